"""The one type of a model: a network, its weights, and what they were trained to mean."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm._errors import FieldError, check_choice
from jax_ddpm._typing import Clipping
from jax_ddpm.io.arrays import flatten
from jax_ddpm.models import NoisyClassifier, SimpleUNet, UNet
from jax_ddpm.reverse import PredictionType, VarianceType
from jax_ddpm.samplers import Sampler, ancestral, ddim, dpm_solver_pp
from jax_ddpm.schedule import NoiseSchedule, Spacing, respace, spaced_timesteps

Network = UNet | SimpleUNet | NoisyClassifier

SOLVER_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "solver_order": (2, 1),  # diffusers' order 3 has another weight
    "solver_type": ("midpoint",),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (-np.inf,),  # any other value would shorten the chain
}
"""What `dpm_solver_pp` implements of `DPMSolverMultistepScheduler`, diffusers' default first."""


class DiffusionModel(NamedTuple):
    """A network, its weights, and what its output means. `_replace` changes a field.

    Attributes:
      model: the network, with `apply(variables, x_t, t[, labels])`; t as in training.
      variables: for `model.apply`; of a run, the averaged weights unless others were asked for.
      schedule: the chain of training, T entries.
      image_shape: height, width and channels; None for a diffusers config without `sample_size`.
      prediction_type: what the network predicts: "epsilon", "sample" or "v_prediction".
      variance_type: of the reverse steps, as in `p_mean_variance`.
      clip_denoised: whether a predicted x_0 is clipped to [-1, 1], or a function that does so.
      timestep_spacing: of `chain(steps)`, as in `spaced_timesteps`.
      steps_offset: added to every step of `"leading"` spacing, as in diffusers.
      set_alpha_to_one: whether a chain ends at the clean image, ᾱ = 1, or at ᾱ of t = 0.
      scheduler: diffusers' scheduler class, whose update rule is `sampler()`.
      solver: settings of a `DPMSolverMultistepScheduler`; None for other schedulers.
      timestep_respacing: OpenAI's words for the default chain, such as "ddim25"; "" for all steps.
      num_classes: number of class labels, 0 … num_classes - 1; None for a model without classes.
      null_label: label of the unconditional model; None without one. Where a diffusers folder does
        not say whether it has one, the last of the `num_classes` labels.
      guidance: default scale of classifier-free guidance; 1 is the conditional model.
      class_names: the name of each label; None if unknown.
      learned: labels that occurred in training; None means all.
      preparation: of the training images, as arguments of `data.Preparation`.

    Examples:
      >>> model = runs.load_run("runs/digits")
      >>> x_t, labels = jnp.zeros(model.shape(2)), jnp.array([3, 7])
      >>> jax.jit(model.model.apply)(model.variables, x_t, 19, labels).shape
      (2, 8, 8, 1)
      >>> model.sampler().name, model.policy["prediction_type"]
      ('ancestral', 'epsilon')
    """

    model: UNet | SimpleUNet
    variables: Mapping[str, Any]
    schedule: NoiseSchedule
    image_shape: tuple[int, int, int] | None
    prediction_type: PredictionType = "epsilon"
    variance_type: VarianceType = "fixed_small"
    clip_denoised: Clipping = True
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    scheduler: str = "DDPMScheduler"
    solver: Mapping[str, Any] | None = None
    timestep_respacing: str = ""
    num_classes: int | None = None
    null_label: int | None = None
    guidance: float = 1.0
    class_names: tuple[str, ...] | None = None
    learned: tuple[int, ...] | None = None
    preparation: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        sizes = [np.size(leaf) for leaf in jax.tree.leaves(self.variables)]
        return (
            f"DiffusionModel({type(self.model).__name__} of {sum(sizes):,} parameters, "
            f"image_shape={self.image_shape}, num_classes={self.num_classes}, "
            f"null_label={self.null_label}, guidance={self.guidance:g})"
        )

    def shape(self, batch: Any) -> tuple[Any, int, int, int]:
        """Shape of `batch` images, a number or a symbol; `ValueError` without `image_shape`."""
        if self.image_shape is None:
            raise FieldError("image_shape", "expected height, width and channels, got None")
        return (batch, *self.image_shape)

    @property
    def policy(self) -> dict[str, Any]:
        """What the output means, as keywords of `p_sample_loop` and `bits_per_dim`."""
        names = ("prediction_type", "variance_type", "clip_denoised")
        return {name: getattr(self, name) for name in names}

    @property
    def drawn(self) -> tuple[int, ...]:
        """Labels that `runs.draw` draws in turn by default; if empty, it draws the null label."""
        return tuple(range(self.num_classes or 0)) if self.learned is None else self.learned

    def sampler(self) -> Sampler:
        """The update rule of `scheduler`, as diffusers' own pipelines run it over `chain(steps)`.
        Raises `ValueError` naming a scheduler, or a setting of it, that is not implemented here."""
        if self.solver is not None:
            for name, choices in SOLVER_CHOICES.items():
                check_choice(name, self.solver[name], choices)
            stochastic = self.solver["algorithm_type"] == "sde-dpmsolver++"
            return dpm_solver_pp(self.solver["solver_order"], stochastic=stochastic)
        kind = self.scheduler.removesuffix("Scheduler").removesuffix("Parallel")
        check_choice("scheduler", kind, ("DDPM", "DDIM", "DPMSolverMultistep"))
        return ancestral() if kind == "DDPM" else ddim(use_clipped_model_output=False)

    def chain(self, steps: int | str | None = None) -> NoiseSchedule:
        """The chain of `steps` that diffusers would run: its spacing, its offset, its end.

        The offset is left out where it would lead out of the chain (there diffusers fails).

        Args:
          steps: 1 … T, or OpenAI's words, as in `spaced_timesteps`, for a chain that ends at the
            image; `ValueError` for others. None is `timestep_respacing`, or all steps.

        Examples:
          >>> schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
          >>> model = interop.DiffusionModel(ddpm.SimpleUNet(), {}, schedule, (64, 64, 3))
          >>> model.chain(4).timesteps.tolist(), model.chain("ddim2").timesteps.tolist()
          ([0, 250, 500, 750], [0, 500])
        """
        timesteps = self.schedule.num_timesteps
        steps = (self.timestep_respacing or timesteps) if steps is None else steps
        if isinstance(steps, str):
            return respace(self.schedule, spaced_timesteps(timesteps, steps))
        # DPM-Solver spaces one point more, and drops the one at t = 0; of all it would repeat one.
        drops = self.solver is not None and self.timestep_spacing != "trailing"
        extra = int(drops and 1 <= steps < timesteps)
        spaced = spaced_timesteps(timesteps, steps + extra, self.timestep_spacing)[extra:]
        if self.timestep_spacing == "leading" and spaced[-1] + self.steps_offset < timesteps:
            spaced = spaced + self.steps_offset
        final = 1.0 if self.set_alpha_to_one else float(self.schedule.alphas_cumprod[0])
        schedule, alphas = self.schedule, np.array(self.schedule.alphas_cumprod)
        # In place of ᾱ_T = 0 DPM-Solver has 2⁻²⁴, where that is less than the kept ᾱ before it.
        if self.solver is not None and alphas[-1] == 0 and alphas[spaced[-2:]].max() > 2**-24:
            alphas[-1] = 2**-24
            schedule = schedule._replace(alphas_cumprod=alphas)
        return respace(schedule, spaced, final_alpha_cumprod=final)


def init_variables(network: Network, key: Any, image_shape: tuple[int, ...]) -> Any:
    """Initial variables of a network. Raises `ValueError` if the images do not suit it."""
    arguments = [jnp.zeros((1, *image_shape), jnp.float32), jnp.zeros((1,), jnp.int32)]
    if isinstance(network, UNet) and network.num_class_embeds is not None:
        arguments.append(jnp.zeros((1,), jnp.int32))
    return jax.jit(network.init)(key, *arguments)


def parameter_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its path, from a trace of `network.init`."""
    if isinstance(network, SimpleUNet):
        shape = (1, 1, network.channels)
    else:
        least = 2 ** (len(network.block_out_channels) - 1)
        side = network.sample_size if isinstance(network, NoisyClassifier) else least
        shape = (side, side, network.in_channels)
    variables = jax.eval_shape(lambda: init_variables(network, jax.random.key(0), shape))
    return {path: leaf.shape for path, leaf in flatten(variables["params"]).items()}
