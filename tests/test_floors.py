"""A file imports only from floors below its own; the maths knows neither Flax nor torch."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jax_ddpm"
FLOORS = [
    {"_typing", "_checks", "_extras"},
    {"schedule", "noise", "thresholding", "cpu", "io"},
    {"forward", "models"},
    {"reverse"},
    {"likelihood", "guidance"},
    {"losses"},
    {"samplers"},
    {"sampling"},
    {"editing", "inpainting"},
    {"interop"},
    {"training", "plan"},
    {"__init__", "cli", "parity", "__main__"},
]
MATHS = set.union(*FLOORS[:9]) - {"models", "cpu", "io"}
ALLOWED = {
    **dict.fromkeys(MATHS, {"jax", "numpy", "jaxtyping"}),
    "cpu": {"jax", "numpy", "jaxtyping"},
    "io": {"jax", "numpy", "safetensors"},
    "models": {"jax", "numpy", "jaxtyping", "flax"},
    "training": {"jax", "numpy", "jaxtyping", "optax"},
    "plan": {"jax"},
    "interop": {"jax", "numpy", "jaxtyping"},
}
LIBRARIES = {"jax", "numpy", "jaxtyping", "flax", "optax", "torch", "diffusers", "safetensors"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def floor(name: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if name in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_below(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            library = module.split(".")[0]
            if library == "jax_ddpm" and floor(here) < floor("__init__"):
                assert room(module) == here or floor(room(module)) < floor(here), module
            elif library in LIBRARIES and here in ALLOWED:
                assert library in ALLOWED[here], module
