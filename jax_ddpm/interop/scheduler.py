"""diffusers' scheduler configs: schedule, parametrisation and clipping, in and out.

How the network was trained is read from the config of any scheduler, and how it samples from some,
for `DiffusionModel.sampler()`. Any other sampler can run over `DiffusionModel.chain(steps)`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jax_ddpm._errors import FieldError, check_choice
from jax_ddpm._typing import Clipping
from jax_ddpm.interop.model import SOLVER_CHOICES, DiffusionModel
from jax_ddpm.reverse import DynamicThreshold, PredictionType, StaticThreshold, VarianceType
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
_SOLVERS = ("DPMSolverSinglestep", "DPMSolverMultistep", "DEISMultistep", "UniPCMultistep")
_SOLVERS += ("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete")
_DEFAULTS = {
    **{f"DDPM{kind}Scheduler": _CLIPPING for kind in ("", "Parallel")},
    **{f"DDIM{kind}Scheduler": _CLIPPING | {"set_alpha_to_one": True} for kind in ("", "Parallel")},
    "PNDMScheduler": _COMMON | {"set_alpha_to_one": False},
    **{f"{solver}Scheduler": _COMMON | {"timestep_spacing": "linspace"} for solver in _SOLVERS},
}
_BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": linear_beta_schedule,
    "scaled_linear": scaled_linear_beta_schedule,
    "squaredcos_cap_v2": lambda steps, start, end: cosine_beta_schedule(steps),
    # Not Jabri et al.'s sigmoid of ᾱ, but GeoDiff's of β (Xu et al. 2022).
    "sigmoid": lambda n, start, end: (end - start) / (1 + np.exp(-np.linspace(-6, 6, n))) + start,
}
# Settings of other scheduler classes, which configs often keep.
_IGNORED = (
    *(*SOLVER_CHOICES, "clip_sample", "clip_sample_range", "disable_corrector", "euler_at_final"),
    *("flow_shift", "interpolation_type", "lower_order_final", "predict_x0", "set_alpha_to_one"),
    *("shift_terminal", "sigma_max", "sigma_min", "skip_prk_steps", "solver_p", "tensor_format"),
    *("time_shift_type", "timestep_type"),
)
# Settings that are fields of a `DiffusionModel` too.
_FIELDS = ("prediction_type", "timestep_spacing", "steps_offset")
_CHOICES = {"prediction_type": PredictionType, "variance_type": VarianceType}
_CHOICES |= {"timestep_spacing": Spacing}
_RESPACING = "_timestep_respacing"  # of a run; diffusers passes over such names


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file `path` in the message of an error about its content."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def completed(
    content: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]], ignored: Sequence[str]
) -> dict[str, Any]:
    """The settings in `content`, and `defaults` of its class; unknown ones are refused."""
    kind = content.get("_class_name", next(iter(defaults)))
    if kind not in defaults:
        raise ValueError(f"expected _class_name {' or '.join(defaults)}, got {kind}")
    settings = dict(defaults[kind])
    for name, value in content.items():
        if name in settings:
            settings[name] = tuple(value) if isinstance(value, list) else value
        # An unknown setting that is off changes nothing.
        elif not (name.startswith("_") or name in ignored or value is None or value is False):
            raise ValueError(f"expected only settings of {kind}, got {name}: {value!r}")
    return settings


def scheduler_from_config(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Fields of a `DiffusionModel` from the scheduler config `content`, read from `path`."""
    with naming(path):
        settings = completed(content, _DEFAULTS, _IGNORED)
        if settings["predict_epsilon"] is False:
            settings["prediction_type"] = "sample"
        # "…_log" is the same variance, by way of its logarithm.
        variance_type = settings["variance_type"] or "fixed_small"
        settings["variance_type"] = variance_type.removesuffix("_log")
        for name, kind in _CHOICES.items():
            check_choice(name, settings[name], kind)
        clip: Clipping = bool(settings.get("clip_sample"))
        if settings["thresholding"]:
            quantile, limit = settings["dynamic_thresholding_ratio"], settings["sample_max_value"]
            clip = DynamicThreshold(quantile, limit)
        elif clip and settings["clip_sample_range"] != 1:
            clip = StaticThreshold(settings["clip_sample_range"])
        betas = settings["trained_betas"]
        if betas is None:
            check_choice("beta_schedule", settings["beta_schedule"], tuple(_BETAS))
            names = ("num_train_timesteps", "beta_start", "beta_end")
            betas = _BETAS[settings["beta_schedule"]](*(settings[name] for name in names))
        if settings["rescale_betas_zero_snr"]:
            betas = rescale_zero_terminal_snr(betas)
        schedule = make_schedule(betas)
    kind = content.get("_class_name", "DDPMScheduler")
    solver = {name: content.get(name, known[0]) for name, known in SOLVER_CHOICES.items()}
    return {
        **{name: settings[name] for name in (*_FIELDS, "variance_type")},
        "schedule": schedule,
        "clip_denoised": clip,
        "set_alpha_to_one": settings.get("set_alpha_to_one", True),
        "scheduler": kind,
        "solver": solver if kind == "DPMSolverMultistepScheduler" else None,
        "timestep_respacing": content.get(_RESPACING, ""),
    }


def scheduler_config(model: DiffusionModel) -> dict[str, Any]:
    """The config that diffusers reads back as the same. Raises `ValueError` if there is none."""
    schedule, clip = model.schedule, model.clip_denoised
    if not np.array_equal(schedule.timesteps, np.arange(schedule.num_timesteps)):
        raise FieldError("schedule", "expected the one of training, got a respaced one")
    betas = np.asarray(schedule.betas)
    start, end, steps = float(betas[0]), float(betas[-1]), betas.size
    cosine = np.array_equal(betas, cosine_beta_schedule(steps))
    named = cosine or np.array_equal(betas, linear_beta_schedule(steps, start, end))
    config: dict[str, Any] = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "squaredcos_cap_v2" if cosine else "linear",
        "trained_betas": None if named else betas.tolist(),
        **{name: getattr(model, name) for name in _FIELDS},
        "rescale_betas_zero_snr": False,
        "clip_sample": isinstance(clip, StaticThreshold) or clip is True,
        "thresholding": isinstance(clip, DynamicThreshold),
    }
    if isinstance(clip, StaticThreshold):
        config["clip_sample_range"] = clip.limit
    elif isinstance(clip, DynamicThreshold):
        config |= {"dynamic_thresholding_ratio": clip.quantile, "sample_max_value": clip.max_value}
    elif not isinstance(clip, bool):
        expected = "expected True, False, static_threshold(…) or dynamic_threshold(…)"
        raise FieldError("clip_denoised", f"{expected}, got {clip!r}")
    if model.timestep_respacing:
        config[_RESPACING] = model.timestep_respacing
    if model.set_alpha_to_one:
        return {**config, "variance_type": model.variance_type}
    if model.variance_type != "fixed_small":
        only = "'fixed_small' where set_alpha_to_one is False (only DDIMScheduler has that)"
        raise FieldError("variance_type", f"expected {only}, got {model.variance_type!r}")
    return {**config, "_class_name": "DDIMScheduler", "set_alpha_to_one": False}
