"""The tutorial's weights, in and out: PyTorch names and layouts against Flax's.

| PyTorch                                        | Flax                       |
|------------------------------------------------|----------------------------|
| Conv2d weight [out, in, row, column]           | [row, column, in, out]     |
| ConvTranspose2d weight [in, out, row, column]  | the same, kernel flipped   |
| Linear weight [out, in]                        | [in, out]                  |

Only moves and flips, so a round trip returns every bit.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_ddpm.interop.tensors import as_numpy, check_tensors

__all__ = ["simple_unet_from_torch", "simple_unet_to_torch"]

_LAYERS = ("down1", "down2", "time_mlp", "up1", "up2")


def simple_unet_from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of `SimpleUNet` from the tutorial's `state_dict`.

    Accepts tensors (on the CPU) or arrays and keeps their dtype. Raises `ValueError` naming any
    tensor that is missing, unknown or misshapen.
    """
    tensors = {name: as_numpy(value) for name, value in state_dict.items()}
    if "down1.weight" not in tensors or tensors["down1.weight"].ndim != 4:
        raise ValueError("state_dict: expected the tutorial's SimpleUNet, got no 4-d down1.weight")
    _check_shapes(tensors, channels=tensors["down1.weight"].shape[1])
    params = {
        layer: {
            "kernel": _kernel_from_torch(layer, tensors[f"{layer}.weight"]),
            "bias": tensors[f"{layer}.bias"],
        }
        for layer in _LAYERS
    }
    return {"params": params}


def simple_unet_to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tutorial's state dict, as C-contiguous NumPy arrays, from variables of `SimpleUNet`."""
    params = variables["params"]
    tensors = {}
    for layer in _LAYERS:
        kernel = np.asarray(params[layer]["kernel"])
        tensors[f"{layer}.weight"] = np.ascontiguousarray(_kernel_to_torch(layer, kernel))
        tensors[f"{layer}.bias"] = np.asarray(params[layer]["bias"])
    return tensors


def _kernel_from_torch(layer: str, weight: np.ndarray) -> np.ndarray:
    if layer == "time_mlp":
        return weight.T
    if layer.startswith("up"):
        return weight[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
    return weight.transpose(2, 3, 1, 0)


def _kernel_to_torch(layer: str, kernel: np.ndarray) -> np.ndarray:
    if layer == "time_mlp":
        return kernel.T
    if layer.startswith("up"):
        return kernel[::-1, ::-1].transpose(2, 3, 0, 1)
    return kernel.transpose(3, 2, 0, 1)


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
