"""Inputs out of public reports of faults in diffusion code, and what is right of each."""

import tracemalloc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import jax_ddpm as ddpm
from jax_ddpm import interop
from jax_ddpm._checks import FieldError
from jax_ddpm.data import load_dataset, to_float

COSINE = ddpm.make_schedule(ddpm.cosine_beta_schedule(200))


def best_denoise_fn(schedule, images, error=0.0):
    """ε of the posterior mean over a finite set of images (Bayes), and an error of a network."""
    known = jnp.asarray(images, jnp.float32).reshape(len(images), -1)
    signal = jnp.asarray(schedule.sqrt_alphas_cumprod, jnp.float32)
    sigma = jnp.asarray(schedule.sqrt_one_minus_alphas_cumprod, jnp.float32)

    def denoise_fn(x, t):
        flat, a, s = x.reshape(len(x), -1), signal[t][:, None], sigma[t][:, None]
        distances = jnp.sum((flat[:, None] - a[:, None] * known) ** 2, axis=-1)
        x_start = jax.nn.softmax(-distances / (2 * s**2)) @ known
        wrong = error * jnp.sin(5 * flat + t[:, None] / 7)
        return ((flat - a * x_start) / s + wrong).reshape(x.shape)

    return denoise_fn


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return rng.choice([-1.0, 1.0], (64, 4, 4, 1)).astype(np.float32)


@pytest.mark.parametrize("steps", [20, 50])
def test_interpolation_gives_its_ends_back_by_default(defaults, pictures, steps):
    """1/√ᾱ_T is 4,000 here: unclipped, an error of ε of 0.1 leads anywhere."""
    chain = ddpm.respace(COSINE, ddpm.spaced_timesteps(200, steps, "trailing"))
    denoise_fn = best_denoise_fn(COSINE, pictures, error=0.1)
    x_a, x_b = pictures[:4], pictures[4:8]
    ends = jax.jit(lambda a, b: ddpm.interpolate(chain, denoise_fn, a, b, [0.0, 1.0]))(x_a, x_b)
    assert np.sqrt(np.mean((ends - np.stack([x_a, x_b])) ** 2)) < 0.05


@pytest.mark.parametrize("null", [0, np.arange(12.0).reshape(2, 2, 3)], ids=["number", "array"])
def test_a_whole_condition_is_dropped(key, null):
    conditions = 100 + np.arange(16 * 12.0).reshape(16, 2, 2, 3)
    seen = []

    def apply_fn(params, x, t, condition):
        seen.append(np.asarray(condition))
        return params["w"] * x

    schedule, optimizer = ddpm.make_schedule(ddpm.linear_beta_schedule(10)), optax.sgd(0.1)
    step = ddpm.make_train_step(schedule, apply_fn, optimizer, null_label=null, label_dropout=0.5)
    state = ddpm.init_train_state(key, {"w": jnp.ones(())}, optimizer)
    step(state, (jnp.zeros((16, 4, 4, 1)), conditions))
    kept = np.array([np.array_equal(*pair) for pair in zip(seen[0], conditions, strict=True)])
    gone = np.array([np.array_equal(each, np.broadcast_to(null, (2, 2, 3))) for each in seen[0]])
    assert np.all(kept ^ gone) and kept.any() and gone.any()


def test_a_null_that_is_no_condition_is_named(untyped, key):
    schedule, optimizer = ddpm.make_schedule(ddpm.linear_beta_schedule(10)), optax.sgd(0.1)
    state = ddpm.init_train_state(key, {"w": jnp.ones(())}, optimizer)
    images = jnp.zeros((4, 4, 4, 1))
    for null, conditions, words in (
        (
            np.zeros(2),
            np.zeros((4, 3)),
            r"null_label: expected shape \(\) or \(3,\), .* got \(2,\)",
        ),
        (0.5, np.zeros(4, int), r"null_label: expected int\d\d, got 0.5"),
        (0, np.zeros(3, int), r"batch: expected a condition for each of 4 images, got .*\(3,\)"),
    ):
        step = ddpm.make_train_step(
            schedule, lambda params, x, t, y: params["w"] * x, optimizer, null_label=null
        )
        with pytest.raises(FieldError, match=words):
            step(state, (images, conditions))


def test_a_mask_as_image_files_hold_it_is_refused(untyped, key, pictures):
    mask = np.repeat([0, 255], 8).reshape(4, 4, 1).astype(np.uint8)
    chain = ddpm.respace(COSINE, [0, 100, 199])
    denoise_fn = best_denoise_fn(COSINE, pictures)
    arguments = (key, chain, denoise_fn, pictures[:2])
    with pytest.raises(ValueError, match=r"mask: expected values in \[0, 1\], got 0 to 255"):
        ddpm.inpaint(*arguments, mask, jump_length=1, resamples=1)


def test_masks_of_any_dtype_mean_the_same(defaults, key, pictures):
    mask = np.repeat([0, 1], 8).reshape(4, 4, 1)
    chain = ddpm.respace(COSINE, [0, 100, 199])
    arguments = (key, chain, best_denoise_fn(COSINE, pictures), pictures[:2])
    bools, numbers, floats = (
        ddpm.inpaint(*arguments, mask.astype(dtype), jump_length=1, resamples=1)
        for dtype in (bool, np.uint8, np.float32)
    )
    np.testing.assert_array_equal(bools, floats)
    np.testing.assert_array_equal(numbers, floats)


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)


def test_labels_in_a_column_are_labels(tmp_path):
    labels = np.array([3, 1, 4, 1, 0])
    np.savez(tmp_path / "x.npz", x=IMAGES, y=labels[:, None])
    np.testing.assert_array_equal(load_dataset(tmp_path / "x.npz").labels, labels)


def test_arrays_that_are_not_understood_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", x=IMAGES, y=np.eye(5, dtype=np.int64))
    with pytest.raises(
        FieldError, match=r"one of labels .* got x uint8\[5, 8, 8\], y int64\[5, 5\]"
    ):
        load_dataset(tmp_path / "x.npz")
    np.savez(tmp_path / "z.npz", x=IMAGES, scale=np.float32(3))
    with pytest.raises(FieldError, match=r"got x uint8\[5, 8, 8\], scale float32\[\]"):
        load_dataset(tmp_path / "z.npz")


@pytest.mark.parametrize("off", [-1e-7, 1 + 1.2e-7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_rounding_does_not_change_what_pixels_mean(tmp_path, off, dtype):
    pixels = np.linspace(0, 1, 128, dtype=dtype).reshape(2, 8, 8)
    pixels[0, 3, 3] = off
    np.save(tmp_path / "x.npy", pixels)
    data = load_dataset(tmp_path / "x.npy")
    expected = (2 * np.clip(pixels, 0, 1) - 1)[..., None]
    np.testing.assert_allclose(data.images, expected, atol=1e-6)
    assert data.notes == ("pixels in [0, 1]",)


def test_pixels_beyond_a_rounding_are_refused_with_enough_digits(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[[0.0, 1.00001]]]))
    with pytest.raises(FieldError, match=r"got \[0, 1\.00001\]"):
        load_dataset(tmp_path / "x.npy")


def test_bytes_stay_bytes(tmp_path):
    """Neither float64 on the way, nor float32 before the device."""
    pixels = np.random.default_rng(0).integers(0, 256, (500, 64, 64), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    tracemalloc.start()
    images = load_dataset(tmp_path / "x.npy").images
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * pixels.nbytes
    np.testing.assert_array_equal(images[..., 0], pixels)
    np.testing.assert_array_equal(
        to_float(images[:9, ..., 0]), (pixels[:9] / 127.5 - 1).astype("f4")
    )


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = [255, 0, 0, 0]  # red, hidden
    pixels[2] = [0, 0, 0, 51]  # a fifth of black
    pixels[3] = [9, 8, 7, 255]
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    palette = Image.fromarray(np.repeat([[0, 1]], 4, axis=0).repeat(2, axis=1).astype(np.uint8))
    palette = palette.convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "z_palette.png", transparency=0)
    data = load_dataset(tmp_path)
    found = data.images[:]
    rows = [[255, 255, 255], [255, 255, 255], [204, 204, 204], [9, 8, 7]]
    np.testing.assert_array_equal(found[0], np.repeat(np.array(rows)[:, None], 4, axis=1))
    np.testing.assert_array_equal(found[1][0], [[255] * 3] * 2 + [[0, 0, 255]] * 2)
    assert data.notes == ("pictures with transparency, which is white now: 2",)


def test_pictures_are_turned_upright(tmp_path):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, :8] = 255  # white on the left
    stored = np.rot90(upright)  # orientation 6: to be turned by 90° clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "x.jpg", exif=exif, quality=100, subsampling=0)
    images = load_dataset(tmp_path).images
    np.testing.assert_allclose(images[0], upright.astype(int), atol=12)


def test_masks_of_ones_are_said_to_be_dark(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES % 2)
    (note,) = load_dataset(tmp_path / "x.npy").notes
    assert "no pixel is above 1 of 255" in note


def test_subfolders_are_classes_and_hidden_files_are_not_pictures(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for folder, level in ((tmp_path / "x" / "cat", 10), (elsewhere, 200)):
        folder.mkdir(parents=True)
        for name in ("a.png", "b.png"):
            Image.fromarray(np.full((8, 8), level, np.uint8)).save(folder / name)
    (tmp_path / "x" / "dog").symlink_to(elsewhere)
    (tmp_path / "x" / "cat" / "round").symlink_to(tmp_path / "x")  # must end
    hidden = tmp_path / "x" / "cat" / ".ipynb_checkpoints"
    hidden.mkdir()
    for path in (hidden / "a.png", tmp_path / "x" / "cat" / "._a.png"):
        Image.fromarray(np.full((8, 8), 99, np.uint8)).save(path)
    data = load_dataset(tmp_path / "x")
    np.testing.assert_array_equal(data.labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(data.images[:][:, 0, 0, 0], [10, 10, 200, 200])
    assert data.notes == ("classes by subfolder: 0 cat, 1 dog",)
    Image.fromarray(np.full((8, 8), 5, np.uint8)).save(tmp_path / "x" / "alone.png")
    data = load_dataset(tmp_path / "x")
    assert data.labels is None and data.notes[0].startswith("no classes: not every picture")


def test_an_average_of_the_default_forgets_its_start(key):
    """With the gradient 0 after a jump by 1, the average's distance is the product of the decays,
    Π (1 + k) / (10 + k) = n! 9! / (n + 9)!."""
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(10))
    optimizer = optax.sgd(0.0)
    step = jax.jit(ddpm.make_train_step(schedule, lambda p, x, t: p["w"] * x, optimizer))
    state = ddpm.init_train_state(key, {"w": jnp.zeros(())}, optimizer)
    state = state._replace(params={"w": jnp.ones(())})
    for n in (1, 2, 3):
        state, _ = step(state, jnp.zeros((2, 4, 4, 1)))
        share = np.prod([(1 + k) / (10 + k) for k in range(n)])
        np.testing.assert_allclose(state.ema_params["w"], 1 - share, rtol=1e-6)
    assert ddpm.ema_warmup()(10**6) == 0.9999


@pytest.mark.parametrize(
    ("betas", "spacing", "steps", "right"),
    [
        (ddpm.linear_beta_schedule(200), "trailing", 50, False),
        (ddpm.linear_beta_schedule(200, 5e-4, 0.1), "trailing", 50, True),
        (ddpm.cosine_beta_schedule(200), "trailing", 50, True),
        (ddpm.cosine_beta_schedule(200), "leading", 10, False),
    ],
    ids=["the tutorial's", "its β by 1000 / T", "cosine", "cosine, leading"],
)
def test_a_chain_that_does_not_start_in_noise_warns(defaults, key, betas, spacing, steps, right):
    """Of the images a tenth is bright, and the network is exact: a right chain draws a tenth."""
    schedule = ddpm.make_schedule(betas)
    known = np.full((10, 8, 8, 1), -1.0)
    known[0] = 1
    chain = ddpm.respace(schedule, ddpm.spaced_timesteps(200, steps, spacing))
    denoise_fn = best_denoise_fn(schedule, known)

    @jax.jit
    def draw(key):
        return ddpm.p_sample_loop(key, chain, denoise_fn, (400, 8, 8, 1), sampler=ddpm.ddim())

    if right:
        with warnings.catch_warnings(action="error"):
            samples = draw(key)
    else:
        with pytest.warns(UserWarning, match="schedule: √ᾱ_T is 0.*: the chain starts from pure"):
            samples = draw(key)
    share = np.mean(np.mean(samples, axis=(1, 2, 3)) > 0)
    assert (abs(share - 0.1) < 0.06) == right  # 4 standard errors


def test_batches_as_loaders_give_them(defaults, key):
    schedule, optimizer = ddpm.make_schedule(ddpm.linear_beta_schedule(10)), optax.sgd(0.1)
    step = ddpm.make_train_step(
        schedule, lambda params, x, t, y=0: params["w"] * x + jnp.mean(y), optimizer
    )
    state = ddpm.init_train_state(key, {"w": jnp.ones(())}, optimizer)
    pixels, labels = IMAGES[:4, ..., None], np.arange(4)
    floats = (pixels / 127.5 - 1).astype(np.float32)
    right = step(state, (floats, labels))[1]["loss"]
    for batch in ([floats, labels], (pixels, labels), [pixels, labels]):
        np.testing.assert_allclose(step(state, batch)[1]["loss"], right, rtol=1e-6)


def test_what_is_no_batch_is_named(untyped, torch, key):
    schedule, optimizer = ddpm.make_schedule(ddpm.linear_beta_schedule(10)), optax.sgd(0.1)
    state = ddpm.init_train_state(key, {"w": jnp.ones(())}, optimizer)
    images = np.zeros((4, 4, 4, 1), np.float32)

    def outcome(batch, apply_fn=lambda params, x, t: params["w"] * x):
        ddpm.make_train_step(schedule, apply_fn, optimizer)(state, batch)

    with pytest.raises(
        TypeError, match="batch: expected images or .*, got a dict of images, label"
    ):
        outcome({"images": images, "label": 0})
    with pytest.raises(TypeError, match="batch: expected a floating array .*, got a torch.Tensor"):
        outcome(torch.from_numpy(images))
    with pytest.raises(TypeError, match="output of apply_fn: expected a .* array, got a tuple"):
        outcome(images, lambda params, x, t: (x, t))
    with pytest.raises(TypeError, match="schedule: expected a NoiseSchedule, .* got float64"):
        ddpm.make_train_step(ddpm.linear_beta_schedule(10), None, optimizer)


def test_a_state_dict_of_data_parallel_is_read(key):
    variables = jax.jit(ddpm.SimpleUNet().init)(key, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1, int))
    tensors = interop.simple_unet_to_torch(variables)
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    jax.tree.map(np.testing.assert_array_equal, interop.simple_unet_from_torch(wrapped), variables)


def test_a_learned_variance_is_trained_by_default(key):
    """L_simple alone has no gradient by the variance's channels (Nichol & Dhariwal 2021, §3.1)."""
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(10))
    x, t = jax.random.normal(key, (4, 4, 4, 1)), jnp.arange(4)

    def loss(output, **options):
        return ddpm.training_losses(
            schedule, lambda x, t: output, x, t, x, variance_type="learned_range", **options
        ).sum()

    output = jnp.zeros((4, 4, 4, 2))
    assert np.any(jax.grad(loss)(output)[..., 1])
    np.testing.assert_array_equal(
        jax.grad(loss)(output), jax.grad(loss)(output, loss_type="hybrid")
    )
    assert not np.any(jax.grad(lambda output: loss(output, loss_type="mse"))(output)[..., 1])
