"""The command line: one frozen dataclass and one function a command."""

import sys
from typing import Annotated, Any

import jax
import tyro

from jax_ddpm import __version__
from jax_ddpm.cli.config import (
    ConvertConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    ParityConfig,
    PlanConfig,
    SampleConfig,
    TrainConfig,
    UsageError,
)
from jax_ddpm.cli.interrupts import Interrupts
from jax_ddpm.training.hosts import PartnerFailed

__all__ = ["run"]

_Command = (
    Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[SampleConfig, tyro.conf.subcommand("sample")]
    | Annotated[ConvertConfig, tyro.conf.subcommand("convert")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
    | Annotated[ExportConfig, tyro.conf.subcommand("export")]
    | Annotated[ParityConfig, tyro.conf.subcommand("parity")]
    | Annotated[DoctorConfig, tyro.conf.subcommand("doctor")]
    | Annotated[PlanConfig, tyro.conf.subcommand("plan")]
)


def run(arguments: list[str] | None = None) -> None:
    """Parse the command line and run it. What is wrong with it is one line and exit code 2."""
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"jax_ddpm {__version__}, jax {jax.__version__}")
        return
    config = tyro.cli(
        _Command,
        prog="jax-ddpm",
        description="Train, sample, certify and plan diffusion models (DDPM) in JAX. "
        "--version says which version this is.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    try:
        with Interrupts() as interrupts:
            _run(config, interrupts)
    except (UsageError, PartnerFailed) as error:
        print(f"jax-ddpm: {error}", file=sys.stderr)
        sys.exit(2)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        problem = str(error).partition("\n")[0]
        print(
            "jax-ddpm: another process does not answer: started again in all of them, the same "
            f"command resumes ({problem})",
            file=sys.stderr,
        )
        sys.exit(2)
    except OSError as error:
        print(f"jax-ddpm: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


def _run(config: Any, interrupts: Interrupts) -> None:
    # Each command is imported when it is run: `parity` alone needs torch.
    match config:
        case TrainConfig():
            from jax_ddpm.cli.train import train

            train(config, interrupts)
        case SampleConfig():
            from jax_ddpm.cli.sample import sample

            sample(config)
        case ConvertConfig():
            from jax_ddpm.cli.convert import convert

            convert(config)
        case EvaluateConfig():
            from jax_ddpm.cli.evaluate import evaluate

            evaluate(config)
        case ExportConfig():
            from jax_ddpm.cli.export import export

            export(config)
        case ParityConfig():
            from jax_ddpm.cli.parity import parity

            parity(config)
        case DoctorConfig():
            from jax_ddpm.cli.doctor import doctor

            doctor(config)
        case PlanConfig():
            from jax_ddpm.cli.plan import plan

            plan(config)
