"""PyTorch's layers as Flax's: which axes of a weight go where.

| PyTorch layer, and its weight             | kind             | Flax                          |
|-------------------------------------------|------------------|-------------------------------|
| `Conv2d` [out, in, row, column]           | `conv`           | kernel [row, column, in, out] |
| `ConvTranspose2d` [in, out, row, column]  | `conv_transpose` | the same, flipped in both     |
| `Linear` [out, in]                        | `linear`         | kernel [in, out]              |
| `Embedding` [entries, features]           | `embedding`      | embedding, as it is           |
| `GroupNorm`, `LayerNorm` [features]       | `norm`           | scale, as it is               |

Convolutions of one and three axes go alike. Only moves and flips, so a round trip returns every
bit, and a gradient is converted as its weight is.

What no weight shows: Flax's norms add 1e-6 to the variance where PyTorch's add 1e-5; a
`ConvTranspose2d` of kernel k and padding p is `nn.ConvTranspose` with padding k - 1 - p, and at
stride 1 it is a `nn.Conv` with that padding.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from jax_ddpm._errors import check_choice
from jax_ddpm.interop.tensors import to_arrays
from jax_ddpm.io.arrays import unflatten

LayerKind = Literal["conv", "conv_transpose", "linear", "embedding", "norm"]
_LEAVES = {"embedding": "embedding", "norm": "scale"}
_LAYERS: dict[str, LayerKind] = {
    **{f"Conv{axes}d": "conv" for axes in (1, 2, 3)},
    **{f"ConvTranspose{axes}d": "conv_transpose" for axes in (1, 2, 3)},
    "Linear": "linear",
    "Embedding": "embedding",
    "GroupNorm": "norm",
    "LayerNorm": "norm",
}


def weight_from_torch(kind: LayerKind, weight: np.ndarray) -> np.ndarray:
    """Flax's kernel, embedding or scale of a PyTorch layer's weight."""
    if kind == "linear":
        return weight.T
    if kind == "conv":
        return np.moveaxis(weight, (0, 1), (-1, -2))
    if kind == "conv_transpose":
        return np.moveaxis(_flipped(weight, range(2, weight.ndim)), (0, 1), (-2, -1))
    return weight


def weight_to_torch(kind: LayerKind, value: np.ndarray) -> np.ndarray:
    """The inverse of `weight_from_torch`, C-contiguous and writable."""
    if kind == "linear":
        value = value.T
    elif kind == "conv":
        value = np.moveaxis(value, (-1, -2), (0, 1))
    elif kind == "conv_transpose":
        value = np.moveaxis(_flipped(value, range(value.ndim - 2)), (-2, -1), (0, 1))
    value = np.ascontiguousarray(value)
    # An opened checkpoint is a view of its file, which whoever gets the weights may not write to.
    return value if value.flags.writeable else value.copy()


def torch_shape(kind: LayerKind, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch of a kernel, embedding or scale of this one."""
    if kind == "linear":
        return shape[::-1]
    if kind == "conv":
        return (shape[-1], shape[-2], *shape[:-2])
    if kind == "conv_transpose":
        return (shape[-2], shape[-1], *shape[:-2])
    return shape


def layer_kinds(module: Any) -> dict[str, LayerKind]:
    """The layers of a `torch.nn.Module` that have weights, by name: what `layers_from_torch` asks.

    Raises `ValueError` naming a layer with parameters that is of another kind.
    """
    kinds = {}
    for name, layer in module.named_modules():
        if not any(True for _ in layer.parameters(recurse=False)):
            continue
        kind = type(layer).__name__
        if kind not in _LAYERS:
            raise ValueError(
                f"{name or 'module'}: expected one of {', '.join(_LAYERS)}, got {kind}"
            )
        kinds[name] = _LAYERS[kind]
    return kinds


def layers_from_torch(
    state_dict: Mapping[str, Any], kinds: Mapping[str, LayerKind]
) -> dict[str, Any]:
    """Flax's variables, `{"params": …}`, of PyTorch's layers.

    Args:
      state_dict: tensors (on the CPU) or arrays by name; their dtype is kept.
      kinds: the kind of every layer by its name in PyTorch. `blocks.0.conv` becomes
        `blocks_0/conv`, as Flax names what stands in a list.

    Raises:
      ValueError: a layer's weight is missing, or a tensor belongs to none of them.
    """
    tensors = to_arrays(state_dict)
    params = {}
    for layer, kind in kinds.items():
        check_choice(f"kinds[{layer!r}]", kind, get_args(LayerKind))
        if f"{layer}.weight" not in tensors:
            raise ValueError(f"state_dict: expected a tensor {layer}.weight, got none")
        path = _flax_path(layer)
        weight = weight_from_torch(kind, tensors.pop(f"{layer}.weight"))
        params[f"{path}/{_LEAVES.get(kind, 'kernel')}"] = weight
        if f"{layer}.bias" in tensors:
            params[f"{path}/bias"] = tensors.pop(f"{layer}.bias")
    if tensors:
        raise ValueError(f"kinds: expected the layer of every tensor, got none for {min(tensors)}")
    return {"params": unflatten(params)}


def _flax_path(name: str) -> str:
    parts: list[str] = []
    for part in name.split("."):
        if part.isdecimal() and parts:
            parts[-1] += f"_{part}"
        else:
            parts.append(part)
    return "/".join(parts)


def _flipped(x: np.ndarray, axes: range) -> np.ndarray:
    return np.flip(x, tuple(axes))
