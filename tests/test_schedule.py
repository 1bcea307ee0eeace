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


def test_it_is_a_line_to_read():
    """Also where it holds shapes or tracers."""
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
    said = [repr(each) for each in (schedule, jax.eval_shape(lambda: schedule))]
    jax.jit(lambda schedule: said.append(repr(schedule)))(schedule)
    assert all(len(each) < 120 and "\n" not in each for each in said), said
    assert "num_timesteps=1000" in said[0]


@pytest.mark.parametrize("tau", [0.7, 1.0])
def test_sigmoid_schedule_is_a_hyperbolic_tangent(tau):
    """σ(x) = (1 + tanh(x/2)) / 2, so ᾱ runs from 1 to 0 as a tanh that is odd about T/2."""
    alphas_cumprod = np.cumprod(1 - ddpm.sigmoid_beta_schedule(100, tau=tau))
    time = np.arange(1, 100) / 100
    expected = (1 - np.tanh((6 * time - 3) / (2 * tau)) / np.tanh(3 / (2 * tau))) / 2
    np.testing.assert_allclose(alphas_cumprod[:-1], expected, rtol=1e-10)


def test_zero_terminal_snr_is_that_of_diffusers(diffusers):
    ours = ddpm.rescale_zero_terminal_snr(ddpm.linear_beta_schedule(1000))
    reference = diffusers.DDPMScheduler(1000, 1e-4, 0.02, rescale_betas_zero_snr=True)
    # In float32, diffusers loses digits where √ᾱ is shifted to near 0: an error of 2e-6 of β.
    np.testing.assert_allclose(ours, reference.betas.numpy(), rtol=0, atol=4e-6)
    np.testing.assert_array_equal(ddpm.rescale_zero_terminal_snr([0.3]), [1.0])
    schedule = ddpm.make_schedule(ours)
    assert schedule.alphas_cumprod[-1] == 0 and np.all(np.isfinite(schedule.posterior_mean_coef1))
    schedule = schedule._replace(half_log_snr_prev=schedule.half_log_snr)  # infinite at x_0
    assert all(np.all(np.isfinite(table[:-1])) for table in schedule)


def test_the_first_entry_ends_in_x_start_to_the_bit(schedule):
    """`alphas_cumprod[t - 1]` at t = 0 wraps to the last entry: x_0 came out as noise. And 1 - ᾱ_0
    by subtraction is 1e-13 off, which a decoder of deviation 0.01 makes 1e-11."""
    for chain in (schedule, ddpm.respace(schedule, [3, 20, 49])):
        assert chain.alphas_cumprod_prev[0] == 1
        np.testing.assert_array_equal(chain.alphas_cumprod_prev[1:], chain.alphas_cumprod[:-1])
    assert schedule.posterior_mean_coef1[0] == 1 and schedule.posterior_mean_coef2[0] == 0
    assert schedule.sqrt_one_minus_alphas_cumprod[0] == np.sqrt(schedule.betas[0])


def test_float32_images_meet_correctly_rounded_tables():
    """Built in float32, as JAX does without x64, cosine betas of 4,000 steps are 1e-2 off."""
    expected = ddpm.make_schedule(ddpm.cosine_beta_schedule(4000))
    with jax.enable_x64(False):
        schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(4000))
        kept = ddpm.respace(schedule, ddpm.spaced_timesteps(4000, 100))
        got = ddpm.extract(schedule.betas, np.arange(4000), np.zeros((4000, 1), np.float32))
    assert all(table.dtype == np.float64 for table in kept[:-1])
    np.testing.assert_array_equal(schedule.betas, expected.betas)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got[:, 0], expected.betas.astype(np.float32))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacing_is_that_of_diffusers(diffusers, spacing):
    """`linspace(0, T, S + 1)` starts at t = T, one past the end; JAX clamps it in silence."""
    reference = diffusers.DDIMScheduler(1000, timestep_spacing=spacing)
    for steps in (1, 2, 7, 10, 50, 999, 1000):
        reference.set_timesteps(steps)
        ours = ddpm.spaced_timesteps(1000, steps, spacing)
        np.testing.assert_array_equal(ours, reference.timesteps.numpy()[::-1])


TENS = [
    *(0, 11, 22, 33, 44, 55, 66, 77, 88, 99),
    *(100, 107, 114, 121, 128, 135, 142, 149, 157, 164, 171, 178, 185, 192, 199),
    *(200, 205, 210, 216, 221, 226, 231, 236, 242, 247),
    *(252, 257, 263, 268, 273, 278, 283, 289, 294, 299),
]


@pytest.mark.parametrize(
    ("timesteps", "words", "expected"),
    [
        (10, "", range(10)),
        (1000, "1000", range(1000)),
        (10, "1", [0]),
        (1000, "ddim25", range(0, 1000, 40)),
        (10, "ddim4", range(0, 10, 3)),
        (100, "3,1,2", [0, 16, 33, 34, 67, 99]),
        (100, "0,0,2", [67, 99]),
        (300, "10,15,20", TENS),
    ],
)
def test_respacing_in_openais_words(timesteps, words, expected):
    """What `guided_diffusion.respace.space_timesteps` gives: 149 is a half that its sum lost."""
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


def test_a_chain_may_end_in_noise(schedule):
    """The tail of a long chain is a chain: its tables are those of the whole."""
    for start in (0, 20):
        end = schedule.alphas_cumprod_prev[start]
        tail = ddpm.respace(schedule, np.arange(start, 50), final_alpha_cumprod=end)
        for name, table in tail._asdict().items():
            expected = getattr(schedule, name)[start:]
            np.testing.assert_allclose(table, expected, rtol=1e-9, atol=1e-15, err_msg=name)
    still = ddpm.respace(schedule, [7, 30], final_alpha_cumprod=schedule.alphas_cumprod[7])
    assert still.betas[0] == still.posterior_variance[0] == 0


def test_extract_of_a_concrete_t_and_a_traced_x():
    """Arithmetic on t would be traced inside the trace of x, and its check fail."""
    x, t = np.zeros((3, 2, 2, 1)), np.array([0, 7, 49])
    betas = ddpm.linear_beta_schedule(50)
    extracted = jax.jit(lambda x: ddpm.extract(betas, jnp.asarray(t), x))(x)
    np.testing.assert_array_equal(extracted, betas[t].reshape(3, 1, 1, 1))
