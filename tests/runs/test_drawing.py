"""Drawing from a run: a sample is its own, labels in turn, and what does not suit is named."""

import warnings

import jax
import numpy as np
import pytest

import jax_ddpm as ddpm
from jax_ddpm import runs
from jax_ddpm.models import SimpleUNet
from jax_ddpm.runs.drawing import labels_in_turn, warn_of_labels

pytestmark = pytest.mark.usefixtures("defaults", "untyped")


@pytest.fixture(scope="module")
def digits(untrained):
    return runs.load_run(untrained / "runs/digits")


@pytest.mark.parametrize("sampler", [ddpm.ddim(eta=1.0), ddpm.heun()], ids=["ddim", "heun"])
def test_a_sample_is_its_own_however_many_are_drawn(tmp_path, write_run, sampler):
    """In one batch or in several, the last of them not full."""
    run, key = write_run(tmp_path / "run", SimpleUNet(channels=1)), jax.random.key(3)
    small = jax.tree.map(lambda x: 0.3 * x, run.pretrained.variables)  # or all pixels are ±1
    pretrained = run.pretrained._replace(variables=small, prediction_type="v_prediction")
    run, seen = run._replace(pretrained=pretrained), []
    whole = runs.draw(key, run, 6, steps=2, sampler=sampler, watch=seen.append)
    parts = runs.draw(key, run, 5, steps=2, sampler=sampler, batch_size=2)
    assert whole.shape == (6, 8, 8, 1) and whole.dtype == np.float32
    np.testing.assert_allclose(parts, whole[:5], atol=1e-4)
    assert np.std(whole, axis=0).mean() > 0.1, "each another"
    np.testing.assert_array_equal(seen[-1], whole)
    assert len(seen) == 3, "noise, and the states after each piece of the chain"


def test_labels_go_in_turn(digits):
    run = digits._replace(class_names=("bird", "cat", "dog", *"defghij"))
    for labels, expected in (
        (None, [*range(10), 0, 1]),
        (3, [3] * 12),
        ([7, 1], [7, 1] * 6),
        (["cat", "7"], [1, 7] * 6),
    ):
        assert labels_in_turn(run, 12, labels).tolist() == expected
    # A grid has one class in each column, several times all of them where they are few.
    for classes, columns in ((2, 8), (3, 6), (10, 10), (16, 16), (17, None), (None, None)):
        assert digits._replace(num_classes=classes).class_columns == columns


@pytest.mark.parametrize(
    ("names", "label", "number", "said"),
    [
        (("caf\u00e9", "tea"), "cafe\u0301", 0, ""),
        (("cafe\u0301", "tea"), "caf\u00e9", 0, ""),
        (("0", "1", "2"), "2", 2, ""),
        (("00", "01", "02"), "2", 2, ""),
        (("0", "1", "10", "2"), "2", 3, "label 3 is the class named '2'"),
        (("0", "1", "10", "2"), 2, 2, "label 2 is the class named '10'"),
        (("1", "2", "3"), "2", 1, "label 1 is the class named '2'"),
        (("1", "2", "3"), 0, 0, "label 0 is the class named '1'"),
        (("0", "1", "2", "10"), "3", None, "expected 0, 1, 2, 10, got '3'"),
        (("0", "1", "2", "10"), "10", 3, "label 3 is the class named '10'"),
        (("ant", "bee"), "1", 1, ""),
    ],
)
def test_a_class_goes_by_its_name(digits, names, label, number, said):
    """In any form of Unicode; where names are numbers that are not the labels, it is said."""
    run = digits._replace(num_classes=len(names), class_names=names)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if number is None:
            with pytest.raises(runs.FieldError, match=f"^labels: {said}"):
                labels_in_turn(run, 1, label)
            return
        labels = labels_in_turn(run, 1, label)
        warn_of_labels(run, labels)
    assert labels.tolist() == [number]
    assert [str(each.message).partition(": ")[2] for each in warned] == [said] * bool(said)


def test_what_does_not_suit_the_run_is_named(digits):
    chain, none = digits.pretrained.schedule, digits._replace(num_classes=None, null_label=None)
    for arguments, words in (
        ({"num": 0}, "num: expected more than 0"),
        ({"labels": 10}, "labels: expected 0 to 9, got 10"),
        ({"labels": [-1, 3]}, "labels: expected 0 to 9, got -1"),
        ({"labels": [0.5]}, "labels: expected whole numbers"),
        ({"labels": [[1]]}, "labels: expected whole numbers"),
        ({"labels": "cat"}, "labels: expected numbers, as the run knows no names"),
        ({"steps": 21}, "steps: expected at most 20"),
        ({"steps": 2, "chain": chain}, "steps: cannot be given with chain"),
        ({"run": none, "guidance": 3.0}, "guidance: the model has no classes"),
        ({"guidance": np.nan}, "guidance: expected a finite number, got nan"),
        ({"guidance": -np.inf}, "guidance: expected a finite number, got -inf"),
        ({"run": none, "labels": 1}, "labels: the model has no classes"),
    ):
        with pytest.raises(runs.FieldError, match=f"^{words}"):
            runs.draw(**{"key": jax.random.key(0), "run": digits, "num": 2, **arguments})
    for platforms in ("cpu", [], ["gpu"]):
        with pytest.raises(runs.FieldError, match="^platforms: expected "):
            runs.export("x.jaxexport", digits, platforms=platforms)
    with pytest.raises(TypeError, match="key: expected a typed key"):
        runs.draw(0, digits, 2)
