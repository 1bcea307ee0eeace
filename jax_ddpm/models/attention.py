"""Dot-product attention in memory that is linear in the number of tokens.

    softmax(q kᵀ / √d) v      Vaswani et al. 2017, eq. 1

A row of scores needs one query and all keys, so queries are processed in blocks, one after the
other, and gradients recompute the scores of each block (Rabe & Staats 2021, "Self-attention Does
Not Need O(n²) Memory"). Few tokens fit in one block, which is the plain formula.

On NVIDIA GPUs, 16-bit attention uses cuDNN where it supports the head's size.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_SCORES, _SCORES_GPU = 2**17, 2**20
"""Scores of each head in a block: all of 362 tokens, or 32 queries of 4,096. Larger blocks are not
faster on a CPU. A GPU idles between small blocks; blocks beyond 2**20 are a little faster, but take
hundreds of MiB per image. Forward pass of 4,096 tokens, 8 heads of 64 channels, on an H200, for
blocks of 2**17, 2**20, 2**23 scores and a single block: 4.4, 2.0, 1.6, 1.2 ms in float32 at
"highest"; 1.7, 0.7, 0.5, 0.5 ms in bfloat16 (cuDNN: 0.1)."""

Heads = Float[Array, "batch tokens heads channels"]
Block = Float[Array, "batch queries heads channels"]


def dot_product_attention(query: Block, key: Heads, value: Heads, *, precision: Any) -> Block:
    """For each query, the mean of the values weighted by the softmax of its scores."""
    plain, channels = partial(_in_blocks, precision=precision), query.shape[-1]
    # JAX's limits for cuDNN on any GPU, which `jax.nn`'s default does not check.
    suits_cudnn = query.dtype.itemsize == 2 and channels % 8 == 0 and channels <= 128
    if jax.default_backend() != "gpu" or not suits_cudnn:
        return plain(query, key, value)
    cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn")
    return lax.platform_dependent(query, key, value, cuda=cudnn, default=plain)


def _in_blocks(query: Block, key: Heads, value: Heads, *, precision: Any) -> Block:
    (batch, queries, heads, channels), tokens = query.shape, key.shape[1]
    attend = partial(_attend, precision=precision)
    scores = _SCORES_GPU if jax.default_backend() == "gpu" else _SCORES
    size = min(queries, max(1, scores // tokens))
    if queries * tokens <= _SCORES:
        return attend(query, key, value)
    blocks = -(-queries // size)
    padded = jnp.pad(query, ((0, 0), (0, blocks * size - queries), (0, 0), (0, 0)))
    padded = padded.reshape(batch, blocks, size, heads, channels).swapaxes(0, 1)
    # XLA removes a loop of one step, and would then keep the scores.
    attend = jax.checkpoint(attend, prevent_cse=blocks == 1)
    mixed = lax.map(lambda block: attend(block, key, value), padded)
    return mixed.swapaxes(0, 1).reshape(batch, blocks * size, heads, channels)[:, :queries]


def _attend(query: Block, key: Heads, value: Heads, *, precision: Any) -> Block:
    # Scores and the sum of their exponentials need more than 16 bits.
    kept = query.dtype if query.dtype.itemsize >= 4 else jnp.float32
    product = partial(jnp.einsum, precision=precision, preferred_element_type=kept)
    scores = product("bqhd,bkhd->bhqk", query, key)
    weights = jax.nn.softmax(scores / query.shape[-1] ** 0.5).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision=precision)
