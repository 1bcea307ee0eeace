"""State dicts, in the files and the formats that PyTorch wrote over the years."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_ddpm.interop.torch import read_state_dict
from jax_ddpm.io.arrays import save_tensors

ARRAYS = {"a.weight": np.arange(600, dtype=np.float32).reshape(20, 30), "a.bias": np.ones(20)}


@pytest.fixture
def tensors(torch):
    return {name: torch.tensor(array) for name, array in ARRAYS.items()}


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "DataParallel's"])
@pytest.mark.parametrize("kind", ["safetensors", "pickle", "a pickle before torch 1.6"])
def test_files(tmp_path, torch, tensors, kind, prefix):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    if kind == "safetensors":
        save_tensors(path, {f"{prefix}{name}": array for name, array in ARRAYS.items()})
    else:
        named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        torch.save(named, path, _use_new_zipfile_serialization=kind == "pickle")
    found = read_state_dict(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=f"{path}: expected a"):
        read_state_dict(path)


def test_what_is_no_state_dict_is_named_and_runs_nothing(tmp_path, torch, tensors):
    class Code:
        def __reduce__(self):
            return (Path(tmp_path / "it-ran").touch, ())

    path = tmp_path / "x.pt"
    with pytest.raises(ValueError, match="x.pt: expected a file of weights, got none"):
        read_state_dict(path)
    for content, got in (
        ({"model": tensors, "step": 3}, "got dict in 'model'"),
        ([*tensors.values()], "got list"),
        (torch.nn.Linear(1, 1), "it holds more than tensors"),
        ({"a.bias": Code()}, "it holds more than tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"x.pt: expected a state dict of tensors.*{got}"):
            read_state_dict(path)
    assert not (tmp_path / "it-ran").exists()


def test_a_pickle_without_torch(tmp_path, monkeypatch):
    (tmp_path / "x.pt").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="x.pt: .*pip install .torch"):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.slow
def test_the_library_never_imports_torch():
    code = "import sys, jax_ddpm, jax_ddpm.io.arrays; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
