"""Callbacks: when they are due, and what trackers receive and their failures cost."""

import io
import struct
import sys
from unittest.mock import Mock, call

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jax_ddpm import runs
from jax_ddpm.runs.callbacks import Every, best_line, open_trackers

BOTH = ["tensorboard", "wandb"]
LINE = {"step": 50, "loss": 0.5, "grad_norm": None, "loss_quarters": [0.1, None, 0.3, 0.4]}
NUMBERS = {"loss": 0.5, "loss_quarters/0": 0.1, "loss_quarters/2": 0.3, "loss_quarters/3": 0.4}
PICTURE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
FIGURE = "classifier_frechet_distance"


def test_it_is_time_where_a_multiple_or_the_end_is_passed():
    """In pieces of three, of ten steps; asked twice, it is as true."""
    pieces = [range(start, min(start + 3, 10)) for start in range(0, 10, 3)]
    for n, ends in ((4, [6, 9, 10]), (3, [3, 6, 9, 10]), (20, [10]), (0, [])):
        for _ in range(2):
            assert [piece.stop for piece in pieces if Every(n, 10)(piece)] == ends


def test_the_best_line_is_the_lowest_and_the_first_of_equals():
    lines = [{"step": step, FIGURE: x} for step, x in ((50, 3.0), (100, 1.0), (150, 1.0))]
    assert best_line([{"step": 25}, *lines, {"step": 250}]) == (lines[1], FIGURE)
    # FID has another scale: what the last line has decides.
    fid = {"step": 250, "fid": 90.0}
    assert best_line([*lines, fid]) == (fid, "fid") and best_line([{"step": 25}]) is None


@pytest.fixture
def wandb(monkeypatch):
    """In place of the package."""
    module = Mock(Image=lambda array: ("I", array.tolist()))
    module.run = module.init.return_value
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def events(folder):
    """Those in the files of TensorBoard, but for the version of each file."""
    for path in sorted((folder / "tensorboard").iterdir()):
        content = io.BytesIO(path.read_bytes())
        while header := content.read(12):  # length, its checksum, the event, its checksum
            event = Event.FromString(content.read(struct.unpack("<Q", header[:8])[0]))
            content.read(4)
            if not event.file_version:
                yield event


def test_both_get_numbers_and_pictures_and_resume(tmp_path, wandb):
    """TensorBoard hides what it has of later steps; wandb, which ignores steps that it has, goes on
    with the same run wherever the folder is."""
    folder, description = tmp_path / "digits", {"model": {"channels": 1}}
    with open_trackers(BOTH, folder, description, 0) as track:
        track(50, {**LINE, "samples": PICTURE})
    given = wandb.init.call_args.kwargs
    expected = {"dir": str(folder), "name": "digits", "config": description, "resume": "allow"}
    assert given.items() >= expected.items()
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(ZeroDivisionError), open_trackers(BOTH, moved, {}, 100) as track:
        track(200, {"step": 200, "loss": 2.0})
        raise ZeroDivisionError
    assert wandb.init.call_args.kwargs["id"] == given["id"] and len(given["id"]) == 16
    logged = [call({**NUMBERS, "samples": ("I", PICTURE.tolist())}, step=50)]
    assert wandb.run.log.call_args_list == [*logged, call({"loss": 2.0}, step=200)]
    assert wandb.run.finish.call_count == 2, "also where the training fails"

    found = list(events(moved))
    assert [event.step for event in found] == [0, *[50] * 5, 101, 200]
    assert found[0].session_log.status == found[6].session_log.status == SessionLog.START
    values = [event.summary.value[0] for event in found[1:6]]
    expected = pytest.approx({**NUMBERS, "samples": 0})
    assert {value.tag: value.simple_value for value in values} == expected
    encoded = io.BytesIO(values[-1].image.encoded_image_string)
    np.testing.assert_array_equal(Image.open(encoded), PICTURE)
    wandb.init.side_effect = RuntimeError("api_key not configured")
    with pytest.raises(runs.FieldError, match="tracker: wandb: api_key not configured"):
        open_trackers(BOTH, moved, {}, 0).__enter__()


def test_what_fails_is_left_out(tmp_path, wandb, monkeypatch):
    """The training goes on with those that work, also where the disk is full and many pictures
    follow."""
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda _: open("/dev/full", "wb"))
    wandb.run.log.side_effect = [None, ConnectionError("no network")]
    with open_trackers(BOTH, tmp_path, {}, 0) as track:
        with pytest.warns(UserWarning, match="^tensorboard is left out .*No space left"):
            track(50, LINE)
        with pytest.warns(UserWarning, match="^wandb is left out from here on: .*no network"):
            track(100, LINE)
        for step in range(100):
            track(step, {"samples": np.tile(PICTURE, (50, 50, 1))})
    assert wandb.run.log.call_count == 2 and wandb.run.finish.call_count == 1
