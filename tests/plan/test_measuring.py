"""What is planned is what is run: the same programs, to the last line of their text."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_ddpm.data import Dataset
from jax_ddpm.plan import measuring
from jax_ddpm.plan.measuring import measure_sampling, measure_training, planned
from jax_ddpm.runs import Settings, draw, drawing, fit, fitting, load_run
from jax_ddpm.runs.starting import new_run
from jax_ddpm.samplers import ancestral

pytestmark = pytest.mark.usefixtures("defaults", "untyped")
# This machine's devices in the place of hardware that is not here.
HERE = SimpleNamespace(
    name="here",
    chip=SimpleNamespace(platform="cpu", title="this machine's"),
    memory=2**30,
    products=lambda dtype: dtype,
    devices=jax.devices,
)


class Compiled(Exception):
    """Raised in place of compiling: the text of the program is known."""


@pytest.fixture
def planned_text(monkeypatch):
    """The text of what would be compiled."""
    texts = []

    def compile_for(target, program, *arguments):
        texts.append(program.lower(*arguments).as_text())
        raise Compiled

    monkeypatch.setattr(measuring, "compile_for", compile_for)

    def text(measure, *arguments, **options):
        with pytest.raises(Compiled):
            measure(*arguments, **options)
        return texts.pop()

    return text


def recorded(monkeypatch, module, name):
    """The texts of the programs `advance` that `module.name` makes, which stop where they begin."""
    make, texts = getattr(module, name), []

    class Recorder:
        def __init__(self, program):
            self.program = program

        def lower(self, *arguments):
            texts.append(self.program.lower(*arguments).as_text())
            raise Compiled

        __call__ = lower

    def remade(*arguments):
        programs = make(*arguments)
        return programs._replace(advance=Recorder(programs.advance))

    monkeypatch.setattr(module, name, remade)
    return texts


def test_a_planned_step_is_the_trained_one(tmp_path, monkeypatch, planned_text, untrained):
    images = np.random.default_rng(0).uniform(-1, 1, (20, 8, 8, 1)).astype(np.float32)
    data = Dataset(images, np.arange(20, dtype=np.int32) % 10)
    layout = {"fsdp": 2, "accumulate": 2, "steps_per_dispatch": 2}
    small = untrained / "runs/digits"
    settings = Settings(steps=2, batch_size=4, checkpoint_every=2, init=small, **layout)
    run = planned(new_run(settings, data), dtype="float32", remat=False)
    texts = recorded(monkeypatch, fitting, "fit_programs")
    with pytest.raises(Compiled):
        fit(tmp_path / "run", data, settings)
    assert texts == [planned_text(measure_training, run, settings, HERE)]


def test_a_planned_chain_is_the_drawn_one(monkeypatch, planned_text, untrained):
    run = load_run(untrained / "runs/digits")
    texts = recorded(monkeypatch, drawing, "draw_programs")
    with pytest.raises(Compiled):
        draw(jax.random.key(3), run, 4, steps=2, sampler=ancestral())
    shapes = planned(run, dtype="float32", remat=False)
    text = planned_text(measure_sampling, shapes, 4, HERE, steps=2, dtype="float32")
    assert texts == [text]
