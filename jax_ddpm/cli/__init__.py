"""The command line: one frozen dataclass and one function a command."""

import io
import re
import sys
from ast import literal_eval
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from itertools import takewhile
from textwrap import dedent
from typing import Annotated, Any, Union

import jax
import tyro
from docstring_parser import parse_from_object

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
_OF_RUNS = ("sample", "evaluate", "export", "doctor")
"""The commands whose first word may be a run: `jax-ddpm sample runs/digits`."""


def run(arguments: list[str] | None = None) -> None:
    """Parse the command line and run it. What is wrong with it is one line and exit code 2."""
    arguments = _with_quoted(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        name, config = _parsed(arguments)
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


def _parsed(arguments: list[str]) -> tuple[str, Any]:
    """The command and its settings. Raises `UsageError` where tyro would draw a box."""
    if (word := arguments[0]) not in _COMMANDS and not word.startswith("-"):
        hint = _meant(word, _COMMANDS) or f"expected one of {', '.join(_COMMANDS)}"
        raise UsageError(f"{word}: no such command; {hint}")
    if word in _OF_RUNS and not (arguments[1:2] or ["-"])[0].startswith("-"):
        arguments = [word, "--run", *arguments[1:]]
    for each in _COMMANDS.values():
        _describe(each)
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            config, unknown = tyro.cli(
                _command(arguments),
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
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise UsageError(_unboxed(box.getvalue())) from None
    name = next(name for name, each in _COMMANDS.items() if type(config) is each)
    if unknown:
        word = unknown[0].partition("=")[0]
        flags = [*_flags(config)]
        initials = {"--" + "".join(part[0] for part in flag[2:].split("-")): flag for flag in flags}
        hint = _meant(initials.get(word, word), flags) or f"see jax-ddpm {name} --help"
        raise UsageError(f"{word}: no such flag of {name}; {hint}")
    return name, config


def _unboxed(box: str) -> str:
    """The first paragraph of an error of tyro's, in our words where it is of a choice."""
    plain = re.sub(r"\x1b\[[\d;]*m|│", "", box)
    _, paragraph, *_ = re.split(r".*[─-]{3}.*\n", plain)
    lines = [*takewhile(str.strip, dedent(paragraph).splitlines())]
    text = " ".join(line.strip() for line in lines)
    if text.startswith("Missing from"):
        missing = re.findall(r"^ {4}(\S.*\S)", "\n".join(lines), re.M)
        return f"expected also {', '.join(missing)}"
    choice = r"invalid choice '(.*)' for argument '(.*)'\. Expected one of (.*)\."
    if (wrong := re.fullmatch(choice, text)) is None:
        return text.removeprefix("Error parsing ")
    value, flag, choices = wrong.groups()
    choices = [each for each in sorted(literal_eval(choices)) if each != "None"]
    hint = _meant(value, choices)
    return f"{flag}: expected {', '.join(choices)}, got {value}" + (f"; {hint}" if hint else "")


def _meant(word: str, choices: Iterable[str]) -> str | None:
    """Which of these a word is near to."""
    close = get_close_matches(word, [*choices], n=1)
    return f"did you mean {close[0]}?" if close else None


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


def _describe(config: Any) -> None:
    """Gives tyro the docstring of each field in one line, and defaults that are values."""

    def hint(default: str) -> str:
        return "" if default in ("None", "True", "False", "") else f"(default: {default})"

    for group in config.__mro__[:-1]:
        for doc in parse_from_object(group).params:
            words = " ".join((doc.description or "").split())
            told = tyro.conf.arg(help=words, help_behavior_hint=hint)
            group.__annotations__[doc.arg_name] = Annotated[
                group.__annotations__[doc.arg_name], told
            ]
    for field in fields(config):
        if is_dataclass(field.type):
            _describe(field.type)


def _flags(config: Any) -> Iterator[str]:
    for field in fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        no = "no-" if field.default is True else ""
        yield from _flags(value) if is_dataclass(value) else [f"--{no}{name}"]
