"""Inception's weights, from the file that torch-fidelity and pytorch-fid download."""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm._errors import FieldError, check_choice
from jax_ddpm.evaluation.networks import FeatureNetwork
from jax_ddpm.interop.torch import check_tensors, read_state_dict
from jax_ddpm.models.inception import InceptionV3

VARIABLE = "JAX_DDPM_INCEPTION"
"""Of the environment: where the weights lie, if nothing else says so."""

WHERE = (
    "FID's Inception is weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release "
    "v0.2.0 (github.com/toshas/torch-fidelity/releases) or pt_inception-2015-12-05-6726825d.pth of "
    "pytorch-fid's release fid_weights (github.com/mseitzer/pytorch-fid/releases); the SHA-256 of "
    "either begins with 6726825d"
)
_WITHOUT = "without it, images are compared by the features of a small classifier, which is no FID"
_EPSILON = 1e-3  # of the batch normalisation


def load_inception(
    path: str | os.PathLike[str] | None = None, *, dtype: Any = jnp.float32
) -> FeatureNetwork:
    """Read FID's InceptionV3 (Heusel et al. 2017): the 2015 release of TensorFlow, as PyTorch.

    `load_inception(path)(images)` takes uint8 images [batch, height, width, 3] of any size and
    gives a dict of "64", "192", "768", "2048" and "logits_unbiased", float32 [batch, n]. It is
    jitted; `apply_fn` is the pure function.

    Args:
      path: the `.pth` that torch-fidelity or pytorch-fid download (torch reads it), or a
        `.safetensors` of the same names. Default: what the environment variable
        JAX_DDPM_INCEPTION says. Nothing is downloaded.
      dtype: what it computes in, float32 or float64.

    Raises:
      FieldError: there is no such file, or its tensors are not those of the network; says where
        the file is published.
      ImportError: torch is needed for a `.pth`.
    """
    check_choice("dtype", jnp.dtype(dtype).name, ("float32", "float64"))
    if jnp.zeros((), dtype).dtype != dtype:
        raise FieldError("dtype", "expected float32, or jax_enable_x64 set, got float64 without it")
    path = path or os.environ.get(VARIABLE)
    if path is None:
        raise FieldError("path", f"expected a file, got none: {WHERE}; {_WITHOUT}")
    path = Path(path)
    if path.is_dir():
        raise FieldError("path", f"expected a file, got the folder {path}")
    if not path.is_file():
        raise FieldError("path", f"no such file: {path}: {WHERE}; {_WITHOUT}")
    model = InceptionV3(dtype=dtype)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    layers = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    try:
        tensors = {
            name: value
            for name, value in read_state_dict(path).items()
            if not name.endswith("num_batches_tracked")
        }
        check_tensors(tensors, _torch_shapes(layers), "Inception's")
    except ValueError as error:
        problem = str(error).removeprefix(f"{path}: ").removeprefix("state_dict: ")
        raise FieldError("path", f"{path} is not FID's Inception: {problem}") from None
    params = {name: _folded(tensors, name) for name in layers if name != "fc"}
    params["fc"] = {"kernel": tensors["fc.weight"].T}
    variables = {"params": jax.tree.map(lambda x: np.asarray(x, model.dtype), params)}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    apply_fn: Any = model.apply
    return FeatureNetwork(apply_fn, variables, "2048", f"InceptionV3, SHA-256 {digest}")


def _torch_shapes(shapes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in shapes.items():
        *size, inputs, outputs = layer["kernel"].shape
        if name == "fc":
            expected |= {"fc.weight": (outputs, inputs), "fc.bias": (outputs,)}
            continue
        expected[f"{name}.conv.weight"] = (outputs, inputs, *size)
        for what in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.bn.{what}"] = (outputs,)
    return expected


def _folded(tensors: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    gain, bias, mean, variance = (
        np.asarray(tensors[f"{name}.bn.{what}"], np.float64)
        for what in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / np.sqrt(variance + _EPSILON)
    kernel = np.asarray(tensors[f"{name}.conv.weight"], np.float64).transpose(2, 3, 1, 0)
    return {"kernel": kernel * scale, "bias": bias - mean * scale}
