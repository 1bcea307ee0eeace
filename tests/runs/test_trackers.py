"""Trackers: what reaches TensorBoard's files and wandb's calls, and what a failure costs."""

import io
import struct
import sys
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
from PIL import Image

from jax_ddpm import runs
from jax_ddpm.runs.trackers import open_trackers

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

LINE = {"step": 50, "loss": 0.5, "grad_norm": None, "loss_quarters": [0.1, None, 0.3, 0.4]}
NUMBERS = {"loss": 0.5, "loss_quarters/0": 0.1, "loss_quarters/2": 0.3, "loss_quarters/3": 0.4}
PICTURE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def events(folder):
    """Of each event file in its order: records of length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    files = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, found = path.read_bytes(), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        files.append(found)
    return files


def scalars(found):
    values = [(event.step, value) for event in found for value in event.summary.value]
    return {(step, value.tag): value.simple_value for step, value in values}


@pytest.fixture
def wandb(monkeypatch):
    """In place of the package: a run that counts steps as wandb's does."""
    run = Mock(step=0)
    run.log.side_effect = lambda values, step: setattr(run, "step", step)
    module = SimpleNamespace(run=run, init=Mock(return_value=run), Image=lambda array: ("I", array))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_tensorboard(tmp_path):
    """A resumed run hides what was written of later steps, and not what was before."""
    with open_trackers(["tensorboard"], tmp_path, {}, 0) as tracker:
        tracker.log(LINE)
        tracker.picture(50, "samples", PICTURE)
        assert len(events(tmp_path)[0]) == 7, "written at once"
    with open_trackers(["tensorboard"], tmp_path, {}, 100) as tracker:
        tracker.log({"step": 150, "loss": 1.0})
    first, second = events(tmp_path)
    got = scalars(first)
    assert got.keys() == {(50, name) for name in [*NUMBERS, "samples"]}
    assert {name: got[50, name] for name in NUMBERS} == pytest.approx(NUMBERS)
    encoded = first[-1].summary.value[0].image.encoded_image_string
    np.testing.assert_array_equal(Image.open(io.BytesIO(encoded)), PICTURE)
    for found, purged in ((first, 0), (second, 101)):
        assert found[0].file_version == "brain.Event:2"
        assert found[1].session_log.status == found[1].session_log.START
        assert found[1].step == purged
    assert scalars(second) == {(150, "loss"): 1.0}


def test_wandb(tmp_path, wandb):
    """It is the same run wherever the folder is; wandb refuses steps that it has."""
    folder, description = tmp_path / "digits", {"model": {"channels": 1}}
    with open_trackers(["wandb"], folder, description, 0) as tracker:
        tracker.log(LINE)
        tracker.picture(50, "samples", PICTURE)
        wandb.run.finish.assert_not_called()
    given = wandb.init.call_args.kwargs
    assert given["resume"] == "allow"
    assert (given["dir"], given["name"], given["config"]) == (str(folder), "digits", description)
    logged = [call(NUMBERS, step=50), call({"samples": ("I", PICTURE)}, step=50)]
    assert wandb.run.log.call_args_list == logged
    wandb.run.finish.assert_called_once_with()
    wandb.run.step = 151
    with open_trackers(["wandb"], folder.rename(tmp_path / "moved"), description, 100) as tracker:
        tracker.log({"step": 150, "loss": 1.0})
        tracker.log({"step": 200, "loss": 2.0})
    assert wandb.init.call_args.kwargs["id"] == given["id"] and len(given["id"]) == 16
    assert wandb.run.log.call_args_list == [*logged, call({"loss": 2.0}, step=200)]


def test_what_fails_is_left_out(tmp_path, wandb, monkeypatch):
    """The training goes on, with those that work."""
    from tensorboardX.record_writer import RecordWriter

    wandb.run.log.side_effect = ConnectionError("no network\nand more")
    with open_trackers(["wandb", "tensorboard"], tmp_path, {}, 0) as tracker:
        with pytest.warns(UserWarning, match="^wandb is left out from here on: no network$"):
            tracker.log(LINE)
        tracker.log({"step": 100, "loss": 1.0})
        assert scalars(events(tmp_path)[0])[100, "loss"] == 1.0
        monkeypatch.setattr(RecordWriter, "write", Mock(side_effect=OSError(28, "No space left")))
        with pytest.warns(UserWarning, match="^tensorboard is left out .* No space left"):
            tracker.log(LINE)
        tracker.log(LINE)
    assert wandb.run.log.call_count == 1 and wandb.run.finish.call_count == 1


def test_a_training_that_fails_ends_its_tracker(tmp_path, wandb):
    with pytest.raises(ZeroDivisionError), open_trackers(["wandb"], tmp_path, {}, 0):
        raise ZeroDivisionError
    assert wandb.run.finish.call_count == 1


def test_what_is_wrong_is_said_before_the_training(tmp_path, wandb, monkeypatch):
    def refused(names, error, **match):
        with pytest.raises(error, **match):
            with open_trackers(names, tmp_path, {}, 0):
                pytest.fail("opened")

    refused(["comet"], runs.FieldError, match="tracker: expected one of 'tensorboard', 'wandb'")
    wandb.init.side_effect = RuntimeError("api_key not configured")
    words = "tracker: wandb: api_key not configured"
    refused(["tensorboard", "wandb"], runs.FieldError, match=words)
    for package, name in (("tensorboardX", "tensorboard"), ("wandb", "wandb")):
        for module in [each for each in sys.modules if each.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        refused([name], ModuleNotFoundError, match=package)
