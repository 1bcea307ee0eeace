"""Every Python block of the README runs, in order, in one namespace."""

from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = list(Sybil(parsers=[PythonCodeBlockParser()]).parse(README).examples())


# Readers run with JAX's defaults.
@pytest.fixture(autouse=True)
def defaults():
    import jax

    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        yield


def test_there_are_examples():
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"line {example.line}")
def test_example(example):
    example.evaluate()
