"""Ho et al.'s CIFAR-10 network, planned for chips that are not here: `python -m benchmarks plan`.

What `jax-ddpm plan` says of a training step on 128 images and of 256 samples of 1,000 steps, on
seven targets, beside what Ho et al. (2020, appendix B) measured on a TPU v3-8. Half an hour on two
cores; nothing runs on the chips themselves.
"""

import jax

from benchmarks.harness import Row, options, say, table, write
from jax_ddpm.plan.compilation import prepare
from jax_ddpm.plan.measuring import PRESETS, measure_sampling, measure_training, of_recipe, planned
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
    parser = options(__doc__)
    parser.add_argument("--target", nargs="+", default=TARGETS)
    arguments = parser.parse_args()
    prepare()
    rows = []
    for text in arguments.target:
        for dtype in ("float32", "bfloat16"):
            say(f"{text} {dtype} …")
            run, target = of_recipe(PRESETS["cifar10"]), parse_target(text)
            run = planned(run, dtype=dtype, remat=False)
            settings = Settings(batch_size=128, dtype=dtype)
            rows.append(measure_training(run, settings, target).record())
            rows.append(measure_sampling(run, 256, target, dtype=dtype).record())
    results = {"jax": jax.__version__, "measured": MEASURED, "rows": rows}
    write(arguments.out / "plan", results, markdown(rows))
    print(markdown(rows))


def markdown(rows: list[Row]) -> str:
    """A line for each target and dtype, the measurement first."""
    steps, seconds = MEASURED["train_steps_per_second"], MEASURED["sample_seconds"]
    lines = [["**measured**, TPU v3-8, Ho et al.", "", "", f"**{steps}**", "", f"**{seconds}**"]]
    for train, sample in zip(rows[::2], rows[1::2], strict=True):
        devices = "" if train["devices"] == 1 else f"{train['devices']} × "
        memory = [f"{row['needed'] / 2**30:.2f} GiB" for row in (train, sample)]
        line = [f"`{train['target']}`, {devices}{train['chip']}", train["dtype"], memory[0]]
        line += [f"≤ {1 / train['estimate']:.0f}, {train['bound']}", memory[1]]
        lines.append([*line, f"≥ {sample['estimate']:.1f}, {sample['bound']}"])
    header = ["estimates", "computes in", "memory per device: training on 128 images"]
    header += ["steps/s, bound by", "memory per device: 256 samples × 1,000 steps"]
    return "\n".join(table([*header, "seconds, bound by"], lines)) + "\n"
