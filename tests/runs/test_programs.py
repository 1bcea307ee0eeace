"""What a training and a draw compute: guidance, augmentation, the optimizer and its rate."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm import runs
from jax_ddpm.data import Preparation
from jax_ddpm.interop import Pretrained
from jax_ddpm.runs.programs import fit_programs, guided_denoise_fn, learning_rate, optimizer
from jax_ddpm.runs.settings import named_schedule
from jax_ddpm.training.sharding import device_mesh

pytestmark = pytest.mark.usefixtures("defaults")


def test_guidance_is_by_the_null_label(untrained):
    """With the scale 2, 2 ε(label) - ε(null); where every label is a class, there is none."""
    run = runs.load_run(untrained / "runs/digits")
    x, t, labels = jnp.ones((2, 8, 8, 1)), jnp.zeros(2, int), jnp.array([9, 3])
    variables, apply = run.pretrained.variables, run.pretrained.model.apply

    @jax.jit
    def outputs(variables, x):
        plain = run._replace(null_label=None, guidance=1.0)
        return (
            guided_denoise_fn(run, variables, labels)(x, t),
            guided_denoise_fn(plain, variables, labels)(x, t),
            apply(variables, x, t, labels),
            apply(variables, x, t, jnp.full(2, 10)),
        )

    guided, unguided, conditional, unconditional = outputs(variables, x)
    np.testing.assert_array_equal(unguided, conditional)
    np.testing.assert_allclose(guided, 2 * conditional - unconditional, atol=1e-5)
    assert np.max(np.abs(conditional - unconditional)) > 1e-3


def test_every_step_mirrors_other_images():
    """A network that gives the ramp of the image that is not mirrored: its loss says which are."""
    ramp = np.linspace(-1, 1, 4, dtype=np.float32)
    model = SimpleNamespace(apply=lambda variables, x, t: x * 0 + ramp[:, None] + variables["bias"])
    variables, schedule = {"bias": np.zeros(1, np.float32)}, named_schedule("cosine", 4)
    pretrained = Pretrained(model, variables, schedule, prediction_type="sample")
    run = runs.Run(pretrained, (2, 4, 1), None, None, 1.0, preparation=Preparation(flip=True))
    settings = runs.Settings(model="simple", batch_size=8, steps=20, learning_rate=1e-12)
    programs = fit_programs(run, settings, device_mesh(8), jax.random.key(0))
    images = np.broadcast_to(ramp[:, None], (20, 8, 2, 4, 1))
    state, measured = programs.advance(programs.init(variables), {"images": images})
    mirrored = np.asarray(measured["losses"]) > 0.1
    assert state.step == 20 and 0.3 < mirrored.mean() < 0.7
    assert len(np.unique(mirrored, axis=0)) > 10, "each step draws anew"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.5, 0]),
        ("cosine", [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_the_rate_rises_and_falls(name, expected):
    """At the start, half-way through the warm-up, after it, half-way from there, at the end."""
    options = {"learning_rate": 2.0, "learning_rate_schedule": name}
    warm = jax.jit(learning_rate(runs.Settings(steps=220, warmup_steps=20, **options)))
    found = [float(warm(step)) for step in (0, 10, 20, 120, 220)]
    np.testing.assert_allclose(found, 2 * np.asarray(expected), atol=1e-6)
    # By default a tenth of all steps, at most a hundred, and none where that is said.
    for settings, step, rate in (
        (runs.Settings(steps=220, **options), 11, 1.0),
        (runs.Settings(steps=10**6, **options), 50, 1.0),
        (runs.Settings(steps=220, warmup_steps=0, **options), 0, 2.0),
    ):
        assert float(learning_rate(settings)(step)) == pytest.approx(rate, rel=1e-6)


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
