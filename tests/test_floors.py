"""A file imports only from floors below its own; the maths knows neither Flax nor torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jax_ddpm"
# The README's map, a line for each kind of module on a floor.
LINES = re.findall(r"^\| (\d+) \| (`.*?`) \|", (PACKAGE.parent / "README.md").read_text(), re.M)
FLOORS = {name: int(number) for number, names in LINES for name in re.findall(r"\w+", names)}
MATHS = {name for name, number in FLOORS.items() if number <= 8} - {"models", "cpu", "io"}
ALLOWED = {
    **dict.fromkeys(MATHS | {"cpu", "data", "interop"}, {"jax", "numpy", "jaxtyping"}),
    **dict.fromkeys(("training", "evaluation"), {"jax", "numpy", "jaxtyping", "optax"}),
    "io": {"jax", "numpy", "safetensors"},
    "models": {"jax", "numpy", "jaxtyping", "flax"},
    "runs": {"jax", "numpy", "optax"},
    "plan": {"jax", "numpy"},
}
LIBRARIES = {"jax", "numpy", "jaxtyping", "flax", "optax", "torch", "diffusers", "safetensors"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_the_map_has_every_module():
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} == FLOORS.keys()


ENDS = {"print", "exit", "quit", "input", "breakpoint", "sys.exit", "os._exit"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_knows_only_what_is_below(path):
    """Below the command line nothing prints, exits or names a flag."""
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            library = module.split(".")[0]
            if library == "jax_ddpm":
                assert room(module) == here or FLOORS[room(module)] < FLOORS[here], module
            elif library in LIBRARIES and here in ALLOWED:
                assert library in ALLOWED[here], module
        if here in ("cli", "__main__"):
            continue
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ENDS, f"line {node.lineno}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value.replace("--xla_", "")  # XLA's own flags
            assert not re.search(r"(?<![\w-])--[a-z]", text), f"line {node.lineno}: {text}"


def test_the_package_loads_its_maths_and_networks_alone():
    """Images, runs and what they need are loaded by those who import them."""
    command = [sys.executable, "-c", "import sys, jax_ddpm; print(*sys.modules)"]
    loaded = set(subprocess.check_output(command, text=True).split())
    rooms = {f"jax_ddpm.{name}" for name in ("data", "evaluation", "runs", "plan", "parity", "cli")}
    assert "jax_ddpm.training" in loaded
    assert not loaded & (rooms | {"PIL", "grain", "safetensors", "sklearn", "torch", "tyro"})
