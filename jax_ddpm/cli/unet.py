"""The fields of `UNet` as flags: `--unet.dropout 0.1`."""

import types
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from docstring_parser import parse_from_object

from jax_ddpm.cli.errors import UsageError
from jax_ddpm.interop.diffusers import unet_from_config
from jax_ddpm.io.files import read_json
from jax_ddpm.models import UNet
from jax_ddpm.runs import unet_fields
from jax_ddpm.runs.settings import UNET_FIELDS

_HELP = {
    name.strip(): param.description or ""
    for param in parse_from_object(UNet).params
    for name in param.arg_name.split(",")
}


def _flag(name: str, kind: Any) -> tuple[str, Any, None]:
    """A field of `UNet`, None where it is not given."""
    if get_origin(kind) in (types.UnionType, None) and len(get_args(kind)) > 1:
        may_be_none = types.NoneType in get_args(kind)
        kind = float if float in get_args(kind) else get_args(kind)[0]
        kind = kind | Literal["none"] if may_be_none and kind is not str else kind
    elif get_args(kind):
        kind = tuple[get_args(kind)[0], ...]  # a sequence
    kind = {Any: str, bool: Literal["True", "False"]}.get(kind, kind)
    help_text = " ".join(_HELP.get(name, "").split())
    flag_name = f"unet.{name.replace('_', '-')}"
    flag = tyro.conf.arg(name=flag_name, help=help_text, help_behavior_hint="")
    return name, Annotated[kind | None, flag], None


_TYPES = {each.name: each.type for each in fields(UNet)}
_CONFIG = Annotated[
    Path | None,
    tyro.conf.arg(
        name="unet-config",
        help="A config.json of diffusers: all of these fields at once.",
        help_behavior_hint="",
    ),
]
UNetConfig: Any = make_dataclass(
    "UNetConfig",
    [("config", _CONFIG, None), *(_flag(name, _TYPES[name]) for name in UNET_FIELDS)],
    frozen=True,
)
UNetConfig.__doc__ = (
    "Fields of the U-Net. Those that are not given are the recipe's, or those of `ddpm_digits`. "
    "The images decide its channels and the number of labels. Where None is a value, write none."
)


def chosen_fields(config: Any, recipe: Any) -> dict[str, Any] | None:
    """Those of flags, else of the config's file, else of the recipe."""
    chosen = dict(recipe or {})
    if config.config is not None:
        try:
            chosen |= unet_fields(unet_from_config(read_json(config.config), config.config))
        except ValueError as error:
            raise UsageError(f"--unet-config: {error}") from None
    for name in UNET_FIELDS:
        if (value := getattr(config, name)) is not None:
            chosen[name] = {"none": None, "True": True, "False": False}.get(str(value), value)
    return chosen or None
