"""The proof: every certified comparison with PyTorch, as a table that anyone can rerun.

`jax-ddpm parity` prints it and the tests assert it. `compare` does the same for networks of one's
own. This package imports torch, and the cases of diffusers' networks need diffusers when they run:
both come with the extra `[parity]`.
"""

from jax_ddpm.parity.compare import compare
from jax_ddpm.parity.harness import Case, Report, run_case
from jax_ddpm.parity.maths import LOSS_CASES, MATHS_CASES
from jax_ddpm.parity.networks import NETWORK_CASES
from jax_ddpm.parity.tolerances import Tolerance

CASES: tuple[Case, ...] = (*MATHS_CASES, *LOSS_CASES, *NETWORK_CASES)
"""Every certified comparison of this library with PyTorch, for `run_case`."""
__all__ = ["CASES", "Case", "Report", "Tolerance", "compare", "run_case"]
