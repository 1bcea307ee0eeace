"""Every sampler is a row of `SAMPLERS`, and every test here runs over all of them.

`dpm_solver_pp(1)` needs no row: it is DDIM, or the ancestral chain, and is tested to be.
"""

import contextlib
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ddpm as ddpm

SAMPLERS = {
    "ancestral": ddpm.ancestral(),
    "ddim": ddpm.ddim(),
    "ddim_half": ddpm.ddim(eta=0.5),
    "ddim_full": ddpm.ddim(eta=1.0),
    "dpm_2": ddpm.dpm_solver_pp(2),
    "dpm_3": ddpm.dpm_solver_pp(3),
    "dpm_sde_2": ddpm.dpm_solver_pp(2, stochastic=True),
    "dpm_sde_3": ddpm.dpm_solver_pp(3, stochastic=True),
    "heun": ddpm.heun(),
}
SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHORT = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 10, "trailing"))
SHAPE = (8, 4, 4, 3)
ROUNDING = 1e-13
"""Of pixels near 1 in float64, over the ten steps of `SHORT`: the most that was seen is 7e-16 on
jax 0.12.0.1, and nothing on 0.10.2."""


def network(x, t):
    """Sees every pixel of its image and the timestep, but no other image."""
    mixed = jnp.tanh(x + x.mean(axis=(1, 2, 3), keepdims=True))
    return mixed * jnp.cos(t.astype(x.dtype) / 200).reshape(-1, 1, 1, 1)


def gaussian_eps(mean, std):
    """The best ε for data N(mean, std²) on `SCHEDULE`: E[ε | x_t], two Gaussians' conditional."""

    def denoise_fn(x, t):
        a = jnp.asarray(SCHEDULE.alphas_cumprod, x.dtype)[t].reshape(-1, *((1,) * (x.ndim - 1)))
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * mean) / (a * std**2 + 1 - a)

    return denoise_fn


def moments(schedule, denoise_fn, sampler):
    """Mean and variance of what a chain makes of normal noise, exactly, where ε is affine in x.

    x_0 is then affine in x_T and the noise of every entry. One batch finds the coefficients:
    of its T + 2 samples the first has them all zero, and each other has one of them one.
    """
    total = schedule.num_timesteps
    unit = jnp.eye(total + 2, k=-1)
    offset, *slopes = ddpm.p_sample_loop(
        None,
        schedule,
        denoise_fn,
        (total + 2, 1),
        sampler=sampler,
        x_T=unit[:, total:-1],
        noise_fn=lambda i: unit[:, i, None],
        clip_denoised=False,
    )[:, 0]
    return offset, jnp.sum((jnp.stack(slopes) - offset) ** 2)


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    return SAMPLERS[request.param]


def test_jit_is_eager_and_compiles_once(sampler, key):
    loop = partial(
        ddpm.p_sample_loop, schedule=SHORT, denoise_fn=network, shape=SHAPE, sampler=sampler
    )
    jitted = jax.jit(loop)
    expected = loop(key)
    assert expected.shape == SHAPE and expected.dtype == jnp.float64
    np.testing.assert_allclose(jitted(key), expected, rtol=1e-10, atol=1e-10)
    jitted(jax.random.key(1))
    assert jitted._cache_size() == 1


def test_vmap_over_keys(sampler, key):
    loop = jax.jit(
        lambda key: ddpm.p_sample_loop(key, SHORT, network, SHAPE, sampler=sampler),
    )
    keys = jax.random.split(key, 2)
    both = jax.vmap(loop)(keys)
    for each, one in zip(both, keys, strict=True):
        np.testing.assert_allclose(each, loop(one), rtol=1e-10, atol=1e-10)


def test_a_sample_is_the_same_in_any_batch(sampler, key):
    """Sample 17 alone, in a batch of 64, and in one of 8 that starts at 12: the same draws, and
    the same picture but for the rounding of the programs, which are compiled for each batch."""

    def draw(batch, first_sample):
        return ddpm.p_sample_loop(
            key,
            SHORT,
            network,
            (batch, *SHAPE[1:]),
            sampler=sampler,
            first_sample=first_sample,
        )

    samples = draw(64, 0)
    np.testing.assert_allclose(draw(1, 17)[0], samples[17], rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(draw(8, 12)[5], samples[17], rtol=0, atol=ROUNDING)
    assert np.any(samples[16] != samples[17])


def test_a_sample_is_the_same_on_eight_devices(sampler, key):
    """On meshes of either kind of axis, entered or only named."""

    def draw(key, sharding=None):
        return ddpm.p_sample_loop(
            key, SHORT, network, (64, *SHAPE[1:]), sampler=sampler, sharding=sharding
        )

    alone = jax.jit(draw)(key)
    for axis_type, in_mesh in itertools.product((AxisType.Auto, AxisType.Explicit), (False, True)):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
        with jax.set_mesh(mesh) if in_mesh else contextlib.nullcontext():
            spread = jax.jit(partial(draw, sharding=NamedSharding(mesh, P("data"))))(key)
        assert spread.sharding.spec[0] == "data"
        np.testing.assert_allclose(spread, alone, rtol=1e-12, atol=1e-12)


def test_noise_and_memory_are_where_the_state_is(sampler, key):
    """The compiled loop moves nothing between devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    loop = jax.jit(
        lambda key: ddpm.p_sample_loop(
            key, SHORT, network, (64, 4, 4, 3), sampler=sampler, sharding=sharding
        )
    )
    text = loop.lower(key).compile().as_text()
    assert "f64[8,4,4,3]" in text and "f64[64,4,4,3]" not in text
    for collective in ("all-gather", "all-reduce", "collective-permute", "all-to-all"):
        assert collective not in text


def test_in_pieces_is_the_same(sampler, key):
    """But for rounding: XLA puts a loop of one step into the program around it (jax 0.12)."""
    whole = jax.jit(lambda key: ddpm.p_sample_loop(key, SHORT, network, SHAPE, sampler=sampler))(
        key
    )
    run = partial(ddpm.p_sample_steps, key, SHORT, network, sampler=sampler)
    run = jax.jit(run, static_argnums=1)
    for pieces in ((5, 5), (1,) * 10):
        state = ddpm.p_sample_init(key, SHORT, SHAPE, sampler=sampler)
        for steps in pieces:
            state = run(state, steps)
        assert int(state.i) == -1
        np.testing.assert_allclose(state.x_t, whole, rtol=0, atol=ROUNDING)


def test_saved_states_are_those_on_the_way(sampler, key):
    loop = partial(ddpm.p_sample_loop, key, SHORT, network, SHAPE, sampler=sampler)
    x_start, states = loop(save_every=3)
    assert states.shape == (3, *SHAPE)
    np.testing.assert_allclose(x_start, loop(), rtol=0, atol=ROUNDING)
    run = jax.jit(lambda state: ddpm.p_sample_steps(key, SHORT, network, state, 3, sampler=sampler))
    state = ddpm.p_sample_init(key, SHORT, SHAPE, sampler=sampler)
    for saved in states:
        state = run(state)
        np.testing.assert_allclose(saved, state.x_t, rtol=0, atol=ROUNDING)


def test_injected_noise_is_used_and_needs_no_key(sampler, key):
    """The same draws, handed in: the same samples."""

    def noise_fn(i):
        return ddpm.sample_noise(key, i, SHAPE)

    x_T = ddpm.sample_noise(key, 10, SHAPE)
    injected = ddpm.p_sample_loop(
        None, SHORT, network, SHAPE, sampler=sampler, x_T=x_T, noise_fn=noise_fn
    )
    np.testing.assert_array_equal(
        injected, ddpm.p_sample_loop(key, SHORT, network, SHAPE, sampler=sampler)
    )


def test_draws_are_those_documented(key):
    """To the bit: x_T uses i = T, entry i its own number, and every sample its own key."""
    seen = ddpm.sample_noise(key, 10, (3, 4, 4, 3), first_sample=5)
    for j in range(3):
        sample_key = jax.random.fold_in(jax.random.fold_in(key, 5 + j), 10)
        np.testing.assert_array_equal(seen[j], jax.random.normal(sample_key, (4, 4, 3)))
    start = ddpm.p_sample_init(key, SHORT, (3, 4, 4, 3), first_sample=5).x_t
    np.testing.assert_array_equal(start, seen)


def test_program_and_memory_do_not_grow_with_the_chain(sampler, key):
    def compiled(timesteps):
        schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(timesteps))
        loop = jax.jit(
            lambda key: ddpm.p_sample_loop(key, schedule, network, SHAPE, sampler=sampler)
        )
        return loop.lower(key).compile()

    short, long = compiled(50), compiled(1000)
    assert len(long.as_text().splitlines()) == len(short.as_text().splitlines())
    grown = long.memory_analysis().temp_size_in_bytes - short.memory_analysis().temp_size_in_bytes
    # A branch, as heun has, is given a copy of the schedule's table.
    assert grown == 0 or sampler is SAMPLERS["heun"] and grown < 1.01 * 4 * (1000 - 50)


def test_closed_form_on_gaussian_data(sampler, key):
    """With the best ε the loop is affine: its samples have the moments that follow exactly.

    The schedule is an argument of the jitted loop, so that one program runs all the spacings.
    """
    count = 20_000
    denoise_fn = gaussian_eps(0.3, 0.5)
    loop = jax.jit(
        lambda key, schedule: ddpm.p_sample_loop(
            key, schedule, denoise_fn, (count, 1), sampler=sampler, clip_denoised=False
        )
    )
    exact = jax.jit(lambda schedule: moments(schedule, denoise_fn, sampler))
    for spacing in ("leading", "trailing", "linspace"):
        schedule = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 20, spacing))
        samples = np.asarray(loop(key, schedule))
        mean, variance = exact(schedule)
        assert abs(samples.mean() - mean) < 4 * np.sqrt(variance / count)
        assert abs(samples.var() - variance) < 4 * variance * np.sqrt(2 / count)
    assert loop._cache_size() == 1


def test_a_long_chain_reaches_the_data(sampler):
    """T = 1,000 with the best ε: the mean and spread that it makes, exactly, are the data's.

    To 1 % of its spread: the linear schedule leaves ᾱ_T = 4e-5, which moves the mean by up to
    √ᾱ_T = 0.6 % of it, and a discrete chain has an error of order 1 / T.
    """
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))

    def denoise_fn(x, t):
        a = jnp.asarray(schedule.alphas_cumprod)[t].reshape(-1, 1)
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * 0.3) / (a * 0.5**2 + 1 - a)

    mean, variance = moments(schedule, denoise_fn, sampler)
    assert abs(mean - 0.3) < 0.005
    assert abs(np.sqrt(variance) - 0.5) < 0.005


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ddpm.ddim(eta=1.0), ddpm.ancestral()),
        (ddpm.dpm_solver_pp(1), ddpm.ddim()),
        (ddpm.dpm_solver_pp(1, stochastic=True), ddpm.ancestral()),
    ],
    ids=["ddim_full", "dpm_1", "dpm_sde_1"],
)
def test_one_rule_written_two_ways(one, other, key):
    """Song et al. 2021a, §4.1; Lu et al. 2022b, §4.1 and §5: the same chain."""
    draw = partial(ddpm.p_sample_loop, key, SHORT, network, SHAPE)
    np.testing.assert_allclose(draw(sampler=one), draw(sampler=other), atol=1e-12)


def test_finite_and_so_are_its_gradients(sampler, key):
    """Also from pure noise (λ = -∞) to the image (λ = ∞), and where a last step has length 0."""

    @jax.jit
    @partial(jax.value_and_grad, argnums=1)
    def loss(schedule, x_T):
        x_start = ddpm.p_sample_loop(
            key,
            schedule,
            network,
            x_T.shape,
            sampler=sampler,
            x_T=x_T,
            prediction_type="v_prediction",
        )
        return jnp.sum(x_start**2)

    linear = ddpm.linear_beta_schedule(200)
    for betas in (linear, ddpm.rescale_zero_terminal_snr(linear)):
        full = ddpm.make_schedule(betas)
        for end in (1.0, full.alphas_cumprod[0]):
            kept = ddpm.spaced_timesteps(200, 5, "linspace")
            schedule = ddpm.respace(full, kept, final_alpha_cumprod=end)
            value, gradient = loss(schedule, jnp.ones((2, 4, 4, 3)))
            assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_state_keeps_its_dtype(sampler, key, dtype):
    x_T = jnp.ones(SHAPE, dtype)
    x_start = ddpm.p_sample_loop(key, SHORT, network, SHAPE, sampler=sampler, x_T=x_T)
    assert x_start.dtype == dtype and jnp.all(jnp.isfinite(x_start))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"key": None}, "key: expected a key, or both x_T and noise_fn"),
        ({"key": None, "x_T": np.zeros(SHAPE)}, "key: expected a key"),
        ({"x_T": np.zeros((1, 4, 4, 3))}, r"x_T: expected shape \(8, 4, 4, 3\), got \(1, "),
        ({"save_every": 0}, "save_every: expected 1 to 10"),
        ({"save_every": 11}, "save_every: expected 1 to 10 steps, got 11"),
        ({"noise_fn": lambda i: jnp.zeros((8, 1, 1, 1))}, "noise_fn: expected shape"),
        ({"prediction_type": "noise"}, "prediction_type: expected one of"),
    ],
)
def test_bad_input_is_named(untyped, key, arguments, words):
    arguments = {"key": key, "schedule": SHORT, "denoise_fn": network, "shape": SHAPE, **arguments}
    with pytest.raises(ValueError, match=words):
        ddpm.p_sample_loop(**arguments)
    for wrong, got in ((0, "int"), (jax.random.PRNGKey(0), "an array of uint32")):
        with pytest.raises(TypeError, match=f"key: expected a typed key, .*, got {got}"):
            ddpm.p_sample_loop(wrong, SHORT, network, SHAPE)
    with pytest.raises(ValueError, match="eta: expected 0 to 1, got 2"):
        ddpm.ddim(eta=2.0)
    with pytest.raises(ValueError, match="order: expected one of 1, 2, 3, got 4"):
        ddpm.dpm_solver_pp(4)
    with pytest.raises(ValueError, match="max_slope: expected more than 0, got 0"):
        ddpm.heun(max_slope=0)


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [(ddpm.ddim(), 10), (ddpm.heun(), 19), (ddpm.heun(max_slope=0.5), 12)],
)
def test_the_network_runs_no_oftener_than_its_output_is_used(sampler, evaluations, key):
    """Ten steps of Heun's method are 19 runs: the last is DDIM's, as are those that are too steep
    (√ᾱ' σ̂ is 0.15, 0.29, 0.43, 0.57, … from entry 0 on)."""
    runs = []

    def predict(x_t, i):
        runs.append(i)
        return ddpm.p_mean_variance(SHORT, network, x_t, i)

    x_t = jax.random.normal(key, SHAPE)
    memory = sampler.init(x_t)
    with jax.disable_jit():
        for i in reversed(range(10)):
            x_t, memory = sampler.step(SHORT, predict, None, jnp.int32(i), x_t, memory)
    assert len(runs) == evaluations


@pytest.mark.parametrize("name", ["ddim", "dpm_2", "dpm_3", "heun"])
def test_deterministic_chains_ask_for_no_noise(name, key):
    x_T = jax.random.normal(key, SHAPE)
    sampler = SAMPLERS[name]
    assert ddpm.p_sample_loop(None, SHORT, network, SHAPE, sampler=sampler, x_T=x_T).shape


def test_a_sampler_of_ones_own(key):
    """A rule that jumps to x_0 and counts its steps."""

    def step(schedule, predict, noise_fn, i, x_t, memory):
        return predict(x_t, i).pred_xstart, memory + 1

    mine = ddpm.Sampler(init=lambda x_T: jnp.zeros((), jnp.int32), step=step)
    state = ddpm.p_sample_init(key, SHORT, SHAPE, sampler=mine)
    state = ddpm.p_sample_steps(key, SHORT, network, state, 10, sampler=mine)
    assert int(state.memory) == 10 and state.x_t.shape == SHAPE


def test_a_step_that_forgets_its_memory_is_named(untyped, key):
    def step(schedule, predict, noise_fn, i, x_t, memory):
        return predict(x_t, i).pred_xstart

    mine = ddpm.Sampler(init=lambda x_T: (), step=step)
    with pytest.raises(TypeError, match=r"sampler.step: expected \(x_prev, memory\), got "):
        ddpm.p_sample_loop(key, SHORT, network, SHAPE, sampler=mine)
