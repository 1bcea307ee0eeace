"""diffusers' scheduler configs: schedule, parametrisation and clipping, in and out.

How the network was trained is read from the config of any scheduler, and how it samples from some,
for `DiffusionModel.sampler()`. Any other sampler can run over `DiffusionModel.chain(steps)`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jax_ddpm._errors import check_choice
from jax_ddpm._typing import ThresholdFn
from jax_ddpm.interop.model import DiffusionModel
from jax_ddpm.reverse import (
    DynamicThreshold,
    PredictionType,
    StaticThreshold,
    VarianceType,
    dynamic_threshold,
    static_threshold,
)
from jax_ddpm.schedule import (
    Spacing,
    cosine_beta_schedule,
    linear_beta_schedule,
    make_schedule,
    rescale_zero_terminal_snr,
    scaled_linear_beta_schedule,
)

_COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "predict_epsilon": None,  # of 2022; False is today's prediction_type "sample"
}
_CLIPPING = {**_COMMON, "clip_sample": True, "clip_sample_range": 1.0}
_DDIM = {**_CLIPPING, "set_alpha_to_one": True}
_SOLVERS = (
    *("DPMSolverSinglestep", "DPMSolverMultistep", "DEISMultistep", "UniPCMultistep"),
    *("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete"),
)
_SOLVER = {**_COMMON, "timestep_spacing": "linspace"}  # which never clips
# Each class's defaults.
_DEFAULTS = {
    "DDPMScheduler": _CLIPPING,
    "DDIMScheduler": _DDIM,
    "DDPMParallelScheduler": _CLIPPING,
    "DDIMParallelScheduler": _DDIM,
    "PNDMScheduler": {**_COMMON, "set_alpha_to_one": False},
    **{f"{solver}Scheduler": _SOLVER for solver in _SOLVERS},
}

# How other classes sample, or what this one does not have: configs keep such leftovers.
_IGNORED = (
    *("algorithm_type", "clip_sample", "clip_sample_range", "disable_corrector", "euler_at_final"),
    *("final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped"),
    *("lower_order_final", "predict_x0", "set_alpha_to_one", "shift_terminal", "sigma_max"),
    *("sigma_min", "skip_prk_steps", "solver_order", "solver_p", "solver_type"),
    *("time_shift_type", "timestep_type"),
    "tensor_format",  # of 2022: which framework the scheduler computed in
)
_RESPACING = "_timestep_respacing"  # of a run; diffusers passes over such names
# How `DPMSolverMultistepScheduler` samples.
_MULTISTEP: dict[str, Any] = {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -np.inf,
}
_CHOICES = {
    "prediction_type": PredictionType,
    "variance_type": VarianceType,
    "timestep_spacing": Spacing,
}


def complete_config(
    content: Mapping[str, Any],
    path: Path,
    defaults: Mapping[str, Mapping[str, Any]],
    ignored: Sequence[str] = (),
) -> dict[str, Any]:
    """The settings in `content`, completed from `defaults` of its class.

    Raises `ValueError` naming `path`, for another class and for a setting that the class lacks.
    """
    kind = content.get("_class_name", next(iter(defaults)))
    if kind not in defaults:
        raise ValueError(f"{path}: expected _class_name {' or '.join(defaults)}, got {kind}")
    settings: dict[str, Any] = dict(defaults[kind])
    for name, value in content.items():
        if name in settings:
            settings[name] = tuple(value) if isinstance(value, list) else value
        # An unknown setting that is off changes nothing.
        elif not (name.startswith("_") or name in ignored or value is None or value is False):
            raise ValueError(f"{path}: expected only settings of {kind}, got {name}: {value!r}")
    return settings


def scheduler_from_config(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Fields of a `DiffusionModel` from the scheduler config `content`, read from `path`.

    Raises `ValueError` for what is not supported.
    """
    settings = complete_config(content, path, _DEFAULTS, _IGNORED)
    kind = content.get("_class_name", "DDPMScheduler")
    is_sample = settings["predict_epsilon"] is False
    # "…_log" is the same variance, by way of its logarithm.
    variance_type = (settings["variance_type"] or "fixed_small").removesuffix("_log")
    fields = {
        "prediction_type": "sample" if is_sample else settings["prediction_type"],
        "variance_type": variance_type,
        "timestep_spacing": settings["timestep_spacing"],
    }
    try:
        for name, choices in _CHOICES.items():
            check_choice(name, fields[name], get_args(choices))
        fields |= {"schedule": make_schedule(_betas(settings)), "clip_denoised": _clip(settings)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if kind == "DPMSolverMultistepScheduler":
        fields["solver"] = {name: content.get(name, _MULTISTEP[name]) for name in _MULTISTEP}
    return fields | {
        "steps_offset": settings["steps_offset"],
        "set_alpha_to_one": settings.get("set_alpha_to_one", True),
        "scheduler": kind,
        "timestep_respacing": content.get(_RESPACING, ""),
    }


def scheduler_config(model: DiffusionModel) -> dict[str, Any]:
    """The config that diffusers reads back as the same. Raises `ValueError` if there is none."""
    schedule, clip = model.schedule, model.clip_denoised
    if not np.array_equal(schedule.timesteps, np.arange(schedule.num_timesteps)):
        raise ValueError("schedule: expected the one of training, got a respaced one")
    betas = np.asarray(schedule.betas)
    start, end, steps = float(betas[0]), float(betas[-1]), betas.size
    name, trained = "linear", None
    if np.array_equal(betas, cosine_beta_schedule(steps)):
        name = "squaredcos_cap_v2"
    elif not np.array_equal(betas, linear_beta_schedule(steps, start, end)):
        trained = betas.tolist()
    config: dict[str, Any] = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": name,
        "trained_betas": trained,
        "prediction_type": model.prediction_type,
        "timestep_spacing": model.timestep_spacing,
        "steps_offset": model.steps_offset,
        "rescale_betas_zero_snr": False,
        "clip_sample": isinstance(clip, StaticThreshold) or clip is True,
        "thresholding": isinstance(clip, DynamicThreshold),
    }
    if isinstance(clip, StaticThreshold):
        config["clip_sample_range"] = clip.limit
    elif isinstance(clip, DynamicThreshold):
        config["dynamic_thresholding_ratio"] = clip.quantile
        config["sample_max_value"] = clip.max_value
    elif not isinstance(clip, bool):
        expected = "expected True, False, static_threshold(…) or dynamic_threshold(…)"
        raise ValueError(f"clip_denoised: {expected}, got {clip!r}")
    if model.timestep_respacing:
        config[_RESPACING] = model.timestep_respacing
    if model.set_alpha_to_one:
        return {**config, "variance_type": model.variance_type}
    if model.variance_type != "fixed_small":
        raise ValueError(
            "variance_type: expected 'fixed_small' where set_alpha_to_one is False (only "
            f"DDIMScheduler has that), got {model.variance_type!r}"
        )
    return {**config, "_class_name": "DDIMScheduler", "set_alpha_to_one": False}


def _betas(settings: dict[str, Any]) -> np.ndarray:
    steps = settings["num_train_timesteps"]
    start, end = settings["beta_start"], settings["beta_end"]
    name = settings["beta_schedule"]
    if settings["trained_betas"] is not None:
        betas = np.asarray(settings["trained_betas"], np.float64)
    elif name == "linear":
        betas = linear_beta_schedule(steps, start, end)
    elif name == "scaled_linear":
        betas = scaled_linear_beta_schedule(steps, start, end)
    elif name == "squaredcos_cap_v2":
        betas = cosine_beta_schedule(steps)
    elif name == "sigmoid":
        # Not Jabri et al.'s sigmoid of ᾱ, but GeoDiff's of β (Xu et al. 2022).
        betas = (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + start
    else:
        known = "'linear', 'scaled_linear', 'squaredcos_cap_v2' or 'sigmoid'"
        raise ValueError(f"beta_schedule: expected {known}, got {name!r}")
    return rescale_zero_terminal_snr(betas) if settings["rescale_betas_zero_snr"] else betas


def _clip(settings: dict[str, Any]) -> bool | ThresholdFn:
    if settings["thresholding"]:
        quantile, limit = settings["dynamic_thresholding_ratio"], settings["sample_max_value"]
        return dynamic_threshold(quantile, limit)
    clips = bool(settings.get("clip_sample"))
    if clips and settings["clip_sample_range"] != 1:
        return static_threshold(settings["clip_sample_range"])
    return clips
