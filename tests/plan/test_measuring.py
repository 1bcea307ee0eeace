"""What is planned is what is run: the same programs, to the last line of their text."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_ddpm.data import Dataset
from jax_ddpm.models import ddpm_digits
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


@pytest.fixture
def planned_text(monkeypatch):
    """The text of what would be compiled."""
    texts = []

    class Compiled(Exception):
        pass

    def compile_for(target, program, *arguments):
        texts.append(program.lower(*arguments).as_text())
        raise Compiled

    monkeypatch.setattr(measuring, "compile_for", compile_for)

    def text(measure, *arguments, **options):
        with pytest.raises(Compiled):
            measure(*arguments, **options)
        return texts.pop()

    return text


@pytest.fixture
def small(tmp_path, write_run):
    """A run with a small U-Net of ten classes."""
    model = ddpm_digits(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    write_run(tmp_path / "small", model, num_classes=10)
    return tmp_path / "small"


def recorded(monkeypatch, module, name):
    """The texts of the programs that `advance` runs, of what `module.name` makes."""
    make, texts = getattr(module, name), []

    class Recorder:
        def __init__(self, program):
            self.program = program

        def lower(self, *arguments):
            lowered = self.program.lower(*arguments)
            texts.append(lowered.as_text())
            return lowered

        def __call__(self, *arguments):
            self.lower(*arguments)
            return self.program(*arguments)

    def remade(*arguments):
        programs = make(*arguments)
        return programs._replace(advance=Recorder(programs.advance))

    monkeypatch.setattr(module, name, remade)
    return texts


def test_a_planned_step_is_the_trained_one(tmp_path, monkeypatch, planned_text, small):
    images = np.random.default_rng(0).uniform(-1, 1, (20, 8, 8, 1)).astype(np.float32)
    data = Dataset(images, np.arange(20, dtype=np.int32) % 10)
    layout = {"fsdp": 2, "accumulate": 2, "steps_per_dispatch": 2}
    settings = Settings(steps=2, batch_size=16, checkpoint_every=2, init=small, **layout)
    run = planned(new_run(settings, data), dtype="float32", remat=False)
    texts = recorded(monkeypatch, fitting, "fit_programs")
    fit(tmp_path / "run", data, settings)
    assert texts == [planned_text(measure_training, run, settings, HERE)]


def test_a_planned_chain_is_the_drawn_one(monkeypatch, planned_text, small):
    run = load_run(small)
    texts = recorded(monkeypatch, drawing, "draw_programs")
    draw(jax.random.key(3), run, 16, steps=2, sampler=ancestral())
    shapes = planned(run, dtype="float32", remat=False)
    text = planned_text(measure_sampling, shapes, 16, HERE, steps=2, dtype="float32")
    assert texts == [text] * 2
