"""The numbers of the parity table, which live beside the report that prints them."""

from jax_ddpm.parity.tolerances import TOLERANCES as TOLERANCES
