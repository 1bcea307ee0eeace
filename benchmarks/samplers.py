"""Every sampler at few steps, the same seeds: `python -m benchmarks.samplers --run runs/digits`.

Each draws the same digits from the same x_T, one row of the picture. The table says how many of
500 are what was asked for (by the SVC of `jax-ddpm evaluate`), and, where no noise is added, how
far pixels are from those of the whole chain: the root mean square against DDIM with every step.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_ddpm.cpu import use_cores
from jax_ddpm.data import load_dataset
from jax_ddpm.noise import sample_noise
from jax_ddpm.runs import load_run
from jax_ddpm.runs.drawing import labels_in_turn
from jax_ddpm.runs.evaluating import label_agreement
from jax_ddpm.runs.figures import image_grid
from jax_ddpm.runs.programs import guided_denoise_fn
from jax_ddpm.samplers import ancestral, ddim, dpm_solver_pp, heun
from jax_ddpm.sampling import p_sample_loop
from jax_ddpm.training.sharding import data_sharding, device_mesh

STEPS = (10, 25, 50)
SAMPLERS = {
    "ancestral()": (ancestral(), 1),
    "ddim()": (ddim(), 1),
    "ddim(eta=0.5)": (ddim(eta=0.5), 1),
    "dpm_solver_pp(2)": (dpm_solver_pp(2), 1),
    "dpm_solver_pp(3)": (dpm_solver_pp(3), 1),
    "dpm_solver_pp(2, stochastic=True)": (dpm_solver_pp(2, stochastic=True), 1),
    "heun()": (heun(), 2),
}
"""Each with the number of times that it runs the network in a step."""
DETERMINISTIC = ("ddim()", "dpm_solver_pp(2)", "dpm_solver_pp(3)", "heun()")
SHOWN = 10


def main() -> None:
    """Draw, judge, and write `samplers.json`, `.md` and `.png`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run on the digits")
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    use_cores()
    run, data = load_run(arguments.run), load_dataset("digits")
    labels = labels_in_turn(run, arguments.num)
    assert labels is not None

    shape = run.shape(arguments.num)
    key = jax.random.key(0)
    sharding = data_sharding(device_mesh(arguments.num))
    # The start that `p_sample_loop` would draw depends on the length of the chain.
    x_T = sample_noise(key, run.schedule.num_timesteps, shape)

    def draw(name: str, steps: int) -> np.ndarray:
        @jax.jit
        def loop(variables, labels, x_T):
            return p_sample_loop(
                key,
                run.chain(steps),
                guided_denoise_fn(run, variables, labels),
                shape,
                sampler=SAMPLERS[name][0],
                prediction_type=run.prediction_type,
                x_T=x_T,
                sharding=sharding,
            )

        return np.asarray(loop(run.variables, labels, x_T))

    limit = draw("ddim()", run.schedule.num_timesteps)
    rows, pictures = [], {}
    for name, (_, evaluations) in SAMPLERS.items():
        for steps in STEPS:
            start = time.perf_counter()
            samples = draw(name, steps)
            agreement, held_out, _ = label_agreement(data, samples, labels).values()
            distance = float(np.sqrt(np.mean((samples - limit) ** 2)))
            rows.append(
                {
                    "sampler": name,
                    "steps": steps,
                    "network_evaluations": steps * evaluations,
                    "agreement": agreement,
                    "svc_held_out": held_out,
                    "rms_to_all_steps": distance if name in DETERMINISTIC else None,
                    "seconds_with_compilation": round(time.perf_counter() - start, 1),
                }
            )
            pictures[name, steps] = samples[:SHOWN]
    arguments.out.mkdir(exist_ok=True)
    (arguments.out / "samplers.json").write_text(json.dumps(rows, indent=2) + "\n")
    (arguments.out / "samplers.md").write_text(markdown(rows))
    plot(pictures, arguments.out / "samplers.png")
    print(markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line a sampler: the share that is what was asked for, and the distance."""
    lines = [
        "| sampler | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |",
        "|---|" + "---|" * len(STEPS),
    ]
    for name in dict.fromkeys(row["sampler"] for row in rows):
        cells = []
        for row in rows:
            if row["sampler"] == name:
                distance = row["rms_to_all_steps"]
                away = "" if distance is None else f", {distance:.3f} away"
                cells.append(f"{row['agreement']:.1%}{away}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(pictures: dict[tuple[str, int], np.ndarray], path: Path) -> None:
    """A row for each sampler, a strip for each number of steps."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for name, _ in pictures))
    figure, axes = plt.subplots(len(names), len(STEPS), figsize=(14, 0.62 * len(names) + 0.4))
    for row, name in zip(axes, names, strict=True):
        for axis, steps in zip(row, STEPS, strict=True):
            axis.imshow(image_grid(pictures[name, steps], SHOWN), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if name == names[0]:
                axis.set_title(f"{steps} steps", fontsize=11)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    figure.tight_layout(h_pad=0.2, w_pad=0.5)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
