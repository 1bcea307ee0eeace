"""Values are compared with diffusers in `tests/parity`; here is what a user can do with the net."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
X = jnp.ones((2, 8, 4, 3), jnp.float32)
T = jnp.array([0, 999], jnp.int32)


def randomised(variables):
    """Weights that are nowhere zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.25, x.shape).astype(x.dtype), variables)


def test_a_new_network_starts_at_zero(key):
    model = ddpm.UNet(**SMALL)
    variables = jax.jit(model.init)(key, X, T)
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, X, T), np.zeros(X.shape))


def test_dropout_acts_in_training_only(key):
    model = ddpm.UNet(**SMALL, dropout=0.5)
    variables = randomised(jax.eval_shape(model.init, key, X, T))
    apply = jax.jit(model.apply, static_argnames="train")
    calm = apply(variables, X, T)
    np.testing.assert_array_equal(apply(variables, X, T), calm)
    keys = jax.random.split(key)
    one, two = (apply(variables, X, T, train=True, rngs={"dropout": k}) for k in keys)
    assert np.any(one != calm) and np.any(one != two)


def test_rematerialisation_keeps_less_and_changes_nothing_else(key):
    """What the backward pass is handed: on CPU, XLA undoes the saving itself."""
    fields = {
        **SMALL,
        "block_out_channels": (8, 8),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D"),
        "downsample_type": "resnet",
        "mid_block_type": None,
    }
    variables = randomised(jax.eval_shape(ddpm.UNet(**fields).init, key, X, T))

    def backward(remat):
        model = ddpm.UNet(**fields, remat=remat)

        def loss_fn(variables):
            return jnp.mean(model.apply(variables, X, T) ** 2)

        kept = jax.eval_shape(lambda variables: jax.vjp(loss_fn, variables)[1], variables)
        gradients = jax.tree.leaves(jax.jit(jax.grad(loss_fn))(variables))
        size = sum(leaf.size for leaf in jax.tree.leaves(kept))
        return size, np.concatenate([np.ravel(leaf) for leaf in gradients])

    (all_of_it, expected), (some, gradients) = backward(False), backward(True)
    np.testing.assert_allclose(gradients, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert some < all_of_it / 3


def test_bfloat16_computes_near_float32(key):
    model = ddpm.UNet(**SMALL)
    variables = randomised(jax.eval_shape(model.init, key, X, T))
    expected = jax.jit(model.apply)(variables, X, T)
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms mix bfloat16 and float32
        output = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, X, T)
    assert output.dtype == jnp.bfloat16
    error = jnp.max(jnp.abs(output.astype(jnp.float32) - expected))
    assert float(error) < 0.05 * float(jnp.max(jnp.abs(expected)))


def test_a_sample_does_not_see_the_others(key):
    model = ddpm.UNet(**SMALL, num_class_embeds=3)
    x, y = jax.random.normal(key, (2, 8, 4, 3), jnp.float32), jnp.array([0, 2], jnp.int32)
    variables = randomised(jax.eval_shape(model.init, key, x, T, y))
    apply = jax.jit(model.apply)
    both = apply(variables, x, T, y)
    np.testing.assert_allclose(apply(variables, x[1:], T[1:], y[1:]), both[1:], atol=1e-4)
    other = apply(variables, x, T, jnp.array([1, 2], jnp.int32))
    assert np.any(other[0] != both[0])


@pytest.mark.parametrize(
    ("fields", "arguments", "words"),
    [
        ({"act_fn": "tanh"}, {}, "act_fn: expected one of 'silu', .* got 'tanh'"),
        (
            {"down_block_types": ("DownBlock2D", "SkipDownBlock2D")},
            {},
            "down_block_types: expected one of .* got 'SkipDownBlock2D'",
        ),
        ({"up_block_types": ("UpBlock2D",)}, {}, "up_block_types: expected 2 .* got 1"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, {}, "mid_block_type: expected one of"),
        ({"downsample_padding": 2}, {}, "downsample_padding: expected one of 0, 1, got 2"),
        ({"downsample_type": "fir"}, {}, "downsample_type: expected one of 'conv', 'resnet', got"),
        ({"upsample_type": None}, {}, "upsample_type: expected one of 'conv', 'resnet', got None"),
        ({"resnet_time_scale_shift": "spatial"}, {}, "resnet_time_scale_shift: expected one of"),
        ({"norm_num_groups": 3}, {}, "block_out_channels: expected multiples .* 3, got 8"),
        ({"attention_head_dim": 17}, {}, "attention_head_dim: expected 1 to 16"),
        ({}, {"x": np.zeros((2, 8, 5, 3))}, "x: expected height and width to be multiples of 2"),
        ({}, {"x": np.zeros((2, 8, 4, 1))}, r"x: expected shape \(2, 8, 4, 3\)"),
        ({}, {"t": np.zeros((3,), int)}, r"t: expected shape \(2,\), got \(3,\)"),
        ({}, {"labels": np.zeros((2,), int)}, "labels: expected None where num_class_embeds"),
        ({"num_class_embeds": 4}, {}, "labels: expected integers .* got None"),
        (
            {"num_class_embeds": 4},
            {"labels": np.array([0, 4])},
            r"labels: expected entries in \[0, 3\], got 4",
        ),
    ],
)
def test_what_does_not_fit_is_named(untyped, key, fields, arguments, words):
    with pytest.raises(ValueError, match=words):
        ddpm.UNet(**{**SMALL, **fields}).init(key, **{"x": X, "t": T, **arguments})
