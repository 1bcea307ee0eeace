"""Every default of a public function has its reason in `jax_ddpm/README.md`."""

import inspect
import re
from pathlib import Path

import jax_ddpm as ddpm
from jax_ddpm import evaluation, interop, runs

ROOMS = (ddpm, evaluation, interop, runs)


def defaults():
    for room in ROOMS:
        for name, value in vars(room).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                for each in inspect.signature(value).parameters.values():
                    if each.default not in (inspect.Parameter.empty, None):
                        yield f"{each.name}={each.default!r}"


def test_every_default_has_its_reason():
    page = Path(ddpm.__file__).with_name("README.md").read_text()
    table = page.partition("## Defaults, and why")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    assert all(len(row) == 5 and row[3].strip() for row in rows)
    said = {word for row in rows for word in re.findall("`([^`]+)`", row[1])}
    assert set(defaults()) <= said, set(defaults()) - said
    stale = {each for each in said if not each.endswith("=None")} - set(defaults())
    assert not {each for each in stale if each.partition("=")[0] not in COMPARE}


COMPARE = {"adam_steps", "chain", "dtypes"}
"""Of `parity.compare`, which needs torch: these are not looked up."""
