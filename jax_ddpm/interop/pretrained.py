"""A trained model, and what its weights were trained to mean."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from jax_ddpm._errors import check_choice
from jax_ddpm._typing import ThresholdFn
from jax_ddpm.models import SimpleUNet, UNet
from jax_ddpm.reverse import PredictionType, VarianceType
from jax_ddpm.samplers import Sampler, ancestral, ddim, dpm_solver_pp
from jax_ddpm.schedule import NoiseSchedule, Spacing, respace, spaced_timesteps


class Pretrained(NamedTuple):
    """A trained model and how it was trained; the fields from `timestep_spacing` on are advice."""

    model: UNet | SimpleUNet
    variables: Mapping[str, Any]
    schedule: NoiseSchedule
    prediction_type: PredictionType = "epsilon"
    variance_type: VarianceType = "fixed_small"
    clip_denoised: bool | ThresholdFn = True
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    scheduler: str = "DDPMScheduler"
    """diffusers' class that its folder names."""
    null_label: int | Literal["none"] | None = None
    """The label that stands for no class; "none" where there is no such label, None where that is
    not known."""
    solver: Mapping[str, Any] | None = None
    """What a config of `DPMSolverMultistepScheduler` says of how it samples."""
    timestep_respacing: str = ""
    """The chain of `chain()`, in OpenAI's words; `""` is the whole one."""

    @property
    def policy(self) -> dict[str, Any]:
        """How an output of the model is read: keywords of `p_sample_loop` and `bits_per_dim`.

        The maths hands the three on by name. A tuple of them would be a second spelling in every
        function that has the keywords.
        """
        return {
            "prediction_type": self.prediction_type,
            "variance_type": self.variance_type,
            "clip_denoised": self.clip_denoised,
        }

    def sampler(self) -> Sampler:
        """The rule of that class, as diffusers' own pipelines run it.

        Raises `ValueError` for a class whose rule is not here, or a setting of it.
        """
        if self.solver is not None:
            return _multistep(self.solver)
        if self.scheduler.startswith("DDPM"):
            return ancestral()
        if self.scheduler.startswith("DDIM"):
            return ddim(use_clipped_model_output=False)
        raise ValueError(
            "scheduler: expected one of DDPM, DDIM or DPMSolverMultistep, whose rules are here, "
            f"got {self.scheduler}"
        )

    def chain(self, steps: int | str | None = None) -> NoiseSchedule:
        """The chain of `steps` that diffusers would run: its spacing, its offset, its end.

        The offset is left out where it would lead out of the chain (there diffusers fails). A
        string is OpenAI's chain, as in `spaced_timesteps`, which ends at the image. None is
        `timestep_respacing`, or all steps.
        """
        timesteps = self.schedule.num_timesteps
        steps = (self.timestep_respacing or timesteps) if steps is None else steps
        if isinstance(steps, str):
            return respace(self.schedule, spaced_timesteps(timesteps, steps))
        last = timesteps - 1
        # DPM-Solver spaces one point more, and drops the one at t = 0; of all it would repeat one.
        drops = self.solver is not None and self.timestep_spacing != "trailing"
        extra = 1 if drops and 1 <= steps < timesteps else 0
        spaced = spaced_timesteps(timesteps, steps + extra, self.timestep_spacing)[extra:]
        if self.timestep_spacing == "leading" and spaced[-1] + self.steps_offset <= last:
            spaced = spaced + self.steps_offset
        final = 1.0 if self.set_alpha_to_one else float(self.schedule.alphas_cumprod[0])
        schedule, alphas = self.schedule, np.array(self.schedule.alphas_cumprod)
        # In place of ᾱ_T = 0 DPM-Solver has 2⁻²⁴, where that is less than the kept ᾱ before it.
        if self.solver is not None and alphas[-1] == 0 and alphas[spaced[-2:]].max() > 2**-24:
            alphas[-1] = 2**-24
            schedule = schedule._replace(alphas_cumprod=alphas)
        return respace(schedule, spaced, final_alpha_cumprod=final)


def _multistep(solver: Mapping[str, Any]) -> Sampler:
    order, algorithm = solver["solver_order"], solver["algorithm_type"]
    check_choice("algorithm_type", algorithm, ("dpmsolver++", "sde-dpmsolver++"))
    check_choice("solver_order", order, (1, 2))  # of order 3 diffusers' own is another
    check_choice("solver_type", solver["solver_type"], ("midpoint",))
    check_choice("final_sigmas_type", solver["final_sigmas_type"], ("zero",))
    if solver["lambda_min_clipped"] != -np.inf:
        raise ValueError(
            f"lambda_min_clipped: expected -inf, got {solver['lambda_min_clipped']}: dpm_solver_pp "
            "over a chain of one's own leaves entries out"
        )
    return dpm_solver_pp(order, stochastic=algorithm.startswith("sde"))
