"""Settings of a training, the network that they make or take from a run, and the recipes."""

import warnings

import equinox as eqx
import jax
import numpy as np
import pytest

from jax_ddpm import runs
from jax_ddpm.data import Dataset, Preparation
from jax_ddpm.models import ddpm_digits
from jax_ddpm.runs import RECIPES, starting
from jax_ddpm.runs.drawing import labels_in_turn, warn_of_labels, with_guidance

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

# The published values of the recipes, written down here apart from the library's own.
# Ho et al. 2020: §4, Appendix B, scripts/run_cifar.py and run_celebahq.py, and diffusion_utils.py,
# whose variance the latter takes. Nichol & Dhariwal 2021: the flags of their README, the step in
# the name of their checkpoint. Dhariwal & Nichol 2021: Table 11. The schedule is T and its name;
# parameters are in millions.
NAMES = ("schedule", "variance_type", "loss_type", "batch_size", "learning_rate", "warmup_steps")
NAMES += ("grad_clip", "steps", "dropout", "flip")
PUBLISHED = {
    "cifar10":
        ((1000, "linear"), "fixed_large", "mse", 128, 2e-4, 5000, 1.0, 800_000, 0.1, True, 35.7),
    "celebahq256":
        ((1000, "linear"), "fixed_small", "mse", 64, 2e-5, 5000, 1.0, 500_000, 0.0, True, 114),
    "cifar10_iddpm":
        ((4000, "cosine"), "learned_range", "hybrid", 128, 1e-4, 0, 0.0, 500_000, 0.3, False, 52.5),
    "imagenet64_adm":
        ((1000, "cosine"), "learned_range", "hybrid", 2048, 3e-4, 0, 0.0, 540_000, 0.1, True, 296),
}  # fmt: skip
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("celebahq256", "imagenet64_adm")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 10.5}, "steps: expected a whole number"),
        ({"learning_rate": np.inf}, "learning_rate: expected a finite number"),
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


def test_it_starts_from_a_run(untrained):
    """With its weights; the images may have fewer classes, and say how they are read."""
    settings = runs.Settings(init=untrained / "runs/digits", batch_size=4, guidance=3)
    images, labels = np.zeros((70, 8, 8, 1), np.uint8), np.arange(70, dtype=np.int32) % 9
    data = Dataset(images, labels, preparation=Preparation(flip=True))
    before, run = runs.load_run(settings.init).pretrained, starting.new_run(settings, data)
    assert eqx.tree_equal(run.pretrained.variables, before.variables)
    assert run.pretrained.model == before.model and run.preparation.flip
    assert (run.num_classes, run.null_label, run.guidance) == (9, 10, 3)
    for wrong, words in (
        ({"labels": labels + 3}, "its network has 10 classes, the images 12"),
        ({"labels": None}, "its network has 10 classes, the images none"),
        ({"images": images[:, :4]}, r"expected images of \(8, 8, 1\)"),
    ):
        with pytest.raises(runs.FieldError, match=f"^init: {words}"):
            starting.new_run(settings, data._replace(**wrong))


def test_what_is_no_run_is_named(untrained, tmp_path):
    run = untrained / "runs/digits"
    weights = run / "checkpoints/00000000/ema.safetensors"
    for call, words in (
        (lambda: runs.load_run(tmp_path / "nowhere"), "folder: expected a run's folder, got"),
        (lambda: runs.load_run(run, checkpoint=1), "checkpoint: expected one of 0 in"),
        (lambda: runs.load_run(run, weights="EMA"), "weights: expected one of 'ema'"),
        (lambda: runs.load_pretrained(weights, openai_flags="--lr 1"), "openai_flags: .* got lr"),
        (lambda: runs.load_model(run / "config.json"), "folder: .* is a file"),
    ):
        with pytest.raises(runs.FieldError, match=f"^{words}"):
            call()
    assert repr(runs.load_run(run)).startswith("Run(UNet of ")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipes_values_are_those_that_were_published(name):
    settings, preparation, (size, *_), *_ = RECIPES[name]
    found = vars(settings) | {
        "schedule": (settings.timesteps, settings.schedule),
        "dropout": settings.unet["dropout"],
        "flip": preparation.flip,
    }
    *published, _ = PUBLISHED[name]
    assert {key: found[key] for key in NAMES} == dict(zip(NAMES, published, strict=True))
    assert settings.ema_decay == 0.9999 and not settings.ema_warmup
    assert preparation.image_size in (None, size) and settings.learning_rate_schedule == "constant"


@pytest.mark.parametrize("name", ["cifar10", "cifar10_iddpm", *SLOW])
def test_a_recipes_network_is_as_large_as_was_published(name):
    settings, _, image_shape, num_classes, _ = RECIPES[name]
    variables = starting.untrained(settings, image_shape, num_classes).pretrained.variables
    millions = sum(leaf.size for leaf in jax.tree.leaves(variables)) / 1e6
    *_, published = PUBLISHED[name]
    assert millions == pytest.approx(published, abs=0.05 if published < 100 else 0.5)


def test_defaults_suit_the_images_and_large_seeds_do_not_wrap(one_level):
    """A batch is 64, or the largest power of two that there are images for."""
    sizes = [(1, 1), (3, 2), (62, 32), (64, 64), (60_000, 64)]
    assert [(count, runs.Settings().batched(count)) for count, _ in sizes] == sizes
    data, kernels = Dataset(np.zeros((2, 8, 8, 1), np.uint8)), set()
    for seed in (0, 2**32, 2**63 - 1):
        run = starting.new_run(runs.Settings(seed=seed, batch_size=1, unet=one_level), data)
        kernels.add(run.pretrained.variables["params"]["conv_in"]["kernel"].tobytes())
    assert len(kernels) == 3


def labelled(names, labels=None):
    labels = np.arange(12) % len(names) if labels is None else np.resize(labels, 12)
    return Dataset(np.zeros((12, 8, 8, 1), np.uint8), labels.astype(np.int32), class_names=names)


@pytest.mark.parametrize(
    ("names", "rows", "said"),
    [
        (("ant", "café", "cat"), (0, 1, 2, 3), ""),
        (("café", "cat"), (1, 2, 3), "no image shows, left out: ant"),
        (("cat", "ant", "dog", "cafe\u0301"), (2, 0, None, 1, 3), "only images show: dog"),
        (("dog", "cow"), (None, None, 3), "left out: ant, café, cat classes that only images sh"),
        (None, (0, 1, 2, 3), ""),  # by number, where the images have no names
    ],
)
def test_a_training_goes_on_by_the_names_of_classes(
    tmp_path, write_run, one_level, names, rows, said
):
    model = ddpm_digits(3, sample_size=8, **one_level)
    before = write_run(tmp_path / "unnamed", model, 3)._replace(class_names=("ant", "café", "cat"))
    runs.save_run(tmp_path / "run", before)
    data = labelled(names) if names else labelled("abc")._replace(class_names=None)
    settings = runs.Settings(init=tmp_path / "run", batch_size=4)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run = starting.new_run(settings, data)
    assert said in " ".join(str(each.message) for each in warned) and bool(warned) == bool(said)
    runs_params = (each.pretrained.variables["params"] for each in (before, run))
    old, new = (params["class_embedding"]["embedding"] for params in runs_params)
    assert run.num_classes == run.null_label == len(rows) - 1
    assert run.pretrained.model.num_class_embeds == len(rows)
    for row, source in zip(new, rows, strict=True):
        assert np.any(np.all(row == old, axis=1)) == (source is not None) and np.any(row)
        assert source is None or np.array_equal(row, old[source])


@pytest.mark.parametrize(
    ("options", "labels", "expected", "drawn"),
    [
        ({}, None, (3, 2.0), [0, 1, 2]),
        ({"guidance": 3}, None, (3, 3.0), [0, 1, 2]),
        ({"label_dropout": 0}, None, (None, 1.0), [0, 1, 2]),
        ({"label_dropout": 0, "guidance": 1}, None, (None, 1.0), [0, 1, 2]),
        ({"label_dropout": 1}, None, (3, 1.0), [3]),
        ({}, [0, 2], (3, 2.0), [0, 2]),
        ({"label_dropout": 0}, [1], (None, 1.0), [1]),
    ],
)
@pytest.mark.parametrize("init", [False, True])
def test_what_was_trained_is_drawn_and_guides(
    tmp_path, write_run, one_level, options, labels, expected, drawn, init
):
    """By default: classes that no image shows, and a null label that stays untrained, do not."""
    write_run(tmp_path / "init", ddpm_digits(3, sample_size=8, **one_level), 3)
    options = options | ({"init": tmp_path / "init"} if init else {"unet": one_level})
    data = labelled(("ant", "bee", "cat"), labels)
    run = starting.new_run(runs.Settings(batch_size=4, **options), data)
    runs.save_run(tmp_path / "run", run)
    run = runs.load_run(tmp_path / "run")
    assert (run.num_classes, run.null_label, run.guidance) == (3, *expected)
    assert labels_in_turn(run, 6).tolist() == (drawn * 6)[:6]
    assert run.pretrained.model.num_class_embeds == 3 + (expected[0] is not None)
    if expected[1] == 1:
        with pytest.raises(runs.FieldError, match="^guidance: .* no trained label that stands"):
            with_guidance(run, 2.5)
        with pytest.raises(
            runs.FieldError, match="^guidance: .* label_dropout . .*expected 1, got"
        ):
            starting.new_run(runs.Settings(batch_size=4, **{**options, "guidance": 2}), data)
    for unseen in {0, 1, 2} - {*drawn}:
        with pytest.warns(UserWarning, match="labels: no image of class ... was learned"):
            warn_of_labels(run, labels_in_turn(run, 2, unseen))
