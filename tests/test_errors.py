"""The mistakes that people make: what would be silent or lead astray is named; what is right, in
whatever form, is not refused."""

import inspect
from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_ddpm as ddpm
from jax_ddpm import data, evaluation, interop, runs
from jax_ddpm.models import NoisyClassifier

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

SCHEDULE = ddpm.make_schedule(ddpm.cosine_beta_schedule(4))
SHORT = ddpm.respace(SCHEDULE, [0, 2])
NO_SIGNAL = ddpm.make_schedule([0.5, 1.0])  # x_T is ε, and says nothing of x_0
SHAPE = (2, 4, 4, 3)
X = np.linspace(-0.9, 0.9, 96).reshape(SHAPE).astype(np.float32)
ROWS = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
X16 = np.zeros((2, 16, 16, 3), np.float32)
T = np.array([0, 3], np.int32)
MASK = np.ones((4, 4, 1), np.float32)
KEY = jax.random.key(0)
SGD = optax.sgd(0.1)


def network(x, t):
    return 0.5 * x


class Half(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        return x * self.param("weight", nn.initializers.constant(0.5), ())


ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
MODEL, VARIABLES = Half(), {"params": {"weight": np.float32(0.5)}}
RUN = interop.DiffusionModel(MODEL, VARIABLES, SCHEDULE, SHAPE[1:])
NAN = RUN._replace(variables={"params": {"weight": np.float32(np.nan)}})

# For each name of an argument of a public function: what is right, …
SAMPLES = ("x_start", "x_t", "noise", "eps", "v", "x_a", "x_b", "a", "b", "x_T")
NETWORKS = ("denoise_fn", "conditional", "unconditional", "apply_fn", "log_prob_fn")
FEATURES = ("features", "logits", "real", "generated", "y")
RIGHT = {
    **dict.fromkeys(SAMPLES, X),
    **dict.fromkeys(NETWORKS, network),
    **dict.fromkeys(FEATURES, ROWS),
    **{"key": KEY, "schedule": SCHEDULE, "shape": SHAPE, "t": T, "i": 2, "mask": MASK, "x": X},
    **{"table": SCHEDULE.betas, "betas": [0.1, 0.2], "scale": 2.0, "limit": 1.0, "weight": 0.5},
    **{"timesteps": 10, "steps": 2, "weights": [0.0, 0.5], "params": VARIABLES, "optimizer": SGD},
    **{"images": X, "size": 3, "step": 0, "dataset_size": 20, "batch_size": 5},
    "state": ddpm.p_sample_init(None, SCHEDULE, SHAPE, x_T=X),
}
# … what a function needs that uses the name in its own way, …
OWN = {
    ddpm.respace: {"timesteps": [0, 2]},
    ddpm.inpaint: {"jump_length": 1, "resamples": 2},
    evaluation.kernel_distance: {"x": ROWS},
    evaluation.nearest_distances: {"x": ROWS},
}
# … and what people pass in its place, which would be silent or lead astray.
BYTES = (X.astype(int), np.zeros(SHAPE, np.uint8))
SHARE = (300, np.nan, -3)
COUNT = (0, 0.5, True, np.nan, -3)
CHOICE = ("x", 0, ["epsilon"])
WRONG = {
    **dict.fromkeys(SAMPLES, BYTES),
    **dict.fromkeys(NETWORKS, (MODEL, "x", None)),
    **dict.fromkeys(("prediction_type", "variance_type", "spacing"), (*CHOICE, None)),
    **dict.fromkeys(("loss_type", "weighting", "order"), CHOICE),
    **dict.fromkeys(("limit", "max_value", "max_slope"), (0, np.nan, -3)),
    **dict.fromkeys(("eta", "quantile", "rescale", "label_dropout"), SHARE),
    **dict.fromkeys(("decay", "ema_decay"), (1.0, np.nan, -3)),
    **dict.fromkeys(("first_sample", "step"), COUNT[1:]),
    **dict.fromkeys(("accumulate", "resamples"), COUNT),
    **dict.fromkeys(("save_every", "jump_length"), (300, *COUNT[1:])),
    **dict.fromkeys(("size", "batch_size", "splits", "k"), (300, -3)),
    **{"final_alpha_cumprod": (0, *SHARE), "subset_size": (0, -3), "subsets": (0, -3)},
    **{"steps": (300, "ddim300", "11", "0", *COUNT[1:]), "clip_denoised": (None, "x")},
    **{"params": (None, MODEL), "interval": ((9, 3), (np.nan, 5))},
    "betas": (None, "linear", [[0.1]], [0, 1], [True, True], [0.1, 1.5], [1.0, 0.1], [np.nan]),
    "sampler": (ddpm.ddim, "ddim", ddpm.ddim().step),
    "key": (jax.random.PRNGKey(0), 0, jax.random.split(KEY), None),
    "mask": (MASK * 255, MASK - 2),
    "scale": (np.nan, np.array([1.0, -np.inf])),
    "schedule": (SCHEDULE.betas, tuple(SCHEDULE), "cosine", None),
    "t": (T + 0.0, T > 0, T + 1, T - 1, np.arange(3), T[None]),
}


def public(*rooms):
    return [value for room in rooms for value in vars(room).values() if inspect.isfunction(value)]


def right_call(function):
    parameters = inspect.signature(function).parameters.values()
    required = [each.name for each in parameters if each.default is each.empty]
    return {name: RIGHT[name] for name in required if name in RIGHT} | OWN.get(function, {})


def check_named(call, *names):
    """`call()` is refused in a line that begins with one of the names, or that Python gives to β in
    place of a schedule."""
    by_name = f"^({'|'.join(names)})[: ]|has no attribute '(sqrt|posterior)_"
    with pytest.raises((TypeError, ValueError, AttributeError), match=by_name):
        made = call()
        if inspect.isfunction(made):  # guidance
            made(X, T)


def may_be_called_wrongly(function):
    return not WRONG.keys().isdisjoint(inspect.signature(function).parameters)


FUNCTIONS = [each for each in public(ddpm, data, evaluation) if may_be_called_wrongly(each)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_mistake_is_named(function):
    call = right_call(function)
    for name in inspect.signature(function).parameters:
        for wrong in WRONG.get(name, ()):
            names = (*SAMPLES, "x") if name in SAMPLES else (name,)
            check_named(partial(function, **{**call, name: wrong}), *names)
    # Of arrays that do not fit each other, the error may name either.
    arrays = [name for name in call if name in (*SAMPLES, "t")]
    for name in arrays if len(arrays) > 1 else ():
        for wrong in (call[name][:1], call[name][None]):
            check_named(partial(function, **{**call, name: wrong}), *arrays)


ENTRIES = ([[0, 1]], [2, 0], [0, 300], [0.5], [True, False])
LATE = RIGHT["state"]._replace(i=jnp.int32(1))
lead = ddpm.classifier_guidance


def loop(**changes):
    call = {"key": KEY, "schedule": SCHEDULE, "denoise_fn": network, "shape": SHAPE, **changes}
    return ddpm.p_sample_loop(**call)


def losses(**options):
    return ddpm.training_losses(SCHEDULE, network, X, T, X, **options)


def guided(scale=2.0, unconditional=network, **options):
    return ddpm.classifier_free_guidance(network, unconditional, scale, **options)(X, T)


LABELLED = RUN._replace(model=ddpm.ddpm_digits(3), num_classes=3, null_label=0)


def by_two(schedule, predict, noise_fn, i, x_t, memory):
    return x_t[:1], memory


def test_the_choice_that_was_meant_is_named():
    for wrong, hint in ("Trailng", "; did you mean 'trailing'[?]"), ("x", ""):
        with pytest.raises(ValueError, match=f"got '{wrong}'{hint}$"):
            ddpm.spaced_timesteps(10, 2, wrong)


class Trainer(partial):
    """Of no framework, with the weights that it saves."""

    state_dict = dict


def labelled(labels, t=T):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model = ddpm.UNet(block_out_channels=(8,), norm_num_groups=4, num_class_embeds=5, **blocks)
    return model.init(KEY, X, t, labels)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *[("timesteps", partial(ddpm.spaced_timesteps, wrong, 2)) for wrong in (0, 0.5, "x")],
        *[("timesteps", partial(ddpm.respace, SCHEDULE, wrong)) for wrong in ENTRIES],
        ("output of denoise_fn", lambda: loop(denoise_fn=lambda x, t: (x, t))),
        ("output of denoise_fn", lambda: loop(denoise_fn=lambda x, t: x[..., :1])),
        ("output of denoise_fn", lambda: loop(variance_type="learned")),
        ("denoise_fn", lambda: loop(denoise_fn=MODEL.apply)),
        ("x_T", lambda: loop(x_T=X[:1])),
        ("x", lambda: ddpm.extract(SCHEDULE.betas, T, X.astype(int))),
        ("steps", lambda: ddpm.p_sample_steps(KEY, SCHEDULE, network, LATE, 3)),
        ("scale", lambda: guided(scale=np.ones(3))),
        ("output of unconditional", lambda: guided(unconditional=lambda x, t: x[:1])),
        ("output of log_prob_fn", lambda: lead(SCHEDULE, network, network)(X, T)),
        ("schedule", lambda: lead(SHORT, network, network)),
        ("schedule", lambda: ddpm.reconstruction_guidance(SHORT, network, network)),
        ("prediction_type", lambda: loop(schedule=NO_SIGNAL)),
        ("prediction_type", lambda: ddpm.training_losses(NO_SIGNAL, network, X, T % 2, X)),
        ("prediction_type", lambda: ddpm.make_train_step(NO_SIGNAL, network, SGD)),
        ("weighting", lambda: losses(loss_type="vb", weighting="min_snr")),
        ("loss_type", lambda: losses(loss_type="hybrid")),
        ("min_snr_gamma", lambda: losses(min_snr_gamma=0.0)),
        ("clip_denoised", lambda: loop(clip_denoised=ddpm.dynamic_threshold)),
        ("scan body function carry", lambda: loop(sampler=ddpm.ddim()._replace(step=by_two))),
        ("model", lambda: runs.draw(KEY, "runs/digits", 2)),
        ("chain", lambda: runs.draw(KEY, RUN, 2, chain=SCHEDULE.betas)),
        ("images", lambda: runs.save_samples("x.npz", X.astype(int))),
        ("images", lambda: runs.save_samples("x.npz", X[0])),
        ("images", lambda: evaluation.train_classifier(X)),
        ("features", lambda: evaluation.statistics(ROWS[0])),
        ("y", lambda: evaluation.kernel_distance(ROWS, ROWS[None])),
        ("first_sample", lambda: loop(first_sample=np.arange(2))),
        ("timesteps", lambda: ddpm.cosine_beta_schedule(10.6)),
        ("mask", lambda: ddpm.inpaint(KEY, SCHEDULE, network, X, MASK[None, :3], resamples=1)),
        ("null_label", lambda: interop.save_diffusers("x", LABELLED)),
        ("data", lambda: runs.fit("x", "digits")),
        ("labels", lambda: labelled(np.array([0, 5]))),
        ("labels", lambda: labelled(np.arange(3))),
        ("mu_2", lambda: evaluation.frechet_distance(T + 0.0, ROWS[:3], ROWS[0], ROWS[:3])),
        ("images", lambda: data.random_flip(KEY, X[0])),
        ("labels", lambda: runs.draw(KEY, RUN, 2, labels="x")),
        ("num", lambda: runs.evaluate(RUN, data.Dataset(X), num=0)),
        ("platforms", lambda: runs.export("x", RUN, platforms=("x",))),
        ("weights", lambda: runs.export("x", NAN)),
        ("on_nan", lambda: runs.Settings(on_nan=None)),
        (r"kinds\['x'\]", lambda: interop.layers_from_torch({"x.weight": X}, {"x": "dense"})),
        ("state_dict", lambda: interop.simple_unet_from_torch({"x": X})),
    ],
)
def test_a_mistake_elsewhere_is_named(name, call):
    check_named(partial(jax.eval_shape, call), name)


RIGHT_TOO = {
    "NumPy's whole numbers": lambda: ddpm.spaced_timesteps(np.int32(10), np.int64(5)),
    "a list for a shape": lambda: loop(shape=list(SHAPE)),
    "arrays without axes": lambda: loop(first_sample=np.array(3), sampler=ddpm.ddim(np.array(1))),
    "a seed of JAX's": lambda: runs.Settings(seed=LATE.i).seed,
    "NumPy's True": lambda: loop(clip_denoised=np.bool_(True)),
    "a module of Equinox": lambda: loop(denoise_fn=eqx.Partial(network)),
    "a bound module of Flax": lambda: loop(denoise_fn=MODEL.bind(VARIABLES)),
    "another kind of key": lambda: loop(key=jax.random.key(0, impl="rbg")),
    "sixteen bits": lambda: ddpm.q_sample(SCHEDULE, jnp.bfloat16(X), 0, jnp.bfloat16(X)),
    "no sign": lambda: ddpm.q_sample(SCHEDULE, X, T.astype(np.uint8), X),
    "whole weights": lambda: ddpm.interpolate(SCHEDULE, network, X, X, (0, 1)),
    "whole scales": lambda: guided(scale=np.array([1, 2])),
    "an array for an interval": lambda: guided(interval=np.array([0, 3])),
    "a scale in the shape of images": lambda: guided(scale=np.ones((2, 1, 1, 1))),
    "the sharding of an array": lambda: loop(sharding=ONE),
    "parts of a chain for an interval": lambda: guided(interval=(0.2 * 4, np.float32(3.2))),
    "a method of what has a state_dict": lambda: loop(denoise_fn=Trainer(network).__call__),
    "a function that has a state_dict": lambda: loop(denoise_fn=Trainer(network)),
    "a timestep of NumPy's": lambda: labelled(T % 2, t=np.float64(0.5)),
    "timesteps of sixteen bits": lambda: labelled(T % 2, t=jnp.bfloat16(T)),
    "images of any size": lambda: NoisyClassifier(32, pool="adaptive").init(KEY, X16, 0.5),
}


@pytest.mark.parametrize("what", RIGHT_TOO)
def test_what_is_right_is_not_refused(what):
    jax.eval_shape(RIGHT_TOO[what])


def takes_images(function):
    return "schedule" in right_call(function) and {"shape", *SAMPLES} & {*right_call(function)}


ON_IMAGES = [function for function in public(ddpm) if takes_images(function)]


def call_with(function, **changes):
    right = right_call(function)
    return function(**right | {name: changes[name] for name in right if name in changes})


@pytest.mark.parametrize("function", ON_IMAGES)
def test_an_empty_batch_has_an_empty_result_as_wide_as_its_images(function):
    for dtype in (np.float32, np.float64):
        images = dict.fromkeys(SAMPLES, X[:0].astype(dtype))
        call = partial(call_with, function, **images, t=T[:0], shape=(0, *SHAPE[1:]))
        with jax.enable_x64(dtype is np.float64):
            leaves = jax.tree.leaves(jax.eval_shape(call))
        floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert all(leaf.size == 0 and leaf.dtype == dtype for leaf in floats)


def test_a_chain_of_one_step_is_finite():
    one = {"schedule": ddpm.make_schedule([0.9999]), "t": T * 0, "steps": 1, "resamples": 1}
    results = jax.jit(lambda: [call_with(function, **one) for function in ON_IMAGES])()
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(results))
