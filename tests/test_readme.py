"""Every Python block of the README runs, in order, in one namespace."""

from pathlib import Path

import jax
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from jax_ddpm.parity.unet import CONFIGS, reference_unet

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = list(Sybil(parsers=[PythonCodeBlockParser()]).parse(README).examples())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader works, with the checkpoint that the README opens, of few channels."""
    folder = tmp_path_factory.mktemp("readme")
    network = reference_unet({**CONFIGS["Ho et al.'s"], "sample_size": 32}, "float32")
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder / "ddpm-cifar10-32")
    return folder


# Readers run with JAX's defaults.
@pytest.fixture(autouse=True)
def defaults(folder, monkeypatch):
    monkeypatch.chdir(folder)

    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        yield


def test_there_are_examples():
    assert len(EXAMPLES) >= 9


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"line {example.line}")
def test_example(example):
    example.evaluate()
