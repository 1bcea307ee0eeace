"""The U-Net's weights, in and out: the names and layouts of diffusers' `UNet2DModel`.

| PyTorch                                     | Flax                                       |
|---------------------------------------------|--------------------------------------------|
| `down_blocks.0.resnets.1.conv1.weight`      | `down_blocks_0/resnets_1/conv1/kernel`     |
| attention `query`, …, `proj_attn` (to 2022) | `to_q`, `to_k`, `to_v`, `to_out_0`         |

The axes of a weight go where `layers` says.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_ddpm.interop.layers import LayerKind, torch_shape, weight_from_torch, weight_to_torch
from jax_ddpm.interop.tensors import check_tensors, parameter_shapes, params_of, to_arrays
from jax_ddpm.io.arrays import flatten, unflatten
from jax_ddpm.models import UNet

_LISTS = re.compile(
    r"\b(down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers|to_out)_(\d+)"
)
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(attentions\.\d+\.)({'|'.join(_OLD_ATTENTION)})\b")
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def unet_from_torch(state_dict: Mapping[str, Any], model: UNet) -> dict[str, Any]:
    """Variables of `model` from a `UNet2DModel`'s `state_dict`.

    Accepts tensors (on the CPU) or arrays and keeps their dtype. Raises `ValueError` naming any
    tensor that is missing, unknown or misshapen.
    """
    return unet_variables(to_arrays(state_dict), model)


def unet_variables(arrays: Mapping[str, np.ndarray], model: UNet) -> dict[str, Any]:
    """As `unet_from_torch`, of arrays that nobody changes: views of them, not copies."""
    tensors = {_current_name(name): value for name, value in arrays.items()}
    expected = parameter_shapes(model)
    names = {path: _torch_name(path) for path in expected}
    check_tensors(
        tensors,
        {
            names[path]: torch_shape(_kind(path, len(shape)), shape)
            for path, shape in expected.items()
        },
        owner="the U-Net's",
    )
    params = {
        path: weight_from_torch(_kind(path, tensors[name].ndim), tensors[name])
        for path, name in names.items()
    }
    return {"params": unflatten(params)}


def unet_to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A `UNet2DModel`'s state dict, as C-contiguous NumPy arrays, from variables of `UNet`."""
    return {
        _torch_name(path): weight_to_torch(_kind(path, np.ndim(value)), np.asarray(value))
        for path, value in flatten(params_of(variables)).items()
    }


def _torch_name(path: str) -> str:
    *modules, leaf = _LISTS.sub(r"\1.\2", path).split("/")
    return ".".join([*modules, _LEAVES[leaf]])


def _current_name(name: str) -> str:
    return _OLD_NAME.sub(lambda match: match[1] + _OLD_ATTENTION[match[2]], name)


def _kind(path: str, axes: int) -> LayerKind:
    if not path.endswith("/kernel"):
        return "norm"  # biases and embeddings likewise: as they are
    return "conv" if axes == 4 else "linear"
