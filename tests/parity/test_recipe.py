"""The recipe `cifar10` as `fit` runs it, against torch: 20 steps of a network of one level.

Both sides get one epoch's order, flips, t and noise, in float32. Dropout is off, whose masks cannot
be shared, and the warm-up is of 5 steps, so that weights move.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jax_ddpm import runs
from jax_ddpm.data import Dataset, to_float
from jax_ddpm.data.batches import Order, augmentation
from jax_ddpm.interop import unet_to_torch
from jax_ddpm.interop.diffusers import unet_config
from jax_ddpm.interop.model import parameter_shapes
from jax_ddpm.io.arrays import load_tensors, unflatten
from jax_ddpm.parity.harness import relative_error, vector
from jax_ddpm.parity.tolerances import TOLERANCES
from jax_ddpm.runs import training
from jax_ddpm.runs.programs import optimizer
from jax_ddpm.training import draw_step, init_train_state

pytestmark = pytest.mark.usefixtures("defaults")
STEPS, BATCH, WARMUP = 20, 8, 5


def drawn(model, key, image_shape):
    """Initial variables by NumPy: Flax's own draws take seconds to compile."""
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(model).items()
    return {"params": unflatten({path: rng.normal(0, 0.1, s).astype("f4") for path, s in shapes})}


@pytest.mark.slow
def test_twenty_steps_of_the_recipe(tmp_path, monkeypatch, one_level, torch, diffusers):
    monkeypatch.setattr(training, "init_variables", drawn)
    recipe = runs.RECIPES["cifar10"]
    small = {**one_level, "down_block_types": ("AttnDownBlock2D",), "layers_per_block": 1}
    unet = {**recipe.settings.unet, **small, "dropout": 0.0}
    changes = {"batch_size": BATCH, "steps": STEPS, "warmup_steps": WARMUP, "sample_every": 0}
    changes["log_every"] = STEPS
    settings = replace(recipe.settings, unet=unet, **changes)
    pixels = np.random.default_rng(0).integers(0, 256, (STEPS * BATCH, 8, 8, 3), np.uint8)
    data = Dataset(pixels, preparation=recipe.preparation)
    start = training.new_run(settings, data)
    end = runs.fit(tmp_path / "run", data, settings)

    # What the steps draw, from the keys that `fit` says it uses.
    data_key, train_key = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), 0))
    order = Order(data_key, len(pixels), BATCH)(range(STEPS))
    assert sorted(order.ravel()) == list(range(len(pixels)))  # an epoch
    flip = jax.jit(augmentation(None, True))
    flip_key = jax.random.fold_in(train_key, 2**31 - 1)
    state = init_train_state(train_key, start.variables, optimizer(settings))
    draws = jax.jit(lambda state, images: draw_step(state, start.schedule, images))

    model = diffusers.UNet2DModel.from_config(unet_config(start.model)).train()
    weights = {name: torch.tensor(array) for name, array in unet_to_torch(start.variables).items()}
    model.load_state_dict(weights)
    average = {name: weight.clone() for name, weight in model.state_dict().items()}
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule="linear")
    adam = torch.optim.Adam(model.parameters(), lr=2e-4)
    warm = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(step / WARMUP, 1))
    losses = []
    for step, rows in enumerate(order):
        images = to_float(np.asarray(flip(jax.random.fold_in(flip_key, step), pixels[rows])))
        t, noise = (np.array(each) for each in draws(state._replace(step=step), images))
        nchw = [torch.tensor(each.transpose(0, 3, 1, 2)) for each in (images, noise)]
        x_t = scheduler.add_noise(*nchw, torch.tensor(t))
        loss = torch.nn.functional.mse_loss(model(x_t, torch.tensor(t)).sample, nchw[1])
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        warm.step()
        for name, weight in model.state_dict().items():
            average[name].mul_(0.9999).add_(weight, alpha=1 - 0.9999)
        losses.append(loss.item())

    folder = tmp_path / f"run/checkpoints/{STEPS:08d}"
    for file, reference in (("params", model.state_dict()), ("ema", average)):
        found = unet_to_torch(unflatten(load_tensors(folder / f"{file}.safetensors")))
        ours, theirs, before = (vector(dict(each)) for each in (found, reference, weights))
        # `parity/tolerances.py` allows 1e-3; measured 4e-7.
        assert relative_error(ours, theirs) <= 1e-6, file
        if file == "params":  # the average moves by less than a rounding
            moved = relative_error(ours - before, theirs - before)
            assert moved <= TOLERANCES["training"].float32
    (line,) = runs.read_metrics(tmp_path / "run/metrics.jsonl")
    np.testing.assert_allclose(line["loss"], np.mean(losses), rtol=1e-4)
    assert line["learning_rate"] == pytest.approx(2e-4)
    assert end.run.variance_type == "fixed_large"
