"""Many hosts: a process on each, one program. Every process runs the same lines; one writes.

Collectives must be entered by all: but for `is_writer`, nothing here may be called by some
processes only.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jax_ddpm.training.sharding import replicated

__all__ = ["WriterFailed", "any_process", "connect", "is_writer", "on_writer", "to_hosts"]


class WriterFailed(Exception):
    """Raised in the processes that do not write, where the one that does could not."""


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes, if there are any. Call before JAX's first use.

    Without arguments SLURM (`srun`), Open MPI (`mpirun`) and TPU pods say what is needed;
    elsewhere `coordinator` is the host and port of process 0. Raises `ValueError` if only some
    of the three are given. Where the others do not come, JAX's runtime ends the process after
    five minutes.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        if not _is_launched():
            return
    elif None in given:
        raise ValueError("coordinator, num_processes, process_id: expected all three or none")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator: expected HOST:PORT, got {coordinator}")
    jax.distributed.initialize(*given)


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


def on_writer(action: Callable[[], None]) -> None:
    """Run `action` in the process that writes; the others wait, and stop too if it fails.

    Raises what `action` raised, elsewhere `WriterFailed`.
    """
    error = None
    if is_writer():
        try:
            action()
        except Exception as caught:
            error = caught
    if any_process(error is not None):
        raise error or WriterFailed("process 0 failed: its own output says why")


def to_hosts(tree: Any, mesh: Mesh) -> Any:
    """The arrays of `tree`, whole, in the memory of every process."""
    if jax.process_count() > 1:
        tree = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(np.asarray, tree)
