"""Every sampler at few steps, the same seeds: `python -m benchmarks samplers --run runs/digits`.

Each draws the same digits from the same x_T, one row of the picture. The table says how many of
500 are what was asked for (by the SVC of `jax-ddpm evaluate`), and, where no noise is added, how
far pixels are from those of the whole chain: the root mean square against DDIM with every step.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import options, say, table, write
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
    "ancestral()": ancestral(),
    "ddim()": ddim(),
    "ddim(eta=0.5)": ddim(eta=0.5),
    "dpm_solver_pp(2)": dpm_solver_pp(2),
    "dpm_solver_pp(3)": dpm_solver_pp(3),
    "dpm_solver_pp(2, stochastic=True)": dpm_solver_pp(2, stochastic=True),
    "heun()": heun(),
}
DETERMINISTIC = ("ddim()", "dpm_solver_pp(2)", "dpm_solver_pp(3)", "heun()")
SHOWN = 10


def main() -> None:
    """Draw, judge, and write `samplers.json`, `.md` and `.png`."""
    parser = options(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run on the digits")
    parser.add_argument("--num", type=int, default=500)
    arguments = parser.parse_args()
    use_cores()
    run, data = load_run(arguments.run), load_dataset("digits")
    labels: Any = labels_in_turn(run, arguments.num)
    shape, key = run.shape(arguments.num), jax.random.key(0)
    sharding = data_sharding(device_mesh(arguments.num))
    # The start that `p_sample_loop` would draw depends on the length of the chain.
    x_T = sample_noise(key, run.schedule.num_timesteps, shape)

    def draw(name: str, steps: int) -> np.ndarray:
        @jax.jit
        def loop(variables, labels, x_T):
            denoise_fn = guided_denoise_fn(run, variables, labels)
            how = {"sampler": SAMPLERS[name], "prediction_type": run.prediction_type}
            how |= {"x_T": x_T, "sharding": sharding}
            return p_sample_loop(key, run.chain(steps), denoise_fn, shape, **how)

        return np.asarray(loop(run.variables, labels, x_T))

    limit = draw("ddim()", run.schedule.num_timesteps)
    rows, pictures, lines = [], {}, []
    for name in SAMPLERS:
        say(f"{name} …")
        lines.append([f"`{name}`"])
        for steps in STEPS:
            samples = draw(name, steps)
            judged = label_agreement(data, samples, labels)
            row = {"sampler": name, "steps": steps, "agreement": judged["agreement"]}
            row |= {"svc_held_out": judged["svc_held_out"], "rms_to_all_steps": None}
            cell = f"{judged['agreement']:.1%}"
            if name in DETERMINISTIC:
                distance = float(np.sqrt(np.mean((samples - limit) ** 2)))
                row["rms_to_all_steps"], cell = distance, f"{cell}, {distance:.3f} away"
            rows.append(row)
            lines[-1].append(cell)
            pictures[name, steps] = samples[:SHOWN]
    report = "\n".join(table(["sampler", *(f"{n} steps" for n in STEPS)], lines)) + "\n"
    write(arguments.out / "samplers", rows, report)
    plot(pictures, arguments.out / "samplers.png")
    print(report)


def plot(pictures: dict[tuple[str, int], np.ndarray], path: Path) -> None:
    """A block for each number of steps, a row of it for each sampler."""
    figure = Figure(figsize=(9, 14.4), layout="constrained")
    for axis, steps in zip(figure.subplots(len(STEPS)), STEPS, strict=True):
        images = np.concatenate([pictures[name, steps] for name in SAMPLERS])
        axis.imshow(image_grid(images, SHOWN), interpolation="nearest")
        height = axis.get_ylim()[0] / len(SAMPLERS)
        axis.set_yticks([(k + 0.5) * height for k in range(len(SAMPLERS))], list(SAMPLERS))
        axis.set_xticks([])
        axis.tick_params(length=0, labelsize=11)
        axis.spines[:].set_visible(False)
        axis.set_title(f"{steps} steps", fontsize=13)
    figure.savefig(path, dpi=90, bbox_inches="tight")
