import jax
import jax.numpy as jnp
import numpy as np

import jax_ddpm as ddpm
from jax_ddpm.likelihood import discretized_gaussian_log_likelihood, gaussian_kl

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(20, 1e-3, 0.2))
ZERO_SNR = ddpm.make_schedule(ddpm.rescale_zero_terminal_snr(SCHEDULE.betas))
PIXELS = np.arange(256) / 127.5 - 1
X_START = np.random.default_rng(0).choice(PIXELS[1:-1], (3, 4, 4, 2))
log_likelihood = jax.jit(discretized_gaussian_log_likelihood)


def test_float32_keeps_its_digits():
    """Of bins 5 deviations away, where the difference of two CDFs keeps none, and of nearly equal
    variances: δ²/4, of which exp(δ) - 1 - δ keeps none."""
    x, scale = PIXELS[100:200], 0.08
    exact = log_likelihood(x, -0.4, np.log(scale))
    single = log_likelihood(x.astype(np.float32), np.float32(-0.4), np.log(np.float32(scale)))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, exact, rtol=1e-5)
    nearly = gaussian_kl(np.float32(0), np.float32(1e-4), np.float32(0), np.float32(0))
    np.testing.assert_allclose(nearly, 2.5e-9, rtol=1e-2)


def test_no_probability_below_the_floor_and_no_nan_far_away():
    def log_p(mean, log_scale):
        return jnp.sum(discretized_gaussian_log_likelihood(PIXELS[100:110], mean, log_scale))

    value, slopes = jax.jit(jax.value_and_grad(log_p, (0, 1)))(50.0, -8.0)
    np.testing.assert_allclose(value, 10 * np.log(1e-12))
    np.testing.assert_array_equal(slopes, (0, 0))


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


def test_zero_terminal_snr_is_finite_and_so_are_gradients(key):
    policy = {"prediction_type": "sample", "variance_type": "learned_range"}

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
