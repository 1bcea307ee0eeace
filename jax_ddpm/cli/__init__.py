"""The command line: one frozen dataclass and one function a command."""

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any, Union

import jax
import tyro
from docstring_parser import parse_from_object

from jax_ddpm import __version__
from jax_ddpm.cli import config as configs
from jax_ddpm.cli.config import TrainConfig
from jax_ddpm.cli.terminal import Interrupts, UsageError, naming, warning_lines
from jax_ddpm.runs import RECIPES
from jax_ddpm.training.hosts import PartnerFailed

__all__ = ["run"]

_COMMANDS = {
    name: getattr(configs, f"{name.capitalize()}Config")
    for name in ("train", "sample", "convert", "evaluate", "export", "parity", "doctor", "plan")
}


def run(arguments: list[str] | None = None) -> None:
    """Parse the command line and run it. What is wrong with it is one line and exit code 2."""
    arguments = _with_quoted(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"jax_ddpm {__version__}, jax {jax.__version__}")
        return
    for each in _COMMANDS.values():
        _join_lines(each)
    config, unknown = tyro.cli(
        _command(arguments),
        prog="jax-ddpm",
        description="Train, sample, certify and plan diffusion models (DDPM) in JAX. "
        "--version says which version this is.",
        args=arguments,
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )
    try:
        name = next(name for name, each in _COMMANDS.items() if type(config) is each)
        if unknown:
            raise UsageError(_unknown(name, config, unknown[0].partition("=")[0]))
        # Each command is imported when it is run: `parity` alone needs torch.
        command = getattr(import_module(f"jax_ddpm.cli.{name}"), name)
        with Interrupts() as interrupts, warning_lines(), naming():
            command(config, interrupts) if name == "train" else command(config)
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


def _with_quoted(arguments: list[str]) -> list[str]:
    """The value of --openai-flags joined to it, since tyro takes what begins with -- for a flag."""
    words: list[str] = []
    for word in arguments:
        if words and words[-1] == "--openai-flags":
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _command(arguments: list[str]) -> Any:
    """One of the commands. The defaults of `train` are those of its recipe."""
    words = [part for word in arguments for part in word.split("=", 1)]
    recipe = words[words.index("--recipe") + 1 :][:1] if "--recipe" in words else []
    defaults: dict[str, Any] = {}
    if {*recipe} & RECIPES.keys():
        defaults = {"train": {"default": TrainConfig.of_recipe(*recipe)}}
    commands = [
        Annotated[kind, tyro.conf.subcommand(name, **defaults.get(name, {}))]
        for name, kind in _COMMANDS.items()
    ]
    return Union[tuple(commands)]  # noqa: UP007


def _join_lines(config: Any) -> None:
    """Makes one line of each field's docstring, which tyro breaks where the source does."""
    for group in config.__mro__[:-1]:
        for doc in parse_from_object(group).params:
            words = (doc.description or "").split()
            group.__dataclass_fields__[doc.arg_name].metadata = {"help": " ".join(words)}
    for field in fields(config):
        if is_dataclass(field.type):
            _join_lines(field.type)


def _unknown(name: str, config: Any, word: str) -> str:
    """Says that command `name` has no such flag, and which one is near or has its initials."""
    flags = ["--" + field.replace("_", "-") for field in _fields(config)]
    initials = {"--" + "".join(part[0] for part in flag[2:].split("-")): flag for flag in flags}
    close = [initials[word]] if word in initials else get_close_matches(word, flags, n=1)
    meant = f"did you mean {close[0]}?" if close else f"see jax-ddpm {name} --help"
    return f"{word}: no such flag of {name}; {meant}"


def _fields(config: Any) -> Iterator[str]:
    for field in fields(config):
        value = getattr(config, field.name)
        yield from _fields(value) if is_dataclass(value) else [field.name]
