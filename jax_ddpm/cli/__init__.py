"""The command line: a frozen dataclass and a function for each command."""

import sys
from importlib import import_module

import jax

from jax_ddpm import __version__
from jax_ddpm._errors import suggestion
from jax_ddpm._table import table
from jax_ddpm.cli.errors import UsageError, naming, warning_lines
from jax_ddpm.training.hosts import PartnerFailed

COMMANDS = {
    "train": "train a model on images and draw samples from it",
    "sample": "draw samples from a trained run or a checkpoint of diffusers or OpenAI",
    "convert": "turn a run, a folder of diffusers or a PyTorch state dict into another of these",
    "evaluate": "measure a model or samples: FID and its kin, bits per dimension",
    "export": "write the whole sampler as one StableHLO file that runs anywhere",
    "parity": "compare every function with PyTorch and print the errors",
    "doctor": "check this machine, and the files of a run",
    "plan": "compile for a TPU or GPU that is not here: does it fit, and how long does it take?",
}
_table = table("<<", [(f"  {name}", summary) for name, summary in COMMANDS.items()])
_USAGE = f"""usage: jax-ddpm COMMAND [OPTIONS]

Train, sample, evaluate and plan diffusion models (DDPM) in JAX.

commands:
{_table}

jax-ddpm COMMAND --help lists the options of a command; --version prints the version."""


def run(arguments: list[str] | None = None) -> None:
    """Parse the command line and run it. A mistake in it is one line and exit code 2."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if name in ("-h", "--help"):
            print(_USAGE)
        elif name == "--version":
            print(f"jax_ddpm {__version__}, jax {jax.__version__}")
        elif name in COMMANDS:
            _run(name, rest)
        else:
            hint = suggestion(name, [*COMMANDS, "--help", "--version"])
            hint = hint or f"; expected one of {', '.join(COMMANDS)}"
            raise UsageError(f"{name}: no such command{hint}")
        return
    except (UsageError, PartnerFailed) as error:
        problem = str(error)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        again = "started again in all of them, the same command resumes"
        problem = f"another process does not answer: {again} ({str(error).splitlines()[0]})"
    except OSError as error:
        problem = f"{error.filename or 'a file'}: {error.strerror or error}"
    print(f"jax-ddpm: {problem}", file=sys.stderr)
    sys.exit(2)


def _run(name: str, arguments: list[str]) -> None:
    """Run a command. What it needs is imported now: `parity` alone needs torch."""
    from jax_ddpm.cli.flags import parse
    from jax_ddpm.cli.terminal import Interrupts

    config = parse(name, arguments)
    module = {"export": "convert", "parity": "doctor"}.get(name, name)
    command = getattr(import_module(f"jax_ddpm.cli.{module}"), name)
    with Interrupts() as interrupts, warning_lines(), naming():
        command(config, interrupts) if name == "train" else command(config)
