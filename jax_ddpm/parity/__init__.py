"""The proof: every certified comparison with PyTorch, as a table that anyone can rerun.

`jax-ddpm parity` prints it and the tests assert it. This package alone, of the library, imports
torch; it comes with the extra `[parity]`.
"""

from jax_ddpm.parity.harness import Case as Case
from jax_ddpm.parity.harness import DType as DType
from jax_ddpm.parity.harness import Result as Result
from jax_ddpm.parity.harness import run_case as run_case
from jax_ddpm.parity.table import CASES as CASES

__all__ = ["CASES", "Case", "DType", "Result", "run_case"]
