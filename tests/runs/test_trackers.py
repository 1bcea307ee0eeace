"""Trackers: what TensorBoard and Weights & Biases receive, and what their failures cost."""

import io
import sys
from unittest.mock import Mock, call

import numpy as np
import pytest
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import SessionLog

from jax_ddpm import runs
from jax_ddpm.runs.trackers import open_trackers

BOTH = ["tensorboard", "wandb"]
LINE = {"step": 50, "loss": 0.5, "grad_norm": None, "loss_quarters": [0.1, None, 0.3, 0.4]}
NUMBERS = {"loss": 0.5, "loss_quarters/0": 0.1, "loss_quarters/2": 0.3, "loss_quarters/3": 0.4}
PICTURE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


@pytest.fixture
def wandb(monkeypatch):
    """In place of the package: a run that counts steps as wandb's does."""
    module = Mock(Image=lambda array: ("I", array))
    module.init.return_value = module.run = Mock(step=0)
    module.run.log.side_effect = lambda values, step: setattr(module.run, "step", step)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def events(monkeypatch):
    """Those written to files, but for the version of each file."""
    written, write = [], EventsWriter.write_event

    def record(self, event):
        write(self, event)
        written.extend([] if event.file_version else [event])

    monkeypatch.setattr(EventsWriter, "write_event", record)
    return written


def test_both_get_numbers_and_pictures_and_resume(tmp_path, wandb, events):
    """TensorBoard hides what it has of later steps; wandb, which refuses steps that it has, goes on
    with the same run wherever the folder is."""
    folder, description = tmp_path / "digits", {"model": {"channels": 1}}
    with open_trackers(BOTH, folder, description, 0) as tracker:
        tracker.log(LINE)
        tracker.picture(50, "samples", PICTURE)
        (file,) = (folder / "tensorboard").iterdir()
        assert b"PNG" in file.read_bytes(), "written at once"
    given = wandb.init.call_args.kwargs
    expected = {"dir": str(folder), "name": "digits", "config": description, "resume": "allow"}
    assert given.items() >= expected.items()
    wandb.run.step = 151
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(ZeroDivisionError), open_trackers(BOTH, moved, {}, 100) as tracker:
        tracker.log({"step": 150, "loss": 1.0})
        tracker.log({"step": 200, "loss": 2.0})
        raise ZeroDivisionError
    assert wandb.init.call_args.kwargs["id"] == given["id"] and len(given["id"]) == 16
    logged = [(NUMBERS, 50), ({"samples": ("I", PICTURE)}, 50), ({"loss": 2.0}, 200)]
    assert wandb.run.log.call_args_list == [call(values, step=step) for values, step in logged]
    assert wandb.run.finish.call_count == 2, "also where the training fails"

    assert [event.step for event in events] == [0, *[50] * 5, 101, 150, 200]
    assert events[0].session_log.status == events[6].session_log.status == SessionLog.START
    values = [event.summary.value[0] for event in events[1:6]]
    expected = pytest.approx({**NUMBERS, "samples": 0})
    assert {value.tag: value.simple_value for value in values} == expected
    encoded = io.BytesIO(values[-1].image.encoded_image_string)
    np.testing.assert_array_equal(Image.open(encoded), PICTURE)
    wandb.init.side_effect = RuntimeError("api_key not configured")
    with pytest.raises(runs.FieldError, match="tracker: wandb: api_key not configured"):
        open_trackers(BOTH, moved, {}, 0).__enter__()


def test_what_fails_is_left_out(tmp_path, wandb, events, monkeypatch):
    """The training goes on, with those that work."""
    wandb.run.log.side_effect = ConnectionError("no network\nand more")
    with open_trackers(BOTH, tmp_path, {}, 0) as tracker:
        with pytest.warns(UserWarning, match="^wandb is left out from here on: no network$"):
            tracker.log(LINE)
        tracker.log({"step": 100, "loss": 1.0})
        assert events[-1].step == 100
        full = Mock(side_effect=OSError(28, "No space left"))
        monkeypatch.setattr(EventsWriter, "write_event", full)
        with pytest.warns(UserWarning, match="^tensorboard is left out .* No space left"):
            tracker.log(LINE)
        tracker.log(LINE)
    assert wandb.run.log.call_count == 1 and wandb.run.finish.call_count == 1
