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


@pytest.fixture
def x_start(key):
    return jax.random.choice(key, PIXELS, (3, 4, 4, 2))


def denoise_fn(x, t):
    return jnp.tanh(x)


@pytest.mark.parametrize("scale", [1e-3, 0.01, 0.1, 3.0])
@pytest.mark.parametrize("mean", [-1.2, -0.3, 0.999])
def test_the_bins_of_all_pixels_sum_to_one(mean, scale):
    log_p = discretized_gaussian_log_likelihood(PIXELS, mean, np.log(scale))
    # The floor of 1e-12 may be added 256 times.
    np.testing.assert_allclose(np.sum(np.exp(log_p)), 1, atol=1e-9)


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0])
def test_the_tanh_formula_is_near_the_normal_cdf(scale):
    """0.5 + 0.5 tanh is within 5e-4 of Φ, and so is each sum of bins, a CDF itself."""
    log_p = discretized_gaussian_log_likelihood(PIXELS, 0.1, np.log(scale))
    exact = norm.cdf((PIXELS[:-1] + 1 / 255 - 0.1) / scale)
    np.testing.assert_allclose(np.cumsum(np.exp(log_p))[:-1], exact, rtol=0, atol=5e-4)


def test_float32_keeps_the_digits_of_narrow_and_of_far_bins():
    """The difference of two float32 CDFs keeps none of them 5 deviations away."""
    x, scale = PIXELS[100:200], 0.08
    exact = discretized_gaussian_log_likelihood(x, -0.4, np.log(scale))
    single = discretized_gaussian_log_likelihood(
        x.astype(np.float32), np.float32(-0.4), np.log(np.float32(scale))
    )
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, exact, rtol=1e-5)


def test_no_probability_below_the_floor_and_no_nan_far_away():
    def log_p(mean, log_scale):
        return jnp.sum(discretized_gaussian_log_likelihood(PIXELS[100:110], mean, log_scale))

    value, slopes = jax.value_and_grad(log_p, (0, 1))(50.0, -8.0)
    np.testing.assert_allclose(value, 10 * np.log(1e-12))
    np.testing.assert_array_equal(slopes, (0, 0))


def test_kl_of_gaussians():
    np.testing.assert_allclose(gaussian_kl(1.0, 0.3, 1.0, 0.3), 0, atol=0)
    # ½ (σ₁²/σ₂² - 1 - log σ₁²/σ₂²) + (μ₁ - μ₂)² / (2 σ₂²), with variances 4 and 1.
    np.testing.assert_allclose(gaussian_kl(2.0, np.log(4), 1.0, 0.0), (3 - np.log(4) + 1) / 2)
    # Variances 1e-4 apart, in float32: δ²/4, of which exp(δ) - 1 - δ keeps no digit.
    nearly = gaussian_kl(np.float32(0), np.float32(1e-4), np.float32(0), np.float32(0))
    np.testing.assert_allclose(nearly, 2.5e-9, rtol=1e-2)


def test_a_perfect_network_pays_only_for_the_prior_and_the_variance(key, x_start):
    def bits(variance_type):
        return ddpm.bits_per_dim(
            key,
            SCHEDULE,
            lambda x, t: x_start,
            x_start,
            prediction_type="sample",
            variance_type=variance_type,
        )

    small, large = bits("fixed_small"), bits("fixed_large")
    np.testing.assert_array_equal(small.vb[:, 1:], np.zeros((3, 19)))
    np.testing.assert_array_equal(small.mse < 1e-25, np.full((3, 20), True))
    ratio = SCHEDULE.posterior_variance[1:] / SCHEDULE.betas[1:]
    expected = (ratio - 1 - np.log(ratio)) / 2 / np.log(2)
    np.testing.assert_allclose(large.vb[:, 1:], np.tile(expected, (3, 1)), rtol=1e-9)
    signal = SCHEDULE.alphas_cumprod[-1]
    squares = np.mean(np.square(x_start), axis=(1, 2, 3))
    prior = (signal * squares - signal - np.log1p(-signal)) / 2 / np.log(2)
    np.testing.assert_allclose(small.prior, prior, rtol=1e-12)
    np.testing.assert_allclose(small.total, small.prior + small.vb.sum(axis=1), rtol=1e-12)


def test_bound_of_gaussian_data_is_its_entropy_and_the_priors_mismatch(key):
    """For x_0 ~ N(0, s²) every p(x_{t-1} | x_t) is Gaussian and known: the bound is then tight.

    E[bound] = H(x_0) + KL(q(x_T) ‖ N(0, 1)), with the entropy of pixels 2/255 apart.
    """
    s, count = 0.25, 20_000
    x_start = np.round(s * jax.random.normal(key, (count, 1)) * 127.5) / 127.5
    previous = SCHEDULE.alphas_cumprod_prev * s**2 + 1 - SCHEDULE.alphas_cumprod_prev
    variance = SCHEDULE.alphas_cumprod * s**2 + 1 - SCHEDULE.alphas_cumprod
    log_variance = jnp.log(SCHEDULE.betas * previous / variance)

    def best(x, t):
        x_hat = ddpm.extract(SCHEDULE.sqrt_alphas_cumprod * s**2 / variance, t, x) * x
        return jnp.concatenate([x_hat, ddpm.extract(log_variance, t, x)], axis=-1)

    bits = jax.jit(
        lambda key, x: ddpm.bits_per_dim(
            key,
            SCHEDULE,
            best,
            x,
            prediction_type="sample",
            variance_type="learned",
            clip_denoised=False,
        )
    )(key, x_start)
    last = variance[-1]
    expected = np.log2(s * 127.5) + np.log2(2 * np.pi * np.e) / 2
    expected += (last - 1 - np.log(last)) / 2 / np.log(2)
    error = np.std(bits.total) / np.sqrt(count)
    # The tanh formula's density differs from the normal one's in the third digit.
    np.testing.assert_allclose(np.mean(bits.total), expected, rtol=0, atol=4 * error + 2e-3)


def test_entries_ascend_and_see_their_own_noise_and_timestep(key, x_start):
    """`vb[:, t]` and `mse[:, t]` belong to entry t, and to training timestep `timesteps[t]`."""
    short = ddpm.respace(SCHEDULE, [3, 7, 19])
    noise = jax.random.normal(key, (3, *x_start.shape))
    bits = ddpm.bits_per_dim(
        None,
        short,
        lambda x, t: jnp.broadcast_to(t.astype(x.dtype)[:, None, None, None], x.shape),
        x_start,
        clip_denoised=False,
        noise_fn=lambda i: noise[i],
    )
    for entry, timestep in enumerate([3, 7, 19]):
        expected = np.mean((timestep - noise[entry]) ** 2, axis=(1, 2, 3))
        np.testing.assert_allclose(bits.mse[:, entry], expected, rtol=1e-9)
        term = ddpm.training_losses(
            short,
            lambda x, t, timestep=timestep: jnp.full(x.shape, float(timestep)),
            x_start,
            entry,
            noise[entry],
            loss_type="vb",
        )
        np.testing.assert_allclose(bits.vb[:, entry], term, rtol=1e-12)


def test_sample_17_has_the_same_bits_in_any_batch(key, x_start):
    together = ddpm.bits_per_dim(key, SCHEDULE, denoise_fn, x_start, first_sample=16)
    alone = ddpm.bits_per_dim(key, SCHEDULE, denoise_fn, x_start[1:2], first_sample=17)
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a, b[1:2], rtol=1e-12)


def test_jit_vmap_a_traced_schedule_and_no_second_compilation(key, x_start):
    jitted = jax.jit(
        lambda schedule, key, x: ddpm.bits_per_dim(
            key, schedule, denoise_fn, x, prediction_type="v_prediction"
        )
    )
    expected = ddpm.bits_per_dim(key, SCHEDULE, denoise_fn, x_start, prediction_type="v_prediction")
    assert [value.shape for value in expected] == [(3,), (3,), (3, 20), (3, 20)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9),
        jitted(SCHEDULE, key, x_start),
        expected,
    )
    jitted(ZERO_SNR, jax.random.key(1), -x_start)
    assert jitted._cache_size() == 1
    keys = jnp.stack([jax.random.key(1), key])
    several = jax.vmap(jitted, (None, 0, None))(SCHEDULE, keys, x_start)
    np.testing.assert_allclose(several.total[1], expected.total, rtol=1e-9)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr_is_finite_and_so_are_gradients(key, x_start, prediction_type):
    x_start = x_start.astype(jnp.float32)

    def total(scale):
        bits = ddpm.bits_per_dim(
            key,
            ZERO_SNR,
            lambda x, t: jnp.concatenate([scale * x, scale * jnp.sin(x)], axis=-1),
            x_start,
            prediction_type=prediction_type,
            variance_type="learned_range",
            clip_denoised=False,
        )
        return jnp.sum(bits.total), bits

    slope, bits = jax.jit(jax.grad(total, has_aux=True))(jnp.float32(0.5))
    assert np.isfinite(slope)
    for value in bits:
        assert value.dtype == jnp.float32 and np.all(np.isfinite(value))
    np.testing.assert_array_equal(bits.prior, np.zeros(3))


def test_memory_does_not_grow_with_the_chain(key):
    def temporary(total, differentiate):
        schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(total))

        def loss(scale, x):
            bits = ddpm.bits_per_dim(key, schedule, lambda x, t: scale * jnp.sin(x), x)
            return jnp.mean(bits.total)

        x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        function = jax.jit(jax.grad(loss) if differentiate else loss)
        compiled = function.lower(jnp.float32(1), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for differentiate in (False, True):
        growth = temporary(200, differentiate) - temporary(20, differentiate)
        assert growth < 2 * 32 * 32 * 3 * 4, growth  # a batch of images


def test_bad_input_is_named(untyped, key, x_start):
    with pytest.raises(ValueError, match="key: expected a key.* got None"):
        ddpm.bits_per_dim(None, SCHEDULE, denoise_fn, x_start)
    with pytest.raises(ValueError, match=r"noise_fn: expected shape \(3, 4, 4, 2\), got \(2,\)"):
        ddpm.bits_per_dim(None, SCHEDULE, denoise_fn, x_start, noise_fn=lambda i: jnp.ones(2))
    with pytest.raises(ValueError, match="prediction_type: expected .* zero terminal SNR"):
        ddpm.bits_per_dim(key, ZERO_SNR, denoise_fn, x_start)
