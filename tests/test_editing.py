from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHORT = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 10, "trailing"))
FINE = ddpm.make_schedule(ddpm.linear_beta_schedule(8000, 1e-4 / 8, 0.02 / 8))
SHAPE = (8, 4, 4, 3)
MEAN, STD = 0.3, 0.5


def network(x, t):
    """Sees every pixel of its image and the timestep, but no other image."""
    mixed = jnp.tanh(x + x.mean(axis=(1, 2, 3), keepdims=True))
    return mixed * jnp.cos(t.astype(x.dtype) / 200).reshape(-1, 1, 1, 1)


def best_eps(x, t):
    """E[ε | x_t] for data N(MEAN, STD²), on `FINE` and its respacings."""
    a = jnp.asarray(FINE.alphas_cumprod)[t].reshape(-1, 1)
    return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)


@pytest.fixture
def x_start(key):
    return jnp.tanh(jax.random.normal(jax.random.fold_in(key, 99), SHAPE))


def test_image_to_image_is_the_last_part_of_a_chain(key, x_start):
    """The same as running the whole chain's last 4 steps from q_sample's x_t."""
    sampler = ddpm.ddim(eta=0.5)

    @jax.jit
    def last_part(key):
        x_t = ddpm.q_sample(SHORT, x_start, 3, ddpm.sample_noise(key, 4, SHAPE))
        state = ddpm.SampleState(jnp.int32(3), x_t, ())
        return ddpm.p_sample_steps(key, SHORT, network, state, 4, sampler=sampler).x_t

    def edit(schedule, x_start, **policy):
        return ddpm.image_to_image(
            schedule=schedule,
            denoise_fn=network,
            x_start=x_start,
            steps=4,
            sampler=sampler,
            **policy,
        )

    whole = last_part(key)
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    close(jax.jit(partial(edit, SHORT, key=key))(x_start), whole)
    close(jax.jit(partial(edit, key=key, first_sample=5))(SHORT, x_start[5:6])[0], whole[5])
    injected = partial(edit, key=None, noise_fn=lambda i: ddpm.sample_noise(key, i, SHAPE))
    close(jax.jit(injected)(SHORT, x_start), whole)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, P("data"))
    close(jax.jit(partial(edit, SHORT, key=key, sharding=sharding))(x_start), whole)


def test_image_to_image_ends_where_the_chain_does(key, x_start):
    """Also in noise: the last of 3 steps draws."""
    noisy = ddpm.respace(
        SCHEDULE, [10, 60, 110, 160], final_alpha_cumprod=float(SCHEDULE.alphas_cumprod[5])
    )

    @jax.jit
    def edit(last):
        def noise_fn(i):
            return jnp.where(i > 0, jnp.full(SHAPE, 0.3), jnp.full(SHAPE, last))

        return ddpm.image_to_image(None, noisy, network, x_start, 3, noise_fn=noise_fn)

    spread = np.sqrt(noisy.posterior_variance[0])
    assert spread > 0.01
    np.testing.assert_allclose(edit(1.0) - edit(0.0), np.full(SHAPE, spread), rtol=1e-9)


def test_few_steps_keep_the_picture(key, x_start):
    """The fewer, the nearer (with the best ε of unit Gaussian data, σ x_t)."""

    def unit_eps(x, t):
        return jnp.sqrt(1 - jnp.asarray(SCHEDULE.alphas_cumprod)[t]).reshape(-1, 1, 1, 1) * x

    edit = jax.jit(partial(ddpm.image_to_image, key, SCHEDULE, unit_eps), static_argnums=1)
    distances = [float(jnp.abs(edit(x_start, steps) - x_start).mean()) for steps in (2, 100)]
    assert distances[0] < 0.1 < distances[1]


def test_inversion_meets_the_exact_ode_and_comes_back():
    """Both errors halve when the steps double.

    For N(m, s²) the ODE keeps the place in the distribution: (x_t - √ᾱ m) / √(ᾱ s² + 1 - ᾱ).
    """
    x_0 = jnp.array([[-0.7], [0.1], [0.9]])
    away, back = [], []
    for steps in (40, 80, 160):
        schedule = ddpm.respace(FINE, ddpm.spaced_timesteps(8000, steps, "trailing"))
        x_T = ddpm.ddim_invert(schedule, best_eps, x_0)
        a = schedule.alphas_cumprod[-1]
        exact = np.sqrt(a) * MEAN + np.sqrt(a * STD**2 + 1 - a) / STD * (x_0 - MEAN)
        returned = ddpm.p_sample_loop(
            None,
            schedule,
            best_eps,
            x_0.shape,
            sampler=ddpm.ddim(),
            x_T=x_T,
            clip_denoised=False,
        )
        away.append(np.abs(x_T - exact).max())
        back.append(np.abs(returned - x_0).max())
    assert away[-1] < 0.015 and back[-1] < 0.025
    for errors in (away, back):
        np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, atol=0.2)


def test_inversion_is_that_of_diffusers(torch, diffusers, x_start):
    """Its `DDIMInverseScheduler`, whose tables are float32."""
    reference = diffusers.DDIMInverseScheduler(200, 1e-4, 0.02, clip_sample=False)
    reference.set_timesteps(20)
    x = torch.from_numpy(np.array(x_start))
    for t in reference.timesteps:
        output = network(jnp.asarray(x.numpy()), jnp.full((SHAPE[0],), int(t)))
        x = reference.step(torch.from_numpy(np.array(output)), t, x).prev_sample
    schedule = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 20, "leading"))
    ours = ddpm.ddim_invert(schedule, network, x_start)
    np.testing.assert_allclose(ours, x.numpy(), rtol=0, atol=2e-5 * np.abs(x.numpy()).max())


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_inversion_is_the_same_for_any_prediction(x_start, prediction_type):
    def other(x, t):
        eps = network(x, t)
        pred_xstart = ddpm.predict_xstart_from_eps(SCHEDULE, x, t, eps)
        v = ddpm.predict_v(SCHEDULE, pred_xstart, t, eps)
        return pred_xstart if prediction_type == "sample" else v

    np.testing.assert_allclose(
        ddpm.ddim_invert(SHORT, other, x_start, prediction_type=prediction_type),
        ddpm.ddim_invert(SHORT, network, x_start),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_interpolation_on_a_mesh(x_start, axis_type):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    weights = jnp.array([0.0, 0.4, 1.0])

    def between(x_a, x_b, sharding):
        return ddpm.interpolate(SHORT, network, x_a, x_b, weights, sharding=sharding)

    alone = jax.jit(partial(between, sharding=None))(x_start[:4], x_start[4:])
    assert alone.shape == (3, 4, 4, 4, 3)
    spread = jax.jit(partial(between, sharding=NamedSharding(mesh, P("data"))))
    np.testing.assert_allclose(spread(x_start[:4], x_start[4:]), alone, rtol=1e-9, atol=1e-9)


def test_interpolation_ends_in_its_pictures():
    """Up to DDIM's error, as the way there and back alone has it."""
    schedule = ddpm.respace(FINE, ddpm.spaced_timesteps(8000, 160, "trailing"))
    x_a, x_b = jnp.array([[-0.7, 0.2], [0.1, 0.4]]), jnp.array([[0.9, 0.1], [-0.3, 0.8]])
    pictures = ddpm.interpolate(schedule, best_eps, x_a, x_b, jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(pictures[0], x_a, atol=0.025)
    np.testing.assert_allclose(pictures[2], x_b, atol=0.025)
    assert np.all(np.abs(pictures[1] - x_a) > 0.01)


def test_slerp_keeps_the_sphere(key):
    a, b = jax.random.normal(key, (2, 3, 4, 5))
    b = (
        b
        * (jnp.linalg.norm(a.reshape(3, -1), axis=1) / jnp.linalg.norm(b.reshape(3, -1), axis=1))[
            :, None, None
        ]
    )
    np.testing.assert_allclose(ddpm.slerp(a, b, 0.0), a, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(ddpm.slerp(a, b, 1.0), b, rtol=1e-14, atol=1e-14)
    between = ddpm.slerp(a, b, jnp.array([0.25, 0.5, 0.9]))
    for j, weight in enumerate([0.25, 0.5, 0.9]):
        length = np.linalg.norm(a[j])
        np.testing.assert_allclose(np.linalg.norm(between[j]), length, rtol=1e-12)
        whole = np.arccos(np.vdot(a[j], b[j]) / length**2)
        part = np.arccos(np.vdot(a[j], between[j]) / length**2)
        np.testing.assert_allclose(part, weight * whole, rtol=1e-7)


def test_slerp_on_a_line_is_straight():
    """Where a and b are parallel, opposite, or 0; and its gradient is finite there."""
    a = jnp.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    b = jnp.array([[1.0, 2.0], [3.0, 6.0], [-1.0, -2.0], [4.0, 0.0]])
    np.testing.assert_allclose(ddpm.slerp(a, b, 0.25), 0.75 * a + 0.25 * b, rtol=1e-14)
    gradient = jax.grad(lambda a: ddpm.slerp(a, b[:3], 0.25).sum())(a[:3])
    np.testing.assert_allclose(gradient, np.full((3, 2), 0.75), rtol=1e-14)


def test_bad_input_is_named(untyped, key, x_start):
    for steps in (0, 11):
        with pytest.raises(ValueError, match=f"steps: expected 1 to 10, got {steps}"):
            ddpm.image_to_image(key, SHORT, network, x_start, steps)
    with pytest.raises(ValueError, match="key: expected a key"):
        ddpm.image_to_image(None, SHORT, network, x_start, 3)
    with pytest.raises(ValueError, match="x_b: expected shape"):
        ddpm.interpolate(SHORT, network, x_start, x_start[:1], jnp.ones(2))
    with pytest.raises(ValueError, match=r"weight: expected shape \(8,\) or \(\), got \(3,\)"):
        ddpm.slerp(x_start, x_start, jnp.ones(3))
