"""The examples in docstrings run."""

import doctest
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

PACKAGE = Path(ddpm.__file__).parent
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if "\n    >>> " in path.read_text()]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_run(path, defaults, untyped, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    names = {"ddpm": ddpm, "jax": jax, "jnp": jnp, "np": np}
    result = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert result.attempted and not result.failed
