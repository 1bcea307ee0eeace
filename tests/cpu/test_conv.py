"""The convolution's derivative, written anew for CPUs, is that of XLA's own convolution."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ddpm.cpu import conv
from jax_ddpm.cpu.conv import conv_general_dilated

# Channels in and out, strides, taps, padding, height and width.
BRANCHES = {
    "neighbourhoods of the input": ((18, 20), (1, 1), (3, 3), "SAME", (6, 32)),
    "of the input, stride 2": ((16, 17), (2, 2), (2, 3), ((0, 1), (2, 0)), (8, 64)),
    "of the output": ((20, 18), (1, 1), (2, 3), ((0, 1), (2, 0)), (6, 32)),
    "few pixels": ((16, 18), (2, 2), (3, 3), ((0, 1), (0, 1)), (6, 8)),
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Sums over pixels are cut as those of large images are."""
    monkeypatch.setattr(conv, "_MOST_PIXELS", 64)


@pytest.fixture(params=BRANCHES)
def case(request):
    (channels, features), strides, taps, padding, size = BRANCHES[request.param]
    rng = np.random.default_rng(0)
    x, x_dot = rng.normal(size=(2, 4, *size, channels))
    w, w_dot = rng.normal(size=(2, *taps, channels, features))
    options = {"window_strides": strides, "padding": padding}
    options["dimension_numbers"] = ("NHWC", "HWIO", "NHWC")
    ours, theirs = (partial(f, **options) for f in (conv_general_dilated, lax.conv_general_dilated))
    return ours, theirs, (x, w), (x_dot, w_dot)


def assert_close(got, expected):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13 * np.max(np.abs(theirs)))


def gradients_of_squares(conv):
    return jax.grad(lambda x, w: jnp.sum(conv(x, w) ** 2), (0, 1))


def test_forwards_backwards_twice_and_of_each_image(case):
    ours, theirs, primals, tangents = case

    @partial(jax.jit, static_argnums=0)
    def derivatives(conv, primals, tangents):
        output, out_dot = jax.jvp(conv, primals, tangents)
        gradients = jax.vjp(conv, *primals)[1](jnp.cos(output))
        of_one = gradients_of_squares(lambda x, w: conv(x[None], w))
        of_each = jax.vmap(of_one, (0, None))(*primals)

        def slope(x, w):
            return jnp.sum(jax.grad(lambda x, w: jnp.sum(conv(x, w) ** 3), 1)(x, w) ** 2)

        return output, out_dot, gradients, of_each, jax.grad(slope, (0, 1))(*primals)

    assert_close(derivatives(ours, primals, tangents), derivatives(theirs, primals, tangents))


def test_convolutions_of_a_loop_are_in_the_layout_that_cpus_run_fast(case):
    """XLA's CPU backend calls its fast kernels for one layout, and mends no other in a loop."""
    ours, _, (x, w), _ = case

    def step(carry, _):
        return jax.tree.map(jnp.add, carry, jax.vjp(ours, *carry)[1](ours(*carry))), None

    float32 = jax.tree.map(lambda a: a.astype(np.float32), (x, w))
    program = jax.jit(lambda c: lax.scan(step, c, length=3)[0]).lower(float32).compile()
    convolutions = [line for line in program.as_text().splitlines() if " convolution(" in line]
    assert convolutions and all("=b01f_01io->b01f" in line for line in convolutions)


@pytest.mark.parametrize("case", ["few pixels"], indirect=True)
def test_no_kernel_is_turned_round_for_few_pixels(case):
    ours, theirs, primals, _ = case

    def turned(conv):
        gradients = jax.jit(gradients_of_squares(conv))
        return " reverse(" in gradients.lower(*primals).compile().as_text()

    assert (turned(ours), turned(theirs)) == (False, True)


def test_sixteen_bits_are_summed_in_thirty_two(key):
    """Over parts of the images, and over the taps of a product."""
    x, dy = jax.random.normal(key, (2, 1, 32, 64, 16), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (3, 3, 16, 16), jnp.bfloat16)

    @jax.jit
    def gradients(x, w, dy):
        return jax.vjp(lambda x, w: conv_general_dilated(x, w, (1, 1), "SAME"), x, w)[1](dy)

    exact = gradients(*(a.astype(jnp.float64) for a in (x, w, dy)))
    for ours, theirs in zip(gradients(x, w, dy), exact, strict=True):
        error = jnp.max(jnp.abs(ours.astype(jnp.float64) - theirs))
        assert error < 5e-3 * jnp.max(jnp.abs(theirs))  # half a unit in the last place is 4e-3


@pytest.mark.parametrize("case", ["neighbourhoods of the input", "few pixels"], indirect=True)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_on_many_devices(case, axis_type):
    ours, theirs, (x, w), _ = case
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    split = jax.device_put((x, w), (NamedSharding(mesh, P("data")), NamedSharding(mesh, P())))
    ours, theirs = (jax.jit(gradients_of_squares(each)) for each in (ours, theirs))
    assert_close(ours(*split), theirs(x, w))


def test_what_no_layer_asks_for_is_refused():
    inputs, other = (jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2))), ("NCHW", "OIHW", "NCHW")
    with pytest.raises(ValueError, match="expected 1"):
        conv_general_dilated(*inputs, (1, 1), "SAME", rhs_dilation=(2, 2))
    with pytest.raises(ValueError, match="expected NHWC"):
        conv_general_dilated(*inputs, (1, 1), "SAME", dimension_numbers=other)
