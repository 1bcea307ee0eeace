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

# What a network may lose where products are not computed in float32, on one side or on both. It
# is a statement about the arithmetic: that the formulas are right is for the table above to show.
# The untrained tutorial network is a hard case: its raw step number makes features near 100, whose
# rounding is as large as everything that the images contribute. Five Adam steps with an ε of 1, in
# the sizes of `benchmarks/accelerator.py`; margins are 2 to 7.
REDUCED = {
    # GPUs round the operands of float32 products to 11 bits, 5e-4, unless the precision is
    # "highest". Measured on an H200: 6e-4, 1.6e-2, 7e-3, 5e-4, 1.1e-3.
    "TF32": {
        "forward": 3e-3,
        # All parameters as one vector: those of a layer whose gradient is a thousandth of the
        # largest are off by 4e-2 of their own.
        "gradients": 5e-2,
        "training": 3e-2,
        "chain": 3e-3,
        "attention": 3e-3,
    },
    # Operands and activations have 8 bits, 4e-3 (on a TPU operands alone, unless the precision is
    # "highest"). Measured on an H200: 7e-3, 6.5e-2, 4.4e-2, 5e-3, 5e-3; on a CPU attention lost
    # 1e-2.
    "bfloat16": {
        "forward": 3e-2,
        "gradients": 2e-1,
        "training": 1e-1,
        "chain": 3e-2,
        "attention": 2e-2,
    },
}
