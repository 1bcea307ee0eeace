"""What exists for the sake of XLA's CPU backend alone. Nothing here acts where another is used.

    conv       the derivative of a convolution, in forms that this backend runs fast
    cores      cores as JAX devices
    dispatch   how often the host and its devices, here the same, take turns

Each file says what it gains, measured on jax 0.10.2 and 0.12.0.1: the same forms are the fastest
on both. Remove the room when they are not: `nn.Conv` and one device do without it.
"""

from jax_ddpm.cpu.conv import conv_general_dilated
from jax_ddpm.cpu.cores import use_cores
from jax_ddpm.cpu.dispatch import default_steps_per_dispatch

__all__ = ["conv_general_dilated", "default_steps_per_dispatch", "use_cores"]
