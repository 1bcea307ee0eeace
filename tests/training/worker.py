"""One process of a training job: `worker.py OUT.npz DEVICES FSDP [COORDINATOR PROCESSES ID]`.

Trains a small U-Net in float64 on made-up images, samples from it, and process 0 writes what
came out.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jax_ddpm as ddpm
from jax_ddpm.models import ddpm_digits
from jax_ddpm.training import batch_indices, load_batch
from jax_ddpm.training.hosts import connect, on_writer, to_hosts
from jax_ddpm.training.sharding import (
    data_sharding,
    device_mesh,
    gather_params,
    replicated,
    state_sharding,
)

STEPS, BATCH, SHAPE = 6, 8, (8, 8, 1)


def main(out, devices, fsdp, coordinator=None, processes=None, process_id=None):
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", int(devices))
    connect(coordinator, processes and int(processes), process_id and int(process_id))
    mesh = device_mesh(BATCH, fsdp=int(fsdp))
    key = jax.random.key(0)
    images = np.random.default_rng(0).uniform(-1, 1, (20, *SHAPE))
    labels = np.arange(20, dtype=np.int32) % 10
    model = ddpm_digits(
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        param_dtype=jnp.float64,
    )
    schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(10))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))

    shapes = jax.eval_shape(model.init, key, images[:1], labels[:1], labels[:1])
    rng = np.random.default_rng(1)
    weights = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape), shapes)

    def init(weights):
        return ddpm.init_train_state(key, weights, optimizer)

    placement = state_sharding(mesh, jax.eval_shape(init, weights))
    state = jax.jit(init, out_shardings=placement)(weights)
    step = ddpm.make_train_step(
        schedule, gather_params(model.apply, mesh), optimizer, null_label=10, accumulate=2
    )
    indices = np.stack([batch_indices(key, step, 20, BATCH) for step in range(STEPS)])
    sharding = NamedSharding(mesh, PartitionSpec(None, *data_sharding(mesh).spec))
    batches = tuple(load_batch(array, indices, sharding) for array in (images, labels))
    train = jax.jit(
        lambda state, batches: lax.scan(step, state, batches),
        donate_argnums=0,
        out_shardings=(placement, replicated(mesh)),
    )
    state, metrics = train(state, batches)

    @jax.jit
    def sample(params):
        where = jnp.arange(BATCH) % 10
        return ddpm.p_sample_loop(
            jax.random.key(1),
            schedule,
            lambda x_t, t: model.apply(params, x_t, t, where),
            (BATCH, *SHAPE),
            sharding=data_sharding(mesh),
        )

    samples = sample(state.ema_params)
    params, losses, samples = to_hosts((state.params, metrics["loss"], samples), mesh)
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(params)}
    local = {device for device in mesh.devices.flat if device.process_index == jax.process_index()}
    bytes_here = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state.params)
        for shard in leaf.addressable_shards
        if shard.device == min(local, key=lambda device: device.id)
    )
    on_writer(lambda: np.savez(out, losses=losses, samples=samples, bytes_here=bytes_here, **flat))


if __name__ == "__main__":
    main(*sys.argv[1:])
