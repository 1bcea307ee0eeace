"""How far from PyTorch each kind of result may be: the worst error over the largest reference.

Loosening a number needs its cause found and written beside it.
"""

from typing import NamedTuple


class Tolerance(NamedTuple):
    """The largest error allowed in each precision; 0 means equal to the bit."""

    float64: float
    float32: float


TOLERANCES = {
    # Tables, q, p and losses against float64 torch on the same inputs, so that 1e-6 is our own
    # rounding: a few units of 6e-8, times the few operations of a formula.
    "maths": Tolerance(1e-12, 1e-6),
    # The bound divides x̂_0 - x_0 by the posterior's deviation, 7e-3 at the first entries, and x̂_0
    # is a float32 near 1: its rounding alone, up to 3e-8, is 4e-6 of that ratio. It stays when
    # torch is given the very x_t of float32.
    "likelihood": Tolerance(1e-12, 1e-5),
    "weights": Tolerance(0, 0),
    # Sums over up to 1,152 products in another order than torch's.
    "forward": Tolerance(1e-13, 1e-5),
    "gradients": Tolerance(1e-12, 1e-4),
    # Adam divides by √v: where a gradient is near zero its rounding decides the step.
    "training": Tolerance(1e-9, 1e-3),
    "chain": Tolerance(1e-11, 1e-3),
    # Up to 35.7 million parameters and 4,608 products a sum; in float32 diffusers' sinusoids of
    # steps near 1,000 are off by 3e-5.
    "unet": Tolerance(1e-10, 1e-4),
    # A softmax's sums over 2,048 tokens; measured 4e-15 and 1.5e-6.
    "attention": Tolerance(1e-13, 1e-5),
    "unet gradients": Tolerance(1e-10, 1e-4),
    "unet chain": Tolerance(1e-8, 1e-3),
    "openai": Tolerance(1e-13, 1e-5),  # measured: 8e-15 and 3e-6
}
