"""Compile for devices that are not here, and say what the program takes.

Without the hardware nothing can be run, so what the compiler does not say is estimated: a
roofline, the longest of three times at the chip's peak figures. Real programs are slower.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ddpm.plan.hlo import Collective, collectives, count_flops, memory_traffic
from jax_ddpm.plan.targets import Target


class Cost(NamedTuple):
    """What one run of a program takes, on each of its devices: bytes and operations."""

    arguments: int
    outputs: int
    aliased: int
    """Of the outputs, what takes the place of donated arguments."""
    temporaries: int
    code: int
    flops: float
    traffic: float
    """Read from and written to the device's memory."""
    collectives: list[Collective]
    seconds_to_compile: float

    @property
    def memory(self) -> int:
        """All of it, where nothing is given back before the end."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    def scaled(self, times: float) -> "Cost":
        """What so many runs take, or that share of one; the memory stays."""
        return self._replace(
            flops=self.flops * times,
            traffic=self.traffic * times,
            collectives=[each.scaled(times) for each in self.collectives],
        )

    def seconds(self, rates: dict[str, float]) -> dict[str, float]:
        """Seconds at the rates of `Target.rates`: the longest bounds the program."""
        amounts = {
            "compute": self.flops,
            "memory": self.traffic,
            "interconnect": sum(each.sent for each in self.collectives),
        }
        return {name: amount / rates[name] for name, amount in amounts.items()}


class Refused(Exception):
    """The compiler takes no such slice or program: one line, with the first of its complaint."""


class TooLarge(Exception):
    """A device has less memory than the program needs. `needed` is in bytes, None if unknown."""

    def __init__(self, message: str):
        super().__init__(message.partition(": ")[2].partition("\n")[0])
        sizes = re.findall(r"([\d.]+)([KMGT])", message)
        self.needed = None
        if sizes:
            number, unit = sizes[0]
            self.needed = int(float(number) * 2 ** (10 * ("KMGT".index(unit) + 1)))


def prepare() -> None:
    """Keep JAX off any hardware and the compilers off the network. Before JAX's first use."""
    jax.config.update("jax_platforms", "cpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # these two only quiet it
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody's TPU is taken
    }.items():
        os.environ.setdefault(name, value)
    # There is no GPU to try algorithms on, and some products have no Triton kernel without.
    flags = os.environ.get("XLA_FLAGS", "")
    untried = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{flags} {untried}".strip()


def require_slice(target: Target) -> None:
    """Raises `Refused` unless the compiler can sum over all devices of `target`."""
    with _complaints(f"{target.name}: its compiler refuses such a slice"):
        devices = target.devices()
        split = NamedSharding(Mesh(devices, "all"), PartitionSpec("all"))
        numbers = jax.ShapeDtypeStruct((len(devices),), jnp.float32, sharding=split)
        jax.jit(jnp.sum).lower(numbers).compile()


def compile_for(target: Target, program: Any, *arguments: Any) -> Cost:
    """Compile a jitted function of `ShapeDtypeStruct`s that are placed on the target's devices.

    Raises `TooLarge` where the compiler finds that it does not fit, `Refused` at other errors.
    """
    platform = target.chip.platform
    traced = program.trace(*arguments)
    lowered = traced.lower(lowering_platforms=(platform,))
    start = time.perf_counter()
    with _complaints(f"{target.name}: its compiler refuses the program"), _effort(platform):
        compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    devices = len(jax.tree.leaves(arguments)[0].sharding.device_set)
    return Cost(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=count_flops(traced.jaxpr) / devices,
        traffic=memory_traffic(text),
        collectives=collectives(text),
        seconds_to_compile=seconds,
    )


@contextmanager
def _effort(platform: str) -> Iterator[None]:
    """A TPU's compiler at its least effort: a minute where the default takes ten, and memory
    within a tenth of it. The setting is JAX's: the compilers' own options change their names."""
    settings: Any = jax.config
    before = settings.jax_optimization_level
    jax.config.update("jax_optimization_level", "O1" if platform == "tpu" else before)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


@contextmanager
def _complaints(refusal: str) -> Iterator[None]:
    """The compilers' errors as `TooLarge`, or as `Refused` with `refusal` in front."""
    try:
        yield
    except RuntimeError as error:  # a JaxRuntimeError is one
        message = str(error)
        if "RESOURCE_EXHAUSTED" in message:
            raise TooLarge(message) from None
        complaint = message.partition("\n")[0].strip()
        raise Refused(f"{refusal}: {complaint}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Drops what the compilers write to the error stream."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
