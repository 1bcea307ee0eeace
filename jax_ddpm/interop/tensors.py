"""State dicts as they come from PyTorch, without PyTorch."""

import os
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm.io.arrays import flatten, load_tensors
from jax_ddpm.models import NoisyClassifier, UNet


def read_state_dict(
    weights: str | os.PathLike[str] | Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Arrays by name: of a `.safetensors`, of a pickle that torch reads, or of tensors themselves.

    torch is imported for a pickle alone, and runs nothing that is in it (`weights_only`, which
    torch 2.6 made safe). Raises `ValueError` naming a file that is missing or cannot be read, and
    `ImportError` without such a torch.
    """
    if isinstance(weights, Mapping):
        return to_arrays(weights)
    path = Path(weights)
    if path.suffix == ".safetensors":
        return _without_module(load_tensors(path))
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of weights, got none")
    try:
        torch = import_module("torch")
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
            raise ImportError
    except ImportError:
        raise ImportError(
            f"{path}: a pickle is read by torch: pip install 'torch>=2.6', or convert it "
            "elsewhere to safetensors"
        ) from None
    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        try:
            content = load(mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            content = load()
    except Exception as error:  # whatever a pickle does to its reader
        reason = str(error).partition("\n")[0]
        if "Weights only" in reason:
            reason = "it holds more than tensors"
        raise ValueError(f"{path}: expected a state dict of tensors: {reason}") from None
    if not isinstance(content, Mapping):
        got = type(content).__name__
        raise ValueError(f"{path}: expected a state dict of tensors, got {got}")
    for name, value in content.items():
        if not hasattr(value, "shape"):
            got = f"{type(value).__name__} in {name!r}"
            raise ValueError(
                f"{path}: expected a state dict of tensors, got {got}; save that alone"
            )
    return to_arrays(content, copy=False)


def to_arrays(state_dict: Mapping[str, Any], *, copy: bool = True) -> dict[str, np.ndarray]:
    """Tensors or arrays by name, copied, since training on in torch must not change them.

    The prefix `module.` that `DataParallel` gives all names is left out. Raises `TypeError` naming
    what cannot be read.
    """
    arrays = {}
    for name, value in state_dict.items():
        # A parameter that tracks gradients refuses NumPy, and this package never imports torch.
        value = value.detach() if hasattr(value, "detach") else value
        try:
            if str(getattr(value, "dtype", None)) == "torch.bfloat16":  # NumPy's is JAX's
                value = value.view(import_module("torch").int16).numpy().view(jnp.bfloat16)
            arrays[name] = np.asarray(value).copy() if copy else np.asarray(value)
        except (TypeError, RuntimeError) as error:
            raise TypeError(f"state_dict: cannot read {name}: {error}") from None
    return _without_module(arrays)


def _without_module(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same without `DataParallel`'s prefix, if all names have it."""
    if all(name.startswith("module.") for name in arrays):
        return {name.removeprefix("module."): value for name, value in arrays.items()}
    return arrays


def params_of(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters among Flax's variables. Raises `ValueError` if there are none."""
    if "params" not in variables or not isinstance(variables["params"], Mapping):
        got = ", ".join(map(str, variables)) or "nothing"
        raise ValueError(f"variables: expected a tree of 'params', as model.init gives, got {got}")
    return variables["params"]


def parameter_shapes(model: UNet | NoisyClassifier) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by its path: a trace of `model.init`, without its arithmetic.

    Raises `ValueError` naming a field of `model` that does not fit.
    """
    side = 2 ** (len(model.block_out_channels) - 1)
    if isinstance(model, NoisyClassifier):
        side = model.sample_size
    inputs: list[Any] = [np.zeros((1, side, side, model.in_channels), np.float32), 0]
    if isinstance(model, UNet) and model.num_class_embeds is not None:
        inputs.append(np.zeros(1, np.int32))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))
    return {path: leaf.shape for path, leaf in flatten(variables["params"]).items()}


def check_tensors(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], owner: str
) -> None:
    """Raises `ValueError` naming the first tensor that is missing, unknown or misshapen."""
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"state_dict: expected a tensor {name}, got none")
        if name not in expected:
            raise ValueError(f"state_dict: expected only {owner} tensors, got {name}")
        if tensors[name].shape != expected[name]:
            raise ValueError(
                f"state_dict: expected {name} of shape {expected[name]}, got {tensors[name].shape}"
            )
