import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

import jax_ddpm as ddpm
from jax_ddpm.likelihood import discretized_gaussian_log_likelihood, gaussian_kl

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(20, 1e-3, 0.2))
ZERO_SNR = ddpm.make_schedule(ddpm.rescale_zero_terminal_snr(SCHEDULE.betas))
PIXELS = np.arange(256) / 127.5 - 1
X_START = np.random.default_rng(0).choice(PIXELS[1:-1], (3, 4, 4, 2))
log_likelihood = jax.jit(discretized_gaussian_log_likelihood)


def test_the_bins_of_all_pixels_sum_to_one():
    means = np.reshape([-1.2, -0.3, 0.999], (3, 1, 1))
    scales = np.reshape([1e-3, 0.01, 0.1, 3.0], (1, 4, 1))
    log_p = log_likelihood(PIXELS[None, None], means, np.log(scales))
    # The floor of 1e-12 may be added 256 times.
    np.testing.assert_allclose(np.sum(np.exp(log_p), axis=-1), np.ones((3, 4)), atol=1e-9)


def test_the_tanh_formula_is_near_the_normal_cdf():
    """0.5 + 0.5 tanh is within 5e-4 of Φ, and so is each sum of bins, a CDF itself."""
    scales = np.array([0.01, 0.1, 1.0])[:, None]
    log_p = log_likelihood(PIXELS[None], 0.1, np.log(scales))
    exact = jax.jit(norm.cdf)((PIXELS[:-1] + 1 / 255 - 0.1) / scales)
    np.testing.assert_allclose(np.cumsum(np.exp(log_p), axis=-1)[:, :-1], exact, rtol=0, atol=5e-4)


def test_float32_keeps_the_digits_of_narrow_and_of_far_bins():
    """The difference of two float32 CDFs keeps none of them 5 deviations away."""
    x, scale = PIXELS[100:200], 0.08
    exact = log_likelihood(x, -0.4, np.log(scale))
    single = log_likelihood(x.astype(np.float32), np.float32(-0.4), np.log(np.float32(scale)))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, exact, rtol=1e-5)


def test_no_probability_below_the_floor_and_no_nan_far_away():
    def log_p(mean, log_scale):
        return jnp.sum(discretized_gaussian_log_likelihood(PIXELS[100:110], mean, log_scale))

    value, slopes = jax.jit(jax.value_and_grad(log_p, (0, 1)))(50.0, -8.0)
    np.testing.assert_allclose(value, 10 * np.log(1e-12))
    np.testing.assert_array_equal(slopes, (0, 0))


def test_kl_of_gaussians():
    np.testing.assert_allclose(gaussian_kl(1.0, 0.3, 1.0, 0.3), 0, atol=0)
    # ½ (σ₁²/σ₂² - 1 - log σ₁²/σ₂²) + (μ₁ - μ₂)² / (2 σ₂²), with variances 4 and 1.
    np.testing.assert_allclose(gaussian_kl(2.0, np.log(4), 1.0, 0.0), (3 - np.log(4) + 1) / 2)
    # Variances 1e-4 apart, in float32: δ²/4, of which exp(δ) - 1 - δ keeps no digit.
    nearly = gaussian_kl(np.float32(0), np.float32(1e-4), np.float32(0), np.float32(0))
    np.testing.assert_allclose(nearly, 2.5e-9, rtol=1e-2)


def test_a_perfect_network_pays_only_for_the_prior_and_the_variance(key):
    @jax.jit
    def bits(key):
        network = lambda x, t: jnp.asarray(X_START)
        found = partial(ddpm.bits_per_dim, key, SCHEDULE, network, X_START)
        kinds = ("fixed_small", "fixed_large")
        return [found(prediction_type="sample", variance_type=kind) for kind in kinds]

    small, large = bits(key)
    np.testing.assert_array_equal(small.vb[:, 1:], np.zeros((3, 19)))
    # What a bin of 2/255 holds about its centre, by the normal CDF.
    deviation = np.exp(SCHEDULE.posterior_log_variance_clipped[0] / 2)
    mass = math.erf(1 / 255 / deviation / math.sqrt(2))
    np.testing.assert_allclose(small.vb[:, 0], np.full(3, -np.log2(mass)), rtol=2e-3)
    np.testing.assert_array_equal(small.mse < 1e-25, np.full((3, 20), True))
    ratio = SCHEDULE.posterior_variance[1:] / SCHEDULE.betas[1:]
    expected = (ratio - 1 - np.log(ratio)) / 2 / np.log(2)
    np.testing.assert_allclose(large.vb[:, 1:], np.tile(expected, (3, 1)), rtol=1e-9)
    signal = SCHEDULE.alphas_cumprod[-1]
    squares = np.mean(np.square(X_START), axis=(1, 2, 3))
    prior = (signal * squares - signal - np.log1p(-signal)) / 2 / np.log(2)
    np.testing.assert_allclose(small.prior, prior, rtol=1e-12)
    np.testing.assert_allclose(small.total, small.prior + small.vb.sum(axis=1), rtol=1e-12)


def test_bound_of_gaussian_data_is_its_entropy_and_the_priors_mismatch(key):
    """For x_0 ~ N(0, s²) every p(x_{t-1} | x_t) is Gaussian and known: the bound is then tight.

    E[bound] = H(x_0) + KL(q(x_T) ‖ N(0, 1)), with the entropy of pixels 2/255 apart.
    """
    s, count = 0.25, 20_000
    x_start = np.round(s * np.random.default_rng(0).standard_normal((count, 1)) * 127.5) / 127.5
    previous = SCHEDULE.alphas_cumprod_prev * s**2 + 1 - SCHEDULE.alphas_cumprod_prev
    variance = SCHEDULE.alphas_cumprod * s**2 + 1 - SCHEDULE.alphas_cumprod
    log_variance = np.log(SCHEDULE.betas * previous / variance)

    def best(x, t):
        x_hat = ddpm.extract(SCHEDULE.sqrt_alphas_cumprod * s**2 / variance, t, x) * x
        return jnp.concatenate([x_hat, ddpm.extract(log_variance, t, x)], axis=-1)

    policy = {"prediction_type": "sample", "variance_type": "learned", "clip_denoised": False}
    bits = jax.jit(lambda x: ddpm.bits_per_dim(key, SCHEDULE, best, x, **policy))(x_start)
    last = variance[-1]
    expected = np.log2(s * 127.5) + np.log2(2 * np.pi * np.e) / 2
    expected += (last - 1 - np.log(last)) / 2 / np.log(2)
    error = np.std(bits.total) / np.sqrt(count)
    # The tanh formula's density differs from the normal one's in the third digit.
    np.testing.assert_allclose(np.mean(bits.total), expected, rtol=0, atol=4 * error + 2e-3)


def test_entries_ascend_and_see_their_own_noise_and_timestep():
    """`vb[:, t]` and `mse[:, t]` belong to entry t, and to training timestep `timesteps[t]`."""
    kept = np.array([3, 7, 19])
    short = ddpm.respace(SCHEDULE, kept)
    noise = np.random.default_rng(1).standard_normal((3, *X_START.shape))

    def network(x, t):
        return jnp.broadcast_to(t.astype(x.dtype)[:, None, None, None], x.shape)

    @jax.jit
    def bits(noise):
        policy = {"clip_denoised": False, "noise_fn": lambda i: noise[i]}
        return ddpm.bits_per_dim(None, short, network, X_START, **policy)

    @jax.jit
    def term(entry, noise, timestep):
        network = lambda x, t: jnp.full(x.shape, timestep)
        return ddpm.training_losses(short, network, X_START, entry, noise, loss_type="vb")

    found = bits(noise)
    for entry, timestep in enumerate(kept.astype(float)):
        expected = np.mean((timestep - noise[entry]) ** 2, axis=(1, 2, 3))
        np.testing.assert_allclose(found.mse[:, entry], expected, rtol=1e-9)
        expected = term(entry, noise[entry], timestep)
        np.testing.assert_allclose(found.vb[:, entry], expected, rtol=1e-12)


def test_jit_vmap_any_batch_a_traced_schedule_and_no_second_trace(key):
    """Sample 17 has the same bits alone and in a batch from 16 on."""
    traces = []

    def bits(schedule, key, x, first_sample):
        traces.append(x)
        policy = {"prediction_type": "v_prediction", "first_sample": first_sample}
        return ddpm.bits_per_dim(key, schedule, lambda x, t: jnp.tanh(x), x, **policy)

    expected, jitted = bits(SCHEDULE, key, X_START, 16), jax.jit(bits)
    assert [value.shape for value in expected] == [(3,), (3,), (3, 20), (3, 20)]
    got = jitted(SCHEDULE, key, X_START, 16)
    jitted(ZERO_SNR, jax.random.key(1), -X_START, 0)
    assert len(traces) == 2
    each = jax.jit(jax.vmap(bits, (None, None, 0, 0)))
    alone = each(SCHEDULE, key, X_START[:, None], np.arange(16, 19))
    for a, b, c in zip(got, alone, expected, strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-9)
        np.testing.assert_allclose(b[:, 0], c, rtol=1e-9)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr_is_finite_and_so_are_gradients(key, prediction_type):
    policy = {"prediction_type": prediction_type, "variance_type": "learned_range"}

    def total(scale):
        network = lambda x, t: jnp.concatenate([scale * x, scale * jnp.sin(x)], axis=-1)
        x_start = X_START.astype(np.float32)
        bits = ddpm.bits_per_dim(key, ZERO_SNR, network, x_start, clip_denoised=False, **policy)
        return jnp.sum(bits.total), bits

    slope, bits = jax.jit(jax.grad(total, has_aux=True))(jnp.float32(0.5))
    assert np.isfinite(slope)
    for value in bits:
        assert value.dtype == jnp.float32 and np.all(np.isfinite(value))
    np.testing.assert_array_equal(bits.prior, np.zeros(3))


def test_neither_the_chain_nor_its_gradient_keeps_images(key):
    """Going back through the bound recomputes each entry."""
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(200))

    def loss(scale, x):
        bits = ddpm.bits_per_dim(key, schedule, lambda x, t: scale * jnp.sin(x), x)
        return jnp.mean(bits.total)

    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(jnp.float32(1), x).compile()
    batch = 2 * 32 * 32 * 3 * 4
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used < 40 * batch, used / batch  # of the 200 on the way
