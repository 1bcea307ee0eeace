"""What a training and a draw compute: guidance, augmentation, the optimizer and its rate."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm
from jax_ddpm import runs
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.runs.programs import (
    draw_programs,
    fit_programs,
    guided_denoise_fn,
    learning_rate,
    optimizer,
)
from jax_ddpm.runs.settings import named_schedule
from jax_ddpm.training.sharding import device_mesh

pytestmark = pytest.mark.usefixtures("defaults")


def test_guidance_is_by_the_null_label(untrained):
    """With the scale 2, 2 ε(label) - ε(null); with the scale 1, ε(label) alone."""
    run = runs.load_run(untrained / "runs/digits")
    x, t, labels = jnp.ones((2, 8, 8, 1)), jnp.zeros(2, int), jnp.array([9, 3])
    variables, apply = run.variables, jax.jit(run.model.apply)
    eps, null = apply(variables, x, t, labels), apply(variables, x, t, jnp.full(2, 10))
    assert np.max(np.abs(eps - null)) > 1e-3
    for scale, null_label, expected in ((2.0, 10, 2 * eps - null), (1.0, None, eps)):
        guided = run._replace(guidance=scale, null_label=null_label)
        found = jax.jit(guided_denoise_fn(guided, variables, labels))(x, t)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_a_sampler_remembers_of_the_images_is_split_as_they_are(untrained):
    run = runs.load_run(untrained / "runs/digits")
    programs = draw_programs(run, run.chain(2), ddpm.dpm_solver_pp(), 4, device_mesh(4))
    done, last = programs.init(jax.random.key(0), np.int32(0)).memory
    assert last.sharding.shard_shape(last.shape) == (2, 8, 8, 1)
    assert done.shape == () and done.sharding.is_fully_replicated


def test_a_rule_of_ones_own_may_remember_anything(untrained):
    """On two devices it draws what it draws without: a table of as many numbers as samples too."""
    run, ddim = runs.load_run(untrained / "runs/digits"), ddpm.ddim()

    def init(x_T):
        return {"table": jnp.arange(4.0), "last": x_T, "older": jnp.stack([x_T, x_T]), "i": 0}

    rules = ddim._replace(init=init), ddim
    drawn = [runs.draw(jax.random.key(0), run, 4, steps=2, sampler=each) for each in rules]
    np.testing.assert_array_equal(*drawn)


def test_every_step_mirrors_other_images():
    """A network that gives the ramp of the image that is not mirrored: its loss says which are."""
    ramp = np.linspace(-1, 1, 4, dtype=np.float32)
    model = SimpleNamespace(apply=lambda variables, x, t: x * 0 + ramp[:, None] + variables["bias"])
    variables, schedule = {"bias": np.zeros(1, np.float32)}, named_schedule("cosine", 4)
    meaning = {"prediction_type": "sample", "preparation": {"flip": True}}
    run = DiffusionModel(model, variables, schedule, (2, 4, 1), **meaning)
    settings = runs.Settings(model="simple", batch_size=8, steps=20, learning_rate=1e-12)
    programs = fit_programs(run, settings, device_mesh(8), jax.random.key(0))
    images = np.broadcast_to(ramp[:, None], (20, 8, 2, 4, 1))
    state, measured = programs.advance(programs.init(variables), {"images": images})
    mirrored = np.asarray(measured["losses"]) > 0.1
    assert state.step == 20 and 0.3 < mirrored.mean() < 0.7
    assert len(np.unique(mirrored, axis=0)) > 10, "each step draws anew"


@pytest.mark.parametrize(
    ("name", "quarter", "end"),
    [("constant", 1, 1), ("linear", 0.75, 0), ("cosine", (1 + np.cos(np.pi / 4)) / 2, 0)],
)
def test_the_rate_rises_and_falls(name, quarter, end):
    """The peak is 2, and the warm-up by default a tenth of all steps, at most a hundred."""
    options = {"learning_rate": 2.0, "learning_rate_schedule": name}
    for steps, warmup, expected in (
        (220, 20, {0: 0, 10: 1, 20: 2, 70: 2 * quarter, 220: 2 * end}),
        (220, None, {11: 1, 22: 2}),
        (10**6, None, {50: 1, 100: 2}),
        (220, 0, {0: 2, 55: 2 * quarter}),
    ):
        rate = learning_rate(runs.Settings(steps=steps, warmup_steps=warmup, **options))
        found = [float(rate(step)) for step in expected]
        np.testing.assert_allclose(found, [*expected.values()], atol=1e-6)


def test_adam_takes_clipped_gradients_and_adamw_decays():
    """The first step is rate · (g / (|g| + eps) + decay · w), of a gradient of norm 1 at most."""
    options = {"learning_rate": 0.5, "learning_rate_schedule": "constant", "warmup_steps": 0}
    gradient, weights = np.asarray([3.0, -4.0], np.float32), np.asarray([2.0, 1.0], np.float32)
    for named, clipped, decay in (
        ({"grad_clip": 1.0}, gradient / 5, 0),
        ({"grad_clip": 0.0}, gradient, 0),
        ({"grad_clip": 9.0, "optimizer": "adamw", "weight_decay": 0.1}, gradient, 0.1),
    ):
        rule = optimizer(runs.Settings(adam_eps=1.0, **options, **named))
        update, _ = jax.jit(rule.update)(gradient, rule.init(weights), weights)
        expected = -0.5 * (clipped / (np.abs(clipped) + 1) + decay * weights)
        np.testing.assert_allclose(update, expected, rtol=1e-5)
