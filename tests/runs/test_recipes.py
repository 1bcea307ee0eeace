"""The recipes against what was published, written down here apart from them."""

import jax
import pytest

from jax_ddpm.runs import RECIPES
from jax_ddpm.runs.starting import untrained

# Ho et al. 2020: §4, Appendix B, scripts/run_cifar.py and run_celebahq.py, and diffusion_utils.py,
# whose variance the latter takes. Nichol & Dhariwal 2021: the flags of their README, the step in
# the name of their checkpoint. Dhariwal & Nichol 2021: Table 11. The schedule is T and its name.
PUBLISHED = {
    "cifar10": {
        "schedule": (1000, "linear"),
        "variance_type": "fixed_large",
        "batch_size": 128,
        "learning_rate": 2e-4,
        "warmup_steps": 5000,
        "grad_clip": 1.0,
        "steps": 800_000,
        "dropout": 0.1,
        "flip": True,
        "loss_type": "mse",
        "parameters": 35.7,
    },
    "celebahq256": {
        "schedule": (1000, "linear"),
        "variance_type": "fixed_small",
        "batch_size": 64,
        "learning_rate": 2e-5,
        "warmup_steps": 5000,
        "grad_clip": 1.0,
        "steps": 500_000,
        "dropout": 0.0,
        "flip": True,
        "loss_type": "mse",
        "parameters": 114,
    },
    "cifar10_iddpm": {
        "schedule": (4000, "cosine"),
        "variance_type": "learned_range",
        "batch_size": 128,
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "grad_clip": 0.0,
        "steps": 500_000,
        "dropout": 0.3,
        "flip": False,
        "loss_type": "hybrid",
        "parameters": 52.5,
    },
    "imagenet64_adm": {
        "schedule": (1000, "cosine"),
        "variance_type": "learned_range",
        "batch_size": 2048,
        "learning_rate": 3e-4,
        "warmup_steps": 0,
        "grad_clip": 0.0,
        "steps": 540_000,
        "dropout": 0.1,
        "flip": True,
        "loss_type": "hybrid",
        "parameters": 296,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_those_that_were_published(name):
    settings, preparation, image_shape, num_classes, _ = RECIPES[name]
    model = untrained(settings, image_shape, num_classes).pretrained.model
    size, *_ = image_shape
    images = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    t = jax.ShapeDtypeStruct((1,), "int32")
    labels = () if num_classes is None else (t,)
    variables = jax.eval_shape(model.init, jax.random.key(0), images, t, *labels)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables)) / 1e6
    published = PUBLISHED[name]
    found = vars(settings) | {
        "schedule": (settings.timesteps, settings.schedule),
        "dropout": model.dropout,
        "flip": preparation.flip,
        "parameters": pytest.approx(parameters, abs=0.05 if parameters < 100 else 0.5),
    }
    assert {key: found[key] for key in published} == published
    assert settings.ema_decay == 0.9999 and not settings.ema_warmup
    assert preparation.image_size in (None, size) and settings.learning_rate_schedule == "constant"
