"""The chips that can be planned for, and their compilers' devices, without the hardware.

A JAX device is a chip, but half a chip (one of two cores) on TPU v3 and TPU7x: a v3-8 has four
chips and eight devices. Sources of the figures, all public:

- TPU: Google Cloud's pages "TPU v3", "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x"
  (docs.cloud.google.com/tpu/docs). `interconnect` is all links one way: "interchip interconnect"
  of v5e and v5p; half of what is called bidirectional for v6e and TPU7x; for v3 and v4, which
  give neither, the pod's all-reduce bandwidth over its chips.
- GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and L4. `bfloat16` is dense (half
  of the figure "with sparsity"), and TF32 half of that; `float32` is the line "FP32", outside the
  tensor cores. `interconnect` is NVLink one way, for L4 PCIe 4.0 x16.
"""

import math
import re
from importlib.util import find_spec
from typing import Any, NamedTuple

from jax.experimental import topologies

_CUDA = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_PASSES = {"default": 1, "high": 3, "highest": 6}
"""Of bfloat16, for a TPU's product of float32 (`jax.lax.Precision`)."""


class Chip(NamedTuple):
    """A kind of chip, and the peak figures of one device, in FLOP/s and bytes (a second)."""

    title: str
    platform: str
    default_shape: str
    bfloat16: float
    float32: float
    """Of a GPU, outside its tensor cores."""
    memory: float
    """All of a GPU's; of a TPU's what its compiler says is available."""
    bandwidth: float
    interconnect: float
    largest: int
    """Chips of a whole pod; GPUs of one host, within which `interconnect` holds."""
    config: str = ""
    """What the compiler needs to know: a TPU's chip config, XLA's `GpuTargetConfigProto`."""


def _tpu(title: str, shape: str, devices: int, pod: int, *peaks: float, config: str = "") -> Chip:
    """Of a chip of so many devices: bfloat16, GiB of memory, bandwidth, interconnect."""
    bfloat16, gib, bandwidth, links = (peak / devices for peak in peaks)
    return Chip(title, "tpu", shape, bfloat16, 0, gib * 2**30, bandwidth, links, pod, config)


def _gpu(title: str, info: dict[str, Any], *peaks: int | float) -> Chip:
    """The peaks are of bfloat16, float32, memory in bytes, bandwidth, interconnect."""
    bfloat16, float32, memory, bandwidth, links = peaks
    config = _GPU.format(title=title, memory=int(memory), bandwidth=int(bandwidth), **info)
    return Chip(title, "cuda", "1", bfloat16, float32, memory, bandwidth, links, 8, config)


_GPU = """
gpu_device_info {{
  core_count: {cores}  fpus_per_core: {fpus}  clock_rate_ghz: {clock}  l2_cache_size: {cache}
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {threads}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {block}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  memory_bandwidth: {bandwidth}  device_memory_size: {memory} }}
platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}  device_description_str: "NVIDIA {title}"
"""
_AMPERE: Any = {"cores": 108, "fpus": 64, "threads": 2048, "shared": 167_936, "block": 166_912}
_AMPERE |= {"cache": 41_943_040, "clock": 1.41, "major": 8, "minor": 0}
_HOPPER: Any = {"cores": 132, "fpus": 128, "threads": 2048, "shared": 233_472, "block": 232_448}
_HOPPER |= {"cache": 52_428_800, "clock": 1.98, "major": 9, "minor": 0}
_ADA: Any = {"cores": 58, "fpus": 128, "threads": 1536, "shared": 102_400, "block": 101_376}
_ADA |= {"cache": 50_331_648, "clock": 2.04, "major": 8, "minor": 9}
CHIPS = {
    "v3": _tpu("TPU v3", "2x2", 2, 1024, 123e12, 30.96, 900e9, 332e9),
    # As on a real v4, the two cores of a chip are one device.
    "v4": _tpu("TPU v4", "2x2x1", 1, 4096, 275e12, 30.75, 1200e9, 268e9, config="megacore"),
    "v5e": _tpu("TPU v5e", "2x2", 1, 256, 197e12, 15.75, 819e9, 200e9),
    "v5p": _tpu("TPU v5p", "2x2x1", 1, 8960, 459e12, 95.74, 2765e9, 600e9),
    "v6e": _tpu("TPU v6e", "2x2", 1, 256, 918e12, 31.25, 1638e9, 400e9),
    "tpu7x": _tpu("TPU7x", "2x2x1", 2, 9216, 2307e12, 189.5, 7380e9, 600e9),
    "a100": _gpu("A100 80GB", _AMPERE, 312e12, 19.5e12, 85_017_755_648, 2039e9, 300e9),
    "h100": _gpu("H100 80GB", _HOPPER, 989e12, 67e12, 84_929_347_584, 3352e9, 450e9),
    "h200": _gpu("H200 141GB", _HOPPER, 989e12, 67e12, 150_754_820_096, 4800e9, 450e9),
    "l4": _gpu("L4 24GB", _ADA, 121e12, 30.3e12, 23_580_639_232, 300e9, 32e9),
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
        return int(share * self.chip.memory)

    def products(self, dtype: str, precision: str = "default") -> tuple[str, float]:
        """What products of `dtype` (float32 or bfloat16) run in at `precision` ("default", "high"
        or "highest"), and a device's peak FLOP/s of them."""
        chip, passes = self.chip, _PASSES[precision]
        if chip.platform == "cuda" and dtype == "float32":
            if precision == "highest":
                return "float32", chip.float32
            return "TF32", chip.bfloat16 / 2
        if dtype == "float32" and passes > 1:
            return f"{passes} passes of bfloat16", chip.bfloat16 / passes
        return "bfloat16", chip.bfloat16

    def devices(self) -> list[Any]:
        """Devices that programs can be compiled for, but not run on.

        The compilers take any shape, also one that nobody rents out.
        """
        chip, sides = self.chip, [int(side) for side in self.shape.split("x")]
        options: dict[str, Any] = {}
        if chip.platform == "cuda":
            options = {"topology": f"1x{self.shape}x1", "target_config": chip.config}
        elif chip.config:
            options["chip_config_name"] = chip.config
        if chip.platform == "tpu" and any(side % 2 for side in sides[:2]):
            # Hosts have 2x2 chips by default; less than that is a host of its own.
            options["chips_per_host_bounds"] = [*sides, 1, 1][:3]
        found = topologies.get_topology_desc(
            platform=chip.platform, topology_name=self.name, **options
        )
        return list(found.devices)


def parse_target(text: str) -> Target:
    """`v5e:2x2`, `h100:8`, or a name alone. Raises `ValueError`, listing what is known."""
    name, _, shape = text.lower().partition(":")
    if name not in CHIPS:
        known = ", ".join(f"{name}:{chip.default_shape}" for name, chip in CHIPS.items())
        more = "or more of these, as in v5e:4x4 (a TPU's chips) or h100:8 (GPUs)"
        raise ValueError(f"expected one of {known}, {more}, got {text}")
    chip = CHIPS[name]
    shape = shape or chip.default_shape
    if not re.fullmatch(re.sub(r"\d", r"[1-9][0-9]*", chip.default_shape), shape):
        raise ValueError(f"expected a shape such as {name}:{chip.default_shape}, got {text}")
    sides = [int(side) for side in shape.split("x")]
    if math.prod(sides) > chip.largest:
        whole = "host: how fast hosts exchange is not known" if chip.platform == "cuda" else "pod"
        raise ValueError(
            f"expected at most {chip.largest:,} chips, those of one {whole}, got {text}"
        )
    longest = math.isqrt(chip.largest)  # a pod of two dimensions is square
    if len(sides) == 2 and max(sides) > longest:
        raise ValueError(f"expected sides of at most {longest} chips, those of a pod, got {text}")
    return Target(f"{name}:{shape}", chip, shape)


def require_compiler(target: Target) -> None:
    """Raises `ModuleNotFoundError` unless the compiler for `target` is installed."""
    names = ("libtpu",) if target.chip.platform == "tpu" else _CUDA
    if not any(find_spec(name) for name in names):
        raise ModuleNotFoundError(f"No module named {names[0]!r}", name=names[0])
