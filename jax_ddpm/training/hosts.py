"""One program on several hosts, a process on each; process 0, the writer, owns files and terminal.

Every process runs the same lines. All functions but `is_writer` communicate, so all processes
must call them, in the same order.
"""

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_ddpm._errors import Field, FieldError

T = TypeVar("T")
_CHUNK = 2**24  # bytes of a broadcast that are on the devices at once
_VFIO, _PCI = Path("/dev/vfio/0"), Path("/sys/bus/pci/devices")


class PartnerFailed(Exception):
    """Raised in healthy processes when another process has failed."""


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes, if there are any. Call it before JAX's first use.

    SLURM (`srun`), Open MPI (`mpirun`) and TPU pods supply the arguments. JAX ends the process if
    the others do not join within five minutes.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes, process_id: the number of processes, and that of this one, from 0.

    Raises:
      FieldError: JAX refuses the arguments.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None) and not _is_launched():
        return
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise FieldError("coordinator", f"expected HOST:PORT, got {coordinator}")
    # XLA's own handling of SIGTERM would hide the signal from the command.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(*given)
    except (ValueError, RuntimeError) as error:
        names = (Field("coordinator"), ", ", Field("num_processes"), ", ", Field("process_id"))
        raise FieldError(None, *names, ": ", str(error).partition("\n")[0]) from None


def _is_launched() -> bool:
    """Whether a launcher started several processes, or this host has TPUs, perhaps of a pod."""
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(os.environ.get(name, 1)) > 1 for name in tasks):
        return True
    usable = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu") and find_spec("libtpu") is not None
    vendors = (path.read_text().strip() for path in _PCI.glob("*/vendor"))
    # 0x1ae0 is Google's: VFIO alone may pass a GPU through.
    return usable and _VFIO.exists() and "0x1ae0" in vendors


def is_writer() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def run_on_all(action: Callable[[], T]) -> T:
    """Call `action` in every process and return its own result to each.

    If it fails in one, its error is raised there, and `PartnerFailed` in the others.
    """
    try:
        result = action()
    except BaseException:
        any_process(True)
        raise
    if any_process(False):
        raise PartnerFailed("another process failed: its own output says why")
    return result


def run_on_writer(action: Callable[[], T]) -> T | None:
    """Call `action` in the writer while the others, which return None, wait; see `run_on_all`."""
    return run_on_all(lambda: action() if is_writer() else None)


def broadcast(content: T) -> T:
    """The writer's `content`, in every process: bytes everywhere, or anything JSON can hold."""
    if jax.process_count() == 1:
        return content
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    high, low = multihost_utils.broadcast_one_to_all(np.array(divmod(len(data), _CHUNK), np.int32))
    size, received = int(high) * _CHUNK + int(low), bytearray()
    for start in range(0, size, _CHUNK):
        chunk = data[start : start + _CHUNK].ljust(_CHUNK, b"\0")
        received += multihost_utils.broadcast_one_to_all(np.frombuffer(chunk, np.uint8)).tobytes()
    whole: Any = bytes(received[:size])
    return whole if isinstance(content, bytes) else json.loads(whole)


def gather(tree: Any) -> Any:
    """The global arrays of `tree`, whole, as NumPy arrays in every process."""
    return multihost_utils.process_allgather(tree, tiled=True)


def gather_to_writer(tree: Any) -> Any:
    """Copies of the global arrays of `tree`, whole, in the writer; None for each elsewhere."""
    copy = np.array if is_writer() else lambda array: None
    return jax.tree.map(lambda array: copy(gather(array)), tree)
