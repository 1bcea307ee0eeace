"""The command line: one frozen dataclass and one function a command."""

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any, Union

import jax
import tyro

from jax_ddpm import __version__
from jax_ddpm.cli import config as configs
from jax_ddpm.cli.errors import UsageError, naming
from jax_ddpm.cli.interrupts import Interrupts
from jax_ddpm.training.hosts import PartnerFailed

__all__ = ["run"]

_COMMANDS = {
    name: getattr(configs, f"{name.capitalize()}Config")
    for name in ("train", "sample", "convert", "evaluate", "export", "parity", "doctor", "plan")
}
_Command: Any = Union[  # noqa: UP007
    tuple(Annotated[each, tyro.conf.subcommand(name)] for name, each in _COMMANDS.items())
]


def run(arguments: list[str] | None = None) -> None:
    """Parse the command line and run it. What is wrong with it is one line and exit code 2."""
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"jax_ddpm {__version__}, jax {jax.__version__}")
        return
    config, unknown = tyro.cli(
        _Command,
        prog="jax-ddpm",
        description="Train, sample, certify and plan diffusion models (DDPM) in JAX. "
        "--version says which version this is.",
        args=arguments,
        return_unknown_args=True,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.DisallowNone,
        ),
    )
    try:
        if unknown:
            raise UsageError(_unknown(config, unknown[0].partition("=")[0]))
        with Interrupts() as interrupts, naming():
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
    name = _name(config)
    command = getattr(import_module(f"jax_ddpm.cli.{name}"), name)
    command(config, interrupts) if name == "train" else command(config)


def _name(config: Any) -> str:
    return next(name for name, each in _COMMANDS.items() if type(config) is each)


def _unknown(config: Any, word: str) -> str:
    """What is wrong with a word that is no flag of the command: the nearest that is, or its
    initials."""
    flags = ["--" + name.replace("_", "-") for name in _fields(config)]
    initials = {"--" + "".join(part[0] for part in flag[2:].split("-")): flag for flag in flags}
    close = [initials[word]] if word in initials else get_close_matches(word, flags, n=1)
    meant = f"did you mean {close[0]}?" if close else f"see jax-ddpm {_name(config)} --help"
    return f"{word}: no such flag of {_name(config)}; {meant}"


def _fields(config: Any) -> Iterator[str]:
    for field in fields(config):
        value = getattr(config, field.name)
        yield from _fields(value) if is_dataclass(value) else [field.name]
