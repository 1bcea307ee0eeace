"""Code that exists only for XLA's CPU backend. Other backends never run it.

    conv     the derivative of a convolution, in forms that this backend runs fast
    cores    cores as JAX devices

Each file states what it gains, measured on jax 0.10.2 and 0.12.0.1. When the gain is gone, remove
the room: `nn.Conv` and a single device need nothing from it.
"""

from jax_ddpm.cpu.cores import use_cores

__all__ = ["use_cores"]
