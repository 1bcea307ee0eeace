"""One rule places everything."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jax_ddpm as ddpm
from jax_ddpm.plan.hlo import collectives
from jax_ddpm.training.sharding import (
    data_sharding,
    device_mesh,
    gather_params,
    replicated,
    state_sharding,
)

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(10))
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def test_the_mesh_takes_what_divides_the_batch():
    assert device_mesh(16).shape == {"data": 8, "fsdp": 1}
    assert device_mesh(12).shape == {"data": 4, "fsdp": 1}
    assert device_mesh(16, fsdp=4).shape == {"data": 2, "fsdp": 4}
    with pytest.raises(ValueError, match="fsdp: expected a divisor of the 4 devices in use, got 8"):
        device_mesh(12, fsdp=8)


def test_the_longest_axis_that_divides_is_split():
    mesh = device_mesh(8, fsdp=4)
    shapes = {"kernel": (3, 3, 8, 16), "odd": (3, 5), "step": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, float) for name, shape in shapes.items()}
    specs = jax.tree.map(lambda sharding: sharding.spec, state_sharding(mesh, tree))
    assert specs == {"kernel": P(None, None, None, "fsdp"), "odd": P(), "step": P()}
    whole = state_sharding(device_mesh(8), tree)
    assert all(sharding.spec == P() for sharding in jax.tree.leaves(whole))


def apply_fn(params, x, t):
    hidden = jnp.tanh(x.reshape(len(x), -1) @ params["in"] + params["time"][t])
    return (hidden @ params["out"]).reshape(x.shape)


def test_fsdp_splits_the_state_and_gathers_the_weights(key):
    """Eight devices hold an eighth each, and take the steps of one."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 4, 4, 1))
    shapes = {"in": (16, 64), "time": (10, 64), "out": (64, 16)}
    params = {name: rng.normal(0, 0.1, shape) for name, shape in shapes.items()}
    size = sum(leaf.nbytes for leaf in params.values())
    state = ddpm.init_train_state(key, params, OPTIMIZER)

    def compiled(mesh):
        placement = state_sharding(mesh, state)
        step = ddpm.make_train_step(SCHEDULE, gather_params(apply_fn, mesh), OPTIMIZER)
        step = jax.jit(step, out_shardings=(placement, replicated(mesh)))
        arguments = jax.device_put((state, images), (placement, data_sharding(mesh)))
        return step.lower(*arguments).compile(), *arguments

    alone, one, batch = compiled(device_mesh(1))
    split, eight, batches = compiled(device_mesh(16, fsdp=8))
    memory = [program.memory_analysis().argument_size_in_bytes for program in (alone, split)]
    assert memory[1] < memory[0] / 6
    gathered = {each.kind: each.nbytes for each in collectives(split.as_text())}["all-gather"]
    assert size <= gathered < 1.01 * size
    for _ in range(3):
        (one, expected), (eight, got) = alone(one, batch), split(eight, batches)
        np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-9)
    np.testing.assert_allclose(eight.params["out"], one.params["out"], rtol=1e-9)
