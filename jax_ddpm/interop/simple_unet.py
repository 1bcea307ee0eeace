"""The tutorial's weights, in and out: the layers of PyTorch and Flax have the same names."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_ddpm.interop.layers import LayerKind, layers_from_torch, weight_to_torch
from jax_ddpm.interop.tensors import check_tensors, params_of, to_arrays

_LAYERS: dict[str, LayerKind] = {
    "down1": "conv",
    "down2": "conv",
    "time_mlp": "linear",
    "up1": "conv_transpose",
    "up2": "conv_transpose",
}


def simple_unet_from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of `SimpleUNet` from the tutorial's `state_dict`.

    Accepts tensors (on the CPU) or arrays and keeps their dtype. Raises `ValueError` naming any
    tensor that is missing, unknown or misshapen.
    """
    tensors = to_arrays(state_dict)
    if "down1.weight" not in tensors or tensors["down1.weight"].ndim != 4:
        raise ValueError("state_dict: expected the tutorial's SimpleUNet, got no 4-d down1.weight")
    _check_shapes(tensors, channels=tensors["down1.weight"].shape[1])
    return layers_from_torch(tensors, _LAYERS)


def simple_unet_to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tutorial's state dict, as C-contiguous NumPy arrays, from variables of `SimpleUNet`."""
    params = params_of(variables)
    tensors = {}
    for layer, kind in _LAYERS.items():
        tensors[f"{layer}.weight"] = weight_to_torch(kind, np.asarray(params[layer]["kernel"]))
        tensors[f"{layer}.bias"] = np.asarray(params[layer]["bias"])
    return tensors


def _check_shapes(tensors: Mapping[str, np.ndarray], channels: int) -> None:
    expected = {
        "down1.weight": (64, channels, 3, 3),
        "down1.bias": (64,),
        "down2.weight": (128, 64, 3, 3),
        "down2.bias": (128,),
        "time_mlp.weight": (128, 1),
        "time_mlp.bias": (128,),
        "up1.weight": (128, 64, 3, 3),
        "up1.bias": (64,),
        "up2.weight": (64, channels, 3, 3),
        "up2.bias": (channels,),
    }
    check_tensors(tensors, expected, owner="SimpleUNet's")
