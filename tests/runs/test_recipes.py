"""The recipes against what was published, written down here apart from them."""

import jax
import pytest

from jax_ddpm.runs import RECIPES
from jax_ddpm.runs.starting import untrained

# Ho et al. 2020: §4, Appendix B, scripts/run_cifar.py and run_celebahq.py, and diffusion_utils.py,
# whose variance the latter takes. Nichol & Dhariwal 2021: the flags of their README, the step in
# the name of their checkpoint. Dhariwal & Nichol 2021: Table 11. The schedule is T and its name;
# parameters are in millions.
NAMES = ("schedule", "variance_type", "loss_type", "batch_size", "learning_rate", "warmup_steps")
NAMES += ("grad_clip", "steps", "dropout", "flip")
PUBLISHED = {
    "cifar10":
        ((1000, "linear"), "fixed_large", "mse", 128, 2e-4, 5000, 1.0, 800_000, 0.1, True, 35.7),
    "celebahq256":
        ((1000, "linear"), "fixed_small", "mse", 64, 2e-5, 5000, 1.0, 500_000, 0.0, True, 114),
    "cifar10_iddpm":
        ((4000, "cosine"), "learned_range", "hybrid", 128, 1e-4, 0, 0.0, 500_000, 0.3, False, 52.5),
    "imagenet64_adm":
        ((1000, "cosine"), "learned_range", "hybrid", 2048, 3e-4, 0, 0.0, 540_000, 0.1, True, 296),
}  # fmt: skip
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("celebahq256", "imagenet64_adm")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_those_that_were_published(name):
    settings, preparation, (size, *_), *_ = RECIPES[name]
    found = vars(settings) | {
        "schedule": (settings.timesteps, settings.schedule),
        "dropout": settings.unet["dropout"],
        "flip": preparation.flip,
    }
    *published, _ = PUBLISHED[name]
    assert {key: found[key] for key in NAMES} == dict(zip(NAMES, published, strict=True))
    assert settings.ema_decay == 0.9999 and not settings.ema_warmup
    assert preparation.image_size in (None, size) and settings.learning_rate_schedule == "constant"


@pytest.mark.parametrize("name", ["cifar10", "cifar10_iddpm", *SLOW])
def test_networks_are_as_large_as_was_published(name):
    settings, _, image_shape, num_classes, _ = RECIPES[name]
    variables = untrained(settings, image_shape, num_classes).pretrained.variables
    millions = sum(leaf.size for leaf in jax.tree.leaves(variables)) / 1e6
    *_, published = PUBLISHED[name]
    assert millions == pytest.approx(published, abs=0.05 if published < 100 else 0.5)
