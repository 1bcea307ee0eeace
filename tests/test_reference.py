"""The reference: an index of every public name, and docstrings that name every argument."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import jax_ddpm

PACKAGE = Path(jax_ddpm.__file__).parent
ROWS = re.findall(r"^\| `([\w.]+)` \|", (PACKAGE / "README.md").read_text(), re.M)
ROOMS = [path.parent.name for path in sorted(PACKAGE.glob("*/__init__.py"))]


def test_the_index_has_every_public_name_once(torch):
    """`__all__` of the package and of its rooms decides what is public."""
    names = list(jax_ddpm.__all__)
    for room in ROOMS:
        module = import_module(f"jax_ddpm.{room}")
        names += [
            f"{room}.{name}"
            for name in getattr(module, "__all__", ())
            if name not in jax_ddpm.__all__
        ]
    names.remove("interop")  # the module
    assert sorted(ROWS) == sorted(names)


@pytest.mark.parametrize("row", ROWS)
def test_a_docstring_names_every_argument(row, request):
    room, _, name = row.rpartition(".")
    if room == "parity":
        request.getfixturevalue("torch")
    value = getattr(import_module(f"jax_ddpm.{room}" if room else "jax_ddpm"), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)
    if inspect.isfunction(value):
        text, parameters = inspect.getdoc(value), inspect.signature(value).parameters
        named = "Args:" in text or len(parameters) < 2
        assert named and all(re.search(rf"\b{each}\b", text, re.I) for each in parameters)
