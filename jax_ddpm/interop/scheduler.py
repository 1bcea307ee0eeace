"""diffusers' scheduler configs: schedule, parametrisation and clipping, in and out.

What says how the network was trained is read, whichever scheduler the config is of, and for
`DiffusionModel.sampler()` how some of them sample. The caller may still choose any sampler:
`p_sample_loop(…, sampler=…)` over `DiffusionModel.chain(steps)`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jax_ddpm._errors import check_choice
from jax_ddpm._typing import ThresholdFn
from jax_ddpm.interop.configs import complete_config
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
_SOLVER = {**_COMMON, "timestep_spacing": "linspace"}  # which never clips
_DEFAULTS = {
    "DDPMScheduler": _CLIPPING,
    "DDIMScheduler": _DDIM,
    "DDPMParallelScheduler": _CLIPPING,
    "DDIMParallelScheduler": _DDIM,
    "PNDMScheduler": {**_COMMON, "set_alpha_to_one": False},
    "DPMSolverSinglestepScheduler": _SOLVER,
    "DPMSolverMultistepScheduler": _SOLVER,
    "DEISMultistepScheduler": _SOLVER,
    "UniPCMultistepScheduler": _SOLVER,
    "EulerDiscreteScheduler": _SOLVER,
    "EulerAncestralDiscreteScheduler": _SOLVER,
    "LMSDiscreteScheduler": _SOLVER,
}
"""What each class takes for a setting that its config leaves out."""

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
_MULTISTEP: dict[str, Any] = {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -np.inf,
}
"""How `DPMSolverMultistepScheduler` samples."""


def default_scheduler() -> dict[str, Any]:
    """That of diffusers' `DDPMScheduler()`: Ho et al.'s schedule and parametrisation."""
    return _scheduler(_DEFAULTS["DDPMScheduler"])


def scheduler_from_config(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Fields of a `DiffusionModel` from the config `content`, read from `path`.

    Raises `ValueError` for what is not supported.
    """
    settings = complete_config(content, path, _DEFAULTS, _IGNORED)
    try:
        kind = content.get("_class_name", "DDPMScheduler")
        fields = {**_scheduler(settings), "scheduler": kind}
        fields["timestep_respacing"] = content.get(_RESPACING, "")
        if kind == "DPMSolverMultistepScheduler":
            fields["solver"] = {name: content.get(name, _MULTISTEP[name]) for name in _MULTISTEP}
        return fields
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def scheduler_config(pretrained: DiffusionModel) -> dict[str, Any]:
    """The config that diffusers reads back as the same. Raises `ValueError` if none says it."""
    schedule = pretrained.schedule
    if not np.array_equal(schedule.timesteps, np.arange(schedule.num_timesteps)):
        raise ValueError("schedule: expected the one of training, got a respaced one")
    config: dict[str, Any] = {
        "_class_name": "DDPMScheduler",
        **_betas_config(np.asarray(schedule.betas)),
        "prediction_type": pretrained.prediction_type,
        "timestep_spacing": pretrained.timestep_spacing,
        "steps_offset": pretrained.steps_offset,
        "rescale_betas_zero_snr": False,
        **_clip_config(pretrained.clip_denoised),
    }
    if pretrained.timestep_respacing:
        config[_RESPACING] = pretrained.timestep_respacing
    if pretrained.set_alpha_to_one:
        return {**config, "variance_type": pretrained.variance_type}
    if pretrained.variance_type != "fixed_small":
        raise ValueError(
            "variance_type: expected 'fixed_small' where set_alpha_to_one is False (only "
            f"DDIMScheduler has that), got {pretrained.variance_type!r}"
        )
    return {**config, "_class_name": "DDIMScheduler", "set_alpha_to_one": False}


def _scheduler(settings: dict[str, Any]) -> dict[str, Any]:
    prediction_type = settings["prediction_type"]
    if settings["predict_epsilon"] is False:
        prediction_type = "sample"
    # "…_log" is the same variance, by way of its logarithm.
    variance_type = (settings["variance_type"] or "fixed_small").removesuffix("_log")
    check_choice("prediction_type", prediction_type, get_args(PredictionType))
    check_choice("variance_type", variance_type, get_args(VarianceType))
    spacing = settings["timestep_spacing"]
    check_choice("timestep_spacing", spacing, get_args(Spacing))
    return dict(
        schedule=make_schedule(_betas(settings)),
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_denoised=_clip(settings),
        timestep_spacing=spacing,
        steps_offset=settings["steps_offset"],
        set_alpha_to_one=settings.get("set_alpha_to_one", True),
    )


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


def _betas_config(betas: np.ndarray) -> dict[str, Any]:
    start, end, steps = float(betas[0]), float(betas[-1]), betas.size
    config = {"num_train_timesteps": steps, "beta_start": start, "beta_end": end}
    if np.array_equal(betas, linear_beta_schedule(steps, start, end)):
        return {**config, "beta_schedule": "linear", "trained_betas": None}
    if np.array_equal(betas, cosine_beta_schedule(steps)):
        return {**config, "beta_schedule": "squaredcos_cap_v2", "trained_betas": None}
    return {**config, "beta_schedule": "linear", "trained_betas": betas.tolist()}


def _clip(settings: dict[str, Any]) -> bool | ThresholdFn:
    if settings["thresholding"]:
        quantile, limit = settings["dynamic_thresholding_ratio"], settings["sample_max_value"]
        return dynamic_threshold(quantile, limit)
    clips = bool(settings.get("clip_sample"))
    if clips and settings["clip_sample_range"] != 1:
        return static_threshold(settings["clip_sample_range"])
    return clips


def _clip_config(clip_denoised: bool | ThresholdFn) -> dict[str, Any]:
    if isinstance(clip_denoised, bool):
        return {"clip_sample": clip_denoised, "thresholding": False}
    if isinstance(clip_denoised, StaticThreshold):
        limit = clip_denoised.limit
        return {"clip_sample": True, "clip_sample_range": limit, "thresholding": False}
    if isinstance(clip_denoised, DynamicThreshold):
        return {
            "clip_sample": False,
            "thresholding": True,
            "dynamic_thresholding_ratio": clip_denoised.quantile,
            "sample_max_value": clip_denoised.max_value,
        }
    raise ValueError(
        "clip_denoised: expected True, False, static_threshold(…) or dynamic_threshold(…), "
        f"got {clip_denoised!r}"
    )
