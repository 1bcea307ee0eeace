"""diffusers' config files: read with its defaults, and nothing unknown passed over."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def complete_config(
    content: Mapping[str, Any],
    path: Path,
    defaults: Mapping[str, Mapping[str, Any]],
    ignored: Sequence[str] = (),
) -> dict[str, Any]:
    """The settings in `content`, completed from `defaults` of the class that it names.

    Raises `ValueError` for another class, and for a setting that the class does not have; `path`
    is where it says so.
    """
    kind = content.get("_class_name", next(iter(defaults)))
    if kind not in defaults:
        raise ValueError(f"{path}: expected _class_name {' or '.join(defaults)}, got {kind}")
    settings: dict[str, Any] = dict(defaults[kind])
    for name, value in content.items():
        if name in settings:
            settings[name] = tuple(value) if isinstance(value, list) else value
        # What is unknown and off changes nothing.
        elif not (name.startswith("_") or name in ignored or value is None or value is False):
            raise ValueError(f"{path}: expected only settings of {kind}, got {name}: {value!r}")
    return settings
