import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

BETAS = {
    "linear": ddpm.linear_beta_schedule,
    "scaled_linear": ddpm.scaled_linear_beta_schedule,
    "cosine": ddpm.cosine_beta_schedule,
    "sigmoid": ddpm.sigmoid_beta_schedule,
}


@pytest.fixture(params=BETAS)
def schedule(request):
    return ddpm.make_schedule(BETAS[request.param](50))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_betas_are_those_of_diffusers(diffusers, name, theirs):
    reference = diffusers.DDPMScheduler(1000, 1e-4, 0.02, beta_schedule=theirs)
    # diffusers computes in float32.
    np.testing.assert_allclose(BETAS[name](1000), reference.betas.numpy(), rtol=3e-6)


def test_zero_terminal_snr_is_that_of_diffusers(diffusers):
    ours = ddpm.rescale_zero_terminal_snr(ddpm.linear_beta_schedule(1000))
    reference = diffusers.DDPMScheduler(1000, 1e-4, 0.02, rescale_betas_zero_snr=True)
    # In float32, diffusers loses digits where √ᾱ is shifted to near 0: an error of 2e-6 of β.
    np.testing.assert_allclose(ours, reference.betas.numpy(), rtol=0, atol=4e-6)
    schedule = ddpm.make_schedule(ours)
    assert schedule.alphas_cumprod[-1] == 0
    schedule = schedule._replace(half_log_snr_prev=schedule.half_log_snr)  # infinite at x_0
    assert all(np.all(np.isfinite(table[:-1])) for table in schedule)
    assert np.all(np.isfinite(schedule.posterior_mean_coef1))


def test_tables_are_float64_on_the_host(schedule):
    for name, table in schedule._asdict().items():
        assert isinstance(table, np.ndarray) and table.shape == (50,)
        assert table.dtype == (np.int64 if name == "timesteps" else np.float64)
    assert schedule.num_timesteps == 50


def test_posterior_variance_by_bayes(schedule):
    """Precisions of q(x_t | x_{t-1}) and q(x_{t-1} | x_0) add."""
    betas, previous = schedule.betas[1:], schedule.alphas_cumprod_prev[1:]
    variance = 1 / ((1 - betas) / betas + 1 / (1 - previous))
    np.testing.assert_allclose(schedule.posterior_variance[1:], variance, rtol=1e-9)
    assert schedule.posterior_variance[0] == 0
    np.testing.assert_allclose(
        np.exp(schedule.posterior_log_variance_clipped), variance[[0, *range(49)]], rtol=1e-9
    )


def test_the_posterior_ends_in_x_start_to_the_bit(schedule):
    """1 - ᾱ_0 by subtraction is 1e-13 off, which a decoder of deviation 0.01 makes 1e-11."""
    assert schedule.posterior_mean_coef1[0] == 1 and schedule.posterior_mean_coef2[0] == 0
    np.testing.assert_array_equal(
        schedule.sqrt_one_minus_alphas_cumprod[0], np.sqrt(schedule.betas[0])
    )


def test_float32_tables_are_correctly_rounded():
    """Built in float32, cosine betas of 4,000 steps are 1e-2 off; gathered late they are not."""
    schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(4000))
    x = jnp.zeros((4000, 1), jnp.float32)
    got = ddpm.extract(schedule.betas, np.arange(4000), x)[:, 0]
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, schedule.betas.astype(np.float32))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50, 999, 1000])
def test_spacing_is_that_of_diffusers(diffusers, spacing, steps):
    reference = diffusers.DDIMScheduler(1000, timestep_spacing=spacing)
    reference.set_timesteps(steps)
    ours = ddpm.spaced_timesteps(1000, steps, spacing)
    np.testing.assert_array_equal(ours, reference.timesteps.numpy()[::-1])


@pytest.mark.parametrize(
    ("timesteps", "words", "expected"),
    [
        (10, "", range(10)),
        (1000, "1000", range(1000)),
        (10, "1", [0]),
        (1000, "ddim25", range(0, 1000, 40)),
        (1000, "ddim300", None),
        (10, "ddim4", range(0, 10, 3)),
        (100, "3,1,2", [0, 16, 33, 34, 67, 99]),
        (100, "0,0,2", [67, 99]),
        (
            300,
            "10,15,20",
            [
                *(0, 11, 22, 33, 44, 55, 66, 77, 88, 99),
                *(100, 107, 114, 121, 128, 135, 142, 149, 157, 164, 171, 178, 185, 192, 199),
                *(200, 205, 210, 216, 221, 226, 231, 236, 242, 247),
                *(252, 257, 263, 268, 273, 278, 283, 289, 294, 299),
            ],
        ),
        (10, "11", None),
        (10, "2,x", None),
        (10, "0", None),
    ],
)
def test_respacing_in_openais_words(timesteps, words, expected):
    """What `guided_diffusion.respace.space_timesteps` gives: 149 is a half that its sum lost."""
    if expected is None:
        with pytest.raises(ValueError, match=f"steps: expected .* got '{words}'"):
            ddpm.spaced_timesteps(timesteps, words)
    else:
        np.testing.assert_array_equal(ddpm.spaced_timesteps(timesteps, words), expected)


def test_respaced_chain_has_the_marginals_of_the_long_one(schedule):
    kept = np.array([0, 3, 4, 20, 49])
    short = ddpm.respace(schedule, kept)
    np.testing.assert_array_equal(short.timesteps, kept)
    np.testing.assert_array_equal(short.alphas_cumprod, schedule.alphas_cumprod[kept])
    # 1 - β rounds to 1e-16, which is 1e-10 of a last factor of 1e-6.
    np.testing.assert_allclose(np.cumprod(1 - short.betas), short.alphas_cumprod, rtol=1e-10)
    again = ddpm.respace(short, [1, 4])
    np.testing.assert_array_equal(again.timesteps, [3, 49])


def test_respacing_to_every_entry_changes_nothing(schedule):
    same = ddpm.respace(schedule, np.arange(50))
    for ours, theirs in zip(same, schedule, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15)


def test_one_step_chain_is_finite(schedule):
    short = ddpm.respace(schedule, [49])._asdict()
    assert short.pop("half_log_snr_prev") == np.inf  # it ends at x_0, where nothing is noise
    assert all(np.all(np.isfinite(table)) for table in short.values())


def test_a_chain_may_end_in_noise(schedule):
    """The tail of a long chain is a chain: its tables are those of the whole."""
    tail = ddpm.respace(
        schedule, np.arange(20, 50), final_alpha_cumprod=schedule.alphas_cumprod[19]
    )
    for name, table in tail._asdict().items():
        np.testing.assert_allclose(table, getattr(schedule, name)[20:], rtol=1e-9, err_msg=name)
    still = ddpm.respace(schedule, [7, 30], final_alpha_cumprod=schedule.alphas_cumprod[7])
    assert still.betas[0] == still.posterior_variance[0] == 0


def test_half_log_snr(schedule):
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    np.testing.assert_allclose(np.exp(2 * schedule.half_log_snr), snr, rtol=1e-12)
    np.testing.assert_array_equal(schedule.half_log_snr_prev[1:], schedule.half_log_snr[:-1])


def test_a_concrete_t_may_meet_a_traced_x(schedule):
    """Arithmetic on it inside the trace would be traced too, and its check fail."""
    t = jnp.array([0, 7, 49])
    jitted = jax.jit(lambda x: ddpm.extract(schedule.betas, t, x))
    np.testing.assert_array_equal(jitted(jnp.zeros((3, 1)))[:, 0], schedule.betas[[0, 7, 49]])


def test_extract_works_traced_and_vmapped(schedule):
    x, t = jnp.zeros((3, 2, 2, 1)), jnp.array([0, 7, 49])
    expected = schedule.betas[[0, 7, 49]].reshape(3, 1, 1, 1)
    np.testing.assert_array_equal(ddpm.extract(schedule.betas, t, x), expected)
    # The schedule, too, may be an argument of the jitted function.
    jitted = jax.jit(lambda schedule, t: ddpm.extract(schedule.betas, t, x))
    np.testing.assert_array_equal(jitted(schedule, t), expected)
    each = jax.vmap(lambda t, x: ddpm.extract(schedule.betas, t, x))(t, x)
    np.testing.assert_array_equal(each, expected)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: ddpm.linear_beta_schedule(0), ValueError, "timesteps: expected at least 1"),
        (lambda s: ddpm.make_schedule([0.1, 0.0]), ValueError, r"betas: expected .* got 0\.0"),
        (lambda s: ddpm.make_schedule([0.1, 1.5]), ValueError, r"betas: expected .* got 1\.5"),
        (lambda s: ddpm.make_schedule([0.1, np.nan]), ValueError, "betas: expected .* got nan"),
        (lambda s: ddpm.make_schedule([1.0, 0.1]), ValueError, r"1 only at the end, got 1\.0"),
        (lambda s: ddpm.make_schedule([[0.1]]), ValueError, "betas: expected shape"),
        (lambda s: ddpm.make_schedule("linear"), TypeError, "betas: expected an array .* 'linear'"),
        (lambda s: ddpm.spaced_timesteps(10, 11), ValueError, "steps: expected 1 to 10"),
        (lambda s: ddpm.respace(s, [3, 2]), ValueError, "ascending"),
        (
            lambda s: ddpm.respace(s, [3], final_alpha_cumprod=0.1),
            ValueError,
            r"final_alpha_cumprod: expected .* \(that of entry 3\) to 1, got 0\.1",
        ),
        (lambda s: ddpm.respace(s, [0, 50]), ValueError, r"entries in \[0, 49\]"),
        (lambda s: ddpm.respace(s, [0.5]), ValueError, "expected integers"),
    ],
)
def test_bad_input_is_named(untyped, schedule, call, error, words):
    with pytest.raises(error, match=words):
        call(schedule)


@pytest.mark.parametrize(
    ("t", "error", "words"),
    [
        (np.array([0, 50]), ValueError, r"t: expected entries in \[0, 49\], got 50"),
        (np.array([-1, 3]), ValueError, r"t: expected entries in \[0, 49\], got -1"),
        (np.array([0, 1, 2]), ValueError, r"t: expected shape \(2,\)"),
    ],
)
def test_extract_refuses_what_jax_would_clamp(untyped, schedule, t, error, words):
    with pytest.raises(error, match=words):
        ddpm.extract(schedule.betas, t, jnp.zeros((2, 4)))


def test_extract_refuses_integer_images(untyped, schedule):
    """Cast to uint8, every table would be zeros."""
    with pytest.raises(TypeError, match="x: expected a floating dtype, got uint8"):
        ddpm.extract(schedule.betas, 0, np.zeros((2, 4), np.uint8))
