"""Settings of a training, the network that they make or take from a run, and the recipes."""

import re
from dataclasses import replace

import equinox as eqx
import jax
import numpy as np
import pytest

from jax_ddpm import runs
from jax_ddpm.data import Dataset, Preparation
from jax_ddpm.runs import RECIPES, training
from jax_ddpm.runs.drawing import labels_in_turn, with_guidance

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

# Published values. Ho et al. 2020: §4, Appendix B, run_cifar.py and run_celebahq.py (with the
# variance of diffusion_utils.py). Nichol & Dhariwal 2021: the flags of their README, the step in
# the name of their checkpoint. Dhariwal & Nichol 2021: Table 11. Parameters are in millions.
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
BLACK, LABELS = np.zeros((12, 8, 8, 1), np.uint8), np.arange(12, dtype=np.int32)
LETTERS = "abcdefghi\u01f0"  # the last is one character, or j and a caron
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("celebahq256", "imagenet64_adm")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 10.5}, "steps: expected a whole number of 1 or more, got 10.5"),
        ({"steps": True}, "steps: expected a whole number of 1 or more, got True"),
        ({"timesteps": 1}, "timesteps: expected a whole number of 2 or more, got 1"),
        ({"seed": 2**63}, "seed: expected a whole number .* got 9223372036854775808$"),
        ({"guidance": np.inf}, "guidance: expected a finite number, got inf"),
        ({"learning_rate": "1e-3"}, "learning_rate: expected a finite number above 0, got '1e-3'"),
        ({"learning_rate": 0}, "learning_rate: expected a finite number above 0, got 0"),
        ({"grad_clip": np.nan}, "grad_clip: expected a finite number of 0 or more, got nan"),
        ({"ema_decay": 1.0}, "ema_decay: expected a number from 0 to 1, below 1, got 1.0"),
        ({"label_dropout": 1.5}, "label_dropout: expected a number from 0 to 1, got 1.5"),
        ({"ema_warmup": "False"}, "ema_warmup: expected a bool, such as True, got 'False'"),
        ({"tracker": None}, "tracker: expected one of .* got None"),
        ({"unet": 5}, "unet: expected a Mapping, such as .* got 5"),
        ({"unet": {"width": 3}}, "unet: expected one of"),
        ({"accumulate": 3}, "accumulate: expected a divisor of batch_size=64, got 3"),
        ({"keep_every": 150}, "keep_every: expected a multiple of checkpoint_every"),
        ({"keep_best": True}, "keep_best: needs evaluate_every"),
        ({"warmup_steps": 9, "steps": 9}, "warmup_steps: expected fewer than steps=9, got 9"),
        ({"model": "simple", "unet": {}}, "unet: needs model='unet'"),
        ({"init": "x", "timesteps": 9}, "timesteps: cannot be given with init"),
    ],
)
def test_what_makes_no_sense_is_named(options, words):
    with pytest.raises(runs.FieldError, match=f"^{words}"):
        runs.Settings(**options)


@pytest.mark.parametrize(("shape", "levels"), [((8, 8, 1), 2), ((32, 64, 3), 3), ((64, 62, 3), 2)])
def test_the_network_grows_with_the_images(shape, levels):
    """A level more for every doubling from 32 pixels on; one label more stands for none."""
    run = training.untrained(runs.Settings(variance_type="learned_range"), shape, 3)
    model = run.model
    assert model.block_out_channels == (32, 64, 64, 64)[:levels]
    assert model.down_block_types == (*("DownBlock2D",) * (levels - 1), "AttnDownBlock2D")
    assert (model.in_channels, model.out_channels) == (shape[2], 2 * shape[2])
    assert (model.num_class_embeds, run.num_classes, run.null_label) == (4, 3, 3)


def test_it_starts_from_a_run(untrained, tmp_path):
    """With its weights; the images may have fewer classes, and say how they are read."""
    settings = runs.Settings(init=untrained / "runs/digits", guidance=3)
    data = Dataset(BLACK, LABELS % 9, preparation=Preparation(flip=True))
    before = runs.load_run(settings.init)
    with pytest.warns(UserWarning, match="no image shows, left out: 9$"):
        run = training.new_run(settings, data)
    assert eqx.tree_equal(run.variables, before.variables) and run.model == before.model
    assert run.preparation["flip"] and (run.num_classes, run.null_label, run.guidance) == (9, 10, 3)
    for wrong, words in (
        ({"labels": None}, "its network has 10 classes, the images none"),
        ({"images": BLACK[:, :4]}, r"expected images of \(8, 8, 1\)"),
    ):
        with pytest.raises(runs.FieldError, match=f"^init: {words}"):
            training.new_run(settings, replace(data, **wrong))
    runs.save_run(tmp_path, run._replace(num_classes=None, null_label=None))
    with pytest.warns(UserWarning, match="^labels are left out: the network of init has no class"):
        training.new_run(runs.Settings(init=tmp_path), data)


@pytest.mark.parametrize("name", ["cifar10", "cifar10_iddpm", *SLOW])
def test_a_recipes_values_are_those_that_were_published(name):
    settings, preparation, (size, *rest), num_classes, _ = RECIPES[name]
    found = vars(settings) | {
        "schedule": (settings.timesteps, settings.schedule),
        "dropout": settings.unet["dropout"],
        "flip": preparation.flip,
    }
    *published, millions = PUBLISHED[name]
    assert {key: found[key] for key in NAMES} == dict(zip(NAMES, published, strict=True))
    assert settings.ema_decay == 0.9999 and not settings.ema_warmup
    assert preparation.image_size in (None, size) and settings.learning_rate_schedule == "constant"
    run = training.untrained(settings, (size, *rest), num_classes)
    # Their networks see T = 1,000 steps, however many there are.
    assert run.model.time_scale * run.schedule.num_timesteps == 1000
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.variables))
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05 if millions < 100 else 0.5)


def test_defaults_suit_the_images_and_large_seeds_do_not_wrap(one_level):
    """A batch is 64, or the largest power of two that there are images for; lines are twenty."""
    assert [runs.Settings().batched(n) for n in (1, 3, 62, 64, 60_000)] == [1, 2, 32, 64, 64]
    lines = [runs.Settings().logged(n) for n in (1, 20, 60, 100, 999, 1000, 10**6)]
    assert lines == [1, 1, 2, 5, 25, 50, 50]
    settings, data = runs.Settings(unet=one_level), Dataset(np.zeros((2, 8, 8, 1), np.uint8))
    first, second = (training.new_run(replace(settings, seed=seed), data) for seed in (0, 2**32))
    assert not eqx.tree_equal(first.variables, second.variables)


@pytest.mark.parametrize(
    ("known", "names", "rows", "said"),  # without row 10: without a null label
    [
        (LETTERS, "bc", (1, 2, 10), "no image shows, left out: a, d, e, f, g, h, i"),
        (LETTERS, ("c", "a", "dog", "j\u030c"), (2, 0, None, 9, 10), "only images show: dog"),
        (LETTERS, "xy", (None, None), "left out: a, b, .* only images show: x, y"),
        (LETTERS, None, (0, 1), "no image shows, left out: c, d, "),
        (None, "12", (1, 2, 10), "no image shows, left out: 0, 3, 4"),
        (None, None, (*range(10), None, None, 10), "only images show: 10, 11"),
        (range(1, 11), None, (None, 0, 1, 10), "left out: 3, 4, .* only images show: 0"),
    ],
)
def test_training_goes_on_by_names(untrained, tmp_path, recwarn, known, names, rows, said):
    before = runs.load_run(untrained / "runs/digits")
    runs.save_run(tmp_path / "run", before._replace(class_names=known and (*map(str, known),)))
    classes = len(rows) - (10 in rows)
    data = Dataset(BLACK, LABELS % classes, class_names=names and (*names,))
    null_label = classes if 10 in rows else None
    options = {"init": tmp_path / "run", "label_dropout": 0.1 if null_label else 0}
    run = training.new_run(runs.Settings(**options), data)
    assert re.search(said, " ".join(str(each.message) for each in recwarn))
    both = (each.variables["params"] for each in (before, run))
    old, new = (params["class_embedding"]["embedding"] for params in both)
    assert (run.num_classes, run.null_label) == (classes, null_label)
    assert run.class_names == (("a", "b") if rows == (0, 1) else data.class_names)
    assert run.model.num_class_embeds == len(new) == len(rows)
    for row, source in zip(new, rows, strict=True):
        assert np.any(np.all(row == old, axis=1)) == (source is not None) and np.any(row)
        assert source is None or np.array_equal(row, old[source])


@pytest.mark.parametrize(
    ("options", "labels", "null", "scale", "drawn"),
    [
        ({}, [0, 2], 3, 2.0, [0, 2]),
        ({"label_dropout": 0}, [0, 1, 2], None, 1.0, [0, 1, 2]),
        ({"label_dropout": 0, "guidance": 1}, [1], None, 1.0, [1]),
        ({"label_dropout": 1}, [0, 1, 2], 3, 1.0, [3]),
    ],
)
def test_only_what_was_trained_is_drawn(tmp_path, one_level, options, labels, null, scale, drawn):
    data = Dataset(BLACK, np.resize(np.int32(labels), 12), class_names=("a", "b", "c"))
    run = training.new_run(runs.Settings(unet=one_level, **options), data)
    runs.save_run(tmp_path, run)
    run = runs.load_run(tmp_path)
    assert (run.num_classes, run.null_label, run.guidance) == (3, null, scale)
    assert labels_in_turn(run, 6).tolist() == (drawn * 6)[:6]
    assert run.model.num_class_embeds == 3 + (null is not None)
    if scale == 1:
        with pytest.raises(runs.FieldError, match="^guidance: .* no trained label that stands"):
            with_guidance(run, 2.5)
