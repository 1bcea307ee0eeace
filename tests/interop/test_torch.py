"""PyTorch's layers and the tutorial's network in Flax and back to the bit; state dicts in all the
files and formats that PyTorch wrote."""

import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from torch import nn as tnn

from jax_ddpm.interop import layer_kinds, layers_from_torch
from jax_ddpm.interop import simple_unet_from_torch as from_torch
from jax_ddpm.interop import simple_unet_to_torch as to_torch
from jax_ddpm.interop.torch import read_state_dict, weight_to_torch
from jax_ddpm.io.arrays import save_tensors
from torch_reference.models.simple_unet import SimpleUNet

LAYERS = {
    "conv": (tnn.Conv2d(4, 6, (3, 5), padding=(1, 2)), nn.Conv(6, (3, 5), padding=(1, 2))),
    "one axis": (tnn.Conv1d(4, 6, 3, padding=1), nn.Conv(6, (3,), padding=1)),
    "depthwise": (
        tnn.Conv2d(4, 8, 3, groups=4, bias=False),
        nn.Conv(8, (3, 3), padding="VALID", feature_group_count=4, use_bias=False),
    ),
    "transposed": (
        tnn.ConvTranspose2d(4, 6, (4, 3), stride=(2, 1), padding=1),
        nn.ConvTranspose(6, (4, 3), strides=(2, 1), padding=((2, 2), (1, 1))),
    ),
    "linear": (tnn.Linear(4, 6), nn.Dense(6)),
    "group norm": (tnn.GroupNorm(2, 4), nn.GroupNorm(2, epsilon=1e-5)),
    "layer norm": (tnn.LayerNorm(4), nn.LayerNorm(epsilon=1e-5)),
    "embedding": (tnn.Embedding(5, 4), nn.Embed(5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    (theirs, ours), rng = LAYERS[name], np.random.default_rng(0)
    for parameter in theirs.double().parameters():
        parameter.data = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
    images = not isinstance(theirs, (tnn.Linear, tnn.LayerNorm, tnn.Embedding))
    x = rng.standard_normal((2, 6, 4) if name == "one axis" else (2, 6, 7, 4))
    if name == "embedding":
        x = rng.integers(0, 5, (2, 3))
    given = np.moveaxis(x, -1, 1).copy() if images else x
    expected = theirs(torch.from_numpy(given)).detach().numpy()
    expected = np.moveaxis(expected, 1, -1) if images else expected

    module = tnn.ModuleDict({"layer": theirs})
    params = layers_from_torch(module.state_dict(), layer_kinds(module))["params"]["layer"]
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms mix dtypes
        output = ours.apply({"params": params}, x)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-12 * np.abs(expected).max())

    (kind,) = layer_kinds(module).values()
    (value,) = (value for leaf, value in params.items() if leaf != "bias")
    np.testing.assert_array_equal(weight_to_torch(kind, value), theirs.weight.detach().numpy())


def test_the_tutorials_weights_come_and_go_as_copies():
    """Parameters that track gradients are taken; training on in torch leaves the copies alone."""
    parameters = dict(SimpleUNet(1).double().named_parameters())
    before = {name: each.detach().numpy().copy() for name, each in parameters.items()}
    variables = from_torch(parameters)
    with torch.no_grad():
        for each in parameters.values():
            each.add_(1)
    arrays = to_torch(variables)
    assert arrays.keys() == before.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name], strict=True)
        assert array.flags.c_contiguous


def test_what_does_not_fit_is_named():
    tensors = SimpleUNet().state_dict()
    one, four = {"down1.weight": tensors["down1.weight"]}, torch.zeros(4)
    for function, given, words in (
        (layer_kinds, tnn.Sequential(tnn.BatchNorm1d(1)), "0: expected one of .* got .BatchNorm1d"),
        (partial(layers_from_torch, kinds={}), one, "kinds: expected the layer of every tensor"),
        (from_torch, one, r"down1.bias: expected \(64,\), got no tensor"),
        (from_torch, tensors | {"extra": four}, r"extra: expected no tensor, got \(4,\)"),
        (from_torch, tensors | {"up2.bias": four}, r"up2.bias: expected \(3,\), got \(4,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            function(given)


ARRAYS = {"a.weight": np.arange(600, dtype=np.float32).reshape(20, 30), "a.bias": np.ones(20)}
TENSORS = {name: torch.tensor(array) for name, array in ARRAYS.items()}


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "DataParallel's"])
@pytest.mark.parametrize("kind", ["safetensors", "pickle", "a pickle before torch 1.6"])
def test_files(tmp_path, kind, prefix):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    if kind == "safetensors":
        save_tensors(path, {f"{prefix}{name}": array for name, array in ARRAYS.items()})
    else:
        named = {f"{prefix}{name}": tensor for name, tensor in TENSORS.items()}
        torch.save(named, path, _use_new_zipfile_serialization=kind == "pickle")
    found = read_state_dict(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=f"{path}: expected a"):
        read_state_dict(path)


def test_what_is_no_state_dict_is_named_and_runs_nothing(tmp_path):
    class Code:
        def __reduce__(self):
            return (Path(tmp_path / "it-ran").touch, ())

    path = tmp_path / "x.pt"
    with pytest.raises(ValueError, match="x.pt: expected .*: .*No such file"):
        read_state_dict(path)
    for content, got in (
        ({"model": TENSORS, "step": 3}, "model: .*got a dictionary"),
        ([*TENSORS.values()], ""),
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
