"""Trainings from Python: watched or not, stopped and resumed, they end with the same bits."""

import json
import re
import shutil
import sys
import time
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from unittest.mock import Mock

import equinox as eqx
import jax
import numpy as np
import pytest
from PIL import Image

from jax_ddpm import runs
from jax_ddpm.data import Dataset
from jax_ddpm.io.checkpoint import load_checkpoint
from jax_ddpm.runs import training
from jax_ddpm.runs.callbacks import Every, best_line
from jax_ddpm.runs.figures import image_grid
from jax_ddpm.runs.training import Dispatches

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
    monkeypatch.setattr("jax_ddpm.runs.callbacks.reference_of_images", reference)
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
    folder, seen, asked = tmp_path / "run", [], count(1)
    options = {"progress": seen.append, "stop": lambda: next(asked) == 60}
    stopped = runs.fit(folder, pictures, WATCHED, **options)
    assert (stopped.step, stopped.stopped) == (60, True)
    assert (str(seen[0]), str(seen[1])) == ("compiling…", "training: 0 of 100")
    previews = folder / "samples"
    assert sorted(path.name for path in previews.iterdir()) == ["00000025.png", "00000050.png"]
    shutil.copy(previews / "00000050.png", previews / "00000070.png")
    end = runs.fit(str(folder), pictures, WATCHED)
    assert eqx.tree_equal(end.state, whole[0].state), "to the bit"
    found, expected = (runs.read_metrics(each / "metrics.jsonl") for each in (folder, whole[1]))
    assert best_line(found)[0]["step"] == 50 and len(found) == 20
    ignored = {FIGURE: None, "steps_per_second": None}  # one measured only; a machine's speed
    assert [line | ignored for line in found] == [line | ignored for line in expected]
    assert {int(path.name) for path in (folder / "checkpoints").iterdir()} == {50, 100}
    assert sorted(int(path.stem) for path in previews.iterdir()) == [25, 50, 75, 100]
    key = jax.random.fold_in(jax.random.key(SETTINGS.seed), 1)  # always, from the average
    picture = image_grid(runs.draw(key, end.run, 16), columns=8)
    np.testing.assert_array_equal(np.asarray(Image.open(previews / "00000100.png")), picture)
    with Image.open(folder / "training.gif") as animation:
        assert animation.n_frames == 4
    tracked = {x.kwargs["step"] for x in watched.call_args_list if "samples" in x.args[0]}
    assert tracked == {25, 50, 75, 100}
    runs.fit(folder, pictures, WATCHED)
    assert (folder / "training.gif").exists(), "a run that is whole keeps its pictures"


def test_each_stretch_between_checkpoints_is_cut_from_its_start():
    """At the same steps wherever a run resumes: a scan of another length may round otherwise."""
    settings = replace(SETTINGS, steps=23, checkpoint_every=10, steps_per_dispatch=4)
    cuts = [0, 4, 8, 10, 14, 18, 20, 23]
    for done in range(23):
        ends, found = [done, *(cut for cut in cuts if cut > done)], Dispatches(done, settings)
        assert list(found) == [range(*pair) for pair in pairwise(ends)]
        assert len(found) == len(ends) - 1 and found.lengths == set(map(len, found))
    # The ranges of a long training are not made before its first step.
    long = Dispatches(1, replace(settings, steps=10**12))
    assert len(long) == 3 * 10**11 and long[-1].stop == 10**12 and long.lengths == {3, 4, 2}


def test_a_save_that_takes_long_holds_nothing_of_later_steps(pictures, tmp_path, monkeypatch):
    save = training.save
    monkeypatch.setattr(training, "save", lambda *known: (time.sleep(0.2), save(*known)))
    runs.fit(tmp_path, pictures, replace(SETTINGS, steps=6, checkpoint_every=3, log_every=2))
    state = load_checkpoint(tmp_path / "checkpoints/00000003").state
    assert [len(values) for values in state["pending"].values()] == [1] * 4


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


def test_it_says_how_far_it_is(whole, pictures, tmp_path, monkeypatch):
    """Also while it waits for the device, and in a line to read; what it returns is another."""
    clock, seen = count(), []  # a second passes whenever it is asked
    monkeypatch.setattr("jax_ddpm.runs.metrics.time.monotonic", lambda: next(clock))
    end = runs.fit(tmp_path / "x", pictures, SETTINGS, progress=seen.append)
    steps = [here.done for here in seen if here.what == "training"]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 100 and len(steps) > 90
    ended = r"training: 100 of 100, loss 0\.\d{4}, [\d,]+ images/s, 0 s left"
    assert re.fullmatch(ended, str(seen[-1]))
    assert len(repr(end)) < 300 and "step=100" in repr(end) and "\n" not in repr(end)


@pytest.mark.slow
def test_a_figure_has_a_line_of_its_own(pictures, tmp_path, monkeypatch):
    sevens = Every(7, 20), lambda step, _: {"figure": step}
    monkeypatch.setattr("jax_ddpm.runs.training.open_callbacks", lambda *_: [sevens])
    runs.fit(tmp_path, pictures, replace(SETTINGS, steps=20, log_every=10))
    found = [(x["step"], x.get("figure")) for x in runs.read_metrics(tmp_path / "metrics.jsonl")]
    assert found == [(7, 7), (10, None), (14, 14), (20, 20)]


OLD = Path(__file__).with_name("format_0_1_0")


@pytest.mark.slow
def test_a_run_of_the_first_format_is_opened_drawn_and_resumed(tmp_path):
    """By every later version; how it was made says its README."""
    folder = shutil.copytree(OLD, tmp_path / "run")
    expected = np.load(folder / "expected.npz")
    samples = runs.draw(jax.random.key(0), runs.load_run(folder), 4)
    np.testing.assert_allclose(samples, expected["samples"], atol=1e-4)
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1), np.uint8)
    data = Dataset(images, np.arange(12, dtype=np.int32) % 2, class_names=("ant", "bee"))
    assert runs.check_run(folder).intact == [56]
    train = json.loads((folder / "config.json").read_text())["train"]
    with pytest.warns(UserWarning, match="step 56 was trained by 1 × cpu"):
        end = runs.fit(folder, data, runs.Settings(**train, log_every=50))
    *_, before, last = runs.read_metrics(folder / "metrics.jsonl")
    assert (end.step, before["step"], last["step"]) == (60, 50, 60)
    assert (last["loss"], last["grad_norm"]) == pytest.approx(tuple(expected["last"]), rel=1e-3)
