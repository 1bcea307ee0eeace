"""OpenAI's networks: what their own code gave in float64, and what happens to odd files and flags.

`openai/*.json` has flags, and the names and shapes of the weights in order, which are drawn as
`weights` does; `*.npz` has the inputs and outputs of guided-diffusion, NCHW. More networks are in
`jax-ddpm parity`, against `torch_reference.models.openai`.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
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
        key: np.moveaxis(value, 1, -1) if value.ndim == 4 else value for key, value in found.items()
    }


def assert_close(ours, theirs, tolerance):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("name", UNETS)
def test_network_and_ddim_loop(name):
    network, expected = UNETS[name], outputs("unet", name)
    pretrained = load_openai(weights(network), network["flags"])
    labels = [expected["y"]] if "y" in expected else []
    apply = functools.partial(pretrained.model.apply, pretrained.variables)
    assert_close(jax.jit(apply)(expected["x"], expected["t"], *labels), expected["out"], 1e-10)

    words = network["flags"]["timestep_respacing"]
    chain = pretrained.chain()
    assert list(chain.timesteps) == network["timesteps"]
    assert list(pretrained.chain(words).timesteps) == network["timesteps"]

    @jax.jit
    def draw(x_T):
        return ddpm.p_sample_loop(
            None,
            chain,
            lambda x_t, t: apply(x_t, t, *labels),
            x_T.shape,
            sampler=ddpm.ddim(),
            x_T=x_T,
            **pretrained.policy,
        )

    assert_close(draw(expected["x_T"]), expected["ddim"], 1e-8)


def test_classifier_and_its_score():
    expected = outputs("classifier", "attention_pool")
    model, variables = load_openai_classifier(weights(CLASSIFIER), CLASSIFIER["flags"])

    def log_prob(x):
        logits = model.apply(variables, x, expected["t"])
        return jax.nn.log_softmax(logits)[0, expected["y"][0]], logits

    score, logits = jax.jit(jax.grad(log_prob, has_aux=True))(expected["x"])
    assert_close(logits, expected["logits"], 1e-10)
    assert_close(score, expected["score"], 1e-10)


def test_flags_as_their_readmes_print_them():
    words = (
        "--image_size 32 --num_channels 32 --num_res_blocks 1 --num_head_channels 16 "
        "--attention_resolutions 16,8 --channel_mult 1,2,3 --learn_sigma True --class_cond True "
        "--use_scale_shift_norm True --resblock_updown=True --use_fp16 True "
        "--diffusion_steps 1000 --noise_schedule linear --timestep_respacing 10"
    )
    tensors = weights(ADM)
    by_words, by_name = load_openai(tensors, words), load_openai(tensors, ADM["flags"])
    assert by_words.model == by_name.model
    assert by_words[3:] == by_name[3:]
    assert by_words.policy == {
        "prediction_type": "epsilon",
        "variance_type": "learned_range",
        "clip_denoised": True,
    }


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ({"predict_xstart": True}, "prediction_type", "sample"),
        ({"sigma_small": True}, "variance_type", "fixed_small"),
        ({}, "variance_type", "fixed_large"),
        ({}, "timestep_respacing", "20"),
    ],
)
def test_what_the_output_means(flags, field, value):
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

    words = (
        "--image_size 32 --num_channels 32 --num_res_blocks 1 --learn_sigma True --dropout 0.3 "
        "--diffusion_steps 4000 --noise_schedule cosine"
    )
    tensors = UNet(32, (1, 2, 2, 2), 1, (2, 4), out_channels=6).state_dict()

    def model(more):
        return load_openai(tensors, f"{words} {more}").model

    assert model("").time_scale == 0.25
    assert model("--rescale_timesteps False").time_scale == 1
    assert model("--use_fp16 True").time_scale == 0.25
    assert model("--num_head_channels -1").time_scale == 1
    assert model("--num_head_channels -1 --rescale_timesteps True") == model("")


@pytest.mark.parametrize(
    ("preset", "flags", "arguments"),
    [
        (
            ddpm.adm_imagenet64(),
            "--attention_resolutions 32,16,8 --class_cond True --dropout 0.1 --image_size 64 "
            "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 "
            "--num_res_blocks 3 --resblock_updown True --use_new_attention_order True",
            (192, (1, 2, 3, 4), 3, (2, 4, 8)),
        ),
        (
            ddpm.adm_imagenet128(),
            "--attention_resolutions 32,16,8 --class_cond True --image_size 128 --learn_sigma True "
            "--num_channels 256 --num_heads 4 --num_res_blocks 2 --resblock_updown True",
            (256, (1, 1, 2, 3, 4), 2, (4, 8, 16)),
        ),
        (
            ddpm.adm_imagenet256(num_class_embeds=None),
            "--attention_resolutions 32,16,8 --class_cond False --image_size 256 --learn_sigma True"
            " --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True",
            (256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32)),
        ),
        (
            ddpm.adm_imagenet512(),
            "--attention_resolutions 32,16,8 --class_cond True --image_size 512 --learn_sigma True "
            "--num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True",
            (256, (0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64)),
        ),
    ],
    ids=["64", "128", "256", "512"],
)
def test_the_published_networks_are_presets(torch, preset, flags, arguments):
    """Their shapes, in bytes instead of floats, since the largest has 559 million."""
    from torch_reference.models.openai import UNet

    with torch.device("meta"):
        network = UNet(
            *arguments, out_channels=6, classes=preset.num_class_embeds, updown=True
        ).state_dict()
    tensors = {name: np.zeros(each.shape, np.int8) for name, each in network.items()}
    assert load_openai(tensors, flags).model == preset


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_channel": 32}, "flags: .*got num_channel; did you mean num_channels"),
        ({"large_size": 256}, "flags: .*enlarges.*large_size"),
        ({"num_channels": "many"}, "flags: num_channels: expected a whole number"),
        ({"num_channels": 32.5}, "flags: num_channels: expected a whole number, got 32.5"),
        ({"class_cond": "maybe"}, "flags: class_cond: expected True or False, got 'maybe'"),
        (
            {"noise_schedule": "sigmoid"},
            "flags: noise_schedule: expected one of 'linear', 'cosine'",
        ),
        ({"diffusion_steps": 0}, "flags: diffusion_steps: expected more than 0, got 0"),
        ({"diffusion_steps": 10, "timestep_respacing": ""}, "flags: diffusion_steps: 10 is too fe"),
        ({"dropout": 2}, "flags: dropout: expected 0 to 1, got 2"),
        ({"num_head_channels": 24}, "flags: num_head_channels: expected a divisor of 64, 96, got"),
        ({"num_head_channels": -1, "num_heads": 5}, "flags: num_heads: expected a divisor of 64"),
        ({"timestep_respacing": "ddim400"}, "flags: timestep_respacing: .*got 'ddim400'"),
        ({"channel_mult": "1,x"}, "flags: channel_mult"),
        ({"attention_resolutions": "0"}, "flags: attention_resolutions"),
        ({"image_size": 48, "channel_mult": ""}, "flags: image_size: expected .*got 48"),
        ({"num_channels": 64}, "flags: num_channels: expected 32, as in weights, got 64"),
        ({"class_cond": False}, "flags: class_cond: expected True, as in weights, got False"),
        ({"learn_sigma": False}, "flags: learn_sigma: expected True"),
        ({"use_scale_shift_norm": False}, "flags: use_scale_shift_norm: expected True"),
        ({"resblock_updown": False}, "flags: resblock_updown: expected True"),
        ({"num_res_blocks": 2}, "state_dict: expected"),
        ({"channel_mult": "1,2,2"}, "state_dict: expected input_blocks.5.0.*of shape"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(ValueError, match=message):
        load_openai(weights(ADM), ADM["flags"] | flags)


@pytest.mark.parametrize("words", ["--image_size", "image_size 64", "--image_size '64"])
def test_words_that_are_no_flags(words):
    with pytest.raises(ValueError, match="flags: expected names, each with its value"):
        load_openai(weights(PLAIN), words)


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
        ({"down_block_types": ("AttnDownBlock",) * 4}, "down_block_types: expected one of"),
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types: expected 4 .*, got 1"),
        ({"downsample_type": "fir"}, "downsample_type: expected one of"),
        ({"resnet_time_scale_shift": "x"}, "resnet_time_scale_shift: expected one of"),
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
    out = tensors.pop("out.2.bias")
    for wrong, message in (
        (tensors, "expected a tensor out.2.bias, got none"),
        (tensors | {"out.2.bias": out, "out.3.bias": out}, "expected only .* got out.3.bias"),
        (tensors | {"out.2.bias": out[1:]}, r"expected out.2.bias of shape \(6,\), got \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_openai(wrong, ADM["flags"])


def test_a_network_that_enlarges_is_refused_by_name():
    tensors = weights(ADM)
    first = tensors["input_blocks.0.0.weight"]
    tensors["input_blocks.0.0.weight"] = np.concatenate([first, first], axis=1)
    with pytest.raises(ValueError, match="weights: .*enlarges"):
        load_openai(tensors, ADM["flags"])


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


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_files(tmp_path, torch, suffix):
    path, tensors = tmp_path / f"model.{suffix}", weights(PLAIN, np.float32)
    if suffix == "pt":
        torch.save({name: torch.from_numpy(each) for name, each in tensors.items()}, path)
    else:
        save_tensors(path, tensors)
    ours, expected = load_openai(path, PLAIN["flags"]), load_openai(tensors, PLAIN["flags"])
    jax.tree.map(np.testing.assert_array_equal, ours.variables, expected.variables)

    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{path}: expected a"):
        load_openai(path, PLAIN["flags"])
    with pytest.raises(ValueError, match="elsewhere: expected a file of weights, got none"):
        load_openai("elsewhere", PLAIN["flags"])


def test_old_and_short_pickles(tmp_path, torch):
    """The format before torch 1.6, which cannot be mapped, and bfloat16, which NumPy has not."""
    tensors = {name: torch.from_numpy(each) for name, each in weights(PLAIN, np.float32).items()}
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    expected = load_openai(tensors, PLAIN["flags"]).variables
    ours = load_openai(tmp_path / "old.pt", PLAIN["flags"]).variables
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    torch.save({name: each.bfloat16() for name, each in tensors.items()}, tmp_path / "short.pt")
    short = load_openai(tmp_path / "short.pt", PLAIN["flags"]).variables
    for ours, full in zip(jax.tree.leaves(short), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, full.astype(jnp.bfloat16))


def test_what_is_no_state_dict_is_named(tmp_path, torch):
    path = tmp_path / "model.pt"
    tensor = torch.zeros(1)
    for content, got in (
        ({"model": {"x": tensor}, "step": 3}, "got dict in 'model'"),
        ([tensor], "got list"),
        (torch.nn.Linear(1, 1), "it holds more than tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"model.pt: expected a state dict of tensors.*{got}"):
            load_openai(path, PLAIN["flags"])


def test_a_pickle_runs_nothing(tmp_path, torch):
    class Code:
        def __reduce__(self):
            return (Path(tmp_path / "it-ran").touch, ())

    path = tmp_path / "model.pt"
    torch.save({"out.2.bias": Code()}, path)
    with pytest.raises(ValueError, match="model.pt: expected a state dict of tensors"):
        load_openai(path, PLAIN["flags"])
    assert not (tmp_path / "it-ran").exists()


def test_a_pickle_without_torch(tmp_path, monkeypatch):
    (tmp_path / "model.pt").touch()
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ImportError, match="model.pt: .*pip install .torch"):
        load_openai(tmp_path / "model.pt", PLAIN["flags"])
