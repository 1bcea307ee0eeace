"""Whatever comes in: a right result, or one clear error. Never a silent wrong one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_ddpm as ddpm
from jax_ddpm._checks import FieldError
from jax_ddpm.data import load_dataset
from jax_ddpm.io.arrays import flatten, from_bytes, to_bytes, unflatten
from jax_ddpm.io.checkpoint import load_checkpoint, save_checkpoint
from jax_ddpm.models import ddpm_digits
from jax_ddpm.training import batch_indices

pytestmark = pytest.mark.usefixtures("untyped")
# The folders of fixtures are written anew for every example.
calm = settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
integers = st.integers(-3, 40)
numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)
names = st.text("abc_/é", min_size=1, max_size=4).filter(lambda name: "/" not in name)
arrays = st.builds(
    lambda shape, dtype, order: np.asarray(
        np.arange(math.prod(shape)).reshape(shape).astype(dtype), order=order
    ),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from(["float32", "float64", "float16", "int32", "uint8", "bool"]),
    st.sampled_from("CF"),
)
trees = st.recursive(arrays, lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3))
edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), min_size=1)


def edited(content, edits):
    """Bytes put in, taken away or changed at a few places."""
    content = bytearray(content)
    for place, replacement in edits:
        start = int(place * len(content))
        content[start : start + 1] = replacement
    return bytes(content)


@calm
@given(trees)
def test_arrays_come_back_to_the_bit(tree):
    tree = {"x": tree}
    back = unflatten(from_bytes(to_bytes(flatten(tree))))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for got, expected in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert got.tobytes() == expected.tobytes()


@calm
@given(st.one_of(st.binary(max_size=64), st.builds(
    lambda length, header: length.to_bytes(8, "little") + header,
    st.integers(0, 2**64 - 1), st.binary(max_size=64),
)))  # fmt: skip
def test_no_safetensors_is_said_to_be_none(content):
    """Among them headers that claim to be as large as memory is not."""
    try:
        from_bytes(content)
    except ValueError as error:
        assert "no safetensors" in str(error)


@calm
@given(st.sampled_from(["manifest.json", "state.json", "w.safetensors"]), edits)
def test_an_edited_checkpoint_is_named_or_as_it_was(tmp_path, name, edits):
    path = save_checkpoint(tmp_path, 3, {"w": {"a": np.arange(5.0)}}, {"key": [1, 2]})
    content = edited((path / name).read_bytes(), edits)
    same = content == (path / name).read_bytes()
    (path / name).write_bytes(content)
    if same:
        assert load_checkpoint(path).step == 3
    else:
        with pytest.raises(ValueError, match=name):
            load_checkpoint(path)


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers") / "model"
    model = ddpm_digits(
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    x, t = jnp.zeros((1, 8, 8, 1), jnp.float32), jnp.zeros((1,), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), x, t, t)
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(10))
    ddpm.interop.save_diffusers(folder, ddpm.interop.Pretrained(model, variables, schedule))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ],
)
def test_an_edited_diffusers_folder_is_named_or_makes_sense(diffusers_folder, name):
    path = diffusers_folder / name
    content = path.read_bytes()
    # Of the weights, the header: within the numbers there is nothing to hold on to.
    head = len(content) if name.endswith("json") else 8 + int.from_bytes(content[:8], "little")

    @calm
    @given(edits)
    def check(edits):
        path.write_bytes(edited(content[:head], edits) + content[head:])
        try:
            pretrained = ddpm.interop.load_diffusers(diffusers_folder)
        except ValueError as error:
            assert str(diffusers_folder) in str(error)
        else:
            assert np.all(np.diff(pretrained.schedule.alphas_cumprod) <= 0)

    try:
        check()
    finally:
        path.write_bytes(content)


@calm
@given(st.sampled_from(["x.npy", "x.npz"]), edits)
def test_an_edited_dataset_is_named_or_makes_sense(tmp_path, name, edits):
    path = tmp_path / name
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 3, 1), np.uint8)
    if name == "x.npy":
        np.save(path, images)
    else:
        np.savez(path, images=images, labels=np.arange(4))
    path.write_bytes(edited(path.read_bytes(), edits))
    try:
        data = load_dataset(path)
    except FieldError as error:
        assert error.field == "data" and "\n" not in str(error)
    else:
        assert data.images.ndim == 4
        assert data.images.dtype == np.uint8 or np.max(np.abs(data.images)) <= 1


@calm
@given(integers, integers, st.sampled_from(["leading", "trailing", "linspace", "other"]))
def test_timesteps_are_spaced_or_refused(timesteps, steps, spacing):
    try:
        spaced = ddpm.spaced_timesteps(timesteps, steps, spacing)
    except ValueError as error:
        assert "expected" in str(error)
        assert not 1 <= steps <= timesteps or spacing == "other"
    else:
        assert len(spaced) == steps and np.all(np.diff(spaced) > 0)
        assert 0 <= spaced[0] and spaced[-1] < timesteps


@calm
@given(st.lists(numbers, max_size=4))
def test_a_schedule_is_one_or_refused(betas):
    try:
        schedule = ddpm.make_schedule(np.array(betas, np.float64))
    except ValueError as error:
        assert "betas: expected" in str(error)
    else:
        alphas = schedule.alphas_cumprod
        assert np.all(np.isfinite(alphas)) and np.all((alphas >= 0) & (alphas < 1))
        assert np.all(np.diff(alphas, prepend=1.0) < 0)


@calm
@given(st.lists(integers, min_size=1, max_size=4))
def test_timesteps_beyond_the_chain_are_refused(t):
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(20))
    x = jnp.ones((len(t), 2, 2, 1))
    try:
        x_t = ddpm.q_sample(schedule, x, jnp.array(t), jnp.zeros_like(x))
    except ValueError as error:
        assert "t: expected" in str(error) and not all(0 <= each < 20 for each in t)
    else:
        expected = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 20)))[t]
        np.testing.assert_allclose(x_t[:, 0, 0, 0], expected, rtol=1e-12)


@calm
@given(st.integers(0, 200), integers, integers)
def test_a_batch_is_of_the_data_or_refused(step, size, batch):
    try:
        indices = batch_indices(jax.random.key(0), step, size, batch)
    except ValueError as error:
        assert "batch_size: expected" in str(error) and not 1 <= batch <= size
    else:
        assert indices.shape == (batch,) and len(set(np.asarray(indices))) == batch
        assert np.all((indices >= 0) & (indices < size))
