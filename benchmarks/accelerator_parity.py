"""Parity on the accelerator: JAX there, torch on the CPU in float64.

The cases are those of `jax_ddpm.parity`. The maths runs in float32 and float64. The tutorial's
network and attention also run in the arithmetic that accelerators prefer, under limits of its own
(`REDUCED`).
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.harness import Row, attempt, available, left_out
from jax_ddpm.models.attention import dot_product_attention
from jax_ddpm.parity.harness import Case, DType, relative_error, run_case, vector
from jax_ddpm.parity.losses import LOSS_CASES
from jax_ddpm.parity.maths import MATHS_CASES
from jax_ddpm.parity.tolerances import REDUCED, TOLERANCES
from jax_ddpm.parity.tutorial import Setting, tutorial_cases

__all__ = ["Mode", "attention", "items", "modes"]

_NO_FLOAT64 = "a TPU has no float64"
_ATTENTION = ("output", "query's gradient", "key's gradient", "value's gradient")
_CPU_DEFAULT = "by default a CPU computes float32 in full"

Work = Callable[[], list[Row]]


class Mode(NamedTuple):
    """An arithmetic of the JAX network. `reduced` names its limits in `REDUCED`."""

    name: str
    dtype: DType
    fields: Mapping[str, Any]
    reduced: str | None = None


def modes(backend: str) -> tuple[list[Mode], list[Row]]:
    """What the backend computes in, most important first; and rows for what it does not."""
    found, missing = [Mode("float32", "float32", {"precision": "highest"})], []
    if backend == "tpu":
        missing.append(left_out(_labels("everything", "float64"), _NO_FLOAT64))
        found.append(Mode("float32 by default (bfloat16)", "float32", {}, "bfloat16"))
    else:
        found.append(Mode("float64", "float64", {"precision": "highest"}))
        if backend == "cpu":
            missing.append(left_out(_labels("networks", "TF32"), _CPU_DEFAULT))
        else:
            found.append(Mode("TF32", "float32", {}, "TF32"))
    found.append(Mode("bfloat16", "float32", {"dtype": jnp.bfloat16}, "bfloat16"))
    return found, missing


def items(*, tiny: bool) -> tuple[list[tuple[Row, Work]], list[Row]]:
    """Each comparison with its labels, most important first; and rows for what is left out."""
    network, missing = modes(jax.default_backend())
    found = [_networks(mode, tiny) for mode in network]
    dtypes: list[DType] = [mode.dtype for mode in network if mode.reduced is None]
    work = [*found[0], *(_maths(dtype) for dtype in dtypes)]
    for each in found[1:]:
        work += each
    name = "Ho et al.'s" if tiny else "35.7 M parameters"
    name = f"UNet, {name}: output"
    if available("diffusers"):
        work += [_unet(name, dtype) for dtype in dtypes]
    else:
        missing.append(left_out(_labels(name, "float32, float64"), "needs diffusers"))
    return work, missing


def attention(*, tiny: bool) -> list[tuple[Row, Work]]:
    """Each comparison of the forms that many tokens take, in blocks or cuDNN's."""
    found, _ = modes(jax.default_backend())
    return [_attention(mode, tokens=401 if tiny else 2048) for mode in found]


def _attention(mode: Mode, tokens: int) -> tuple[Row, Work]:
    name = f"{tokens:,} tokens, 4 heads of 32 channels: output and gradients"

    def compare(dtype: DType) -> tuple[Any, Any]:
        rng, dtype = np.random.default_rng(0), mode.fields.get("dtype", dtype)
        # Rounded first, so that both sides begin from the same numbers.
        inputs = [jnp.asarray(rng.standard_normal((1, tokens, 4, 32)), dtype) for _ in range(4)]
        theirs = _torch_attend([np.array(array, np.float64) for array in inputs])
        return _attend(inputs, mode.fields.get("precision")), theirs

    labels: Row = {**_labels(name, mode.name), "part": "attention"}
    return labels, lambda: [_compare(Case("attention", name, compare), mode) | labels]


def _attend(arrays: list[jax.Array], precision: Any) -> dict[str, Any]:
    *inputs, cotangent = arrays
    attend = jax.jit(lambda *inputs: dot_product_attention(*inputs, precision=precision))
    output, gradient = jax.vjp(attend, *inputs)
    found = (np.asarray(array, np.float64) for array in (output, *gradient(cotangent)))
    return dict(zip(_ATTENTION, found, strict=True))


def _torch_attend(arrays: list[np.ndarray]) -> dict[str, Any]:
    *inputs, cotangent = (torch.from_numpy(array).swapaxes(1, 2) for array in arrays)
    query, key, value = (array.requires_grad_() for array in inputs)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    tensors = (output, *torch.autograd.grad(output, (query, key, value), cotangent))
    tensors = (tensor.detach().swapaxes(1, 2).numpy() for tensor in tensors)
    return dict(zip(_ATTENTION, tensors, strict=True))


def _networks(mode: Mode, tiny: bool) -> list[tuple[Row, Work]]:
    """The output at the tutorial's size, the chain at a size that torch can follow in float64.

    Gradients stay small: a ReLU whose input is nearly zero falls on either side by rounding, and
    at 64×64 there are so many that float32 was off by 4e-4, where it is by 6e-7 at 8×8.
    """
    # Without a larger ε, Adam makes a whole step of the sign of a gradient near zero.
    setting = Setting(adam_steps=5, adam_eps=1.0, oracle="float64", fields=mode.fields)
    sizes = {} if tiny else {"forward": 64, "chain": 16}
    cases = [
        case
        for kind in ("forward", "gradients", "training", "chain")
        for case in tutorial_cases(setting._replace(size=sizes.get(kind, setting.size)))
        if case.kind == kind
    ]
    return [
        (_labels(case.name, mode.name), lambda case=case: [_compare(case, mode)]) for case in cases
    ]


def _compare(case: Case, mode: Mode) -> Row:
    start = time.perf_counter()
    with jax.enable_x64(mode.dtype == "float64"):
        ours, theirs = case.compare(mode.dtype)
    if mode.reduced is None:
        tolerance = getattr(TOLERANCES[case.kind], mode.dtype)
    else:
        tolerance = REDUCED[mode.reduced][case.kind]
        if case.kind == "gradients":
            ours, theirs = vector(ours), vector(theirs)
    error = relative_error(ours, theirs)
    return _row(case.kind, case.name, mode.name, error, tolerance, time.perf_counter() - start)


def _maths(dtype: DType) -> tuple[Row, Work]:
    """Schedules, q, p and the plain losses, on the inputs that each case makes for itself."""
    cases = [case for case in (*MATHS_CASES, *LOSS_CASES) if case.kind == "maths"]

    def work() -> list[Row]:
        rows: list[Row] = []
        for case in cases:
            rows += attempt(_labels(case.name, dtype), lambda case=case: [_run(case, dtype)])
        return rows

    return _labels(f"schedule, q, p, losses: {len(cases)} cases", dtype), work


def _unet(name: str, dtype: DType) -> tuple[Row, Work]:
    def work() -> list[Row]:
        from jax_ddpm.parity.unet import UNET_CASES

        [case] = [case for case in UNET_CASES if case.name == name]
        return [_run(case, dtype)]

    return _labels(name, dtype), work


def _run(case: Case, dtype: DType) -> Row:
    with jax.enable_x64(dtype == "float64"):
        result = run_case(case, dtype)
    return _row(case.kind, case.name, dtype, result.error, result.tolerance, result.seconds)


def _row(
    kind: str, name: str, mode: str, error: float, tolerance: float, seconds: float
) -> dict[str, Any]:
    row = {
        **_labels(name, mode),
        "kind": kind,
        "error": error if np.isfinite(error) else None,
        "tolerance": tolerance,
        "seconds": seconds,
        "status": "passed" if error <= tolerance else "failed",
    }
    if row["status"] == "failed":
        row["problem"] = f"error {error:.1e}, allowed {tolerance:.0e}"
    return row


def _labels(name: str, mode: str) -> Row:
    return {"part": "parity", "name": name, "mode": mode}
