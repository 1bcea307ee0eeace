"""One process of a training job: `worker.py FSDP`, and the flags of `jax-ddpm` for many hosts.

Trains a small network in float64, and samples from it; prints what it saw of the others.
"""

import hashlib
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jax_ddpm as ddpm
from jax_ddpm.data import load_batch
from jax_ddpm.training import sharding
from jax_ddpm.training.hosts import broadcast, connect, gather, run_on_all, run_on_writer

STEPS, BATCH, SHAPE = 6, 8, (4, 4, 1)
SHAPES = {"in": (16, 32), "time": (10, 32), "label": (11, 32), "out": (32, 16)}


def apply_fn(params, x, t, label):
    hidden = x.reshape(len(x), -1) @ params["in"] + params["time"][t] + params["label"][label]
    return (jnp.tanh(hidden) @ params["out"]).reshape(x.shape)


def train_and_sample(mesh):
    """The losses, samples and weights, and the bytes of weights that a device holds."""
    key, rng = jax.random.key(0), np.random.default_rng(0)
    images, labels = rng.uniform(-1, 1, (20, *SHAPE)), np.arange(20, dtype=np.int32) % 10
    weights = {name: rng.normal(0, 0.3, shape) for name, shape in SHAPES.items()}
    schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(10))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))

    init = lambda weights: ddpm.init_train_state(key, weights, optimizer)
    placement = sharding.state_sharding(mesh, jax.eval_shape(init, weights))
    state = jax.jit(init, out_shardings=placement)(weights)
    gathered = sharding.gather_params(apply_fn, mesh)
    step = ddpm.make_train_step(schedule, gathered, optimizer, null_label=10, accumulate=2)
    indices, split = rng.integers(0, 20, (STEPS, BATCH)), sharding.data_sharding(mesh)
    of_steps = NamedSharding(mesh, PartitionSpec(None, *split.spec))
    batches = tuple(load_batch(array, indices, of_steps) for array in (images, labels))
    placements = (placement, sharding.replicated(mesh))
    train = jax.jit(partial(lax.scan, step), donate_argnums=0, out_shardings=placements)
    state, metrics = train(state, batches)

    @jax.jit
    def sample(params):
        denoise_fn = lambda x_t, t: apply_fn(params, x_t, t, jnp.arange(BATCH))
        chain = (jax.random.key(1), schedule, denoise_fn, (BATCH, *SHAPE))
        return ddpm.p_sample_loop(*chain, sharding=split)

    results = {"losses": metrics["loss"], "samples": sample(state.ema_params), **state.params}
    bytes_here = sum(leaf.addressable_shards[0].data.nbytes for leaf in state.params.values())
    return {**gather(results), "bytes_here": bytes_here}


if __name__ == "__main__":
    fsdp, *flags = sys.argv[1:]
    coordinator, processes, number = flags[1::2]  # --coordinator, --num-processes, --process-id
    jax.config.update("jax_enable_x64", True)
    connect(coordinator, int(processes), int(number))
    results = train_and_sample(sharding.device_mesh(BATCH, fsdp=int(fsdp)))
    run_on_writer(lambda: np.savez(f"results-{number}.npz", **results))

    # More than one piece of what is broadcast at a time, and no whole number of them.
    told = broadcast(np.random.default_rng(int(number)).bytes(2**24 + 3))
    seen = {"told": hashlib.sha256(told).hexdigest()}
    try:
        run_on_all(lambda: 1 // (jax.process_index() - 1))  # fails in the second process
    except Exception as error:
        seen["failure"] = type(error).__name__
    print(json.dumps(seen))
