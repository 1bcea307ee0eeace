"""Every certified case, in the order of the report, and results as a table to read."""

from collections.abc import Sequence

from jax_ddpm.parity.harness import Result
from jax_ddpm.parity.losses import LOSS_CASES
from jax_ddpm.parity.maths import MATHS_CASES
from jax_ddpm.parity.openai import OPENAI_CASES
from jax_ddpm.parity.tutorial import TUTORIAL_CASES
from jax_ddpm.parity.unet import UNET_CASES

CASES = (*MATHS_CASES, *LOSS_CASES, *TUTORIAL_CASES, *UNET_CASES, *OPENAI_CASES)
_TITLES = {
    "maths": "schedule, q, p, losses",
    "likelihood": "variational bound",
    "weights": "converted weights",
    "forward": "network",
    "gradients": "network, gradients",
    "training": "training",
    "chain": "reverse chain",
    "unet": "U-Net against diffusers'",
    "unet gradients": "U-Net, gradients",
    "unet chain": "U-Net, reverse chain",
    "openai": "OpenAI's networks",
}


def report(results: Sequence[Result]) -> str:
    """A line for each comparison, of results that alternate between float64 and float32."""
    width = max(len(result.name) for result in results) + 2
    lines = [
        "worst error over the largest reference value, and its limit\n",
        f"  {'':<{width}}{'float64':^22}  {'float32':^22}",
    ]
    kind = None
    for double, single in zip(results[::2], results[1::2], strict=True):
        if double.kind != kind:
            kind = double.kind
            lines.append(_TITLES[kind])
        lines.append(f"  {double.name:<{width}}{_cell(double)}  {_cell(single)}")
    passed = sum(result.passed for result in results)
    seconds = sum(result.seconds for result in results)
    lines.append(f"\n{passed} of {len(results)} comparisons hold ({seconds:.0f} s)")
    return "\n".join(lines)


def _cell(result: Result) -> str:
    mark = "✓" if result.passed else "✗"
    error = "equal" if result.error == 0 else f"{result.error:.1e}"
    limit = "= to the bit" if result.tolerance == 0 else f"≤ {result.tolerance:.0e}"
    return f"{mark} {error:>7} {limit:<12}"
