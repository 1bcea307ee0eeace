"""Settings of a training, and the network that they make for the images or take from a run."""

import jax
import numpy as np
import pytest

from jax_ddpm import runs
from jax_ddpm.data import Dataset, Preparation
from jax_ddpm.runs import starting

pytestmark = pytest.mark.usefixtures("defaults", "untyped")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 10.5}, "steps: expected a whole number"),
        ({"learning_rate": np.inf}, "learning_rate: expected a finite number"),
        ({"schedule": "x"}, "schedule: expected one of 'linear'"),
        ({"seed": -1}, "seed: expected values in"),
        ({"seed": 2**63}, "seed: expected values in"),
        ({"unet": {"width": 3}}, "unet: expected one of"),
        ({"ema_decay": 1.0}, "ema_decay: expected 0 to 1, below 1"),
        ({"label_dropout": 2}, "label_dropout: expected 0 to 1"),
        ({"accumulate": 3}, "accumulate: expected a divisor of batch_size=64"),
        ({"keep_every": 150}, "keep_every: expected a multiple of checkpoint_every"),
        ({"evaluate_every": 30}, "evaluate_every: expected a multiple of 50"),
        ({"keep_best": True}, "keep_best: comes with evaluate_every"),
        ({"warmup_steps": 9, "steps": 9}, "warmup_steps: expected fewer than steps=9"),
        ({"model": "simple", "unet": {}}, "unet: comes with model='unet'"),
        ({"init": "x", "timesteps": 9}, "timesteps: comes with init"),
    ],
)
def test_what_makes_no_sense_is_named(options, words):
    with pytest.raises(runs.FieldError, match=f"^{words}"):
        runs.Settings(**options)


@pytest.mark.parametrize(("shape", "levels"), [((8, 8, 1), 2), ((32, 64, 3), 3), ((64, 62, 3), 2)])
def test_the_network_grows_with_the_images(shape, levels):
    """A level more for every doubling from 32 pixels on; one label more stands for none."""
    run = starting.untrained(runs.Settings(variance_type="learned_range"), shape, 3)
    model = run.pretrained.model
    assert model.block_out_channels == (32, 64, 64, 64)[:levels]
    assert model.down_block_types == (*("DownBlock2D",) * (levels - 1), "AttnDownBlock2D")
    assert (model.in_channels, model.out_channels) == (shape[2], 2 * shape[2])
    assert (model.num_class_embeds, run.num_classes, run.null_label) == (4, 3, 3)


def test_it_starts_from_a_run(untrained, tmp_path):
    """With its weights; the images may have fewer classes, and say how they are read."""

    def dataset(classes, size=8):
        labels = np.arange(70, dtype=np.int32) % classes
        return Dataset(np.zeros((70, size, size, 1), np.uint8), labels)

    settings = runs.Settings(init=untrained / "runs/digits", batch_size=4, guidance=3)
    data = dataset(9)._replace(class_names=tuple("abcdefghi"), preparation=Preparation(flip=True))
    before = runs.load_run(untrained / "runs/digits").pretrained
    run = starting.new_run(settings, data)
    jax.tree.map(np.testing.assert_array_equal, run.pretrained.variables, before.variables)
    assert run.pretrained.model == before.model and run.preparation.flip
    assert (run.num_classes, run.null_label, run.guidance) == (9, 10, 3)
    for data, words in (
        (dataset(12), "its network has 10 classes, the images 12"),
        (dataset(3)._replace(labels=None), "its network has 10 classes, the images none"),
        (dataset(3, size=4), r"expected images of \(8, 8, 1\)"),
    ):
        with pytest.raises(runs.FieldError, match=f"^init: {words}"):
            starting.new_run(settings, data)


def test_what_is_no_run_is_named(untrained, tmp_path):
    run = untrained / "runs/digits"
    weights = run / "checkpoints/00000000/ema.safetensors"
    for call, words in (
        (lambda: runs.load_run(tmp_path / "nowhere"), "folder: expected a run's folder, got"),
        (lambda: runs.load_run(run / "checkpoints"), "folder: expected a run's folder"),
        (lambda: runs.load_run(run, checkpoint=1), "checkpoint: expected one of 0 in"),
        (lambda: runs.load_run(run, weights="EMA"), "weights: expected one of 'ema'"),
        (lambda: runs.load_pretrained(run), "folder: .* is a run, for load_run"),
        (lambda: runs.load_pretrained(weights, openai_flags="--lr 1"), "openai_flags: .* got lr"),
        (lambda: runs.load_model(run / "config.json"), "folder: .* is a file"),
    ):
        with pytest.raises(runs.FieldError, match=f"^{words}"):
            call()
    assert repr(runs.load_run(run)).startswith("Run(UNet of ")


def test_defaults_suit_the_images_and_large_seeds_do_not_wrap(one_level):
    """A batch is 64, or the largest power of two that there are images for."""
    sizes = [(1, 1), (3, 2), (62, 32), (64, 64), (60_000, 64)]
    assert [(count, runs.Settings().batched(count)) for count, _ in sizes] == sizes
    data, kernels = Dataset(np.zeros((2, 8, 8, 1), np.uint8)), set()
    for seed in (0, 2**32, 2**63 - 1):
        run = starting.new_run(runs.Settings(seed=seed, batch_size=1, unet=one_level), data)
        kernels.add(run.pretrained.variables["params"]["conv_in"]["kernel"].tobytes())
    assert len(kernels) == 3
