"""Whole chains on a mesh of eight: the same pictures, and nothing moves between the devices."""

import contextlib
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

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHORT = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 10, "trailing"))
SHAPE = (16, 4, 4, 3)
X_START = np.tanh(np.random.default_rng(0).normal(size=SHAPE))
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


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


def edit(key, x_start, **policy):
    return ddpm.image_to_image(key, SHORT, network, x_start, 4, **policy)


def interpolate(key, x_start, **policy):
    return ddpm.interpolate(SHORT, network, x_start, x_start**2, np.array([0.0, 0.4]), **policy)


def inpaint(key, x_start, **policy):
    policy |= dict(mask=np.arange(4).reshape(4, 1, 1) < 2, jump_length=3, resamples=2)
    return ddpm.inpaint(key, SHORT, network, x_start, **policy)


CHAINS = {
    "dpm_sde_2": partial(sample, sampler=ddpm.dpm_solver_pp(2, stochastic=True)),
    "heun": partial(sample, sampler=ddpm.heun()),
    "guided": sample_guided,
    "edit": edit,
    "interpolate": interpolate,
    "inpaint": inpaint,
}
FIRST = [
    ("dpm_sde_2", AUTO, False),
    ("dpm_sde_2", EXPLICIT, True),
    ("guided", EXPLICIT, True),
    ("edit", EXPLICIT, False),
    ("interpolate", EXPLICIT, False),
    ("inpaint", EXPLICIT, False),
]
SECOND = [("heun", EXPLICIT, True), ("guided", AUTO, False), ("interpolate", AUTO, True)]


@pytest.mark.parametrize(
    ("name", "axis_type", "entered"),
    FIRST + [pytest.param(*case, marks=pytest.mark.slow) for case in SECOND],
)
def test_a_chain_is_the_same_on_eight_devices(name, axis_type, entered, key):
    """On meshes of either kind of axis, entered or only named."""
    chain = CHAINS[name]
    alone = jax.jit(chain)(key, X_START)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh) if entered else contextlib.nullcontext():
        spread = jax.jit(partial(chain, sharding=sharding)).lower(key, X_START).compile()
        samples = spread(key, X_START)
    np.testing.assert_allclose(samples, alone, rtol=1e-10, atol=1e-10)
    assert samples.sharding.spec[-4 % samples.ndim] == "data"
    text = spread.as_text()
    assert "f64[2,4,4,3]" in text
    for collective in ("all-gather", "all-reduce", "collective-permute", "all-to-all"):
        assert collective not in text


BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "param_dtype": float,
}
UNET = ddpm.UNet(**BLOCKS, attention_head_dim=4, resnet_time_scale_shift="scale_shift")
DIGITS = ddpm.ddpm_digits(3, **BLOCKS | {"in_channels": 3, "out_channels": 3})
CLASSIFIER = NoisyClassifier(4, 3, 2, (32,), ("AttnDownBlock2D",), 1, 32, param_dtype=float)
SIMPLE = ddpm.SimpleUNet(param_dtype=float)
CONV = eqx.nn.Conv2d(3, 3, 3, padding=1, key=jax.random.key(0), dtype=float)
LABELS = np.arange(16) % 4
MODELS = {DIGITS: (LABELS,), UNET: (), CLASSIFIER: (), SIMPLE: ()}


def convolve(x, t, label):
    """Of one image, as Equinox's layers are."""
    return CONV(x.transpose(2, 0, 1)).transpose(1, 2, 0) * (t / 200) + label


# Each from the networks, their variables given, and labels, which lie where the images do.
NETWORKS = {
    "heads": lambda nets, labels: nets[UNET],
    "labels": lambda nets, labels: ddpm.classifier_free_guidance(
        lambda x, t: nets[DIGITS](x, t, labels), lambda x, t: nets[DIGITS](x, t, labels * 0), 2.0
    ),
    "classifier": lambda nets, labels: ddpm.classifier_guidance(
        SCHEDULE, nets[UNET], lambda x, t: nets[CLASSIFIER](x, t)[:, 1], labels * 1.0
    ),
    "reconstruction": lambda nets, labels: ddpm.reconstruction_guidance(
        SCHEDULE, nets[SIMPLE], lambda x, t: -(x**2).sum((1, 2, 3)) * t
    ),
    "vmap": lambda nets, labels: lambda x, t: jax.vmap(convolve)(x, t, labels),
}


@pytest.mark.parametrize("entered", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_on_the_mesh_that_jax_makes_by_default(name, entered, key):
    """Its axes are Explicit. The weights are on it where it is entered, as people place them."""
    mesh, rng, t = jax.make_mesh((8,), ("data",)), np.random.default_rng(0), np.zeros(16, int)
    assert mesh.axis_types == (EXPLICIT,)
    chain, sharding = ddpm.respace(SHORT, [0, 5, 9]), NamedSharding(mesh, P("data"))

    def weights(model, *labels):
        shapes = jax.eval_shape(model.init, key, X_START, t, *labels)
        return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape), shapes)

    def draw(trees, labels, sharding=None):
        nets = {
            model: partial(model.apply, tree) for model, tree in zip(MODELS, trees, strict=True)
        }
        network = NETWORKS[name](nets, labels)
        return ddpm.p_sample_loop(key, chain, network, SHAPE, sharding=sharding)

    with jax.numpy_dtype_promotion("standard"):
        trees = [weights(model, *labels) for model, labels in MODELS.items()]
        alone = jax.jit(lambda: draw(trees, jnp.asarray(LABELS)))()
        with jax.set_mesh(mesh) if entered else contextlib.nullcontext():
            placed = jax.device_put(trees, NamedSharding(mesh, P())) if entered else trees
            labels = jax.device_put(LABELS, sharding)
            spread = jax.jit(lambda: draw(placed, labels, P("data") if entered else sharding))()
            again = jax.jit(lambda: draw(placed, labels, spread.sharding))()
    assert spread.sharding.spec[0] == "data"
    np.testing.assert_allclose(spread, alone, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(again, spread)
