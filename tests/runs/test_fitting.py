"""Trainings from Python: watched or not, stopped and resumed, they end with the same bits."""

import shutil
import sys
from dataclasses import replace
from unittest.mock import Mock

import equinox as eqx
import jax
import numpy as np
import pytest
from PIL import Image

from jax_ddpm import runs
from jax_ddpm.data import Dataset
from jax_ddpm.runs.figures import image_grid
from jax_ddpm.runs.fitting import _dispatches
from jax_ddpm.runs.watching import best_line

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

SETTINGS = runs.Settings(model="simple", steps=100, batch_size=4, timesteps=4, checkpoint_every=80)
WATCH = {"sample_every": 25, "evaluate_every": 50, "evaluate_num": 4, "keep_best": True, "keep": 1}
WATCHED = replace(SETTINGS, tracker=("wandb",), **WATCH)
FIGURE = "classifier_frechet_distance"


@pytest.fixture(scope="module")
def pictures():
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    return Dataset(images, np.arange(12, dtype=np.int32) % 3)


@pytest.fixture
def watched(monkeypatch):
    """What wandb is given. The figure is the samples' darkness, which rises from step 50 to 100."""

    def measure(batches, num):
        samples = np.concatenate(list(batches))
        assert samples.shape == (num, 8, 8, 1)
        return {FIGURE: -float(samples.mean())}

    reference = Mock(**{"return_value.measure": measure})
    monkeypatch.setattr("jax_ddpm.runs.watching.reference_of_images", reference)
    wandb = Mock(**{"init.return_value.step": 0})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb.init.return_value.log


@pytest.fixture(scope="module")
def whole(tmp_path_factory, defaults, pictures):
    """A training that nothing interrupts or watches, and its folder. Only to be read."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return runs.fit(folder, pictures, SETTINGS), folder


def test_a_whole_state_is_saved_and_restored(whole, tmp_path):
    """The average of its weights is what is drawn from."""
    end, folder = whole
    assert (end.step, end.stopped) == (100, False)
    for path in (runs.save_state(tmp_path / "mine", end.state), folder / "checkpoints/00000100"):
        assert path.name == "00000100"
        loaded = runs.load_state(path, like=jax.eval_shape(lambda: end.state))
        assert eqx.tree_equal(loaded, end.state)
    assert eqx.tree_equal(end.run.variables, end.state.ema_params)
    assert not eqx.tree_equal(end.state.params, end.state.ema_params)
    other = end.state._replace(params={**end.state.params, "x": np.float32(1)})
    with pytest.raises(ValueError, match=r"params: x: expected float32\[\], got no array"):
        runs.load_state(path, like=other)


def test_it_is_stopped_and_resumes_and_is_watched(whole, pictures, watched, tmp_path):
    """Samples and figures change no bit, nor does the pause; of all checkpoints but the newest the
    best is kept; and samples that were drawn after the checkpoint are removed."""
    folder, seen = tmp_path / "run", []
    watch = {"progress": seen.append, "stop": lambda: seen[-1].done == 60}
    stopped = runs.fit(folder, pictures, WATCHED, **watch)
    assert (stopped.step, stopped.stopped) == (60, True)
    assert [(here.done, here.total) for here in seen] == [(done, 100) for done in range(61)]
    previews = folder / "samples"
    assert sorted(path.name for path in previews.iterdir()) == ["00000025.png", "00000050.png"]
    shutil.copy(previews / "00000050.png", previews / "00000070.png")
    end = runs.fit(str(folder), pictures, WATCHED)
    assert eqx.tree_equal(end.state, whole[0].state), "to the bit"
    found, expected = (runs.read_metrics(each / "metrics.jsonl") for each in (folder, whole[1]))
    assert best_line(found)[0]["step"] == 50 and len(found) == 2
    ignored = {FIGURE: None, "steps_per_second": None}  # one measured only; a machine's speed
    assert [line | ignored for line in found] == [line | ignored for line in expected]
    assert {int(path.name) for path in (folder / "checkpoints").iterdir()} == {50, 100}
    assert sorted(int(path.stem) for path in previews.iterdir()) == [25, 50, 75, 100]
    key = jax.random.fold_in(jax.random.key(SETTINGS.seed), 1)  # always, from the average
    picture = image_grid(runs.draw(key, end.run, 16), columns=8)
    np.testing.assert_array_equal(np.asarray(Image.open(previews / "00000100.png")), picture)
    with Image.open(folder / "training.gif") as animation:
        assert animation.n_frames == 4
    assert {given.kwargs["step"] for given in watched.call_args_list} == {25, 50, 75, 100}
    runs.fit(folder, pictures, WATCHED)
    assert (folder / "training.gif").exists(), "a run that is whole keeps its pictures"


def test_the_best_line_is_the_lowest_and_the_first_of_equals():
    lines = [{"step": step, FIGURE: x} for step, x in ((50, 3.0), (100, 1.0), (150, 1.0))]
    assert best_line([{"step": 25}, *lines, {"step": 250}]) == (lines[1], FIGURE)
    # FID has another scale: what the last line has decides.
    fid = {"step": 250, "fid": 90.0}
    assert best_line([*lines, fid]) == (fid, "fid") and best_line([{"step": 25}]) is None


def test_dispatches_end_where_a_checkpoint_is_due():
    """At the same steps wherever a run resumes: a scan of another length may round otherwise."""
    settings = runs.Settings(steps=10, steps_per_dispatch=3, checkpoint_every=4)
    expected = [range(0, 3), range(3, 4), range(4, 6), range(6, 8), range(8, 9), range(9, 10)]
    assert _dispatches(0, settings) == expected
    assert _dispatches(4, settings) == expected[2:] and not _dispatches(10, settings)


def test_what_is_wrong_is_named_before_the_training(pictures, tmp_path):
    nowhere = {"evaluate_every": 50, "inception": tmp_path / "nowhere.pth"}
    for wrong, options, words in (
        ({"images": np.int32(pictures.images)}, {}, "data: expected uint8 or float32"),
        ({"labels": np.int32([0])}, {}, r"data: expected int32 labels .12."),
        ({}, nowhere, "inception: expected images of 3 channels"),
    ):
        with pytest.raises(runs.FieldError, match=words):
            runs.fit(tmp_path / "x", replace(pictures, **wrong), replace(SETTINGS, **options))
    assert not any(tmp_path.glob("x/checkpoints/*"))
    default = replace(SETTINGS, batch_size=None, steps=2)  # in batches of two
    assert runs.fit(tmp_path / "few", Dataset(pictures.images[:3]), default).step == 2
