"""The settings of a training; the docstring of a field is also the help of its flag."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from operator import index
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np

from jax_ddpm import schedule as schedules
from jax_ddpm._errors import Field, FieldError, check_choice, check_kind, described
from jax_ddpm.losses import LossType, Weighting
from jax_ddpm.models import UNet
from jax_ddpm.reverse import PredictionType, VarianceType

LOG_EVERY = 50
"""Steps between two lines of metrics, in a run of a thousand steps or more."""
TrackerName = Literal["tensorboard", "wandb"]
ScheduleName = Literal["linear", "scaled_linear", "cosine", "sigmoid"]
# Numbers by their range. NaN is in none.
Finite = Annotated[float, "a finite number", math.isfinite]
NotNegative = Annotated[float, "a finite number of 0 or more", lambda x: 0 <= x < math.inf]
Positive = Annotated[float, "a finite number above 0", lambda x: 0 < x < math.inf]
Share = Annotated[float, "a number from 0 to 1", lambda x: 0 <= x <= 1]
Decay = Annotated[float, "a number from 0 to 1, below 1", lambda x: 0 <= x < 1]
Count = Annotated[int, "a whole number of 1 or more", lambda n: n >= 1]
Whole = Annotated[int, "a whole number of 0 or more", lambda n: n >= 0]
Seed = Annotated[int, "a whole number from 0, below 2**63", lambda n: 0 <= n < 2**63]
# Settings that `init` brings with it.
_BROUGHT = ("model", "unet", "schedule", "timesteps", "prediction_type", "variance_type")
# What follows from the images, and what is set for the whole run.
_NOT_CHOSEN = ("parent", "name", "sample_size", "in_channels", "out_channels", "num_class_embeds")
_NOT_CHOSEN += ("dtype", "param_dtype", "remat")
UNET_FIELDS = tuple(each.name for each in fields(UNet) if each.name not in _NOT_CHOSEN)
"""The fields of `UNet` that are a choice. Its channels and labels follow from the images."""


def named_schedule(name: ScheduleName, timesteps: int) -> schedules.NoiseSchedule:
    """The schedule of `linear_beta_schedule` and the others of this form, with its defaults."""
    return schedules.make_schedule(getattr(schedules, f"{name}_beta_schedule")(timesteps))


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The network and what it learns."""

    model: Literal["unet", "simple"] = "unet"
    """The U-Net, which knows labels, or the tutorial's four convolutions, which do not."""
    init: Path | None = None
    """Start from a run, one of its checkpoints or a folder of diffusers. It brings its network,
    weights, schedule and prediction type. Classes are matched by name where both sides have names,
    else by number; new classes start untrained. Without a free null label there is no guidance."""
    timesteps: Annotated[int, "a whole number of 2 or more", lambda n: n >= 2] = 200
    """T, the number of steps of the forward process."""
    schedule: ScheduleName = "cosine"
    """The noise schedule."""
    prediction_type: PredictionType = "epsilon"
    """The network's prediction: the noise, the image, or the velocity."""
    variance_type: VarianceType = "fixed_small"
    """The variance of a reverse step: the posterior's, β, or one that the network learns."""
    loss_type: LossType | None = None
    """The squared error, the variational bound, or both. Default: the squared error, or both with
    a learned variance."""
    weighting: Weighting | None = None
    """Weigh the squared error by min(SNR, γ) (Hang et al. 2023). Default: no weights."""
    min_snr_gamma: Positive = 5.0
    """γ of the min-SNR weighting."""
    guidance: Finite | None = None
    """Guidance scale of samples. Default: 2, or 1 (none) if labels never or always drop out."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer, its steps and its batches."""

    steps: Count = 1500
    """The number of training steps."""
    batch_size: Count | None = None
    """Images per step. Default: 64, or the largest power of two up to the number of images."""
    learning_rate: Positive = 2e-3
    """The highest learning rate."""
    learning_rate_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """After the warm-up, the rate stays constant, or falls to 0 at the last step."""
    warmup_steps: Whole | None = None
    """Steps over which the rate rises from 0. Default: a tenth of all, at most 100."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """AdamW also has a weight decay."""
    adam_b1: Decay = 0.9
    """Decay of Adam's average of the gradients."""
    adam_b2: Decay = 0.999
    """Decay of Adam's average of the squared gradients."""
    adam_eps: Positive = 1e-8
    """ε, added to the root of the average square."""
    weight_decay: NotNegative = 0.0
    """AdamW's decay: a step subtracts this share of each weight, times the learning rate."""
    grad_clip: NotNegative = 1.0
    """Largest global norm of the gradient, which is scaled down to it; 0: no limit."""
    label_dropout: Share = 0.1
    """Share of labels replaced by the null label, which classifier-free guidance needs."""
    ema_decay: Decay = 0.999
    """Decay of the average of the weights; samples are drawn from the average."""
    ema_warmup: bool = True
    """Smaller decay over the first steps: min(decay, (1 + step) / (10 + step))."""
    on_nan: Literal["stop", "skip"] = "stop"
    """On a loss or gradient that is not finite, end the training, or drop the step and count it."""
    seed: Seed = 0
    """Decides the initial weights, the order of the data, the noise and the samples."""

    def batched(self, images: int = 64) -> int:
        """`batch_size` of a training on `images` images."""
        return self.batch_size or 2 ** (min(images, 64).bit_length() - 1)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Checkpoints, metrics and samples of a training."""

    checkpoint_every: Count = 100
    """Steps between two checkpoints, each with all that is needed to resume; one is at the end."""
    keep: Count = 3
    """The number of checkpoints that are kept, the newest."""
    keep_every: Count | None = None
    """Also keep the checkpoints at multiples of this step, a multiple of `checkpoint_every`."""
    log_every: Count | None = None
    """Steps between two lines of metrics. Default: 50, or fewer so that there are twenty lines."""
    sample_every: Whole | None = None
    """Steps between two pictures of samples; 0: none. Default: a twentieth of all, at least 500."""
    evaluate_every: Whole | None = None
    """Steps between two evaluations, as by `jax-ddpm evaluate`. Default: none."""
    evaluate_num: Count = 1000
    """Samples per evaluation, each drawn in 50 steps of DDIM."""
    inception: Path | None = None
    """The file of Inception's weights, as for `jax-ddpm evaluate`. Default: the environment's
    JAX_DDPM_INCEPTION, or else features of a small classifier, which give no FID."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest distance of samples from images, as evaluated."""
    tracker: tuple[TrackerName, ...] = ()
    """Also send metrics and samples to TensorBoard's files in the run, or Weights & Biases."""

    def logged(self, steps: int) -> int:
        """`log_every` of a training of `steps` steps. By default multiples of 50 get a line."""
        fitting = [n for n in (LOG_EVERY, 25, 10, 5, 2) if 20 * n <= steps]
        return self.log_every or max(fitting, default=1)

    def sampled(self, steps: int) -> int:
        """`sample_every` of a training of `steps` steps; 0: never."""
        return max(500, steps // 20) if self.sample_every is None else self.sample_every


@dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    """Precision, memory and devices."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of network and gradients; weights, their average and Adam stay float32."""
    accumulate: Count = 1
    """Split each batch into this many parts, computed one after the other, to save memory."""
    remat: bool = False
    """Recompute the activations of the U-Net's blocks for the gradient, to save memory."""
    fsdp: Count = 1
    """Split weights and optimizer state over this many devices, a divisor of those in use."""
    steps_per_dispatch: Count | None = None
    """Training steps per dispatch to the devices. Default: 10, on a CPU 1."""

    def dispatched(self, backend: str | None = None) -> int:
        """`steps_per_dispatch`, or what suits the backend. Default: JAX's own."""
        # A CPU's step takes a hundred times as long as a dispatch, and a signal waits for its end.
        return self.steps_per_dispatch or (1 if (backend or jax.default_backend()) == "cpu" else 10)


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings, OptimizerSettings, CheckpointSettings, LayoutSettings):
    """All settings of a training: the options of `jax-ddpm train`, whose help describes each.

    Raises:
      FieldError: a value is out of range, or does not go with another setting.

    Examples:
      >>> settings = runs.Settings(steps=500, unet={"block_out_channels": (32, 64)})
      >>> settings.batched(1797), settings.logged(500)  # images per step; steps per line of metrics
      (64, 25)
      >>> from dataclasses import replace
      >>> replace(runs.RECIPES["cifar10"].settings, steps=1000).timesteps
      1000
    """

    unet: Mapping[str, Any] | None = None
    """Fields of the U-Net, by name. The others are those of a small network: attention at the
    lowest level, and one more level for each doubling of the images from 32 pixels on."""

    def __post_init__(self) -> None:
        values: Any = dict(vars(self))
        for name, hint in _KINDS.items():
            value, kinds = values[name], get_args(hint)
            kind: Any = kinds[0] if type(None) in kinds else hint
            if value is None and kind is not hint:
                continue
            if get_origin(kind) is Literal:
                check_choice(name, value, get_args(kind))
            elif get_origin(kind) is Annotated:
                number, expected, holds = get_args(kind)
                if not isinstance(value, bool | np.bool_ | str | bytes):
                    with suppress(TypeError, ValueError):  # NumPy's numbers and JAX's too
                        convert: Any = index if number is int else float
                        values[name] = convert(value)
                if type(values[name]) is not number or not holds(values[name]):
                    raise FieldError(name, f"expected {expected}, got {described(value)}")
            elif kind is bool:
                check_kind(name, value, bool, "True")
            elif kind is Path:
                values[name] = Path(values[name])
        several = isinstance(self.tracker, list | tuple)
        values["tracker"] = tuple(self.tracker) if several else (self.tracker,)
        if self.unet is not None:
            check_kind("unet", self.unet, Mapping, "{'dropout': 0.1}")
            # With lists for tuples, as JSON gives them back.
            values["unet"] = json.loads(json.dumps(dict(self.unet), default=str))
        for name, choices in (("tracker", get_args(TrackerName)), ("unet", UNET_FIELDS)):
            for each in values[name] or ():
                check_choice(name, each, choices)
        for name, value in values.items():
            object.__setattr__(self, name, value)

        pairs = [("keep_best", Field("evaluate_every"), self.evaluate_every)]
        pairs += [("weight_decay", Field("optimizer", "adamw"), self.optimizer == "adamw")]
        pairs += [("unet", Field("model", "unet"), self.model == "unet")]
        pairs += [("min_snr_gamma", Field("weighting", "min_snr"), self.weighting == "min_snr")]
        for name, other, fits in pairs:
            if values[name] != getattr(Settings, name) and not fits:
                raise FieldError(name, "needs ", other)
        for name in _BROUGHT if self.init is not None else ():
            if values[name] != getattr(Settings, name):
                raise FieldError(name, "cannot be given with ", Field("init"), ", which brings it")
        every, batch, steps = self.checkpoint_every, self.batched(), self.steps
        warm = self.learning_rate_schedule == "constant" or (self.warmup_steps or 0) < steps
        kept, shared = not (self.keep_every or 0) % every, not batch % self.accumulate
        for name, fits, expected, limit in (
            ("keep_every", kept, "a multiple of ", Field("checkpoint_every", every)),
            ("accumulate", shared, "a divisor of ", Field("batch_size", batch)),
            ("warmup_steps", warm, "fewer than ", Field("steps", steps)),
        ):
            if not fits:
                raise FieldError(name, f"expected {expected}", limit, f", got {values[name]}")

    def record(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return json.loads(json.dumps(asdict(self), default=str))  # a path as its name


_KINDS = get_type_hints(Settings, include_extras=True)
