"""One rule places everything."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jax_ddpm as ddpm
from jax_ddpm.plan.hlo import collectives
from jax_ddpm.training import load_batch
from jax_ddpm.training.sharding import (
    data_sharding,
    device_mesh,
    gather_params,
    replicated,
    state_sharding,
)


def test_the_mesh_takes_what_divides_the_batch():
    assert device_mesh(16).shape == {"data": 8, "fsdp": 1}
    assert device_mesh(12).shape == {"data": 4, "fsdp": 1}
    assert device_mesh(16, fsdp=4).shape == {"data": 2, "fsdp": 4}
    with pytest.raises(ValueError, match="fsdp: expected a divisor of the 4 devices in use, got 8"):
        device_mesh(12, fsdp=8)


def test_the_longest_axis_that_divides_is_split():
    mesh = device_mesh(8, fsdp=4)
    tree = {"kernel": jnp.zeros((3, 3, 8, 16)), "odd": jnp.zeros((3, 5)), "step": jnp.zeros(())}
    specs = jax.tree.map(lambda sharding: sharding.spec, state_sharding(mesh, tree))
    assert specs == {"kernel": P(None, None, None, "fsdp"), "odd": P(), "step": P()}
    whole = state_sharding(device_mesh(8), tree)
    assert all(sharding.spec == P() for sharding in jax.tree.leaves(whole))


def test_a_batch_is_loaded_where_it_is_needed():
    mesh = device_mesh(8)
    images = np.arange(20.0)[:, None] * np.ones(3)
    indices = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    batch = load_batch(images, indices, data_sharding(mesh))
    np.testing.assert_array_equal(batch, images[indices])
    assert [shard.data.shape for shard in batch.addressable_shards] == [(1, 3)] * 8


def _program(mesh, gather):
    model = ddpm.SimpleUNet(channels=1)
    images = jnp.zeros((16, 8, 8, 1), jnp.float32)
    params = model.init(jax.random.key(0), images[:1], jnp.zeros((1,), jnp.int32))
    optimizer = optax.sgd(1e-3, momentum=0.9)
    state = ddpm.init_train_state(jax.random.key(0), params, optimizer)
    placement = state_sharding(mesh, state)
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(10))
    apply_fn = gather_params(model.apply, mesh) if gather else model.apply
    step = jax.jit(
        ddpm.make_train_step(schedule, apply_fn, optimizer),
        donate_argnums=0,
        out_shardings=(placement, replicated(mesh)),
    )
    arguments = jax.device_put((state, images), (placement, data_sharding(mesh)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return step.lower(*arguments).compile(), size


def test_fsdp_splits_the_state_and_gathers_the_weights():
    (alone, size), (split, _) = (
        _program(device_mesh(16), False),
        _program(device_mesh(16, fsdp=8), True),
    )
    memory = [program.memory_analysis().argument_size_in_bytes for program in (alone, split)]
    assert memory[1] < memory[0] / 6
    gathered = {each.kind: each.nbytes for each in collectives(split.as_text())}["all-gather"]
    assert 0.9 * size <= gathered <= size  # all weights that 8 divides
