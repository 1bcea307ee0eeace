"""JSON files: what is no object is named, and none is left half written."""

import json
from pathlib import Path
from typing import Any

from jax_ddpm.io.files import replace_file


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


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all. Raises `OSError`."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, text.encode(errors="backslashreplace"))  # JSON spells a lone surrogate so
