"""Ho et al.'s CIFAR-10 network, planned for chips that are not here: `python -m benchmarks.plan`.

What `jax-ddpm plan` says of a training step on 128 images and of 256 samples of 1,000 steps, on
seven targets, beside what Ho et al. (2020, appendix B) measured on a TPU v3-8. Half an hour on two
cores; nothing runs on the chips themselves.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax

from jax_ddpm.plan.compilation import prepare
from jax_ddpm.plan.measuring import measure_sampling, measure_training, planned, preset
from jax_ddpm.plan.targets import parse_target
from jax_ddpm.runs import Settings

TARGETS = ("v3", "v4", "v5e", "v5p", "v6e", "a100", "h100")
MEASURED = {
    "source": "Ho et al. 2020, appendix B: TPU v3-8, batch size 128; a batch of 256 samples",
    "train_steps_per_second": 21,
    "sample_seconds": 17,
}


def main() -> None:
    """Compile everything, and write `plan.json` and `plan.md`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--target", nargs="+", default=list(TARGETS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    prepare()
    rows = []
    for text in arguments.target:
        for dtype in ("float32", "bfloat16"):
            run, target = planned(preset("cifar10"), dtype=dtype, remat=False), parse_target(text)
            settings = Settings(batch_size=128, dtype=dtype)
            rows.append(measure_training(run, settings, target))
            rows.append(measure_sampling(run, 256, target, dtype=dtype))
            for row in rows[-2:]:
                what = f"{row['target']} {dtype} {row['work']}"
                print(f"{what}: {row['estimate']:.3g} s", flush=True)
    results = {"jax": jax.__version__, "measured": MEASURED, "rows": rows}
    arguments.out.mkdir(exist_ok=True)
    (arguments.out / "plan.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "plan.md").write_text(markdown(rows))
    print(markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each target and dtype, the measurement first."""
    lines = [
        "| | | training step, batch 128 | | 256 samples × 1,000 steps | |",
        "|---|---|---|---|---|---|",
        "| *estimates:* | computes in | memory per device | steps/s, bound by | memory per device "
        "| seconds, bound by |",
        f"| **measured**, TPU v3-8, Ho et al. | | | **{MEASURED['train_steps_per_second']}** | "
        f"| **{MEASURED['sample_seconds']}** |",
    ]
    for train, sample in zip(rows[::2], rows[1::2], strict=True):
        name = f"`{train['target']}`, {train['devices']} × {train['chip']}"
        if train["devices"] == 1:
            name = f"`{train['target']}`, {train['chip']}"
        cells = [name, train["dtype"]]
        for row in (train, sample):
            speed = f"{row['estimate']:.1f}" if row is sample else f"{1 / row['estimate']:.0f}"
            cells += [f"{row['needed'] / 2**30:.2f} GiB", f"≤ {speed}, {row['bound']}"]
        cells[-1] = cells[-1].replace("≤", "≥")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
