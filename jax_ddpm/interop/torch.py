"""PyTorch's state dicts, and the layers in them as Flax has them."""

import os
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from zipfile import is_zipfile

import jax.numpy as jnp
import numpy as np

from jax_ddpm._errors import check_choice
from jax_ddpm.interop.model import Network, parameter_shapes
from jax_ddpm.io.arrays import flatten, load_tensors, unflatten
from jax_ddpm.models import SimpleUNet, UNet

Weights = str | os.PathLike[str] | Mapping[str, Any]
Variables = dict[str, Any]
LayerKind = Literal["conv", "conv_transpose", "linear", "embedding", "norm"]
_LAYERS: dict[str, LayerKind] = {
    **{f"Conv{axes}d": "conv" for axes in (1, 2, 3)},
    **{f"ConvTranspose{axes}d": "conv_transpose" for axes in (1, 2, 3)},
    **{"Linear": "linear", "Embedding": "embedding", "GroupNorm": "norm", "LayerNorm": "norm"},
}
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
"""PyTorch's names of Flax's parameters."""

_LISTS = re.compile(r"\b(\w+_blocks|resnets|attentions|\w+samplers|to_out)_(\d+)")
# diffusers' names until 2022.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_state_dict(weights: Weights) -> dict[str, np.ndarray]:
    """Read arrays by name from a `.safetensors`, a pickle (by torch), or tensors by name.

    Nothing in a pickle is executed (`weights_only`, safe since torch 2.6). Raises `ValueError`
    naming a file that is missing or cannot be read, and `ImportError` without such a torch.
    """
    if isinstance(weights, Mapping):
        return to_arrays(weights)
    path = Path(weights)
    if path.suffix == ".safetensors":
        return to_arrays(load_tensors(path), copy=False)
    try:
        torch = import_module("torch")
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
            raise ImportError
    except ImportError:
        raise ImportError(f"{path}: to read a pickle, pip install 'torch>=2.6'") from None
    mmap = is_zipfile(path)  # the format before torch 1.6 is no zip, and cannot be mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return to_arrays(content, copy=False)
    except Exception as error:  # whatever a pickle does to its reader
        reason = str(error).partition("\n")[0]
        if "Weights only" in reason:
            reason = "it holds more than tensors"
        raise ValueError(f"{path}: expected a state dict of tensors: {reason}") from None


def to_arrays(state_dict: Mapping[str, Any], *, copy: bool = True) -> dict[str, np.ndarray]:
    """Arrays of tensors or arrays by name; copies, since training on in torch must not change them.

    `DataParallel`'s prefix `module.` is dropped. Raises `TypeError` naming an unreadable entry.
    """
    arrays = {}
    for name, value in state_dict.items():
        try:
            if isinstance(value, Mapping):
                raise TypeError("expected a tensor, got a dictionary; pass that alone")
            # NumPy refuses parameters that track gradients.
            value = value.detach() if hasattr(value, "detach") else value
            if str(getattr(value, "dtype", None)) == "torch.bfloat16":  # NumPy's is JAX's
                value = value.view(import_module("torch").int16).numpy().view(jnp.bfloat16)
            array = np.asarray(value)
            arrays[name] = array.copy() if copy else array
        except (TypeError, RuntimeError) as error:
            raise TypeError(f"state_dict: cannot read {name}: {error}") from None
    if all(name.startswith("module.") for name in arrays):
        return {name.removeprefix("module."): value for name, value in arrays.items()}
    return arrays


def torch_axes(kind: LayerKind, ndim: int) -> tuple[int, ...]:
    """Flax's axis for each axis of PyTorch's weight: [out, in, …], or transposed, [in, out, …]."""
    if kind in ("embedding", "norm"):
        return tuple(range(ndim))
    first = (ndim - 2, ndim - 1)
    return (*(first if kind == "conv_transpose" else first[::-1]), *range(ndim - 2))


def weight_from_torch(kind: LayerKind, weight: np.ndarray) -> np.ndarray:
    """Flax's kernel, embedding or scale: a view of a PyTorch layer's weight."""
    value = weight.transpose(np.argsort(torch_axes(kind, weight.ndim)))
    return np.flip(value, tuple(range(value.ndim - 2))) if kind == "conv_transpose" else value


def weight_to_torch(kind: LayerKind, value: np.ndarray) -> np.ndarray:
    """The inverse of `weight_from_torch`, as a C-contiguous copy."""
    if kind == "conv_transpose":
        value = np.flip(value, tuple(range(value.ndim - 2)))
    return np.array(value.transpose(torch_axes(kind, value.ndim)), order="C")


def layer_kinds(module: Any) -> dict[str, LayerKind]:
    """The kind of each layer with weights in a `torch.nn.Module`; `ValueError` names any other."""
    kinds = {}
    for name, layer in module.named_modules():
        if any(True for _ in layer.parameters(recurse=False)):
            kind = type(layer).__name__
            check_choice(name or "module", kind, tuple(_LAYERS))
            kinds[name] = _LAYERS[kind]
    return kinds


def layers_from_torch(state_dict: Mapping[str, Any], kinds: Mapping[str, LayerKind]) -> Variables:
    """Flax's variables, `{"params": …}`, of PyTorch's layers, for networks of one's own.

    Conversion only transposes and flips, so it suits gradients too. Not in the weights: Flax's
    norms add 1e-6 to the variance, PyTorch's 1e-5; a `ConvTranspose2d` of kernel k and padding p is
    `nn.ConvTranspose` with padding k - 1 - p (at stride 1, `nn.Conv` with that padding).

    Args:
      state_dict: tensors (on the CPU) or arrays by name, whose dtype is kept.
      kinds: "conv", "conv_transpose", "linear", "embedding" or "norm", by each layer's PyTorch
        name, as `layer_kinds` returns them.

    Raises:
      KeyError: a layer has no weight in `state_dict`.
      ValueError: a tensor belongs to no layer, or a kind is unknown.

    Examples:
      >>> state_dict = {"layers.0.weight": np.ones((2, 3)), "layers.0.bias": np.zeros(2)}
      >>> variables = interop.layers_from_torch(state_dict, {"layers.0": "linear"})
      >>> variables["params"]["layers_0"]["kernel"].shape
      (3, 2)
    """
    tensors = to_arrays(state_dict)
    leaves = {"embedding": "embedding", "norm": "scale"}
    params = {}
    for layer, kind in kinds.items():
        check_choice(f"kinds[{layer!r}]", kind, LayerKind)
        path = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", layer).replace(".", "/")
        weight = weight_from_torch(kind, tensors.pop(f"{layer}.weight"))
        params[f"{path}/{leaves.get(kind, 'kernel')}"] = weight
        if f"{layer}.bias" in tensors:
            params[f"{path}/bias"] = tensors.pop(f"{layer}.bias")
    if tensors:
        raise ValueError(f"kinds: expected the layer of every tensor, got none for {min(tensors)}")
    return {"params": unflatten(params)}


def simple_unet_from_torch(state_dict: Mapping[str, Any]) -> Variables:
    """Variables of `SimpleUNet` from the PyTorch tutorial's `state_dict`.

    Its tensors (on the CPU) or arrays keep their dtype.

    Raises:
      ValueError: a tensor is missing, unknown or misshapen; the message names it.

    Examples:
      >>> model, x = ddpm.SimpleUNet(), jnp.zeros((1, 8, 8, 3))
      >>> variables = jax.jit(model.init)(jax.random.key(0), x, 0)
      >>> again = interop.simple_unet_from_torch(interop.simple_unet_to_torch(variables))
      >>> jax.tree.all(jax.tree.map(np.array_equal, variables, again))
      True
    """
    tensors = to_arrays(state_dict)
    first = tensors.get("down1.weight", np.empty(0))
    return variables_from(tensors, SimpleUNet(channels=first.shape[1] if first.ndim == 4 else 3))


def unet_from_torch(state_dict: Mapping[str, Any], model: UNet, *, copy: bool = True) -> Variables:
    """Variables of `UNet` from the state dict of diffusers' `UNet2DModel`.

    Args:
      state_dict: as in `simple_unet_from_torch`, with the same errors.
      model: the network, with the fields of the `UNet2DModel`.
      copy: False makes the variables views of the tensors.

    Examples:
      >>> model = runs.load_run("runs/digits")
      >>> variables = interop.unet_from_torch(interop.unet_to_torch(model.variables), model.model)
      >>> jax.tree.all(jax.tree.map(np.array_equal, model.variables, variables))
      True
    """
    tensors = to_arrays(state_dict, copy=copy)
    for old, new in _OLD_ATTENTION.items():
        tensors = {name.replace(f".{old}.", f".{new}."): each for name, each in tensors.items()}
    return variables_from(tensors, model)


def unet_to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """State dict of variables of `UNet` (for `UNet2DModel`) or `SimpleUNet`: C-contiguous arrays.

    Examples:
      >>> interop.unet_to_torch(runs.load_run("runs/digits").variables)["conv_in.weight"].shape
      (8, 1, 3, 3)
    """
    return {
        torch_name(path): weight_to_torch(leaf_kind(path, np.ndim(value)), np.asarray(value))
        for path, value in flatten(variables["params"]).items()
    }


simple_unet_to_torch = unet_to_torch
"""The PyTorch tutorial's state dict, as C-contiguous arrays, from variables of `SimpleUNet`."""


def torch_name(path: str) -> str:
    """The name in these networks' state dicts of the parameter at `path`."""
    *modules, leaf = _LISTS.sub(r"\1.\2", path).split("/")
    return ".".join([*modules, LEAVES[leaf]])


def leaf_kind(path: str, ndim: int) -> LayerKind:
    """The kind of layer that a parameter of these networks belongs to; that of a bias is `norm`."""
    if not path.endswith(("/kernel", "/positions")):
        return "norm"
    if path in ("up1/kernel", "up2/kernel"):  # of `SimpleUNet`
        return "conv_transpose"
    return "conv" if ndim == 4 else "linear"


def variables_from(
    tensors: Mapping[str, np.ndarray],
    network: Network,
    name_of: Callable[[str], str] = torch_name,
    part_of: Callable[[str, np.ndarray], np.ndarray] = lambda path, tensor: tensor,
) -> Variables:
    """Variables of `network`: the parameter at `path` is `part_of` the tensor `name_of(path)`.

    A tensor is expected to hold, one after the other, the parameters that share its name.
    """
    expected, params, shapes = {}, {}, parameter_shapes(network)
    for path, shape in shapes.items():
        name = name_of(path)
        first, *rest = (shape[axis] for axis in torch_axes(leaf_kind(path, len(shape)), len(shape)))
        expected[name] = (first + sum(expected.get(name, ())[:1]), *rest)
    for name in sorted(expected.keys() | tensors.keys()):
        got = tensors[name].shape if name in tensors else "no tensor"
        if got != (want := expected.get(name, "no tensor")):
            raise ValueError(f"state_dict: {name}: expected {want}, got {got}")
    for path in shapes:
        weight = part_of(path, tensors[name_of(path)])
        params[path] = weight_from_torch(leaf_kind(path, weight.ndim), weight)
    return {"params": unflatten(params)}
