"""The comparison that comes before any timing can fail, and the report shows what it is given."""

import jax
import numpy as np
import pytest

from benchmarks import profile
from benchmarks.harness import Disagreement, check_agreement
from benchmarks.report import markdown, moved, plot, plot_scaling


def test_a_wrong_output_is_refused():
    right = np.linspace(1, 2, 5)
    outputs = {"torch eager": right, "JAX jit": right + 1e-7}
    assert check_agreement(outputs, "torch eager", 1e-6)["JAX jit"] == pytest.approx(5e-8)
    with pytest.raises(Disagreement, match="JAX jit by 5.0e-08"):
        check_agreement(outputs, "torch eager", 1e-8)
    with pytest.raises(Disagreement):
        check_agreement({**outputs, "JAX jit": right * np.nan}, "torch eager", 1e-6)


def _results(jax_seconds=0.01):
    names = ["JAX jit", "torch eager", "torch.compile, channels_last"]
    seconds = (jax_seconds, 0.03, 0.02)
    rows = [
        {"contender": name, "batch": 4, "compile_s": None, "seconds_per_step": [s, s, 1.2 * s]}
        for name, s in zip(names, seconds, strict=True)
    ]
    timed = ("sampling", "training", "cifar10_sampling", "cifar10_training")
    attention = {"what": "attention", "pass": "forward"}
    overhead = ["JAX, one scan", "JAX, one scan, DDIM", "DDPMScheduler", "DDIMScheduler"]
    return {
        "machine": {
            "date": "2026-01-01T00:00:00",
            "jax_device": "a processor",
            "cores": 2,
            "versions": {"jax": "1"},
            "precision": "float32",
        },
        **dict.fromkeys(timed, rows),
        "overhead": [{"contender": name, "seconds_per_step": [1e-6]} for name in overhead],
        "peak": [
            {"contender": "sgemm", "gflop_per_second": [100.0, 110.0]},
            {"contender": "JAX jit", "gflop_per_second": [98.0, 98.0]},
        ],
        "checkpoints": [
            {"contender": "without", "batch": 64, "steps": 100, "seconds": [9.8, 9.8]},
            {"contender": "with", "batch": 64, "steps": 100, "seconds": [10.0, 10.0]},
        ],
        "growth": [
            {"timesteps": 10, "program_lines": 5, "temporary_bytes": 2**20, "compile_s": 1.0}
        ],
        "scaling": [
            {"curve": "steps", "size": size, "seconds": [size, 1.1 * size]} for size in (1, 2)
        ],
        "processes": [
            {"what": "memory", "contender": "JAX jit, sharded over cores", "bytes": [2**20]},
            {"what": "memory", "contender": "torch eager", "bytes": [3 * 2**20]},
            {**attention, "side": "jax", "contender": "JAX jit", "bytes": [2**21]},
            {**attention, "side": "torch", "contender": "torch's", "bytes": [2**20]},
            {"what": "start", "contender": "cold", "imports": 1.0, "pictures": 8.0},
            {"what": "start", "contender": "cache warm", "imports": 1.0, "pictures": 2.0},
        ],
    }


def test_report(tmp_path):
    text = markdown(_results())
    assert "| 4 | **JAX jit** | 10.0 (10.0 – 12.0) |  | 3.00 × | 2.00 × |" in text
    assert (
        "| tutorial reverse loop, 64×64 | 4 | 2.00 × (2.00 – 2.00) | torch.compile, channels_last |"
        in text
    )
    assert "| share of the sgemm peak | 16 | 0.94 × (0.89 – 0.98) | sgemm |" in text
    assert "| peak memory of sampling | 16 | 3.00 × | torch eager |" in text
    assert "| training with a checkpoint every 100 steps | 64 | 0.98 × (0.98" in text
    assert "| cache warm | 1.0 | 2.0 |" in text
    assert "| memory of attention over 64×64 tokens, forward | 1 | 0.50 × | torch's |" in text
    alone = {name: _results()[name] for name in ("machine", "peak")}  # a section by itself
    assert "share of the sgemm peak" in markdown(alone)
    plot(_results(), tmp_path / "plot.png")
    plot_scaling(_results()["scaling"], tmp_path / "scaling.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_what_moved_by_more_than_the_noise_is_named():
    """The noise is what the rounds of either run show, and 3 % between runs."""
    assert moved(_results(), _results()) == []
    assert moved(_results(), _results(jax_seconds=0.0102)) == []
    assert len(moved(_results(), _results(jax_seconds=0.0104))) == 4
    lines = moved(_results(), _results(jax_seconds=0.02))
    assert "tutorial reverse loop, 64×64, batch 4: 2.00 × (2.00 – 2.00) then, 1.00 ×" in lines[0]
    assert len(lines) == 4
    noisy = _results(jax_seconds=0.02)
    noisy["sampling"][0]["seconds_per_step"] = [0.02, 0.01, 0.03]  # all four share the row
    assert moved(_results(), noisy) == []
    with pytest.raises(ValueError, match="expected ratios of the same work, got none"):
        moved(_results(), {})


def test_a_profile_is_shared_out_by_what_instructions_do():
    program = """HloModule jit_step

%fused (a: f32[2]) -> f32[2] {
  ROOT %c = f32[2]{0} convolution(%a, %b), metadata={op_name="jit(step)/UNet/conv"}
}

%added (a: f32[2]) -> f32[2] {
  ROOT %s = f32[2]{0} add(%a, %b)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %ynn_fusion.1 = f32[2]{0} fusion(%x), kind=kCustom, calls=%fused, metadata={op_name="a/UNet/b"}
  %fusion.2 = f32[2]{0} fusion(%x), kind=kLoop, calls=%added, metadata={op_name="a/UNet/add"}
  %fusion.3 = f32[2]{0} fusion(%x), kind=kLoop, calls=%added, metadata={op_name="step/add"}
  %all-reduce.4 = (f32[2]{0}, f32[]) all-reduce(%x, %y), metadata={op_name="a/UNet/sum"}
  %while.5 = (f32[2]{0}, s32[]) while(%t), condition=%c, body=%b
  ROOT %dot.6 = f32[2]{0} dot(%x, %y)
}
"""
    names = ("ynn_fusion.1", "fusion.2", "fusion.3", "all-reduce.4", "while.5", "dot.6", "thread")
    spent = {name: 2.0**place for place, name in enumerate(names)}
    found = profile.shares(spent, program)
    assert found == {"products": 1 + 32, "network": 2, "update": 4, "exchange": 8}


def test_products_are_found_in_a_real_profile():
    """Most of the time of a large product; nothing is exchanged."""
    side = 1024
    matrix = jax.numpy.ones((side, side), "float32")
    program = jax.jit(lambda x: x @ x).lower(matrix).compile()
    found, seconds = profile.profile(lambda: program(matrix).block_until_ready(), program.as_text())
    assert 0.2 * seconds < found["products"] <= sum(found.values())
    assert found["exchange"] == 0
