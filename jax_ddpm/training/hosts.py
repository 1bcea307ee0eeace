"""Many hosts: a process on each, one program. Every process runs the same lines; one writes.

Collectives must be entered by all: but for `is_writer`, nothing here may be called by some
processes only.
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jax_ddpm._errors import Field, FieldError
from jax_ddpm.training.sharding import replicated

T = TypeVar("T")
_CHUNK = 2**24


class PartnerFailed(Exception):
    """Raised where nothing is wrong, because something is in another process."""


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes, if there are any. Call before JAX's first use.

    Without arguments SLURM (`srun`), Open MPI (`mpirun`) and TPU pods say what is needed;
    elsewhere `coordinator` is the host and port of process 0. Raises `FieldError` if only some
    of the three are given, or JAX refuses them. Where the others do not come, JAX's runtime ends
    the process after five minutes.
    """
    given = (coordinator, num_processes, process_id)
    names = (Field("coordinator"), ", ", Field("num_processes"), ", ", Field("process_id"), ": ")
    if given == (None, None, None):
        if not _is_launched():
            return
    elif None in given:
        raise FieldError(None, *names, "expected all three or none")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise FieldError("coordinator", f"expected HOST:PORT, got {coordinator}")
    # XLA's own handling of SIGTERM would keep it from the command.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(*given)
    except (ValueError, RuntimeError) as error:
        raise FieldError(None, *names, str(error).partition("\n")[0]) from None


def _is_launched() -> bool:
    """Whether a launcher started several processes, or this is a TPU host, maybe of a pod."""
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(os.environ.get(name, 1)) > 1 for name in tasks):
        return True
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    return "tpu" in wanted and os.path.exists("/dev/vfio/0") and find_spec("libtpu") is not None


def is_writer() -> bool:
    """Whether this process writes files and speaks to the user."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def together(action: Callable[[], T]) -> T:
    """What `action` returns, once it has succeeded in every process; if it fails in one, all stop.

    Raises what `action` raised here, or else `PartnerFailed`.
    """
    result: Any = None
    error = None
    try:
        result = action()
    except BaseException as caught:
        error = caught
    if any_process(error is not None):
        raise error or PartnerFailed("another process failed: its own output says why")
    return result


def on_writer(action: Callable[[], None]) -> None:
    """Run `action` in the process that writes; the others wait, and stop too if it fails."""
    together(lambda: action() if is_writer() else None)


def from_writer(data: bytes) -> bytes:
    """The bytes that the process which writes has, everywhere."""
    if jax.process_count() == 1:
        return data
    high, low = multihost_utils.broadcast_one_to_all(np.array(divmod(len(data), _CHUNK), np.int32))
    size, chunks = int(high) * _CHUNK + int(low), []
    for start in range(0, size, _CHUNK):  # through the devices: in small pieces
        chunk = np.zeros(_CHUNK, np.uint8)
        part = np.frombuffer(data[start : start + _CHUNK], np.uint8)
        chunk[: len(part)] = part
        chunks.append(multihost_utils.broadcast_one_to_all(chunk).tobytes())
    return b"".join(chunks)[:size]


def everywhere(content: T) -> T:
    """What the process that writes has, everywhere; JSON holds it."""
    if jax.process_count() == 1:
        return content
    return json.loads(from_writer(json.dumps(content).encode()))


def same_everywhere(text: str) -> bool:
    """Whether all processes call this with the same text."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    return bool(np.all(digests == digest))


def to_hosts(tree: Any, mesh: Mesh) -> Any:
    """The arrays of `tree`, whole, in the memory of every process; one at a time on the devices."""
    return jax.tree.map(lambda array: np.asarray(_whole(mesh)(array)), tree)


def to_writer(tree: Any, mesh: Mesh) -> Any:
    """Copies of the arrays of `tree`, whole, in the process that writes; nothing in the others."""

    def fetch(array):
        whole = _whole(mesh)(array)
        return np.array(whole) if is_writer() else None

    return jax.tree.map(fetch, tree)


@lru_cache
def _whole(mesh: Mesh) -> Callable[[Any], Any]:
    if jax.process_count() == 1:
        return lambda array: array
    return jax.jit(lambda array: array, out_shardings=replicated(mesh))
