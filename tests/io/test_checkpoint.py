"""What is written comes back to the bit, or is named, whatever happened in between."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_ddpm.io import checkpoint as checkpoints
from jax_ddpm.io.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    restore,
    save_checkpoint,
)
from jax_ddpm.training import init_train_state

TREE = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "bias": np.ones(2)}}
STATE = {"key": {"impl": "threefry2x32", "data": [0, 7]}, "pending": {"loss": [0.1, None]}}


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(tmp_path, 12, {"params": TREE, "count": np.int32(5)}, STATE)


def test_everything_comes_back(saved):
    step, arrays, state = load_checkpoint(saved)
    assert (saved.name, step, state) == ("00000012", 12, STATE)
    np.testing.assert_array_equal(arrays["params"]["layer/kernel"], TREE["layer"]["kernel"])
    assert arrays["params"]["layer/bias"].dtype == np.float64
    assert arrays["count"][""] == 5 and arrays["count"][""].shape == ()
    assert {path.name for path in saved.parent.iterdir()} == {"00000012"}


def test_a_training_state_is_restored_to_the_bit(tmp_path, key):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    params = {"w": jax.random.normal(key, (3, 4)), "b": jnp.zeros((), jnp.float32)}
    state = init_train_state(key, params, optimizer)
    path = save_checkpoint(tmp_path, 0, {"optimizer": state.opt_state}, {})
    back = restore(state.opt_state, load_checkpoint(path).arrays["optimizer"])
    assert jax.tree.structure(back) == jax.tree.structure(state.opt_state)
    for got, expected in zip(jax.tree.leaves(back), jax.tree.leaves(state.opt_state), strict=True):
        assert got.dtype == expected.dtype and got.tobytes() == np.asarray(expected).tobytes()


def test_every_flipped_bit_of_every_file_is_named(saved):
    for path in sorted(saved.iterdir()):
        content = path.read_bytes()
        for position in range(len(content)):
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=path.name):
                load_checkpoint(saved)
        path.write_bytes(content)
    load_checkpoint(saved)


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "missing"])
def test_every_damaged_file_is_named(saved, damage):
    for path in sorted(saved.iterdir()):
        content = path.read_bytes()
        path.unlink()
        if damage != "missing":
            changed = {"truncated": content[:-1], "longer": content + b"\n", "empty": b""}
            path.write_bytes(changed[damage])
        with pytest.raises(ValueError, match=path.name):
            load_checkpoint(saved)
        path.write_bytes(content)


def test_a_later_format_is_refused_by_its_number(saved, monkeypatch):
    monkeypatch.setattr(checkpoints, "FORMAT", 2)
    later = save_checkpoint(saved.parent, 13, {}, {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"manifest.json: expected format 1, got 2: another ver"):
        load_checkpoint(later)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"kind": "jax_ddpm checkpoint", "format": 1, "step": 1, "files": {}}',
        b'\xff\xfe{"format": 1}',
    ],
)
def test_a_foreign_manifest_is_refused(saved, content):
    (saved / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match="manifest.json"):
        load_checkpoint(saved)


@pytest.mark.parametrize("files", [{"../x.safetensors": {}}, {"state.json": 3}, [], None])
def test_a_sealed_but_hostile_manifest_is_refused(saved, files):
    content = {"kind": "jax_ddpm checkpoint", "format": 1, "step": 1, "files": files}
    (saved / "manifest.json").write_bytes(checkpoints._sealed(content))
    with pytest.raises(ValueError, match="manifest.json: expected a step and files beside it"):
        load_checkpoint(saved)


def test_what_is_not_finite_is_never_kept(saved):
    bad = {"layer": {"kernel": np.array([1.0, np.nan])}}
    with pytest.raises(ValueError, match="params: expected finite numbers, got NaN or inf"):
        save_checkpoint(saved.parent, 13, {"params": bad}, {})
    with pytest.raises(ValueError):
        save_checkpoint(saved.parent, 13, {}, {"loss": float("nan")})
    assert list_checkpoints(saved.parent) == [saved]


@pytest.mark.parametrize("broken", ["fsync", "rename"])
def test_a_failed_save_leaves_what_was_there(saved, monkeypatch, broken):
    before = {path: path.read_bytes() for path in saved.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    for step in (12, 13):
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(saved.parent, step, {"params": TREE}, {})
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in saved.iterdir()} == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_step_saved_again_takes_the_place_of_the_damaged_one(saved):
    (saved / "params.safetensors").write_bytes(b"")
    save_checkpoint(saved.parent, 12, {"params": TREE}, {})
    assert load_checkpoint(saved).step == 12
    assert list(saved.parent.iterdir()) == [saved]


def test_the_last_few_and_every_mth_are_kept(tmp_path):
    for step in range(10, 110, 10):
        save_checkpoint(tmp_path, step, {"params": TREE}, {})
    (tmp_path / ".00000999.tmp").mkdir()
    (tmp_path / ".00000050.damaged").mkdir()
    (tmp_path / "notes").mkdir()
    prune_checkpoints(tmp_path, keep=2, keep_every=40)
    assert {path.name for path in tmp_path.iterdir()} == {
        "00000040",
        "00000080",
        "00000090",
        "00000100",
        ".00000050.damaged",
        "notes",
    }
    prune_checkpoints(tmp_path, keep=0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["00000100"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda flat: flat.pop("w"), "expected an array w, got none"),
        (lambda flat: flat.update(v=np.ones(1)), "expected only the model's arrays, got v"),
        (lambda flat: flat.update(w=np.ones((2, 2))), r"expected w of float64\[2, 3\], got floa"),
        (lambda flat: flat.update(w=np.ones((2, 3), np.float32)), "got float32"),
    ],
)
def test_another_models_arrays_are_named(change, words):
    flat = {"w": np.ones((2, 3)), "b": np.ones(3)}
    template = dict(flat)
    change(flat)
    with pytest.raises(ValueError, match=words):
        restore(template, flat)


def test_the_manifest_can_be_checked_without_this_library(saved):
    """`sha256sum` is enough: digests are those of the files."""
    import hashlib

    manifest = json.loads((saved / "manifest.json").read_text())
    assert set(manifest["files"]) == {"params.safetensors", "count.safetensors", "state.json"}
    for name, expected in manifest["files"].items():
        content = (saved / name).read_bytes()
        assert len(content) == expected["bytes"]
        assert hashlib.sha256(content).hexdigest() == expected["sha256"]
