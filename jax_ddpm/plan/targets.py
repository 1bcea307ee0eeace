"""The chips that can be planned for, and their compilers' devices, without the hardware.

Figures are those of a chip. A JAX device is a chip, but half a chip (one of two cores) on TPU v3
and TPU7x: a v3-8 has four chips and eight devices. Sources, all public:

- TPU: Google Cloud's pages "TPU v3", "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x"
  (docs.cloud.google.com/tpu/docs). `interconnect` is all links one way: "interchip interconnect"
  of v5e and v5p; half of what is called bidirectional for v6e and TPU7x; for v3 and v4, which
  give neither, the pod's all-reduce bandwidth over its chips.
- GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and L4, dense (half of the
  figures "with sparsity"). `interconnect` is NVLink one way, for L4 PCIe 4.0 x16.

Products of float32 run in bfloat16 on a TPU, in one pass, and in TF32 on a GPU, unless a model
has `precision="highest"`: `float32` is the speed of that.
"""

import math
from importlib.util import find_spec
from typing import Any, NamedTuple

from jax.experimental import topologies

GiB = 2**30
_CUDA = ("jax_cuda13_plugin", "jax_cuda12_plugin")


class Chip(NamedTuple):
    """Peak figures of one chip, in FLOP/s and bytes (a second)."""

    title: str
    platform: str
    default_shape: str
    devices: int
    """JAX devices in a chip."""
    bfloat16: float
    float32: float
    memory: float
    """All of a GPU's; of a TPU's what its compiler says is available."""
    bandwidth: float
    interconnect: float
    largest: int
    """Chips of a whole pod; GPUs of one host, within which `interconnect` holds."""
    config: str = ""
    """What the compiler needs to know: a TPU's chip config, a GPU's `gpu_device_info`."""


def _gpu(cores: int, shared: int, cache: int, clock: float, capability: tuple[int, int]) -> str:
    """XLA's `GpuDeviceInfoProto` but for the memory: multiprocessors, bytes of shared memory of
    each, bytes of L2 cache, GHz, compute capability."""
    major, minor = capability
    return f"""
      threads_per_block_limit: 1024  threads_per_warp: 32
      threads_per_core_limit: {1536 if capability == (8, 9) else 2048}
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: {shared - 1024}  shared_memory_per_core: {shared}
      core_count: {cores}  fpus_per_core: {64 if capability == (8, 0) else 128}
      block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
      registers_per_core_limit: 65536  registers_per_block_limit: 65536
      l2_cache_size: {cache}  clock_rate_ghz: {clock}
      cuda_compute_capability {{ major: {major} minor: {minor} }}"""


_AMPERE = _gpu(108, 167_936, 41_943_040, 1.41, (8, 0))
_HOPPER = _gpu(132, 233_472, 52_428_800, 1.98, (9, 0))
_ADA = _gpu(58, 102_400, 50_331_648, 2.04, (8, 9))

CHIPS = {
    "v3": Chip("TPU v3", "tpu", "2x2", 2, 123e12, 123e12, 30.96 * GiB, 900e9, 332e9, 1024),
    # As on a real v4, the two cores of a chip are one device.
    "v4": Chip(
        "TPU v4", "tpu", "2x2x1", 1, 275e12, 275e12, 30.75 * GiB, 1200e9, 268e9, 4096, "megacore"
    ),
    "v5e": Chip("TPU v5e", "tpu", "2x2", 1, 197e12, 197e12, 15.75 * GiB, 819e9, 200e9, 256),
    "v5p": Chip("TPU v5p", "tpu", "2x2x1", 1, 459e12, 459e12, 95.74 * GiB, 2765e9, 600e9, 8960),
    "v6e": Chip("TPU v6e", "tpu", "2x2", 1, 918e12, 918e12, 31.25 * GiB, 1638e9, 400e9, 256),
    "tpu7x": Chip("TPU7x", "tpu", "2x2x1", 2, 2307e12, 2307e12, 189.5 * GiB, 7380e9, 600e9, 9216),
    "a100": Chip(
        "A100 80GB", "cuda", "1", 1, 312e12, 156e12, 85_017_755_648, 2039e9, 300e9, 8, _AMPERE
    ),
    "h100": Chip(
        "H100 80GB", "cuda", "1", 1, 989e12, 494e12, 84_929_347_584, 3352e9, 450e9, 8, _HOPPER
    ),
    "h200": Chip(
        "H200 141GB", "cuda", "1", 1, 989e12, 494e12, 150_754_820_096, 4800e9, 450e9, 8, _HOPPER
    ),
    "l4": Chip("L4 24GB", "cuda", "1", 1, 121e12, 60e12, 23_580_639_232, 300e9, 32e9, 8, _ADA),
}


class Target(NamedTuple):
    """So many chips of a kind: `v5e:2x2`, `h100:8`."""

    name: str
    chip: Chip
    shape: str

    @property
    def memory(self) -> int:
        """Bytes per device that JAX can use: 75 % of a GPU's by default."""
        share = 0.75 if self.chip.platform == "cuda" else 1
        return int(share * self.chip.memory / self.chip.devices)

    def rates(self, dtype: str) -> dict[str, float]:
        """A device's FLOP/s for products of `dtype` (float32 or bfloat16), and bytes a second
        from and to its memory and to other devices."""
        chip = self.chip
        peaks = {
            "compute": chip.bfloat16 if dtype == "bfloat16" else chip.float32,
            "memory": chip.bandwidth,
            "interconnect": chip.interconnect,
        }
        return {name: peak / chip.devices for name, peak in peaks.items()}

    def products(self, dtype: str) -> str:
        """What products of `dtype` are computed in by default."""
        return "TF32" if (self.chip.platform, dtype) == ("cuda", "float32") else "bfloat16"

    def devices(self) -> list[Any]:
        """Devices that programs can be compiled for, but not run on.

        The compilers take any shape, also one that nobody rents out.
        """
        chip = self.chip
        if chip.platform == "cuda":
            topology = topologies.get_topology_desc(
                platform="cuda",
                topology_name=self.name,
                topology=f"1x{self.shape}x1",
                target_config=_target_config(chip),
            )
        else:
            topology = topologies.get_topology_desc(
                platform="tpu", topology_name=self.name, **_tpu_options(self)
            )
        return list(topology.devices)


def parse_target(text: str) -> Target:
    """`v5e:2x2`, `h100:8`, or a name alone. Raises `ValueError`, listing what is known."""
    name, _, shape = text.lower().partition(":")
    if name not in CHIPS:
        known = ", ".join(f"{name}:{chip.default_shape}" for name, chip in CHIPS.items())
        raise ValueError(
            f"expected one of {known}, or more of these, as in v5e:4x4 (a TPU's chips) or h100:8 "
            f"(GPUs), got {text}"
        )
    chip = CHIPS[name]
    shape = shape or chip.default_shape
    sizes = shape.split("x")
    if len(sizes) != len(chip.default_shape.split("x")) or not all(
        size.isdecimal() and int(size) > 0 for size in sizes
    ):
        raise ValueError(f"expected a shape such as {name}:{chip.default_shape}, got {text}")
    sides = [int(size) for size in sizes]
    if math.prod(sides) > chip.largest:
        whole = "host: how fast hosts exchange is not known" if chip.platform == "cuda" else "pod"
        raise ValueError(
            f"expected at most {chip.largest:,} chips, those of one {whole}, got {text}"
        )
    # A pod of two dimensions is square.
    longest = math.isqrt(chip.largest)
    if len(sides) == 2 and max(sides) > longest:
        raise ValueError(f"expected sides of at most {longest} chips, those of a pod, got {text}")
    return Target(f"{name}:{shape}", chip, shape)


def require_compiler(target: Target) -> None:
    """Raises `ModuleNotFoundError` unless the compiler for `target` is installed."""
    names = ("libtpu",) if target.chip.platform == "tpu" else _CUDA
    if not any(find_spec(name) for name in names):
        raise ModuleNotFoundError(f"No module named {names[0]!r}", name=names[0])


def _tpu_options(target: Target) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if target.chip.config:
        options["chip_config_name"] = target.chip.config
    sizes = [int(size) for size in target.shape.split("x")]
    if any(size % 2 for size in sizes[:2]):
        # Hosts have 2x2 chips by default; less than that is a host of its own.
        options["chips_per_host_bounds"] = [*sizes, 1, 1][:3]
    return options


def _target_config(chip: Chip) -> str:
    return f"""
    gpu_device_info {{ {chip.config}
      memory_bandwidth: {chip.bandwidth:.0f}  device_memory_size: {chip.memory:.0f} }}
    platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 8 }}
    runtime_version {{ major: 12 minor: 9 }}  device_description_str: "NVIDIA {chip.title}"
    """
