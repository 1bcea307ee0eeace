"""diffusers' config files: read with its defaults, and nothing unknown passed over."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["complete_config", "read_json", "write_json"]


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises `ValueError` naming a file that has none."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSON file, got none")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got a damaged file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


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
        if name.startswith("_") or name in ignored or (name not in settings and value is None):
            continue
        if name not in settings:
            raise ValueError(f"{path}: expected only settings of {kind}, got {name}: {value!r}")
        settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as diffusers would."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
