"""Trackers: what TensorBoard and Weights & Biases receive, and what their failures cost."""

import io
import sys
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from jax_ddpm import runs
from jax_ddpm.runs.trackers import open_trackers

LINE = {"step": 50, "loss": 0.5, "grad_norm": None, "loss_quarters": [0.1, None, 0.3, 0.4]}
NUMBERS = {"loss": 0.5, "loss_quarters/0": 0.1, "loss_quarters/2": 0.3, "loss_quarters/3": 0.4}
PICTURE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def events(path):
    """Of an event file: records of length, its checksum, the event, its checksum."""
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def scalars(path):
    values = [(event.step, value) for event in events(path) for value in event.summary.value]
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
        (first,) = (tmp_path / "tensorboard").iterdir()
        assert len(events(first)) == 7, "written at once"
    with open_trackers(["tensorboard"], tmp_path, {}, 100) as tracker:
        tracker.log({"step": 150, "loss": 1.0})
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    expected = {(50, name): pytest.approx(x) for name, x in {**NUMBERS, "samples": 0}.items()}
    assert scalars(first) == expected and scalars(second) == {(150, "loss"): 1.0}
    encoded = events(first)[-1].summary.value[0].image.encoded_image_string
    np.testing.assert_array_equal(Image.open(io.BytesIO(encoded)), PICTURE)
    for file, purged in ((first, 0), (second, 101)):
        version, start, *_ = events(file)
        assert version.file_version == "brain.Event:2"
        assert (start.session_log.status, start.step) == (SessionLog.START, purged)


def test_wandb(tmp_path, wandb):
    """It is the same run wherever the folder is; wandb refuses steps that it has."""
    folder, description = tmp_path / "digits", {"model": {"channels": 1}}
    with open_trackers(["wandb"], folder, description, 0) as tracker:
        tracker.log(LINE)
        tracker.picture(50, "samples", PICTURE)
    given = wandb.init.call_args.kwargs
    expected = {"dir": str(folder), "name": "digits", "config": description, "resume": "allow"}
    assert given.items() >= expected.items()
    logged = [call(NUMBERS, step=50), call({"samples": ("I", PICTURE)}, step=50)]
    assert wandb.run.log.call_args_list == logged
    wandb.run.finish.assert_called_once_with()
    wandb.run.step = 151
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(ZeroDivisionError), open_trackers(["wandb"], moved, {}, 100) as tracker:
        tracker.log({"step": 150, "loss": 1.0})
        tracker.log({"step": 200, "loss": 2.0})
        raise ZeroDivisionError
    assert wandb.init.call_args.kwargs["id"] == given["id"] and len(given["id"]) == 16
    assert wandb.run.log.call_args_list == [*logged, call({"loss": 2.0}, step=200)]
    assert wandb.run.finish.call_count == 2, "also where the training fails"
    wandb.init.side_effect = RuntimeError("api_key not configured")
    with pytest.raises(runs.FieldError, match="tracker: wandb: api_key not configured"):
        open_trackers(["tensorboard", "wandb"], tmp_path, {}, 0).__enter__()


def test_what_fails_is_left_out(tmp_path, wandb, monkeypatch):
    """The training goes on, with those that work."""
    wandb.run.log.side_effect = ConnectionError("no network\nand more")
    with open_trackers(["wandb", "tensorboard"], tmp_path, {}, 0) as tracker:
        with pytest.warns(UserWarning, match="^wandb is left out from here on: no network$"):
            tracker.log(LINE)
        tracker.log({"step": 100, "loss": 1.0})
        assert scalars(*(tmp_path / "tensorboard").iterdir())[100, "loss"] == 1.0
        monkeypatch.setattr(RecordWriter, "write", Mock(side_effect=OSError(28, "No space left")))
        with pytest.warns(UserWarning, match="^tensorboard is left out .* No space left"):
            tracker.log(LINE)
        tracker.log(LINE)
    assert wandb.run.log.call_count == 1 and wandb.run.finish.call_count == 1
