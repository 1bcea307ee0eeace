"""Whole chains on a mesh of eight: the same pictures, and nothing moves between the devices."""

import contextlib
import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ddpm as ddpm
from jax_ddpm.models import NoisyClassifier
from jax_ddpm.noise import place

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHORT = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 10, "trailing"))
SHAPE = (16, 4, 4, 3)
X_START = np.tanh(np.random.default_rng(0).normal(size=SHAPE))


def network(x, t):
    """Sees every pixel of its image and the timestep, but no other image."""
    mixed = jnp.tanh(x + x.mean(axis=(1, 2, 3), keepdims=True))
    return mixed * jnp.cos(t.astype(x.dtype) / 200).reshape(-1, 1, 1, 1)


def sample(key, x_start, denoise_fn=network, **policy):
    return ddpm.p_sample_loop(key, SHORT, denoise_fn, SHAPE, **policy)


def sample_guided(key, x_start, **policy):
    guidance = dict(interval=(20, 150), rescale=0.7)
    free = ddpm.classifier_free_guidance(network, lambda x, t: x / 2, 3.0, **guidance)
    guided = ddpm.classifier_guidance(SCHEDULE, free, lambda x, t: -(x**2).sum((1, 2, 3)))
    return sample(key, x_start, guided, **policy)


def interpolate(key, x_start, **policy):
    return ddpm.interpolate(SHORT, network, x_start, x_start**2, np.array([0.0, 0.4]), **policy)


CHAIN, MASK = {"schedule": SHORT, "denoise_fn": network}, np.arange(4).reshape(4, 1, 1) < 2
UNET = ddpm.UNet(
    block_out_channels=(8, 16),
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=4,
    num_class_embeds=4,
    resnet_time_scale_shift="scale_shift",
    param_dtype=float,
)
CLASSIFIER = NoisyClassifier(4, 3, 2, (32,), ("AttnDownBlock2D",), 1, 32, param_dtype=float)
SIMPLE = ddpm.SimpleUNet(param_dtype=float)
CONV = eqx.nn.Conv2d(3, 3, 3, padding=1, key=jax.random.key(0), dtype=float)

# Each from `run(model, x, t, *labels)`, and labels, which lie where the images do.
NETWORKS = {
    "labels": lambda run, labels: ddpm.classifier_free_guidance(
        lambda x, t: run(UNET, x, t, labels), lambda x, t: run(UNET, x, t, labels * 0), 2.0
    ),
    "classifier": lambda run, labels: ddpm.classifier_guidance(
        SCHEDULE, network, lambda x, t: run(CLASSIFIER, x, t)[:, 1], labels * 1.0
    ),
    "reconstruction": lambda run, labels: ddpm.reconstruction_guidance(
        SCHEDULE, partial(run, SIMPLE), lambda x, t: -(x**2).sum((1, 2, 3)) * t
    ),
    "vmap": lambda run, labels: (
        lambda x, t: jax.vmap(
            lambda x, t, label: CONV(x.T).T * (t / 200) + label  # of one image
        )(x, t, labels)
    ),
}


def sample_by(name, on_mesh, key, x_start, sharding=None):
    """The weights are on the mesh, as people place them, or constants."""

    def run(model, *inputs):
        rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, key, *inputs)
        tree = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape), shapes)
        if on_mesh and sharding is not None:
            tree = jax.device_put(tree, NamedSharding(sharding.mesh, P()))
        return model.apply(tree, *inputs)

    denoise_fn = NETWORKS[name](run, place(jnp.arange(16) % 4, sharding))
    return sample(key, x_start, denoise_fn, sharding=sharding)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit  # Explicit ones are what JAX makes by default
# The kind of the mesh's axes, and whether the mesh is entered or only named.
CHAINS = {
    "sde": (partial(sample, sampler=ddpm.dpm_solver_pp(2, stochastic=True)), AUTO, False),
    "heun": (partial(sample, sampler=ddpm.heun()), EXPLICIT, True),
    "guided": (sample_guided, EXPLICIT, True),
    "edit": (partial(ddpm.image_to_image, **CHAIN, steps=4), AUTO, True),
    "interpolate": (interpolate, EXPLICIT, False),
    "inpaint": (partial(ddpm.inpaint, **CHAIN, mask=MASK, jump_length=3), EXPLICIT, False),
    **{
        f"{name}, {entered}": (partial(sample_by, name, entered), EXPLICIT, entered)
        for name in NETWORKS
        for entered in ((True, False) if name in ("labels", "vmap") else (True,))
    },
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_the_same_on_eight_devices(name, key):
    chain, axis_type, entered = CHAINS[name]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("data"))
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms
        alone = jax.jit(chain)(key, x_start=X_START)
        with jax.set_mesh(mesh) if entered else contextlib.nullcontext():
            lowered = jax.jit(partial(chain, sharding=sharding)).lower(key, x_start=X_START)
            spread = lowered.compile()
            samples = spread(key, x_start=X_START)
    np.testing.assert_allclose(samples, alone, rtol=1e-9, atol=1e-9)
    assert samples.sharding.spec[-4 % samples.ndim] == "data"
    text = spread.as_text()
    assert "f64[2,4,4,3]" in text
    text = text.replace("pred[] all-reduce(", "")  # is a timestep in the interval of guidance?
    for collective in ("all-gather", "all-reduce", "collective-permute", "all-to-all"):
        assert not re.search(rf" {collective}(-start)?\(", text)


def test_a_state_from_one_device_is_spread(key):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    state = ddpm.p_sample_init(key, SHORT, SHAPE, x_T=X_START, sampler=ddpm.ddim())
    policy = dict(sampler=ddpm.ddim(), sharding=NamedSharding(mesh, P("data")))
    steps = jax.jit(lambda state: ddpm.p_sample_steps(key, SHORT, network, state, 5, **policy))
    assert steps(state).x_t.sharding.spec[0] == "data"
