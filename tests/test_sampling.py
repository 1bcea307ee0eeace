"""Every sampler is a row of `SAMPLERS`, and every test here runs over all of them."""

from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ddpm as ddpm

SAMPLERS = {
    "ancestral": ddpm.ancestral(),
    "ddim": ddpm.ddim(),
    "ddim_half": ddpm.ddim(eta=0.5),
    "ddim_full": ddpm.ddim(eta=1.0),
}
STOCHASTIC = ["ancestral", "ddim_half", "ddim_full"]
SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHORT = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 10, "trailing"))
SHAPE = (8, 4, 4, 3)


def network(x, t):
    """Sees every pixel of its image and the timestep, but no other image."""
    mixed = jnp.tanh(x + x.mean(axis=(1, 2, 3), keepdims=True))
    return mixed * jnp.cos(t.astype(x.dtype) / 200).reshape(-1, 1, 1, 1)


def gaussian_eps(schedule, mean, std):
    """The best ε for data N(mean, std²): E[ε | x_t], by the conditional of two Gaussians."""
    alpha_bar = np.ones(200)
    alpha_bar[schedule.timesteps] = schedule.alphas_cumprod

    def denoise_fn(x, t):
        a = jnp.asarray(alpha_bar, x.dtype)[t].reshape(-1, *((1,) * (x.ndim - 1)))
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * mean) / (a * std**2 + 1 - a)

    return denoise_fn


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
    loop = partial(
        ddpm.p_sample_loop, schedule=SHORT, denoise_fn=network, shape=SHAPE, sampler=sampler
    )
    keys = jax.random.split(key, 2)
    both = jax.vmap(loop)(keys)
    for each, one in zip(both, keys, strict=True):
        np.testing.assert_allclose(each, loop(one), rtol=1e-10, atol=1e-10)


def test_a_sample_is_the_same_in_any_batch(sampler, key):
    """Sample 17 alone, in a batch of 64, and in one of 8 that starts at 12: equal to the bit."""

    def draw(batch, first_sample):
        return ddpm.p_sample_loop(
            key,
            SHORT,
            network,
            (batch, *SHAPE[1:]),
            sampler=sampler,
            first_sample=first_sample,
        )

    seventeen = draw(64, 0)[17]
    np.testing.assert_array_equal(draw(1, 17)[0], seventeen)
    np.testing.assert_array_equal(draw(8, 12)[5], seventeen)
    assert np.any(draw(64, 0)[16] != seventeen)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("in_mesh", [False, True])
def test_a_sample_is_the_same_on_eight_devices(sampler, key, axis_type, in_mesh):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("data"))

    def draw(key, sharding):
        return ddpm.p_sample_loop(
            key, SHORT, network, (64, *SHAPE[1:]), sampler=sampler, sharding=sharding
        )

    alone = jax.jit(partial(draw, sharding=None))(key)
    if in_mesh:
        with jax.set_mesh(mesh):
            spread = jax.jit(partial(draw, sharding=sharding))(key)
    else:
        spread = jax.jit(partial(draw, sharding=sharding))(key)
    assert spread.sharding.spec[0] == "data"
    np.testing.assert_allclose(spread, alone, rtol=1e-12, atol=1e-12)


def test_noise_is_drawn_where_the_state_is(key):
    """The compiled loop moves nothing between devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    loop = jax.jit(
        lambda key: ddpm.p_sample_loop(key, SHORT, network, (64, 4, 4, 3), sharding=sharding)
    )
    text = loop.lower(key).compile().as_text()
    assert "f64[8,4,4,3]" in text and "f64[64,4,4,3]" not in text
    for collective in ("all-gather", "all-reduce", "collective-permute", "all-to-all"):
        assert collective not in text


@pytest.mark.parametrize("pieces", [(5, 5), (3, 3, 4), (1,) * 10], ids=len)
def test_in_pieces_is_the_same_to_the_bit(sampler, key, pieces):
    whole = jax.jit(lambda key: ddpm.p_sample_loop(key, SHORT, network, SHAPE, sampler=sampler))(
        key
    )
    run = partial(ddpm.p_sample_steps, key, SHORT, network, sampler=sampler)
    run = jax.jit(run, static_argnums=1)
    state = ddpm.p_sample_init(key, SHORT, SHAPE, sampler=sampler)
    for steps in pieces:
        state = run(state, steps)
    assert int(state.i) == -1
    np.testing.assert_array_equal(state.x_t, whole)


@pytest.mark.parametrize("save_every", [1, 3, 5, 10])
def test_saved_states_are_those_on_the_way(sampler, key, save_every):
    x_start, states = ddpm.p_sample_loop(
        key, SHORT, network, SHAPE, sampler=sampler, save_every=save_every
    )
    assert states.shape == (10 // save_every, *SHAPE)
    np.testing.assert_array_equal(
        x_start, ddpm.p_sample_loop(key, SHORT, network, SHAPE, sampler=sampler)
    )
    run = partial(ddpm.p_sample_steps, key, SHORT, network, sampler=sampler)
    run = jax.jit(run, static_argnums=1)
    state = ddpm.p_sample_init(key, SHORT, SHAPE, sampler=sampler)
    for saved in states:
        state = run(state, save_every)
        np.testing.assert_allclose(saved, state.x_t, rtol=1e-12, atol=1e-12)


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
    """x_T uses i = T, entry i its own number, and every sample its own key."""
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
    assert long.memory_analysis().temp_size_in_bytes == short.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_closed_form_on_gaussian_data(sampler, key, spacing):
    """With the best ε the loop is linear: its moments follow an exact recursion."""
    mean, std, count = 0.3, 0.5, 40_000
    schedule = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 20, spacing))
    denoise_fn = gaussian_eps(schedule, mean, std)
    loop = jax.jit(
        lambda key: ddpm.p_sample_loop(
            key, schedule, denoise_fn, (count, 1), sampler=sampler, clip_denoised=False
        )
    )
    samples = np.asarray(loop(key))

    # Two probes of one step give its slope and offset, and unit noise its spread: the map of
    # each entry is affine in (x, noise), so the moments are carried through it exactly.
    def entry(i, x, noise):
        state = ddpm.SampleState(jnp.int32(i), jnp.full((1, 1), x), ())
        return ddpm.p_sample_steps(
            None,
            schedule,
            denoise_fn,
            state,
            1,
            sampler=sampler,
            clip_denoised=False,
            noise_fn=lambda i: jnp.full((1, 1), noise),
        ).x_t.item()

    expected_mean, expected_variance = 0.0, 1.0
    for i in reversed(range(20)):
        offset = entry(i, 0.0, 0.0)
        slope, spread = entry(i, 1.0, 0.0) - offset, entry(i, 0.0, 1.0) - offset
        expected_mean = slope * expected_mean + offset
        expected_variance = slope**2 * expected_variance + spread**2
    assert abs(samples.mean() - expected_mean) < 4 * np.sqrt(expected_variance / count)
    assert abs(samples.var() - expected_variance) < 4 * expected_variance * np.sqrt(2 / count)


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_a_long_chain_reaches_the_data(name, key):
    """T = 1,000 with the best ε: mean and spread are the data's, to 1 % of its spread.

    The linear schedule leaves ᾱ_T = 4e-5 and a discrete chain an error of order 1 / T: with
    40,000 samples 4 standard errors are 0.01 of the mean and 0.007 of the spread.
    """
    mean, std, count = 0.3, 0.5, 40_000
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))

    def denoise_fn(x, t):
        a = jnp.asarray(schedule.alphas_cumprod)[t].reshape(-1, 1)
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * mean) / (a * std**2 + 1 - a)

    samples = jax.jit(
        lambda key: ddpm.p_sample_loop(
            key, schedule, denoise_fn, (count, 1), sampler=SAMPLERS[name], clip_denoised=False
        )
    )(key)
    assert abs(float(samples.mean()) - mean) < 0.01
    assert abs(float(samples.std()) - std) < 0.01


def test_ddim_of_eta_one_is_ancestral(key):
    """Song et al. 2021a, §4.1: the same chain, written another way."""
    draw = partial(ddpm.p_sample_loop, key, SHORT, network, SHAPE)
    np.testing.assert_allclose(
        draw(sampler=ddpm.ddim(eta=1.0)), draw(sampler=ddpm.ancestral()), atol=1e-12
    )


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_ddim_is_that_of_diffusers(key, spacing):
    """Where its scheduler is right: it reads ᾱ_prev at t - T/S, which under linspace is not the
    entry before (one step alone has none)."""
    steps = {"leading": 20, "trailing": 20, "linspace": 1}[spacing]
    x_T = np.array(jax.random.normal(key, SHAPE))
    reference = diffusers.DDIMScheduler(
        200,
        1e-4,
        0.02,
        clip_sample=False,
        timestep_spacing=spacing,
        set_alpha_to_one=True,
    )
    reference.set_timesteps(steps)
    x = torch.from_numpy(x_T)
    for t in reference.timesteps:
        output = network(jnp.asarray(x.numpy()), jnp.full((SHAPE[0],), int(t)))
        x = reference.step(torch.from_numpy(np.array(output)), t, x).prev_sample
    schedule = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, steps, spacing))
    ours = ddpm.p_sample_loop(
        None, schedule, network, SHAPE, sampler=ddpm.ddim(), x_T=x_T, clip_denoised=False
    )
    # diffusers' tables are float32.
    np.testing.assert_allclose(ours, x.numpy(), rtol=0, atol=2e-5 * np.abs(x.numpy()).max())


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
    with pytest.raises(ValueError, match="eta: expected 0 to 1, got 2"):
        ddpm.ddim(eta=2.0)


def test_deterministic_chains_ask_for_no_noise(key):
    x_T = jax.random.normal(key, SHAPE)
    assert ddpm.p_sample_loop(None, SHORT, network, SHAPE, sampler=ddpm.ddim(), x_T=x_T).shape


def test_a_sampler_of_ones_own(key):
    """A rule that jumps to x_0 and counts its steps."""

    def step(schedule, predict, noise_fn, i, x_t, memory):
        return predict(x_t, i).pred_xstart, memory + 1

    mine = ddpm.Sampler(init=lambda x_T: jnp.zeros((), jnp.int32), step=step)
    state = ddpm.p_sample_init(key, SHORT, SHAPE, sampler=mine)
    state = ddpm.p_sample_steps(key, SHORT, network, state, 10, sampler=mine)
    assert int(state.memory) == 10 and state.x_t.shape == SHAPE
