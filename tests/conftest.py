"""Strict by default: float64 is real, and nothing is broadcast or promoted by accident.

Three circles, each a superset of the one before:

    pytest                      what anyone runs: neither `slow` nor `patience` (see pyproject.toml)
    pytest -m "not patience"    what .ci/run runs: also what is marked `slow`
    pytest -m ""                everything, by hand: also what is marked `patience`
"""

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

# All of this is also for the processes that tests start.
# Compiled programs are kept from run to run; `pytest --cache-clear` empties the folder.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache/d/xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.01"  # reading one takes 3 ms
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# JAX warns when it cannot read an entry of the cache, which another process may be writing; it then
# compiles the program again.
os.environ["PYTHONWARNINGS"] = (
    "error::DeprecationWarning,ignore:Error reading persistent compilation cache"
)
# Programs that run for a moment are compiled fast, not well. `JAX_DISABLE_MOST_OPTIMIZATIONS=0
# pytest` compiles all of them as users do, as .ci/run does once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Two devices; eight_devices/ has a process with eight. torch computes on one thread: the workers
# share the cores.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# Without torch, a test file that imports it, directly or through one of our modules, is not
# collected. Other tests that need it use the fixture `torch` or `diffusers`.
IMPORTS_TORCH = r"^(import|from) (torch|diffusers|torch_reference|jax_ddpm\.parity|benchmarks)\b"
NEEDS_TORCH = "needs torch and diffusers"
MISSING = [name for name in ("torch", "diffusers") if find_spec(name) is None]
FILES = Path(__file__).parent.rglob("test_*.py")
NEED_TORCH = [str(file) for file in FILES if re.search(IMPORTS_TORCH, file.read_text(), re.M)]
collect_ignore = NEED_TORCH if MISSING else []

# The slowest files start first, so that no worker sits idle while another finishes a long one.
LONGEST = ("parity/test_parity", "faults/", "test_samplers.", "test_readme", "cli/test_train")
LONGEST += ("test_eight_devices", "training/test_hosts", "test_sampling", "cli/", "interop/")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [name not in str(item.path) for name in LONGEST])


def pytest_report_header():
    if MISSING:
        rest = f"{len(collect_ignore)} test files are left out, and single tests are skipped"
        return f"without {' and '.join(MISSING)}: {rest}"


@pytest.fixture(scope="session", autouse=True)
def decoded_pictures(tmp_path_factory):
    """Tests, and the commands that they start, keep decoded pictures in a folder of their own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason=NEEDS_TORCH)


@pytest.fixture(scope="session")
def diffusers(torch):
    return pytest.importorskip("diffusers", reason=NEEDS_TORCH)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def network():
    """Sees every pixel of its image and the timestep, but no other image."""

    def denoise_fn(x, t):
        mixed = jnp.tanh(x + x.mean(axis=(1, 2, 3), keepdims=True))
        return mixed * jnp.cos(t.astype(x.dtype) / 200).reshape(-1, 1, 1, 1)

    return denoise_fn


EVENTS = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: EVENTS.append(name))


@pytest.fixture
def no_new_program():
    """`with no_new_program(): …` fails if JAX compiles anything inside."""

    @contextmanager
    def check():
        before = EVENTS.count("/jax/core/compile/backend_compile_duration")
        assert before, "JAX no longer says when it compiles"
        yield
        assert EVENTS.count("/jax/core/compile/backend_compile_duration") == before

    return check


class Command(subprocess.Popen):
    """Python in a process of its own, with so many devices; `text` is what it says."""

    def __init__(self, *arguments, cwd, devices):
        self.output = cwd / f"output-{time.monotonic_ns()}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        with self.output.open("wb") as file:
            command = [sys.executable, *arguments]
            super().__init__(command, cwd=cwd, env=environment, stdout=file, stderr=file)

    def until(self, condition):
        """Wait until `condition()`; fails if the process ends before, or after five minutes."""
        limit = time.monotonic() + 300
        while not condition():
            assert self.poll() is None and time.monotonic() < limit, self.text
            time.sleep(0.003)

    def end(self, number=None):
        """The exit code, after a signal of this number."""
        if number is not None:
            self.send_signal(number)
        return self.wait(600)

    @property
    def text(self):
        return self.output.read_text(errors="replace")


@pytest.fixture
def start(tmp_path):
    """Start a command in a folder of the test's own."""
    started = []

    def run(*arguments, devices=2):
        started.append(Command(*arguments, cwd=tmp_path, devices=devices))
        return started[-1]

    yield run
    for command in started:
        command.kill()
        command.wait()


@pytest.fixture
def untyped():
    """As in production, where types are not checked and our own errors are what a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@contextmanager
def users_settings():
    """JAX's own settings, as a user has them."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        yield


@pytest.fixture(scope="module")
def defaults():
    """JAX's own settings for a whole module."""
    with users_settings():
        yield


@pytest.fixture(scope="session")
def write_run():
    """Writes a run of 8×8 images, T = 20, with random weights, as `jax-ddpm train` would."""
    from jax_ddpm.interop import DiffusionModel
    from jax_ddpm.interop.model import init_variables
    from jax_ddpm.runs.model import save_run
    from jax_ddpm.runs.settings import named_schedule

    def write(folder, model, num_classes=None):
        shape, rng = (8, 8, 1), np.random.default_rng(0)
        variables = jax.tree.map(
            lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32),
            jax.eval_shape(lambda: init_variables(model, jax.random.key(0), shape)),
        )
        options = {"num_classes": num_classes, "null_label": num_classes, "guidance": 2.0}
        options |= {"timestep_spacing": "trailing"}
        run = DiffusionModel(model, variables, named_schedule("cosine", 20), shape, **options)
        save_run(folder, run)
        return run

    return write


@pytest.fixture(scope="session")
def one_level():
    """The fields of the cheapest U-Net: one level of eight channels."""
    return {
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
        "norm_num_groups": 4,
    }


@pytest.fixture(scope="session")
def small_unet(one_level):
    """The cheapest U-Net that knows ten classes and a null label."""
    from jax_ddpm.models import ddpm_digits

    return ddpm_digits(sample_size=8, **one_level)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory, write_run, small_unet):
    """A folder with `runs/digits`, a run of `small_unet` that was not trained. Only to be read."""
    folder = tmp_path_factory.mktemp("untrained")
    with users_settings():
        write_run(folder / "runs/digits", small_unet, num_classes=10)
    return folder


@pytest.fixture
def jax_ddpm_here(monkeypatch, capsys, defaults):
    """Run a command without the time of a new process: exit code, output, errors."""
    from jax_ddpm.cli import run

    def run_here(*arguments, cwd):
        monkeypatch.chdir(cwd)
        code = 0
        try:
            run(list(arguments))
        except SystemExit as end:
            code = end.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run_here
