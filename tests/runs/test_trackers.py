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


def test_none_does_nothing(tmp_path):
    with open_trackers([], tmp_path, {}, 0) as tracker:
        tracker.log(LINE)
        tracker.picture(50, "samples", PICTURE)
    assert not list(tmp_path.iterdir())


def test_tensorboard(tmp_path):
    with open_trackers(["tensorboard"], tmp_path / "run", {}, 0) as tracker:
        tracker.log(LINE)
        tracker.picture(50, "samples", PICTURE)
        assert len(events(tmp_path / "run")[0]) == 7, "written at once"
    (found,) = events(tmp_path / "run")
    assert found[0].file_version == "brain.Event:2"
    got = scalars(found)
    assert got.keys() == {(50, name) for name in [*NUMBERS, "samples"]}
    for name, value in NUMBERS.items():
        assert got[50, name] == pytest.approx(value)
    encoded = found[-1].summary.value[0].image.encoded_image_string
    np.testing.assert_array_equal(Image.open(io.BytesIO(encoded)), PICTURE)


def test_tensorboard_resumed(tmp_path):
    """What was written of steps after the one it resumes at is hidden, and not what was before."""
    for step in (0, 100):
        with open_trackers(["tensorboard"], tmp_path, {}, step) as tracker:
            tracker.log({"step": step + 50, "loss": 1.0})
    first, second = events(tmp_path)
    for found, purged in ((first, 0), (second, 101)):
        assert found[1].session_log.status == found[1].session_log.START
        assert found[1].step == purged
    assert scalars(second) == {(150, "loss"): 1.0}


def test_wandb(tmp_path, wandb):
    folder, description = tmp_path / "digits", {"model": {"channels": 1}}
    with open_trackers(["wandb"], folder, description, 0) as tracker:
        tracker.log(LINE)
        tracker.picture(50, "samples", PICTURE)
        wandb.run.finish.assert_not_called()
    given = wandb.init.call_args.kwargs
    identity = given.pop("id")
    assert len(identity) == 16
    assert given == {
        "dir": str(folder),
        "project": "jax_ddpm",
        "name": "digits",
        "config": description,
        "resume": "allow",
        "allow_val_change": True,
    }
    assert wandb.run.log.call_args_list == [
        call(NUMBERS, step=50),
        call({"samples": ("I", PICTURE)}, step=50),
    ]
    wandb.run.finish.assert_called_once_with()

    moved = folder.rename(tmp_path / "moved")
    wandb.run.log.reset_mock()
    wandb.run.step = 151
    with open_trackers(["wandb"], moved, description, 100) as tracker:
        tracker.log({"step": 150, "loss": 1.0})  # it has that
        tracker.log({"step": 200, "loss": 2.0})
    assert wandb.init.call_args.kwargs["id"] == identity
    assert wandb.run.log.call_args_list == [call({"loss": 2.0}, step=200)]


def test_what_fails_is_left_out(tmp_path, wandb):
    wandb.run.log.side_effect = ConnectionError("no network\nand more")
    with open_trackers(["wandb", "tensorboard"], tmp_path, {}, 0) as tracker:
        with pytest.warns(UserWarning) as caught:
            tracker.log(LINE)
        tracker.log({"step": 100, "loss": 1.0})
    assert [str(each.message) for each in caught] == ["wandb is left out from here on: no network"]
    assert wandb.run.log.call_count == 1 and wandb.run.finish.call_count == 1
    assert scalars(events(tmp_path)[0])[100, "loss"] == 1.0


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch):
    from tensorboardX.record_writer import RecordWriter

    def full(self, data):
        raise OSError(28, "No space left on device")

    with open_trackers(["tensorboard"], tmp_path, {}, 0) as tracker:
        monkeypatch.setattr(RecordWriter, "write", full)
        with pytest.warns(UserWarning, match="^tensorboard is left out .* No space left on dev"):
            tracker.log(LINE)
        for step in range(100, 2000, 50):
            tracker.log({"step": step, "loss": 1.0})


def test_what_is_wrong_is_said_before_the_training(tmp_path, wandb, monkeypatch):
    with pytest.raises(runs.FieldError, match="tracker: expected one of 'tensorboard', 'wandb', g"):
        with open_trackers(["comet"], tmp_path, {}, 0):
            pytest.fail("opened")
    wandb.init.side_effect = RuntimeError("api_key not configured")
    with pytest.raises(runs.FieldError, match="tracker: wandb: api_key not configured"):
        with open_trackers(["tensorboard", "wandb"], tmp_path, {}, 0):
            pytest.fail("opened")
    for package, name in (("tensorboardX", "tensorboard"), ("wandb", "wandb")):
        for module in [each for each in sys.modules if each.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        with pytest.raises(ModuleNotFoundError) as caught:
            with open_trackers([name], tmp_path, {}, 0):
                pytest.fail("opened")
        assert caught.value.name.partition(".")[0] == package


def test_the_training_s_own_error_passes(tmp_path, wandb):
    with pytest.raises(KeyboardInterrupt):
        with open_trackers(["wandb"], tmp_path, {}, 0):
            raise KeyboardInterrupt
    wandb.run.finish.assert_called_once_with()
