"""`jax-ddpm plan`'s estimate of a program that was compiled for the device that is here.

A roofline: the longer of two times, operations and memory traffic at the chip's peak figures.
Real programs are slower. Plan knows the products that a chip computes by default, which for
float32 is TF32 on a GPU and bfloat16 on a TPU: at "highest" a float32 program cannot come near.
"""

from typing import Any

from jax_ddpm.plan.flops import count_flops
from jax_ddpm.plan.hlo import memory_traffic
from jax_ddpm.plan.targets import parse_target

__all__ = ["chip_of", "estimate"]

# Whole names, since others that begin alike are other chips: H100 PCIe, A100-SXM4-40GB, L40S.
_CHIPS = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA L4": "l4",
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip_of(device_kind: str) -> str | None:
    """Plan's name of the chip that JAX calls `device_kind`; None if plan has no figures of it."""
    return _CHIPS.get(device_kind)


def estimate(device_kind: str, jaxpr: Any, compiled: Any, dtype: str, steps: int) -> dict[str, Any]:
    """Of one of the `steps` that a run of `compiled` takes: operations, bytes and, where the
    chip is known, seconds and what bounds them."""
    figures: dict[str, Any] = {
        "flops": count_flops(jaxpr) / steps,
        "traffic": memory_traffic(compiled.as_text()) / steps,
    }
    chip = chip_of(device_kind)
    if chip is None:
        return {**figures, "seconds": None, "why": f"plan has no figures of {device_kind!r}"}
    target = parse_target(chip)
    kind = "bfloat16" if dtype == "bfloat16" else "float32"
    rates = target.rates(kind)
    seconds = {
        "compute": figures["flops"] / rates["compute"],
        "memory": figures["traffic"] / rates["memory"],
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return {
        **figures,
        "chip": chip,
        "products": target.products(kind),
        "seconds": seconds[bound],
        "bound": bound,
    }
