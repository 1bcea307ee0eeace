"""Strict by default: float64 is real, and nothing is broadcast or promoted by accident."""

import os
import shutil
import subprocess
import tempfile

# Compiled programs are kept for these tests alone, and for the commands that they run.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()

import jax
import jaxtyping
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, or one worker would wait for the other's last."""
    longest = ("faults/", "cli/test_cli", "training/test_hosts", "parity/", "test_readme")
    items.sort(key=lambda item: not any(name in item.nodeid for name in longest))


def pytest_unconfigure():
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def untyped():
    """As in production, where types are not checked and our own errors are what a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def defaults():
    """JAX's own settings for a whole module, as a user has them."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        yield


@pytest.fixture(scope="session")
def write_run():
    """Writes a run of 8×8 images, T = 20, with random weights, as `jax-ddpm train` would."""
    from jax_ddpm.cli.runs import Run, init_variables, named_schedule, save_run
    from jax_ddpm.interop import Pretrained

    def write(folder, model, num_classes=None):
        shape, rng = (8, 8, 1), np.random.default_rng(0)
        variables = jax.tree.map(
            lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32),
            jax.eval_shape(lambda: init_variables(model, jax.random.key(0), shape)),
        )
        schedule = named_schedule("cosine", 20)
        pretrained = Pretrained(model, variables, schedule, timestep_spacing="trailing")
        run = Run(pretrained, shape, num_classes, null_label=num_classes, guidance=2.0)
        save_run(folder, run)
        return run

    return write


@pytest.fixture
def jax_ddpm_here(monkeypatch, capsys, defaults):
    """Run a command in this process, which saves its start: exit code, output, errors."""
    from jax_ddpm.cli import run

    def run_here(*arguments, cwd):
        monkeypatch.chdir(cwd)
        code = 0
        try:
            run(list(arguments))
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run_here
