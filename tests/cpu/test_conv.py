"""The convolution's derivative, written anew for CPUs, is that of XLA's own convolution."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ddpm.cpu.conv import conv_general_dilated

OWN = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
CASES = {
    "few to many channels": ((3, 20), (1, 1), (3, 3), "SAME"),
    "large images: in parts": ((18, 20), (1, 1), (3, 3), "SAME", (32, 36)),
    "in parts, uneven padding and kernel": ((20, 18), (1, 1), (2, 3), ((0, 1), (2, 0)), (36, 32)),
    "in parts, stride 2": ((16, 17), (2, 2), (3, 3), ((0, 1), (0, 1)), (64, 68)),
    "tiny images: in parts": ((18, 20), (1, 1), (3, 3), "SAME", (4, 3)),
    "one pixel, many channels: in parts": ((17, 24), (1, 1), (1, 1), ((0, 0), (0, 0))),
    "many to few: rows and columns exchanged": ((20, 3), (1, 1), (3, 3), ((1, 1), (1, 1))),
    "exchanged, uneven padding and kernel": ((18, 24), (1, 1), (2, 3), ((0, 1), (2, 0))),
    "wide to narrow": ((24, 18), (1, 1), (3, 3), ((1, 1), (1, 1))),
    "stride 2": ((5, 6), (2, 2), (3, 3), ((0, 1), (0, 1))),
    "few pixels, stride 2": ((16, 18), (2, 2), (3, 3), ((0, 1), (0, 1))),
    "one pixel": ((17, 4), (1, 1), (1, 1), ((0, 0), (0, 0))),
}


BRANCHES = (
    "large images: in parts",
    "few pixels, stride 2",
    "many to few: rows and columns exchanged",
    "wide to narrow",
)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    (channels, features), strides, taps, padding, *size = request.param
    height, width = size[0] if size else (6, 8)
    rng = np.random.default_rng(0)
    x, x_dot = (rng.normal(size=(4, height, width, channels)) for _ in range(2))
    w, w_dot = (rng.normal(size=(*taps, channels, features)) for _ in range(2))

    def ours(x, w):
        return conv_general_dilated(x, w, strides, padding, lhs_dilation=(1, 1))

    def theirs(x, w):
        return lax.conv_general_dilated(x, w, strides, padding, **OWN)

    return ours, theirs, (x, w), (x_dot, w_dot)


def assert_close(got, expected):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert np.max(np.abs(ours - theirs)) < 1e-13 * np.max(np.abs(theirs))


def test_forwards_backwards_and_twice(case):
    ours, theirs, primals, tangents = case

    @partial(jax.jit, static_argnums=0)
    def derivatives(conv, primals, tangents):
        output, out_dot = jax.jvp(conv, primals, tangents)
        gradients = jax.vjp(conv, *primals)[1](jnp.cos(output))

        def slope(x, w):
            return jnp.sum(jax.grad(lambda x, w: jnp.sum(conv(x, w) ** 3), 1)(x, w) ** 2)

        return output, out_dot, gradients, jax.grad(slope, (0, 1))(*primals)

    assert_close(derivatives(ours, primals, tangents), derivatives(theirs, primals, tangents))


@pytest.mark.parametrize("case", [CASES[name] for name in BRANCHES], ids=BRANCHES, indirect=True)
def test_vmap(case):
    ours, theirs, (x, w), _ = case
    gradients = [
        jax.vmap(
            jax.grad(lambda x, w, conv=conv: jnp.sum(conv(x[None], w) ** 2), (0, 1)), (0, None)
        )
        for conv in (ours, theirs)
    ]
    assert_close(*(jax.jit(gradient)(x, w) for gradient in gradients))


def test_convolutions_of_a_loop_are_in_the_layout_that_cpus_run_fast(case):
    """XLA's CPU backend calls its fast kernels for one layout, and mends no other in a loop."""
    ours, _, (x, w), _ = case

    def step(carry, _):
        return jax.tree.map(jnp.add, carry, jax.vjp(ours, *carry)[1](ours(*carry))), None

    float32 = jax.tree.map(lambda a: a.astype(np.float32), (x, w))
    program = jax.jit(lambda c: lax.scan(step, c, length=3)[0]).lower(float32).compile()
    convolutions = [line for line in program.as_text().splitlines() if " convolution(" in line]
    assert convolutions
    assert all("dim_labels=b01f_01io->b01f" in line for line in convolutions)


@pytest.mark.parametrize("case", [CASES["few pixels, stride 2"]], ids=["stride 2"], indirect=True)
def test_no_kernel_is_turned_round_for_few_pixels(case):
    ours, theirs, primals, _ = case

    def turned(conv):
        gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(conv(x, w) ** 2)))
        return " reverse(" in gradient.lower(*primals).compile().as_text()

    assert (turned(ours), turned(theirs)) == (False, True)


@pytest.mark.parametrize("size", [(128, 256), (4, 4)])
def test_sixteen_bits_are_summed_in_thirty_two(key, size):
    """Over parts of the images (in bfloat16 4 % off), and over the taps of a product."""
    keys = jax.random.split(key, 3)
    x, dy = (jax.random.normal(k, (1, *size, 16), jnp.bfloat16) for k in keys[:2])
    w = jax.random.normal(keys[2], (3, 3, 16, 16), jnp.bfloat16)

    def gradients(x, w, dy):
        return jax.vjp(lambda x, w: conv_general_dilated(x, w, (1, 1), "SAME"), x, w)[1](dy)

    exact = gradients(*(a.astype(jnp.float64) for a in (x, w, dy)))
    for ours, theirs in zip(gradients(x, w, dy), exact, strict=True):
        error = jnp.max(jnp.abs(ours.astype(jnp.float64) - theirs))
        assert error < 5e-3 * jnp.max(jnp.abs(theirs))  # half a unit in the last place is 4e-3


@pytest.mark.parametrize("case", [CASES[name] for name in BRANCHES], ids=BRANCHES, indirect=True)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_on_many_devices(case, axis_type):
    ours, _, (x, w), _ = case
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    gradients = jax.jit(jax.grad(lambda x, w: jnp.sum(ours(x, w) ** 2), (0, 1)))
    split = (
        jax.device_put(x, NamedSharding(mesh, P("data"))),
        jax.device_put(w, NamedSharding(mesh, P())),
    )
    assert_close(gradients(*split), gradients(x, w))


@pytest.mark.parametrize("options", [{"feature_group_count": 2}, {"rhs_dilation": (2, 2)}])
def test_what_no_layer_asks_for_is_refused(options):
    with pytest.raises(ValueError, match="expected 1"):
        conv_general_dilated(
            jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2)), (1, 1), "SAME", **options
        )
