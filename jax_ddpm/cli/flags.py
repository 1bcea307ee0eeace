"""From words to the settings of a command: tyro's flags, and its errors as one line."""

import io
import re
from ast import literal_eval
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from itertools import takewhile
from textwrap import dedent
from typing import Annotated, Any

import tyro
from docstring_parser import parse_from_object

from jax_ddpm._errors import suggestion
from jax_ddpm.cli import config as configs
from jax_ddpm.cli.errors import UsageError
from jax_ddpm.runs import RECIPES
from jax_ddpm.runs.settings import UNET_FIELDS

_OF_RUNS = ("sample", "evaluate", "export", "doctor")
"""The commands whose first word may be a run: `jax-ddpm sample runs/digits`."""


def parse(name: str, arguments: list[str]) -> Any:
    """The settings of a command. Raises `UsageError` where tyro would draw a box."""
    kind = getattr(configs, f"{name.capitalize()}Config")
    if name in _OF_RUNS and arguments and not arguments[0].startswith("-"):
        arguments = ["--run", *arguments]
    # tyro takes what begins with -- for a flag.
    joined = re.sub(r"(?<=\0--openai-flags)\0", "=", "\0".join(["", *arguments]))
    arguments = joined.split("\0")[1:]
    recipe = re.search(r"\0--recipe[\0=]([^\0]*)", joined)
    default: dict[str, Any] = {}
    if name in ("train", "plan") and recipe and recipe[1] in RECIPES:
        default = {"default": kind.of_recipe(recipe[1])}
    _describe(kind)
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            config, unknown = tyro.cli(
                kind,
                prog=f"jax-ddpm {name}",
                args=arguments,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
                **default,
            )
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise UsageError(_unboxed(box.getvalue())) from None
    if unknown:
        word, known = unknown[0].partition("=")[0], [*_flags(config)]
        initials = {"--" + "".join(part[0] for part in flag[2:].split("-")): flag for flag in known}
        hint = suggestion(initials.get(word, word), known) or f"; see jax-ddpm {name} --help"
        raise UsageError(f"{word}: not an option of {name}{hint}")
    return config


def _unboxed(box: str) -> str:
    """The first paragraph of an error of tyro's, in our words for a wrong choice."""
    plain = re.sub(r"\x1b\[[\d;]*m|│", "", box)
    _, paragraph, *_ = re.split(r".*[─-]{3}.*\n", plain)
    lines = [*takewhile(str.strip, dedent(paragraph).splitlines())]
    text = " ".join(line.strip() for line in lines)
    if text.startswith("Missing from"):
        missing = re.findall(r"^ {4}(\S.*\S)", "\n".join(lines), re.M)
        return f"expected also {', '.join(missing)}"
    if wrong := re.fullmatch(r"Missing value for argument '(.*?)'.*", text):
        return f"{wrong[1]}: expected a value"
    if wrong := re.fullmatch(r"Error parsing (--\S+): .*\b(int|float)\b.*'(.*)'.*", text, re.I):
        number = "a whole number" if wrong[2].lower() == "int" else "a number"
        return f"{wrong[1]}: expected {number}, got {wrong[3]}"
    if wrong := re.fullmatch(r"Error parsing images: (\w+)(: .*)", text):  # of `Preparation`
        return f"--{wrong[1].replace('_', '-')}{wrong[2]}"
    choice = r"invalid choice '(.*)' for argument '(.*)'\. Expected one of (.*)\."
    if (wrong := re.fullmatch(choice, text)) is None:
        return text.removeprefix("Error parsing ")
    value, flag, choices = wrong.groups()
    known = [each for each in sorted(literal_eval(choices)) if each != "None"]
    return f"{flag}: expected {', '.join(known)}, got {value}{suggestion(value, known)}"


def _flags(config: Any) -> Iterator[str]:
    if isinstance(config, configs.UNetConfig):
        yield from ("--unet-config", *(f"--unet.{name.replace('_', '-')}" for name in UNET_FIELDS))
        return
    for field in fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        yield from _flags(value) if is_dataclass(value) else [f"--{name}"]


def _describe(config: Any) -> None:
    """Gives tyro the docstring of each field in one line, only defaults that are values, and a
    switch to both sides only where it is on by default."""

    def hint(default: str) -> str:
        return "" if default in ("None", "False", "") else f"(default: {default})"

    for group in config.__mro__[:-1]:
        for doc in parse_from_object(group).params:
            name, words = doc.arg_name, " ".join((doc.description or "").split())
            marks: list[Any] = [tyro.conf.arg(help=words, help_behavior_hint=hint)]
            if getattr(group, name, None) is not True:
                marks.append(tyro.conf.FlagCreatePairsOff)
            group.__annotations__[name] = Annotated[group.__annotations__[name], *marks]
    for field in fields(config):
        if is_dataclass(field.type):
            _describe(field.type)
