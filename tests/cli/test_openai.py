"""OpenAI's files from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from jax_ddpm.cli import run as jax_ddpm
from jax_ddpm.io.arrays import save_tensors

NETWORK = json.loads((Path(__file__).parents[1] / "interop/openai/unet.json").read_text())["plain"]
FLAGS = " ".join(f"--{name} {value}" for name, value in NETWORK["flags"].items())


@pytest.fixture
def weights(tmp_path, monkeypatch, defaults):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape, np.float32) / max(np.prod(shape[1:]), 1) ** 0.5
        for name, shape in NETWORK["shapes"].items()
    }
    save_tensors("model.safetensors", tensors)


def test_sample_and_convert(weights, capsys):
    few = ["--num", "2", "--steps", "2", "--out"]
    source = ["--pretrained", "model.safetensors", "--openai-flags", FLAGS]
    jax_ddpm(["sample", *source, *few, "ours.png"])
    jax_ddpm(["convert", "model.safetensors", "run", "--to", "run", f"--openai-flags={FLAGS}"])
    jax_ddpm(["sample", "--run", "run", *few, "run.png"])
    assert Path("run.png").read_bytes() == Path("ours.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["sample", "--pretrained", "model.safetensors"],
            "--pretrained: model.safetensors is a file, and no folder of diffusers; one of "
            "OpenAI's comes with --openai-flags",
        ),
        (
            ["sample", "--pretrained", "model.safetensors", "--openai-flags", "--lr 1"],
            "--openai-flags: expected those of the model and of the diffusion, got lr",
        ),
        (
            ["sample", "--pretrained", "no.pt", "--openai-flags", FLAGS],
            "--pretrained: no.pt: expected a file of weights, got none",
        ),
        (
            ["sample", "--run", "run", "--openai-flags", FLAGS],
            "--openai-flags: comes with --pretrained",
        ),
        (
            ["convert", "model.safetensors", "x", "--to", "diffusers", "--openai-flags", FLAGS],
            "--to diffusers: num_attention_heads: expected None (`UNet2DModel` has no such",
        ),
    ],
    ids=["no flags", "another flag", "no file", "a run", "no words"],
)
def test_bad_input_is_one_line(weights, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        jax_ddpm(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("jax-ddpm: ") and words in said and "\n" not in said
