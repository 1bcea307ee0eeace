"""The command line: a flag that is wrong, or what is missing, is one line and leaves nothing."""

import io
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_ddpm import __version__
from jax_ddpm.__main__ import main
from jax_ddpm.models import SimpleUNet


@pytest.fixture(scope="module")
def here(tmp_path_factory, untrained, write_run, defaults):
    """Files that are wrong, images, and runs: DIGITS has classes, and SIMPLE has none."""
    folder = tmp_path_factory.mktemp("here")
    write_run(folder / "SIMPLE", SimpleUNet(channels=1))
    (folder / "DIGITS").symlink_to(untrained / "runs/digits")
    (folder / "empty").mkdir()
    (folder / "weights.pt").write_bytes(b"PK")
    np.save(folder / "odd.npy", np.zeros((99, 5, 5), np.uint8))
    np.save(folder / "grey.npy", np.zeros((20, 8, 8), np.uint8))
    np.save(folder / "dark.npy", np.full((20, 8, 8), -0.5))
    np.save(folder / "rgb.npy", np.zeros((6, 8, 8, 3), np.uint8))
    return folder


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train --data nowhere", "--data: no such file or folder: nowhere"),
        ("train --data odd.npy", "--data: the network refuses images of 5×5×1"),
        ("train --init empty", "--init: empty/config.json: expected a JSON file"),
        ("train --weight-decay 0.1", "--weight-decay: needs --optimizer adamw"),
        ("train --seed -1", "--seed: expected a whole number from 0, below 2**63, got -1"),
        ("train --weighting min_snr --loss-type vb", "--weighting: expected None with --loss-type"),
        ("train --unet.dropout 1.5", "dropout: expected 0 to 1, below 1, got 1.5"),
        ("train --data grey.npy --batch-size 64", "--batch-size: expected at most 20 images, got"),
        ("train --recipe cifar10", "--recipe cifar10: not for the images of digits; --data"),
        ("train --image-size 16", "--image-size: not for the images of digits; --data"),
        ("train --image-size 0", "--image-size: expected a whole number above 0, got 0"),
        ("train --image-size x", "--image-size: expected a whole number, got x"),
        ("train --unet.dropot 0", "not an option of train; did you mean --unet.dropout?"),
        ("train --data rgb.npy --dataset digits", "expected one of --data and --dataset, got both"),
        ("train --init DIGITS --timesteps 9", "--timesteps: cannot be given with --init, which"),
        ("sample nowhere", "--run: expected a run's folder, got nowhere, which does not exist"),
        ("trian --steps 3", "trian: no such command; did you mean train?"),
        ("train --dataset mnist", "--dataset: expected digits, mnist5k, photo_crops, got mnist;"),
        ("train --ema-warmup False", "False: not an option of train; see jax-ddpm train --help"),
        ("train --unet.dropout x", "--unet.dropout: expected a number, got x"),
        ("train --steps 1.5", "--steps: expected a whole number, got 1.5"),
        ("sample --num", "--num: expected a value"),
        ("convert SIMPLE", "expected also OUT, --to {run,diffusers,torch}"),
        ("sample --sampler euler", "--sampler: expected ancestral, ddim, dpm_solver_pp, heun, got"),
        ("train --lr 3", "--lr: not an option of train; did you mean --learning-rate?"),
        ("doctor --xyz", "--xyz: not an option of doctor; see jax-ddpm doctor --help"),
        ("parity --json no/where.json", "--json: no such folder: no"),
        ("train --data weights.pt", "--data: expected a .npz, a .npy or a folder of pictures"),
        ("sample --run DIGITS --pretrained empty", "expected --run or --pretrained, and one of"),
        ("sample --pretrained nowhere", "--pretrained: nowhere: expected a folder of diffusers"),
        ("sample --pretrained weights.pt", "one of OpenAI's comes with --openai-flags"),
        ("sample --run DIGITS --openai-flags b", "--openai-flags: comes with --pretrained"),
        ("sample --pretrained weights.pt --openai-flags b", "--openai-flags: expected "),
        ("sample --run DIGITS --seed 9223372036854775808", "--seed: expected values in [0, 922337"),
        ("sample --run DIGITS --guidance nan", "--guidance: expected a finite number, got nan"),
        ("train --label-dropout 0 --guidance 2", "--guidance: the model has no classes, or"),
        ("train --data grey.npy --out /proc", "--out: cannot write /proc/grey"),
        ("sample --run DIGITS --out DIGITS", "--out: expected a new or empty folder, got DIGITS"),
        ("sample --run DIGITS --order 3", "--order: needs --sampler dpm_solver_pp"),
        ("convert nowhere x --to run", "SOURCE: no such file or folder: nowhere"),
        ("convert SIMPLE x --to diffusers", "--to diffusers: model: expected a UNet"),
        ("convert weights.pt x --to run --weights ema", "for weights.pt, a state dict of the tut"),
        ("convert SIMPLE x --to run --image-size 64", "--image-size: expected none for SIMPLE"),
        ("convert SIMPLE empty --to run", "OUT: empty exists already"),
        ("export --pretrained DIGITS", "--pretrained: DIGITS is a run, for --run"),
        ("export --run DIGITS --steps 21", "--steps: expected values in [1, 20], got 21"),
        ("export --run SIMPLE --guidance 3", "--guidance: the model has no classes"),
        ("export --run DIGITS --out x.bin", "--out: expected a .jaxexport, got x.bin"),
        ("evaluate", "expected --run, --pretrained or --samples, and one of them only"),
        ("evaluate --run DIGITS --json empty", "--json: expected a file, got the folder empty"),
        ("evaluate --run DIGITS --num 0", "--num: expected more than 0: without"),
        ("evaluate --run DIGITS --samples grey.npy", "--run: cannot be given with --samples"),
        ("evaluate --samples grey.npy --num 21", "--num: expected values in [1, 20], got 21"),
        ("evaluate --samples x.npz", "--samples: no such file or folder: x.npz"),
        ("evaluate --samples rgb.npy", "--dataset: digits cannot be prepared like the samples; "),
        ("evaluate --samples rgb.npy --data rgb.npy --inception w.pth",
         "--inception: expected a file, got w.pth: FID's Inception is weights-inception-"),
        ("evaluate --samples grey.npy --save-statistics x.npz", "--save-statistics: expected Inc"),
        ("train --data dark.npy --range unit", "expected pixels in [0, 1], as --range unit says"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(here, jax_ddpm_here, monkeypatch, command, words):
    monkeypatch.delenv("JAX_DDPM_INCEPTION", raising=False)
    before = sorted(here.rglob("*"))
    result = jax_ddpm_here(*command.split(), cwd=here)
    assert result.returncode == 2
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert sorted(here.rglob("*")) == before


def test_a_missing_package_names_its_extra(here, capsys, monkeypatch):
    code = "import sys; sys.modules['tyro'] = None\nfrom jax_ddpm.__main__ import main; main()"
    command = [sys.executable, "-c", code]
    result, version, usage = (
        subprocess.run([*command, word], capture_output=True, text=True)
        for word in ("train", "--version", "--help")
    )
    assert version.stdout == f"jax_ddpm {__version__}, jax {jax.__version__}\n"
    assert "\n  plan      compile for a TPU or GPU" in usage.stdout
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.setattr(sys, "argv", ["jax-ddpm", "export", "--run", f"{here}/DIGITS"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert result.returncode == 2
    for said, package in ((result.stderr, "tyro"), (capsys.readouterr().err, "flatbuffers")):
        assert said == f'jax-ddpm: this command needs {package}: pip install "jax_ddpm[train]"\n'


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_any_encoding(monkeypatch, encoding):
    """β, and bytes of a name that are no UTF-8, are replaced where they cannot be printed."""
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "argv", ["jax-ddpm", "train", "--help"])
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit, match="0"):
        main()
    print("caf\udce9 β", flush=True)
    assert ("β" in out.buffer.getvalue().decode(encoding)) == (encoding == "utf-8")
