"""What people pass by mistake, to every public function: it works, or one line names the argument.

Each function has one call that is right. From it are made all calls with one argument replaced, by
what its annotation makes plausible: another rank, whole numbers, a list, an old key, the betas in
place of a schedule. Such a call may do what the right form of the same value does; otherwise it
raises a `TypeError` or `ValueError` of this library that begins with the argument's name. Nothing
comes back silently wrong, and no error comes from inside JAX, Flax or NumPy.
"""

import inspect
import re
import traceback
import warnings
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_ddpm as ddpm
from jax_ddpm import data, evaluation, interop, runs
from jax_ddpm.runs.run import Run
from jax_ddpm.training.sharding import device_mesh

try:
    import torch as TORCH
except ImportError:
    TORCH = None

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

T = 4
SCHEDULE = ddpm.make_schedule(ddpm.cosine_beta_schedule(T))
SHAPE = (2, 4, 4, 3)
X = np.linspace(-0.9, 0.9, 96).reshape(SHAPE).astype(np.float32)
ROWS = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
ENTRIES = np.array([0, 3], np.int32)
KEY = jax.random.key(0)
MODEL = ddpm.SimpleUNet()
VARIABLES = jax.jit(MODEL.init)(KEY, X, ENTRIES)
OPTIMIZER = optax.sgd(0.1)
TABLE = SCHEDULE.sqrt_alphas_cumprod
UNET = ddpm.UNet(
    block_out_channels=(8,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    norm_num_groups=4,
    layers_per_block=1,
    num_class_embeds=5,
)
UNET_VARIABLES = jax.jit(UNET.init)(KEY, X, ENTRIES, ENTRIES)
PRETRAINED = interop.Pretrained(MODEL, VARIABLES, SCHEDULE, timestep_spacing="trailing")
IMAGES = data.Dataset(X)
STATE = ddpm.init_train_state(KEY, {"w": np.ones(2, np.float32)}, OPTIMIZER)
KINDS = {"up": "linear", "norm": "norm"}
RUN = Run(PRETRAINED, SHAPE[1:], None, null_label=None, guidance=1.0)


def network(x, t):
    return 0.5 * x


def apply_fn(params, x, t, *conditions):
    return params["w"] * x


def step_on(batch, null_label=None):
    """One training step on a batch, with the null label in place of every label."""
    step = ddpm.make_train_step(
        SCHEDULE, apply_fn, OPTIMIZER, null_label=null_label, label_dropout=1.0
    )
    return step(ddpm.init_train_state(KEY, {"w": jnp.float32(1)}, OPTIMIZER), batch)[1]


def guided(scale=2.0, **options):
    return ddpm.classifier_free_guidance(network, lambda x, t: 0.2 * x, scale, **options)(
        X, ENTRIES
    )


def apply_unet(x, t, labels):
    return UNET.apply(UNET_VARIABLES, x, t, labels)


def apply_simple(x, t):
    return MODEL.apply(VARIABLES, x, t)


def settings_of(**fields):
    return runs.Settings(**fields)


def fit_one_step(folder="run", data=IMAGES):
    settings = runs.Settings(model="simple", steps=1, batch_size=2, timesteps=T)
    return runs.fit(folder, data, settings).run.pretrained.variables


def log_prob(x, t):
    return -jnp.sum(x**2, axis=(1, 2, 3))


CHAIN = {"key": KEY, "schedule": SCHEDULE, "denoise_fn": network}
ONE_STEP = {"schedule": SCHEDULE, "denoise_fn": network, "x_t": X, "t": ENTRIES}
BETAS = ("linear", "scaled_linear", "cosine", "sigmoid")

# Every public function, and a call that is right.
CALLS = {
    **{getattr(ddpm, f"{name}_beta_schedule"): {"timesteps": 10} for name in BETAS},
    ddpm.make_schedule: {"betas": np.array([0.1, 0.2, 0.3])},
    ddpm.rescale_zero_terminal_snr: {"betas": np.array([0.1, 0.2, 0.3])},
    ddpm.spaced_timesteps: {"timesteps": 10, "steps": 5, "spacing": "leading"},
    ddpm.respace: {"schedule": SCHEDULE, "timesteps": np.array([0, 2]), "final_alpha_cumprod": 1.0},
    ddpm.extract: {"table": TABLE, "t": ENTRIES, "x": X},
    ddpm.q_sample: {"schedule": SCHEDULE, "x_start": X, "t": ENTRIES, "noise": X},
    ddpm.q_mean_variance: {"schedule": SCHEDULE, "x_start": X, "t": ENTRIES},
    ddpm.q_posterior_mean_variance: {
        "schedule": SCHEDULE,
        "x_start": X,
        "x_t": X,
        "t": ENTRIES,
    },
    ddpm.predict_xstart_from_eps: {"schedule": SCHEDULE, "x_t": X, "t": ENTRIES, "eps": X},
    ddpm.predict_eps_from_xstart: {"schedule": SCHEDULE, "x_t": X, "t": ENTRIES, "x_start": X},
    ddpm.predict_v: {"schedule": SCHEDULE, "x_start": X, "t": ENTRIES, "noise": X},
    ddpm.predict_xstart_from_v: {"schedule": SCHEDULE, "x_t": X, "t": ENTRIES, "v": X},
    ddpm.predict_eps_from_v: {"schedule": SCHEDULE, "x_t": X, "t": ENTRIES, "v": X},
    ddpm.p_mean_variance: {
        **ONE_STEP,
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "clip_denoised": True,
    },
    ddpm.sample_noise: {"key": KEY, "i": 2, "shape": SHAPE, "first_sample": 0},
    ddpm.p_sample_init: {"key": KEY, "schedule": SCHEDULE, "shape": SHAPE, "sampler": ddpm.ddim()},
    ddpm.p_sample_steps: {
        **CHAIN,
        "state": ddpm.p_sample_init(KEY, SCHEDULE, SHAPE, x_T=X),
        "steps": 2,
        "sampler": ddpm.ancestral(),
    },
    ddpm.p_sample_loop: {
        **CHAIN,
        "shape": SHAPE,
        "sampler": ddpm.ancestral(),
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "clip_denoised": True,
        "x_T": X,
        "noise_fn": lambda i: jnp.zeros(SHAPE),
        "first_sample": 0,
        "save_every": 2,
    },
    ddpm.ddim: {"eta": 0.5},
    ddpm.dpm_solver_pp: {"order": 2, "stochastic": False},
    ddpm.heun: {"max_slope": 10.0},
    ddpm.static_threshold: {"limit": 1.5},
    ddpm.dynamic_threshold: {"quantile": 0.9, "max_value": 1.5},
    ddpm.training_losses: {
        "schedule": SCHEDULE,
        "denoise_fn": network,
        "x_start": X,
        "t": ENTRIES,
        "noise": X,
        "loss_type": "mse",
        "weighting": "min_snr",
        "min_snr_gamma": 5.0,
    },
    ddpm.bits_per_dim: {**CHAIN, "x_start": X, "first_sample": 0},
    guided: {"scale": 2.0, "rescale": 0.5, "interval": (0, 3)},
    ddpm.classifier_free_guidance: {
        "conditional": network,
        "unconditional": network,
        "scale": 2.0,
    },
    ddpm.classifier_guidance: {
        "schedule": SCHEDULE,
        "denoise_fn": network,
        "log_prob_fn": log_prob,
        "scale": 1.0,
        "prediction_type": "epsilon",
    },
    ddpm.reconstruction_guidance: {
        "schedule": SCHEDULE,
        "denoise_fn": network,
        "log_prob_fn": log_prob,
        "scale": 1.0,
        "prediction_type": "epsilon",
    },
    ddpm.image_to_image: {**CHAIN, "x_start": X, "steps": 2, "sampler": ddpm.ddim()},
    ddpm.ddim_invert: {"schedule": SCHEDULE, "denoise_fn": network, "x_start": X},
    ddpm.interpolate: {
        "schedule": SCHEDULE,
        "denoise_fn": network,
        "x_a": X,
        "x_b": X[::-1],
        "weights": np.array([0.0, 0.5], np.float32),
    },
    ddpm.slerp: {"a": X, "b": X[::-1], "weight": 0.5},
    ddpm.repaint_walk: {"timesteps": 10, "jump_length": 2, "resamples": 2},
    ddpm.inpaint: {
        **CHAIN,
        "x_start": X,
        "mask": np.ones((4, 4, 1), np.float32),
        "jump_length": 2,
        "resamples": 2,
    },
    ddpm.ema_warmup: {"decay": 0.99},
    ddpm.init_train_state: {"key": KEY, "params": {"w": np.ones(2)}, "optimizer": OPTIMIZER},
    ddpm.make_train_step: {
        "schedule": SCHEDULE,
        "apply_fn": apply_fn,
        "optimizer": OPTIMIZER,
        "ema_decay": 0.9,
        "label_dropout": 0.1,
        "accumulate": 1,
    },
    step_on: {"batch": X},
    ddpm.adm_imagenet64: {},
    ddpm.adm_imagenet128: {},
    ddpm.adm_imagenet256: {},
    ddpm.adm_imagenet512: {},
    ddpm.ddpm_celebahq: {},
    ddpm.ddpm_cifar10: {},
    ddpm.ddpm_digits: {"num_classes": 10},
    ddpm.ancestral: {},
    apply_simple: {"x": X, "t": ENTRIES},
    apply_unet: {"x": X, "t": ENTRIES, "labels": ENTRIES},
    interop.simple_unet_from_torch: {"state_dict": interop.simple_unet_to_torch(VARIABLES)},
    interop.unet_from_torch: {
        "state_dict": interop.unet_to_torch(UNET_VARIABLES),
        "model": UNET,
    },
    interop.unet_to_torch: {"variables": UNET_VARIABLES},
    interop.simple_unet_to_torch: {"variables": VARIABLES},
    interop.layers_from_torch: {
        "state_dict": {"up.weight": X[0, 0], "up.bias": X[0, :, 0, 0], "norm.weight": X[0, 0, 0]},
        "kinds": KINDS,
    },
    interop.load_diffusers: {"folder": "missing"},
    interop.load_openai: {"weights": "missing", "flags": ""},
    interop.load_openai_classifier: {"weights": "missing", "flags": ""},
    interop.save_diffusers: {
        "folder": "new",
        "pretrained": interop.Pretrained(UNET, UNET_VARIABLES, SCHEDULE),
    },
    data.load_dataset: {"data": "digits", "preparation": None, "cache": "none", "progress": None},
    data.random_crop: {"key": KEY, "images": X, "size": 4, "extents": None},
    data.random_flip: {"key": KEY, "images": X},
    data.to_float: {"images": X},
    data.to_bytes: {"images": X},
    evaluation.frechet_distance: {
        "mu_1": ROWS.mean(0),
        "sigma_1": np.cov(ROWS, rowvar=False),
        "mu_2": ROWS[0],
        "sigma_2": np.eye(3, dtype=np.float32),
    },
    evaluation.kernel_distance: {"x": ROWS, "y": ROWS[:6], "subsets": 4, "subset_size": 4},
    evaluation.inception_score: {"logits": ROWS, "splits": 2},
    evaluation.precision_recall: {"real": ROWS, "generated": ROWS[:6], "k": 2},
    evaluation.nearest_distances: {"x": ROWS, "y": ROWS[:6]},
    evaluation.statistics: {"features": ROWS},
    evaluation.save_statistics: {
        "path": "statistics.npz",
        "found": evaluation.statistics(ROWS),
    },
    evaluation.load_statistics: {"path": "missing"},
    evaluation.load_inception: {"path": "missing"},
    runs.unet_fields: {"model": ddpm.ddpm_digits()},
    data.batch_indices: {"key": KEY, "step": 3, "dataset_size": 20, "batch_size": 5},
    device_mesh: {"batch_size": 8, "fsdp": 1},
    settings_of: {
        "init": None,
        "steps": 10,
        "learning_rate": 1e-3,
        "on_nan": "stop",
        "remat": False,
    },
    runs.draw: {"key": KEY, "run": RUN, "num": 2, "steps": 2, "batch_size": 2, "labels": None},
    fit_one_step: {"folder": "run", "data": IMAGES},
    runs.evaluate: {"run": RUN, "data": IMAGES, "num": 2, "seed": 0},
    runs.export: {"path": "x.jaxexport", "run": RUN, "steps": 2, "platforms": ("cpu",)},
    runs.save_state: {"folder": "states", "state": STATE},
    runs.load_state: {"path": "missing", "like": STATE},
    runs.read_metrics: {"path": "missing"},
    runs.load_run: {"folder": "missing", "weights": "ema"},
    runs.load_pretrained: {"folder": "missing"},
    runs.load_model: {"folder": "missing"},
    runs.load_state_dict: {"path": "missing"},
    runs.check_run: {"folder": "missing"},
    runs.save_run: {"folder": "new", "run": RUN},
    runs.save_grid: {"file": "x.png", "images": X, "columns": 2, "titles": ["a", "b"]},
    runs.save_samples: {
        "path": "x.npz",
        "images": X,
        "labels": None,
        "columns": 2,
        "titles": ["a", "b"],
        "names": ["a", "b"],
    },
    runs.save_gif: {"path": "x.gif", "frames": [X, X], "columns": 2, "titles": ["a", "b"]},
    runs.save_loss: {"path": "x.png", "steps": [50, 100], "losses": [1.0, 0.5]},
    runs.save_forward: {"path": "x.png", "schedule": SCHEDULE, "image": X[0]},
}


def mistakes(value, torch=None):
    """What may stand in place of `value`, by name."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return {
            "none": None,
            "seed": 0,
            "old": jax.random.PRNGKey(0),
            "several": jax.random.split(value),
        }
    if isinstance(value, ddpm.NoiseSchedule):
        return {"betas": value.betas, "none": None, "tables": tuple(value), "text": "cosine"}
    wrong = {"none": None, "text": "x", "dict": {"x": value}}
    if isinstance(value, np.ndarray):
        wrong |= {
            "list": value.tolist(),
            "whole": np.round(value).astype(np.int32),
            "bytes": np.zeros(value.shape, np.uint8),
            "bools": value > 0,
            "complex": value.astype(np.complex64),
            "first": value[0],
            "scalar": value.flat[0],
            "deeper": value[None],
            "longer": np.concatenate([value, value]),
            "column": value[..., None],
            "float64": value.astype(np.float64) if value.dtype.kind == "f" else value,
            "float16": value.astype(np.float16),
            "below": value - 5,
            "above": value + 500,
        }
        return wrong | ({"tensor": torch.from_numpy(value.copy())} if torch else {})
    if callable(value):
        return wrong | {
            "module": MODEL,
            "tuple": lambda *_: (X, X),
            "nothing": lambda *_: None,
            "numbers": lambda *_: np.zeros(SHAPE, np.int32),
            "shape": lambda *_: jnp.zeros((2, 4, 4, 1)),
        }
    if isinstance(value, ddpm.Sampler):
        return wrong | {"factory": ddpm.ddim, "name": "ddim", "step": value.step}
    if isinstance(value, str):
        return {"none": None, "text": "x", "number": 1, "list": [value]}
    if isinstance(value, tuple):
        return wrong | {"number": 3, "one": value[:1], "below": (-1, *value[1:])}
    if isinstance(value, bool):
        return {"none": None, "text": "yes", "list": [value]}
    if isinstance(value, int | float):
        return wrong | {
            "nan": float("nan"),
            "negative": -3,
            "zero": 0,
            "huge": 300,
            "half": 0.5,
            "list": [value],
            "array": np.array([value]),
            "bool": True,
        }
    return wrong


CASES = [
    pytest.param(function, name, id=f"{function.__name__}-{name}")
    for function, call in CALLS.items()
    for name in call
]


def numbers(result):
    """The floats in a result, of a schedule its β: some of its tables are infinite at the ends."""
    result = result.betas if isinstance(result, ddpm.NoiseSchedule) else result
    leaves = [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array | np.ndarray)]
    return [np.asarray(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


BESIDE = {"columns": "titles", "dataset_size": "batch_size"}
"""What is named where this does not go with it."""


def check_named(error, name, call, mistake, wrong):
    """The error is this library's, one line, and begins with the argument's name, or with the path.

    Of two arguments whose shapes do not fit each other, it may name either.
    """
    said, frames = str(error), traceback.extract_tb(error.__traceback__)
    home = Path(ddpm.__file__).parent
    assert home in Path(frames[-1].filename).parents, f"{mistake}: raised in {frames[-1]}: {said}"
    words = said.removeprefix("output of ").partition(":")[0]
    names = {name, *call} if "shape" in said else {name, str(wrong), BESIDE.get(name)}
    assert any(words.startswith(each) for each in names if each), f"{mistake}: {said}"
    assert re.search("expected|no such", said) and "\n" not in said, f"{mistake}: {said}"


@pytest.mark.parametrize(("function", "name"), CASES)
def test_a_mistake_works_or_is_named(function, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = CALLS[function]
    for mistake, wrong in mistakes(call[name], TORCH).items():
        try:
            with warnings.catch_warnings(action="ignore"):
                result = function(**{**call, name: wrong})
        except (TypeError, ValueError) as error:
            check_named(error, name, call, mistake, wrong)
            continue
        found = numbers(result)
        assert mistake == "nan" or all(np.all(np.isfinite(x)) for x in found), mistake
        if mistake in ("list", "float64", "tensor"):  # the same numbers
            right = numbers(function(**call))
            for ours, theirs in zip(found, right, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=mistake)


def loop(**changes):
    call = {"key": KEY, "schedule": SCHEDULE, "denoise_fn": network, "shape": SHAPE, **changes}
    return ddpm.p_sample_loop(**call)


class Half(eqx.Module):
    weight: jax.Array

    def __call__(self, x, t):
        return x * self.weight


RIGHT = {
    "NumPy's whole numbers": lambda: ddpm.spaced_timesteps(np.int32(10), np.int64(5)),
    "a list for a shape": lambda: loop(shape=list(SHAPE)),
    "arrays without axes": lambda: loop(first_sample=jnp.int32(3), sampler=ddpm.ddim(np.array(1))),
    "NumPy's True": lambda: loop(clip_denoised=np.bool_(True)),
    "a partial": lambda: loop(denoise_fn=partial(lambda w, x, t: x * w, 0.5)),
    "a jitted function": lambda: loop(denoise_fn=jax.jit(network)),
    "a module of Equinox": lambda: loop(denoise_fn=Half(jnp.float32(0.5))),
    "a bound module of Flax": lambda: loop(denoise_fn=MODEL.bind(VARIABLES)),
    "another kind of key": lambda: loop(key=jax.random.key(0, impl="rbg")),
    "keys under vmap": lambda: jax.vmap(lambda key: loop(key=key))(jax.random.split(KEY)),
    "a traced schedule": lambda: jax.jit(lambda s: loop(schedule=s))(
        jax.tree.map(jnp.asarray, SCHEDULE)
    ),
    "sixteen bits": lambda: ddpm.q_sample(
        SCHEDULE, X.astype(jnp.bfloat16), 0, X.astype(jnp.bfloat16)
    ),
    "no sign": lambda: ddpm.q_sample(SCHEDULE, X, ENTRIES.astype(np.uint8), X),
    "whole weights": lambda: ddpm.interpolate(SCHEDULE, network, X, X, (0, 1)),
    "whole scales": lambda: guided(scale=np.array([1, 2])),
    "a list for an interval": lambda: guided(interval=[0, 3]),
    "samples of numbers": lambda: loop(shape=(4, 2)),
}


@pytest.mark.parametrize("what", RIGHT)
def test_what_is_right_is_not_refused(what):
    assert all(np.all(np.isfinite(leaf)) for leaf in numbers(RIGHT[what]()))


ON_IMAGES = [
    pytest.param(function, id=function.__name__)
    for function, call in CALLS.items()
    if "schedule" in call and any(value is X for value in call.values())
]


@pytest.mark.parametrize("function", ON_IMAGES)
def test_an_empty_batch_has_an_empty_result(function):
    def emptied(value):
        return value[:0] if isinstance(value, np.ndarray) and len(value) == len(X) else value

    call = {name: emptied(value) for name, value in CALLS[function].items()}
    call |= {"noise_fn": lambda i: jnp.zeros((0, *SHAPE[1:]))} if "noise_fn" in call else {}
    call |= {"shape": (0, *SHAPE[1:])} if "shape" in call else {}
    for leaf in numbers(function(**call)):
        assert leaf.size == 0 or function in (ddpm.interpolate, ddpm.inpaint)


@pytest.mark.parametrize("function", ON_IMAGES)
@pytest.mark.parametrize("x64", [False, True])
def test_a_chain_of_one_step_and_either_width_of_floats(function, x64):
    schedule = ddpm.make_schedule([0.9999])
    call = {**CALLS[function], "schedule": schedule}
    one = {"t": ENTRIES * 0, "steps": 1, "save_every": 1, "resamples": 1, "jump_length": 1}
    call |= {name: value for name, value in one.items() if name in call}
    dtype = np.float64 if x64 else np.float32
    call = {name: dtype(value) if value is X else value for name, value in call.items()}
    with jax.enable_x64(x64):
        for leaf in numbers(function(**call)):
            assert leaf.dtype == dtype and np.all(np.isfinite(leaf))


def test_every_public_function_has_its_call():
    public = {
        value
        for room in (ddpm, data, evaluation, interop, runs)
        for name, value in vars(room).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    # Called by others above; and what takes a torch module, in tests/interop/test_layers.py.
    others = {runs.fit, runs.save_pictures, data.load_batch, interop.layer_kinds}
    # What takes files or bytes alone, in tests/evaluation and tests/runs/test_evaluate.py.
    others |= {evaluation.train_classifier, runs.evaluate_samples}
    assert public <= CALLS.keys() | others, public - CALLS.keys()
