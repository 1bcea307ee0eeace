"""Parity, resuming and speed on one GPU or TPU: `python -m benchmarks accelerator`.

On JAX's default backend: a resumed training against one that was not stopped; parity with torch on
the CPU; reverse loop and training step against torch on the same device, where outputs are compared
first. Writes `accelerator-DEVICE.json` and `.md`; the exit code is 1 if anything failed. What needs
a package that is missing is left out by name.
"""

import gc
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.harness import Contender, Row, describe, options, race, say, write
from benchmarks.processes import check_resuming
from benchmarks.report import markdown
from jax_ddpm.models.attention import dot_product_attention
from jax_ddpm.parity.harness import Case, DType, relative_error, run_case, vector
from jax_ddpm.parity.maths import LOSS_CASES, MATHS_CASES
from jax_ddpm.parity.networks import NETWORK_CASES, Setting, tutorial_cases
from jax_ddpm.parity.tolerances import TOLERANCES
from jax_ddpm.plan.hlo import memory_traffic
from jax_ddpm.plan.targets import parse_target

PARTS = ("resume", "parity", "attention", "tutorial", "ddpm_cifar10")
PRECISION = (
    "float32 is 'highest' on both sides, bfloat16 is the network's dtype in JAX and autocast in "
    "torch; weights are float32"
)
FIELDS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "highest"},
    "float64": {"precision": "highest"},
    "TF32": {"precision": None},
    "bfloat16": {"precision": None, "dtype": jnp.bfloat16},
}
"""Of JAX's networks, by arithmetic."""

# What a network may lose where products are not computed in float32, on one side or on both. It
# says something of the arithmetic; `parity.tolerances` is for the formulas. The untrained tutorial
# network is a hard case: its raw step number makes features near 100, whose rounding is as large
# as everything that the images contribute. Five Adam steps with an ε of 1; margins are 2 to 7.
_KINDS = ("forward", "gradients", "training", "chain", "attention")
REDUCED: dict[str, dict[str, float]] = {
    # GPUs round the operands of float32 products to 11 bits, 5e-4, unless the precision is
    # "highest". Measured on an H200: 6e-4, 1.6e-2, 7e-3, 5e-4, 1.1e-3. Gradients are one vector:
    # a layer whose gradient is a thousandth of the largest is off by 4e-2 of its own.
    "TF32": dict(zip(_KINDS, (3e-3, 5e-2, 3e-2, 3e-3, 3e-3), strict=True)),
    # Operands and activations have 8 bits, 4e-3 (on a TPU operands alone, unless the precision is
    # "highest"). Measured on an H200: 7e-3, 6.5e-2, 4.4e-2, 5e-3, 5e-3; attention on a CPU: 1e-2.
    "bfloat16": dict(zip(_KINDS, (3e-2, 2e-1, 1e-1, 3e-2, 2e-2), strict=True)),
}

_STEPS = {("tutorial", "chain"): 200, ("tutorial", "training"): 50}
_STEPS |= {("ddpm_cifar10", "chain"): 20, ("ddpm_cifar10", "training"): 10}
"""Of a timed run."""

Work = Callable[[], list[Row]]


def main() -> None:
    """Parse the command line, measure, report."""
    parser = options(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--batch", type=int, nargs="+", default=[128], help="(default: 128)")
    names = ("bfloat16", "float32", "TF32")
    help_ = "of the races (default: the first two)"
    parser.add_argument("--arithmetic", nargs="+", choices=names, default=names[:2], help=help_)
    parser.add_argument("--compile", action="store_true", help="race torch.compile too")
    chip = "the chip by plan's name, for an estimate beside JAX's times"
    parser.add_argument("--target", metavar="h200", help=chip)
    parser.add_argument("--tiny", action="store_true", help="small sizes: a trial, on a CPU too")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    # Before JAX's backend starts: memory is left for torch, of a GPU at least half.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    record: dict[str, Any] = {"tiny": arguments.tiny}
    failed = False
    for part, labels, work in _measure(arguments):
        say(f"{', '.join(map(str, [part, *labels.values()]))} …")
        try:
            rows = work()
        except Exception as error:
            status = "left out" if isinstance(error, ImportError) else "failed"
            line = str(error).strip().partition("\n")[0][:300]
            rows = [{"status": status, "problem": f"{type(error).__name__}: {line}"}]
        failed |= any(row["status"] == "failed" for row in rows)
        record.setdefault(part, []).extend(labels | row for row in rows)
        record["machine"] = describe() | {"precision": PRECISION}
        kind = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
        # Each time, so that what is stopped has lost nothing.
        write(arguments.out / f"accelerator-{kind}", record, markdown(record))
        gc.collect()  # so that the next has the memory
        torch.cuda.empty_cache()
    print(markdown(record))
    sys.exit(failed)


def _measure(arguments: Namespace) -> Iterator[tuple[str, Row, Work]]:
    """What was asked for, with labels; resuming first, while the device is free."""
    parts, tiny = arguments.parts or PARTS, arguments.tiny
    if "resume" in parts:
        yield "resume", {}, lambda: [check_resuming()]
    lacking = {"cpu": ("TF32",), "tpu": ("TF32", "float64")}.get(jax.default_backend(), ())
    for mode in [mode for mode in FIELDS if mode not in lacking]:
        for part, cases in {"parity": _parity_cases, "attention": _attention_cases}.items():
            for case in cases(mode, tiny) if part in parts else ():
                labels = {"name": case.name, "arithmetic": mode}
                yield part, labels, partial(_compare, case, mode)
    # The tutorial's rate is small because Adam turns rounding into steps: on an H200 at 1e-3, two
    # of torch's layouts were 4e-4 apart in the third loss of 128 images in float32.
    networks = [sides.TUTORIAL._replace(learning_rate=1e-4), sides.CIFAR10]
    if tiny:
        small = ddpm.ddpm_digits(num_classes=None, in_channels=3, out_channels=3)
        networks[0] = networks[0]._replace(image_shape=(8, 8, 3))
        networks[1] = sides.unet("ddpm_cifar10", (8, 8, 3), small)
    for network in [network for network in networks if network.name in parts]:
        for batch in [2] if tiny else arguments.batch:
            for work in ("reverse loop", "training step"):
                for arithmetic in arguments.arithmetic:
                    labels = {"work": work, "batch": batch, "arithmetic": arithmetic}
                    each = partial(_race, network, work, batch, arithmetic, arguments)
                    yield network.name, labels, each


def _parity_cases(mode: str, tiny: bool) -> list[Case]:
    """The network in every arithmetic, the maths in full ones.

    The output at the tutorial's size, the chain at a size that torch can follow in float64.
    Gradients stay small: a ReLU whose input is nearly zero falls on either side by rounding, and at
    64×64 there are so many that float32 was off by 4e-4, where it is by 6e-7 at 8×8.
    """
    cases = []
    for kind, size in {"forward": 64, "gradients": 8, "training": 8, "chain": 16}.items():
        # Without a larger ε, Adam makes a whole step of the sign of a gradient near zero.
        setting = Setting(8 if tiny else size, 5, 1.0, oracle="float64", fields=FIELDS[mode])
        cases += [case for case in tutorial_cases(setting) if case.kind == kind]
    if mode not in REDUCED:
        cases += [case for case in (*MATHS_CASES, *LOSS_CASES) if case.kind == "maths"]
        name = "UNet, Ho et al.'s: output" if tiny else "UNet, 35.7 M parameters: output"
        cases.append(next(case for case in NETWORK_CASES if case.name == name))  # needs diffusers
    return cases


def _attention_cases(mode: str, tiny: bool) -> list[Case]:
    """The form that many tokens take: in blocks, or cuDNN's."""
    precision, tokens = FIELDS[mode]["precision"], 401 if tiny else 2048

    def compare(dtype: DType) -> tuple[Any, Any]:
        random = np.random.default_rng(0).standard_normal((4, 1, tokens, 4, 32))
        # Rounded first, so that both sides begin from the same numbers.
        inputs = [jnp.asarray(each, FIELDS[mode].get("dtype", dtype)) for each in random]
        attend = jax.jit(lambda *inputs: dot_product_attention(*inputs, precision=precision))
        output, gradient = jax.vjp(attend, *inputs[:3])
        ours = [np.asarray(each, np.float64) for each in (output, *gradient(inputs[3]))]

        tensors = [torch.from_numpy(np.array(x, np.float64)).swapaxes(1, 2) for x in inputs]
        query, key, value = heads = [tensor.requires_grad_() for tensor in tensors[:3]]
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        theirs = (expected, *torch.autograd.grad(expected, heads, tensors[3]))
        return ours, [each.detach().swapaxes(1, 2).numpy() for each in theirs]

    name = f"{tokens:,} tokens, 4 heads of 32 channels: output and gradients"
    return [Case("attention", name, compare)]


def _compare(case: Case, mode: str) -> list[Row]:
    dtype: DType = "float64" if mode == "float64" else "float32"
    with jax.enable_x64(dtype == "float64"):
        if mode in REDUCED:
            ours, theirs = case.compare(dtype)
            if case.kind == "gradients":
                ours, theirs = vector(ours), vector(theirs)
            error, tolerance = relative_error(ours, theirs), REDUCED[mode][case.kind]
        else:
            result = run_case(case, dtype)
            error, tolerance = result.error, result.tolerance
    row: Row = {"kind": case.kind, "error": float(np.nan_to_num(error, nan=np.inf))}
    row |= {"tolerance": tolerance, "status": "passed"}
    if not error <= tolerance:
        row |= {"status": "failed", "problem": f"error {error:.1e}, allowed {tolerance:.0e}"}
    return [row]


def _race(
    network: sides.Network, work: str, batch: int, arithmetic: str, arguments: Namespace
) -> list[Row]:
    """Compare, then time; beside JAX's time stands the estimate that `jax-ddpm plan` would make."""
    # TF32 where it is asked for and nowhere else; cuDNN tries its algorithms, as XLA does.
    torch.set_float32_matmul_precision("high" if arithmetic == "TF32" else "highest")
    torch.backends.cudnn.allow_tf32 = arithmetic == "TF32"
    torch.backends.cudnn.benchmark = True
    network = network._replace(model=network.model.clone(**FIELDS[arithmetic]))
    kind, ours, theirs = "chain", sides.jax_loop, sides.torch_loop
    if work == "training step":
        kind, ours, theirs = "training", sides.jax_training, sides.torch_training
    steps = 3 if arguments.tiny else _STEPS[network.name, kind]
    contenders = {"JAX": ours(network, steps, batch)}
    if jax.default_backend() == ("gpu" if torch.cuda.is_available() else "cpu"):
        for name, (channels_last, wrap) in sides.torch_contenders(large=True).items():
            if arguments.compile or not name.startswith("torch.compile"):
                wrap = partial(_autocast, arithmetic, wrap)
                contenders[name] = theirs(network, steps, batch, channels_last, wrap)
    target = arguments.target
    figures = _estimate(contenders["JAX"], steps, arithmetic, target) if target else {}
    full = TOLERANCES[kind].float32
    tolerance = full if arithmetic == "float32" else REDUCED[arithmetic][kind]
    rows = race(contenders, batch, steps, tolerance, rounds=2 if arguments.tiny else 3)
    rows[0] |= figures
    return [row | {"status": "timed", "tolerance": tolerance} for row in rows]


def _autocast(arithmetic: str, wrap: sides.Wrap, function: Callable) -> Callable:
    """`wrap(function)`, under torch's own mixed precision where `arithmetic` is bfloat16."""
    # Asked here, since torch.compile would trace the question too.
    device, enabled = sides.torch_device().type, arithmetic == "bfloat16"

    def cast(*arguments: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            return function(*arguments)

    return wrap(cast)


def _estimate(ours: Contender, steps: int, arithmetic: str, target: str) -> Row:
    """`jax-ddpm plan`'s estimate of a step; real programs are slower."""
    chip, precision = parse_target(target), "highest" if arithmetic == "float32" else "default"
    _, peak = chip.products(arithmetic.replace("TF32", "float32"), precision)
    flops, traffic = ours.flops / steps, memory_traffic(ours.program.as_text()) / steps
    seconds = {"compute": flops / peak, "memory": traffic / chip.chip.bandwidth}
    bound = max(seconds, key=lambda name: seconds[name])
    figures = {"plan_flops": flops, "plan_traffic": traffic}
    return {**figures, "plan_seconds": seconds[bound], "plan_bound": bound}
