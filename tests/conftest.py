"""Strict by default: float64 is real, and nothing is broadcast or promoted by accident."""

import os

# Fake CPU devices share one pool of threads, where collectives that wait may hold them all.
os.environ.setdefault("NPROC", "32")

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def untyped():
    """As in production, where types are not checked and our own errors are what a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
