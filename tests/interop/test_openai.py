"""OpenAI's networks: what their own code gave in float64, and what happens to odd files and flags.

`openai/{unet,classifier}.json` have flags, and the names and shapes of the weights in order, which
are drawn as `weights` does; `*.npz` have the inputs and outputs of guided-diffusion, NCHW. More
networks are in `jax-ddpm parity`, against `torch_reference.models.openai`. `published.json` has the
flags of published networks, as OpenAI's README prints them, and how that reference is called.
"""

import json
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import pytest

import jax_ddpm as ddpm
from jax_ddpm import data, runs
from jax_ddpm.interop import load_diffusers, load_openai, load_openai_classifier, save_diffusers
from jax_ddpm.io.arrays import save_tensors
from jax_ddpm.models import NoisyClassifier, parameter_shapes
from jax_ddpm.runs.drawing import make_chain

FOLDER = Path(__file__).parent / "openai"
UNETS = json.loads((FOLDER / "unet.json").read_text())
CLASSIFIER = json.loads((FOLDER / "classifier.json").read_text())["attention_pool"]
PUBLISHED = json.loads((FOLDER / "published.json").read_text())
PLAIN, ADM = UNETS["plain"], UNETS["adm_cond"]


@pytest.fixture(autouse=True)
def promotion():
    """Flax's own norms mix float64 and float32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def weights(network, dtype=np.float64):
    rng = np.random.default_rng(network["seed"])
    tensors = {}
    for name, shape in network["shapes"].items():
        value = rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1))
        if len(shape) == 1:
            value = 0.1 * rng.standard_normal(shape) + name.endswith("weight")
        tensors[name] = value.astype(np.float32).astype(dtype)
    return tensors


def outputs(file, name):
    """Images as NHWC."""
    with np.load(FOLDER / f"{file}.npz") as arrays:
        found = {key.split("/")[1]: arrays[key] for key in arrays if key.startswith(f"{name}/")}
    return {
        key: np.moveaxis(each, 1, -1) if each.ndim == 4 else each for key, each in found.items()
    }


def assert_close(ours, theirs, tolerance):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def loaded(name):
    """One of the networks, what OpenAI's code gave for it, and its labels, if it has any."""
    expected = outputs("unet", name)
    pretrained = load_openai(weights(UNETS[name]), UNETS[name]["flags"])
    labels = [expected["y"]] if "y" in expected else []
    return pretrained, expected, labels


@pytest.mark.parametrize("name", UNETS)
def test_output(name):
    pretrained, expected, labels = loaded(name)
    output = jax.jit(pretrained.model.apply)(
        pretrained.variables, expected["x"], expected["t"], *labels
    )
    assert_close(output, expected["out"], 1e-10)


@pytest.mark.parametrize("name", ["plain", pytest.param("adm_cond", marks=pytest.mark.slow)])
def test_ddim_loop(name):
    pretrained, expected, labels = loaded(name)
    words = UNETS[name]["flags"]["timestep_respacing"]
    chain, again = pretrained.chain(), pretrained.chain(words)
    assert list(chain.timesteps) == list(again.timesteps) == UNETS[name]["timesteps"]

    @jax.jit
    def draw(variables, x_T):
        return ddpm.p_sample_loop(
            None,
            chain,
            lambda x_t, t: pretrained.model.apply(variables, x_t, t, *labels),
            x_T.shape,
            sampler=ddpm.ddim(),
            x_T=x_T,
            **pretrained.policy,
        )

    assert_close(draw(pretrained.variables, expected["x_T"]), expected["ddim"], 1e-8)


def test_logits_of_the_classifier():
    expected = outputs("classifier", "attention_pool")
    model, variables = load_openai_classifier(weights(CLASSIFIER), CLASSIFIER["flags"])
    logits = jax.jit(model.apply)(variables, expected["x"], expected["t"])
    assert_close(logits, expected["logits"], 1e-10)


@pytest.mark.patience
def test_score_of_the_classifier():
    expected = outputs("classifier", "attention_pool")
    model, variables = load_openai_classifier(weights(CLASSIFIER), CLASSIFIER["flags"])

    def log_prob(x):
        logits = model.apply(variables, x, expected["t"])
        return jax.nn.log_softmax(logits)[0, expected["y"][0]]

    assert_close(jax.jit(jax.grad(log_prob))(expected["x"]), expected["score"], 1e-10)


def test_flags_as_their_readmes_print_them():
    words = " ".join(f"--{name} {value}" for name, value in ADM["flags"].items())
    words = words.replace("--resblock_updown ", "--resblock_updown=") + " --use_fp16 True"
    by_words, by_name = (load_openai(weights(ADM), flags) for flags in (words, ADM["flags"]))
    assert by_words.model == by_name.model and by_words[3:] == by_name[3:]
    assert list(by_words.policy.values()) == ["epsilon", "learned_range", True]


@pytest.mark.parametrize(
    ("script", "aside"),
    [
        ('MODEL_FLAGS="{0}"\nDIFFUSION_FLAGS="{1}"\nTRAIN_FLAGS="--lr 1"', "lr"),
        ("X=/tmp mpiexec -n 8 python a/b.py {0} \\\n  {1} \\\r\n --use_ddim True", "use_ddim"),
        ("export MODEL_FLAGS='{0}'; SAMPLE_FLAGS=\"--batch_size 4\"  # few\n"
         "python image_sample.py $MODEL_FLAGS ${{SAMPLE_FLAGS}} {1}", "batch_size"),
        ("{0}\n{1}\n", ""),
    ],
    ids=str,
)  # fmt: skip
def test_flags_as_a_script_has_them(script, aside):
    words = [f"--{name} {value}" for name, value in PLAIN["flags"].items()]
    script = script.format(" ".join(words[:3]), " ".join(words[3:]))
    said = pytest.warns(match=f"^flags: left aside, not of the network: {aside}$")
    with said if aside else nullcontext():
        opened = load_openai(weights(PLAIN), script)
    expected = load_openai(weights(PLAIN), PLAIN["flags"])
    assert opened.model == expected.model and opened[3:] == expected[3:]


def test_what_the_output_means():
    for flags, field, value in (
        ({"predict_xstart": True}, "prediction_type", "sample"),
        ({"sigma_small": True}, "variance_type", "fixed_small"),
        ({}, "variance_type", "fixed_large"),
        ({}, "timestep_respacing", "20"),
        ({"clip_denoised": False}, "clip_denoised", False),
    ):
        pretrained = load_openai(weights(PLAIN), PLAIN["flags"] | flags)
        assert getattr(pretrained, field) == value


def test_schedules():
    """Nichol & Dhariwal 2021, eq. 17: ᾱ of the cosine; and 1000 / T times the β of 1,000 steps."""
    tensors = weights(PLAIN)
    linear = load_openai(tensors, PLAIN["flags"] | {"diffusion_steps": 4000}).schedule
    np.testing.assert_allclose(linear.betas[[0, -1]], [2.5e-5, 5e-3], rtol=1e-15)
    flags = PLAIN["flags"] | {"diffusion_steps": 100, "noise_schedule": "cosine"}
    cosine = load_openai(tensors, flags).schedule
    angles = (np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2
    expected = np.cos(angles[1:99]) ** 2 / np.cos(angles[0]) ** 2
    np.testing.assert_allclose(cosine.alphas_cumprod[:98], expected, rtol=1e-12)


def test_time_scale_by_the_code_that_the_flags_are_of(torch):
    """improved-diffusion rescales unless told otherwise, guided-diffusion does not."""
    from torch_reference.models.openai import UNet

    words = "--image_size 32 --num_channels 32 --num_res_blocks 1 --diffusion_steps 4000"
    tensors = UNet(32, (1, 2, 2, 2), 1, (2, 4)).state_dict()

    def model(more):
        return load_openai(tensors, f"{words} {more}").model

    assert model("").time_scale == 0.25
    assert model("--rescale_timesteps False").time_scale == 1
    assert model("--use_fp16 True").time_scale == 0.25
    assert model("--num_head_channels -1").time_scale == 1
    assert model("--num_head_channels -1 --rescale_timesteps True") == model("")


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_networks_are_presets(torch, size):
    """Their shapes, in bytes instead of floats, since the largest has 559 million."""
    from torch_reference.models.openai import UNet

    flags, arguments = PUBLISHED[size]["flags"], PUBLISHED[size]["reference"]
    classes = 1000 if "--class_cond True" in flags else None
    preset = getattr(ddpm, f"adm_imagenet{size}")(num_class_embeds=classes)
    with torch.device("meta"):
        network = UNet(*arguments, out_channels=6, classes=classes, updown=True).state_dict()
    tensors = {name: np.zeros(each.shape, np.int8) for name, each in network.items()}
    assert load_openai(tensors, flags).model == preset


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_channel": 32}, "flags: .*got num_channel; did you mean num_channels"),
        ({"large_size": 256}, "flags: .*enlarges.*large_size"),
        ({"num_channels": "many"}, "flags: num_channels: expected a whole number, got 'many'"),
        ({"num_channels": 32.5}, "flags: num_channels: expected a whole number, got 32.5"),
        ({"class_cond": "maybe"}, "flags: class_cond: expected True or False, got 'maybe'"),
        ({"noise_schedule": "sigmoid"}, "flags: noise_schedule: expected one of"),
        ({"diffusion_steps": 0}, "flags: diffusion_steps: expected more than 0, got 0"),
        ({"diffusion_steps": 10, "timestep_respacing": ""}, "flags: diffusion_steps: 10 is too fe"),
        ({"dropout": 2}, "flags: dropout: expected 0 to 1, got 2"),
        ({"num_head_channels": 24}, "flags: num_head_channels: expected a divisor of 64, 96, got"),
        ({"timestep_respacing": "ddim400"}, "flags: timestep_respacing: .*got 'ddim400'"),
        ({"channel_mult": "1,x"}, "flags: channel_mult: expected numbers"),
        ({"image_size": 48, "channel_mult": ""}, "flags: image_size: expected .*got 48"),
        ("--image_size", "flags: expected names, each with its value"),
        ("--image_size '64", "flags: expected names, each with its value"),
        ("--attention_resolutions 32, 16", "flags: expected names, each with its value"),
        # What the file contradicts.
        ({"class_cond": False}, "flags: class_cond: expected True, as in weights, got False"),
        ({"resblock_updown": False}, "flags: resblock_updown: expected True"),
        ({"channel_mult": "1,2,2"}, "state_dict: expected input_blocks.5.0.*of shape"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(ValueError, match=message):
        load_openai(weights(ADM), flags if isinstance(flags, str) else ADM["flags"] | flags)


def test_the_chain_of_the_flags_is_that_of_the_run(tmp_path):
    run = runs.Run(load_openai(weights(PLAIN), PLAIN["flags"]), (32, 32, 3), None, None, 1.0)
    assert list(make_chain(run).timesteps) == PLAIN["timesteps"]
    runs.save_run(tmp_path / "run", run)
    again = runs.load_run(tmp_path / "run")
    assert list(make_chain(again).timesteps) == PLAIN["timesteps"]
    assert make_chain(again, 7).num_timesteps == 7


def test_a_network_without_a_null_label_has_none_wherever_it_goes(tmp_path):
    save_tensors(tmp_path / "adm.safetensors", weights(ADM, np.float32))
    flags = " ".join(f"--{name} {value}" for name, value in ADM["flags"].items())
    run = runs.load_pretrained(tmp_path / "adm.safetensors", openai_flags=flags)
    assert (run.num_classes, run.null_label, run.guidance) == (1000, None, 1.0)
    save_diffusers(tmp_path / "adm", run.pretrained)
    again = runs.load_pretrained(tmp_path / "adm")
    assert (again.num_classes, again.null_label) == (1000, None)
    for name, value in (("guidance", 3.0), ("label_dropout", 0.2)):
        settings = runs.Settings(init=tmp_path / "adm", steps=1, batch_size=1, **{name: value})
        images = np.zeros((2, 32, 32, 3), np.float32)
        dataset = data.Dataset(images, np.arange(2, dtype=np.int32))
        with pytest.raises(ValueError, match=f"{name}: the network has no label that stands for"):
            runs.fit(tmp_path / "run", dataset, settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool": "mean"}, "pool: expected one of"),
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types: expected 4 .*, got 1"),
        ({"block_out_channels": (64, 64, 64, 100)}, "block_out_channels: expected multiples of 32"),
        ({"attention_head_dim": 48}, "attention_head_dim: expected a divisor of 256, got 48"),
    ],
    ids=str,
)
def test_fields_of_a_classifier_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        parameter_shapes(NoisyClassifier(**fields))


def test_tensors_that_do_not_fit():
    tensors = weights(ADM)
    first, out = tensors["input_blocks.0.0.weight"], tensors["out.2.bias"]
    for wrong, message in (
        ({"out.3.bias": out}, "expected only .* got out.3.bias"),
        ({"out.2.bias": out[1:]}, r"expected out.2.bias of shape \(6,\), got \(5,\)"),
        ({"input_blocks.0.0.weight": np.repeat(first, 2, axis=1)}, "weights: .*enlarges"),
    ):
        with pytest.raises(ValueError, match=message):
            load_openai(tensors | wrong, ADM["flags"])


def test_diffusers_opens_what_it_has_words_for(tmp_path, torch, diffusers):
    """diffusers' own network, with the weights on their way through here, against OpenAI's."""
    expected = outputs("unet", "adm_cond")
    pretrained = load_openai(weights(ADM, np.float32), ADM["flags"])
    save_diffusers(tmp_path / "adm", pretrained)
    network = diffusers.UNet2DModel.from_pretrained(tmp_path / "adm" / "unet")
    x, t, y = (torch.from_numpy(expected[name]) for name in ("x", "t", "y"))
    with torch.no_grad():
        output = network(x.permute(0, 3, 1, 2).float(), t, class_labels=y).sample
    assert_close(output.permute(0, 2, 3, 1).numpy(), expected["out"], 1e-5)
    again = load_diffusers(tmp_path / "adm")
    assert again.model == pretrained.model and again.policy == pretrained.policy
    with pytest.raises(ValueError, match="num_attention_heads: .*UNet2DModel.* has no such"):
        save_diffusers(tmp_path / "plain", load_openai(weights(PLAIN), PLAIN["flags"]))
