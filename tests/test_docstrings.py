"""The examples in docstrings run, those of a file one after another, in a folder with a run.

They take these names as given, as the index (jax_ddpm/README.md) says.
"""

import doctest
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_ddpm as ddpm
from jax_ddpm import data, evaluation, interop, runs

PACKAGE = Path(ddpm.__file__).parent
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if " >>> " in path.read_text()]
ROOMS = {"data": data, "evaluation": evaluation, "interop": interop, "runs": runs}
NAMES = {"ddpm": ddpm, "jax": jax, "jnp": jnp, "np": np, "optax": optax, **ROOMS}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_run(path, defaults, untyped, untrained, monkeypatch, tmp_path, request):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(untrained / "runs/digits")
    monkeypatch.chdir(tmp_path)
    if path.parent.name == "parity":
        request.getfixturevalue("torch")
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), extraglobs=NAMES, optionflags=options)
    assert result.attempted and not result.failed
