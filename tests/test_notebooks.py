"""The tutorial's notebooks: public names, the same sections in both, outputs without errors.

.ci/run executes them.
"""

import ast
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [ROOT / "jax_ddpm/tutorial.ipynb", ROOT / "torch_reference/tutorial.ipynb"]


def cells(path: Path, kind: str) -> list[dict]:
    found = json.loads(path.read_text())["cells"]
    return [
        {**cell, "source": "".join(cell["source"])} for cell in found if kind in cell["cell_type"]
    ]


def test_the_jax_notebook_uses_public_names():
    tree = ast.parse("\n".join(cell["source"] for cell in cells(NOTEBOOKS[0], "code")))
    rooms, used = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            rooms |= {x.asname or x.name: x.name for x in node.names if x.name == "jax_ddpm"}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax_ddpm"):
            assert node.module == "jax_ddpm", "a room's names are used by its prefix"
            rooms |= {each.name: f"jax_ddpm.{each.name}" for each in node.names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.append((node.value.id, node.attr))
    assert rooms.keys() == {"ddpm", "data", "interop"}
    for room, name in used:
        assert room not in rooms or name in import_module(rooms[room]).__all__, f"{room}.{name}"


def test_both_have_the_same_sections():
    """Cell by cell, up to the takeaways."""
    theirs, ours = (
        [(cell["cell_type"], *re.findall("^## .*", cell["source"])) for cell in cells(path, "")]
        for path in NOTEBOOKS[::-1]
    )
    assert theirs[-1] == ("markdown", "## Key takeaways")
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.parent.name)
def test_outputs(path):
    assert path.stat().st_size <= 400_000
    assert not re.search(r"/home/|/root/|/tmp/", path.read_text())
    for number, cell in enumerate(cells(path, "code"), 1):
        assert cell["execution_count"] == number, "executed in order"
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr"
