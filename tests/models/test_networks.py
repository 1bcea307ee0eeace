"""Values are compared with torch in `tests/parity`; here is what users can do with networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm
from jax_ddpm.models import NoisyClassifier

KEY = jax.random.key(0, impl="unsafe_rbg")  # whose draws compile fast
X = np.ones((2, 8, 4, 3), np.float32)
T = np.array([0, 999], np.int32)
LABELS = np.array([0, 2], np.int32)


def randomised(model, *inputs):
    """Variables that are nowhere zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, *inputs)
    return jax.tree.map(lambda x: rng.normal(0, 0.25, x.shape).astype(x.dtype), shapes)


@pytest.fixture(scope="module")
def plain(one_level):
    """A network of one level with attention, its variables and its output."""
    with_attention = {"down_block_types": ("AttnDownBlock2D",), "layers_per_block": 1}
    network = ddpm.UNet(**one_level | with_attention)
    variables = randomised(network, X, T)
    return network, variables, np.asarray(jax.jit(network.apply)(variables, X, T))


def test_a_new_network_starts_at_zero(plain):
    """And as nearly the identity: each residual branch ends in zeros."""
    output, variables = jax.jit(plain[0].init_with_output)(KEY, X, T)
    np.testing.assert_array_equal(output, np.zeros(X.shape))
    down = variables["params"]["down_blocks_0"]
    for last in (down["resnets_0"]["conv2"], down["attentions_0"]["to_out_0"]):
        assert not np.any(last["kernel"])
    assert np.any(down["resnets_0"]["conv1"]["kernel"])


def test_dropout_acts_in_training_only(plain):
    model, variables, expected = plain
    apply = jax.jit(model.clone(dropout=0.5).apply, static_argnames="train")
    np.testing.assert_array_equal(apply(variables, X, T), expected)
    keys = jax.random.split(KEY)
    one, two = (apply(variables, X, T, train=True, rngs={"dropout": k}) for k in keys)
    assert np.any(one != expected) and np.any(one != two)


def test_rematerialisation_keeps_less_and_changes_nothing_else(plain):
    """What the backward pass is handed: on CPU, XLA undoes the saving itself."""
    network, variables, _ = plain

    def backward(remat):
        loss_fn = lambda *inputs: jnp.mean(network.clone(remat=remat).apply(*inputs, T) ** 2)
        kept = jax.eval_shape(lambda *inputs: jax.vjp(loss_fn, *inputs)[1], variables, X)
        size = sum(leaf.size for leaf in jax.tree.leaves(kept))
        return size, np.asarray(jax.jit(jax.grad(loss_fn, 1))(variables, X))

    (all_of_it, expected), (some, gradient) = backward(False), backward(True)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert some < all_of_it / 3


def test_bfloat16_computes_near_float32(plain):
    model, variables, expected = plain
    with jax.numpy_dtype_promotion("standard"):  # Flax's own norms mix bfloat16 and float32
        output = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, X, T)
    assert output.dtype == jnp.bfloat16
    error = np.max(np.abs(np.asarray(output, np.float32) - expected))
    assert error < 0.05 * np.max(np.abs(expected))


def test_the_tutorials_network_takes_any_size_and_dtype():
    model, x = ddpm.SimpleUNet(dtype=jnp.bfloat16), X[:, :5]
    output, variables = jax.eval_shape(model.init_with_output, KEY, x, T)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
    assert output.shape == x.shape and output.dtype == jnp.bfloat16


def test_a_sample_does_not_see_the_others_and_a_label_without_a_row_is_nan(plain):
    model = plain[0].clone(num_class_embeds=3)
    variables = randomised(model, X, T, LABELS)
    apply = jax.jit(model.apply)
    both = apply(variables, X, T, LABELS)
    x, t, labels = X.copy(), T.copy(), LABELS.copy()
    x[0] *= 2
    t[0], labels[0] = 500, 1
    other = apply(variables, x, t, labels)
    np.testing.assert_array_equal(other[1], both[1])
    relabelled = apply(variables, X, T, labels)
    assert np.any(relabelled[0] != both[0])
    for label in (-1, 3):  # traced, so it cannot be refused
        labels[0] = label
        strange = apply(variables, X, T, labels)
        assert np.all(np.isnan(strange[0])) and not np.any(np.isnan(strange[1]))


def two_levels(**fields):
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    levels = {"block_out_channels": (8, 16), "down_block_types": down, "up_block_types": up}
    return ddpm.UNet(**levels | {"norm_num_groups": 4} | fields)


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (two_levels(act_fn="tanh"), {}, "act_fn: expected one of 'silu', .* got 'tanh'"),
        (two_levels(down_block_types=("DownBlock2D", "Skip")), {}, "down_block_types: .*Skip"),
        (two_levels(up_block_types=("UpBlock2D",)), {}, "up_block_types: expected 2 .* got 1"),
        (two_levels(downsample_padding=2), {}, "downsample_padding: expected one of 0, 1, got 2"),
        (two_levels(norm_num_groups=3), {}, "block_out_channels: expected multiples .* 3, got 8"),
        (two_levels(attention_head_dim=17), {}, r"attention_head_dim: expected values in .1, 16"),
        (two_levels(num_attention_heads=3), {}, "num_attention_heads: .* a divisor of .*16"),
        (two_levels(), {"x": X[:, :, :3]}, "x: expected height and width to be multiples of 2"),
        (two_levels(), {"x": X[..., :1]}, r"x: expected shape \(2, 8, 4, 3\)"),
        (two_levels(), {"t": np.zeros((3,), int)}, r"t: expected shape \(\) or \(2,\), got \(3,\)"),
        (two_levels(), {"labels": LABELS}, "labels: expected None where num_class_embeds"),
        (two_levels(num_class_embeds=4), {}, "labels: expected whole numbers, got None"),
        (ddpm.SimpleUNet(), {"x": X[..., :1]}, r"x: expected shape \(2, 8, 4, 3\), got .* 1\)"),
        (NoisyClassifier(pool="mean"), {}, "pool: expected"),
        (NoisyClassifier(block_out_channels=(64, 64, 64, 100)), {}, "block_out_channels: expected"),
    ],
)
def test_what_does_not_fit_is_named(untyped, model, arguments, words):
    with pytest.raises(ValueError, match=words):
        model.init(KEY, **{"x": X, "t": T} | arguments)


def test_timesteps_may_be_fractions_and_one_for_all(plain):
    """As OpenAI's rescaled ones are, and diffusers' floats."""
    network, variables, _ = plain
    quarters = network.clone(time_scale=0.25).apply(variables, X, T)
    np.testing.assert_array_equal(network.apply(variables, X, T / 4), quarters)
    simple = ddpm.SimpleUNet()
    for model, weights in ((network, variables), (simple, randomised(simple, X, T))):
        both = [model.apply(weights, X, t) for t in (7.5, np.full(2, 7.5, np.float32))]
        np.testing.assert_array_equal(*both)
    with jax.numpy_dtype_promotion("standard"):  # bfloat16 has one number for 999 and 1,000
        near = [simple.apply(weights, jnp.asarray(X, jnp.bfloat16), t) for t in (999, 1000)]
    assert np.any(near[0] != near[1])
