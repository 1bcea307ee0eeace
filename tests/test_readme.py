"""Every Python block of each page runs, in order, those of a file in one namespace."""

from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from jax_ddpm.cli import run as jax_ddpm

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "jax_ddpm").rglob("*.md"))
EXAMPLES = [
    pytest.param(
        example,
        id=f"{path.relative_to(ROOT)} line {example.line}",
        marks=pytest.mark.slow if path in PAGES else (),
    )
    for path in (ROOT / "README.md", *PAGES)
    for example in Sybil(parsers=[PythonCodeBlockParser()]).parse(path).examples()
]
assert EXAMPLES


# Readers run with JAX's defaults.
@pytest.fixture(scope="module")
def folder(tmp_path_factory, defaults, write_run, small_unet):
    """Where a reader works, with the files that the README opens, of few channels."""
    folder = tmp_path_factory.mktemp("readme")
    run, out = folder / "runs/digits", folder / "digits.jaxexport"
    write_run(run, small_unet, num_classes=10)
    jax_ddpm(["export", "--run", str(run), "--out", str(out), "--steps", "2"])
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder, diffusers):
    from torch_reference.models.diffusers import CONFIGS, reference_unet

    network = reference_unet({**CONFIGS["no attention, no middle"], "sample_size": 32}, "float32")
    pipeline = diffusers.DDPMPipeline(network, diffusers.DDPMScheduler())
    pipeline.save_pretrained(folder / "ddpm-cifar10-32")


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(request, example, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if any(each in example.parsed for each in ("ddpm-cifar10-32", "trained-on")):
        request.getfixturevalue("checkpoint")
    if any(each in example.parsed for each in ("import torch", "parity.compare")):
        request.getfixturevalue("diffusers")
    # Of the README's training, two steps are enough.
    source = str(example.parsed).replace("range(1000)", "range(2)")
    exec(compile(source, example.path, "exec"), example.namespace)
