"""What is planned is what is run: the same programs, to the last line of their text."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_ddpm.data import Dataset, Preparation
from jax_ddpm.plan import measuring
from jax_ddpm.plan.measuring import measure_sampling, measure_training, planned
from jax_ddpm.runs import Settings, draw, drawing, fit, load_run, training
from jax_ddpm.runs.training import new_run
from jax_ddpm.samplers import ancestral

pytestmark = pytest.mark.usefixtures("defaults", "untyped")
# This machine's devices in the place of hardware that is not here.
HERE = SimpleNamespace(name="here", memory=2**30, devices=jax.devices)
HERE.chip = SimpleNamespace(platform="cpu")


class Compiled(Exception):
    """Raised in place of compiling: the text of the program is known."""


@pytest.fixture
def same_program(monkeypatch):
    """Two calls have one text of the program `advance`, but for its key; it is never compiled."""
    texts = []

    def recorded(make, *arguments):
        programs = make(*arguments)

        def advance(*arguments):
            text = programs.advance.lower(*arguments).as_text()
            texts.append(re.sub(r"dense<[^>]*> : tensor<2xui32>", "a key", text))
            raise Compiled

        advance.lower = advance.trace = advance
        return programs._replace(advance=advance)

    for module in (training, drawing, measuring):
        for name in vars(module).keys() & {"fit_programs", "draw_programs"}:
            monkeypatch.setattr(module, name, partial(recorded, getattr(module, name)))

    def check(*calls):
        for each in calls:
            with pytest.raises(Compiled):
                each()
        first, second = texts
        assert first == second

    return check


@pytest.mark.parametrize("window", [False, True])
def test_a_planned_step_is_the_trained_one(tmp_path, same_program, untrained, window):
    """On images as the digits are, and on pictures that windows are cut out of."""
    labels, images = np.arange(20, dtype=np.int32) % 10, np.zeros((20, 8, 8, 1), np.float32)
    data = Dataset(images, labels)
    if window:
        pictures, how = np.zeros((20, 9, 12, 1), np.uint8), Preparation(image_size=8, crop="random")
        data = Dataset(pictures, labels, preparation=how, extents=np.full((20, 2), 9, np.int32))
    layout = {"fsdp": 2, "accumulate": 2, "steps_per_dispatch": 2}
    small = untrained / "runs/digits"
    settings = Settings(steps=2, batch_size=4, checkpoint_every=2, init=small, **layout)
    run = planned(new_run(settings, data), dtype="float32", remat=False)
    train = lambda: fit(tmp_path / "run", data, settings)
    known = data if window else None
    same_program(train, lambda: measure_training(run, settings, HERE, known))


def test_a_planned_chain_is_the_drawn_one(same_program, untrained):
    run = load_run(untrained / "runs/digits")
    shapes = planned(run, dtype="float32", remat=False)
    same_program(
        lambda: draw(jax.random.key(3), run, 4, steps=2, sampler=ancestral()),
        lambda: measure_sampling(shapes, 4, HERE, steps=2, dtype="float32"),
    )


def test_a_batch_that_the_devices_do_not_share_is_named(untrained):
    run = load_run(untrained / "runs/digits")
    for settings, words in (
        (
            Settings(batch_size=3),
            "batch_size: expected a multiple of 2 for the 2 devices of here, got",
        ),
        (
            Settings(batch_size=6, accumulate=2),
            "batch_size: expected a multiple of 4 for the 2 devices",
        ),
        (Settings(batch_size=8, fsdp=4), "fsdp: expected a divisor of the 2 devices in use, got"),
    ):
        with pytest.raises(ValueError, match=words):
            measure_training(run, settings, HERE)
