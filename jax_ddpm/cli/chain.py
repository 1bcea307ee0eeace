"""A model and how its chain is run: what `sample` and `export` have in common."""

from jax_ddpm.cli.config import ChainConfig
from jax_ddpm.cli.errors import UsageError, naming
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.runs import load_model, load_run
from jax_ddpm.runs.drawing import with_guidance
from jax_ddpm.runs.model import is_run
from jax_ddpm.samplers import Sampler, ancestral, ddim, dpm_solver_pp, heun

SAMPLERS = {"ancestral": ancestral, "ddim": ddim, "dpm_solver_pp": dpm_solver_pp, "heun": heun}
_OPTIONS = {"eta": "ddim", "order": "dpm_solver_pp", "stochastic": "dpm_solver_pp"}


def make_sampler(config: ChainConfig) -> Sampler:
    """The rule of `--sampler`, with its options. Raises `UsageError` for those of another rule."""
    options = {}
    for name, owner in _OPTIONS.items():
        value = getattr(config, name)
        if value is None or value is False:
            continue
        if owner != config.sampler:
            raise UsageError(f"--{name}: comes with --sampler {owner}")
        options[name] = value
    return SAMPLERS[config.sampler](**options)


def load_chain(config: ChainConfig) -> DiffusionModel:
    """The model under its guidance, with its spacing."""
    if (config.run is None) == (config.pretrained is None):
        raise UsageError("expected --run or --pretrained, and one of them only")
    if config.run is not None:
        if config.openai_flags is not None:
            raise UsageError("--openai-flags: comes with --pretrained")
        with naming(folder="--run"):
            run = load_run(config.run, checkpoint=config.checkpoint)
    else:
        if config.checkpoint is not None:
            raise UsageError("--checkpoint: comes with --run")
        assert config.pretrained is not None
        if is_run(config.pretrained):
            raise UsageError(f"--pretrained: {config.pretrained} is a run, for --run")
        with naming(folder="--pretrained"):
            run = load_model(config.pretrained, openai_flags=config.openai_flags)
    run = with_guidance(run, config.guidance)
    if config.spacing is not None:
        run = run._replace(timestep_spacing=config.spacing)
    return run
