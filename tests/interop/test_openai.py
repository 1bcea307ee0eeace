"""OpenAI's networks: what their own code gave in float64, and what happens to odd files and flags.

`openai/{unet,classifier}.json` have flags, and the names and shapes of the weights in order, which
are drawn as `weights` does; `*.npz` have the inputs and outputs of guided-diffusion, NCHW.
`published.json` has the flags of OpenAI's README, and how `torch_reference.models.openai`, with
which `jax-ddpm parity` compares more networks, is called.
"""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jax_ddpm as ddpm
from jax_ddpm import data, runs
from jax_ddpm.interop import load_openai, load_openai_classifier, save_diffusers
from jax_ddpm.io.arrays import save_tensors
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
    return {key: np.moveaxis(x, 1, -1) if x.ndim == 4 else x for key, x in found.items()}


def assert_close(ours, theirs, tolerance):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("name", UNETS)
def test_output_and_ddim_loop(name):
    network, expected = UNETS[name], outputs("unet", name)
    pretrained = load_openai(weights(network), network["flags"])
    chain, again = pretrained.chain(), pretrained.chain(network["flags"]["timestep_respacing"])
    assert list(chain.timesteps) == list(again.timesteps) == network["timesteps"]
    labels = [expected["y"]] if "y" in expected else []

    def denoise_fn(x_t, t):
        return pretrained.model.apply(pretrained.variables, x_t, t, *labels)

    @jax.jit
    def draw(x_T):
        options = {"sampler": ddpm.ddim(), "x_T": x_T, **pretrained.policy}
        return ddpm.p_sample_loop(None, chain, denoise_fn, x_T.shape, **options)

    assert_close(jax.jit(denoise_fn)(expected["x"], expected["t"]), expected["out"], 1e-10)
    assert_close(draw(expected["x_T"]), expected["ddim"], 1e-8)


@pytest.mark.parametrize("name", ["logits", pytest.param("score", marks=pytest.mark.patience)])
def test_the_classifier(name):
    expected = outputs("classifier", "attention_pool")
    model, variables = load_openai_classifier(weights(CLASSIFIER), CLASSIFIER["flags"])
    logits = lambda x: model.apply(variables, x, expected["t"])
    log_prob = lambda x: jax.nn.log_softmax(logits(x))[0, expected["y"][0]]
    function = {"logits": logits, "score": jax.grad(log_prob)}[name]
    assert_close(jax.jit(function)(expected["x"]), expected[name], 1e-10)


def test_what_the_flags_say_of_the_output():
    for network, flags, policy in (
        (ADM, {}, ["epsilon", "learned_range", True]),
        (PLAIN, {"predict_xstart": True, "sigma_small": True}, ["sample", "fixed_small", True]),
        (PLAIN, {"clip_denoised": False}, ["epsilon", "fixed_large", False]),
    ):
        pretrained = load_openai(weights(network), network["flags"] | flags)
        assert list(pretrained.policy.values()) == policy


@pytest.mark.parametrize(
    ("script", "aside"),
    [
        ('MODEL_FLAGS="{0}"\nDIFFUSION_FLAGS="{1}"\nTRAIN_FLAGS="--use_fp16 True --lr=1"', "lr"),
        ("X=$HOME/x mpiexec -n 8 python a/b.py {0} \\\n  {1} \\\r\n --use_ddim True", "use_ddim"),
        ("export MODEL_FLAGS='{0}'; SAMPLE_FLAGS=\"--batch_size 4\"  # few\n"
         "python image_sample.py $MODEL_FLAGS ${{SAMPLE_FLAGS}} {1}", "batch_size"),
    ],
)  # fmt: skip
def test_flags_as_a_script_has_them(script, aside):
    first, *rest = (f"--{name} {value}" for name, value in PLAIN["flags"].items())
    script = script.format(first, " ".join(rest))
    with pytest.warns(match=f"^flags: left aside, not of the network: {aside}$"):
        opened = load_openai(weights(PLAIN), script)
    expected = load_openai(weights(PLAIN), PLAIN["flags"])
    assert opened.model == expected.model and opened[3:] == expected[3:]


def test_schedules():
    """Nichol & Dhariwal 2021, eq. 17: ᾱ of the cosine; and 1000 / T times the β of 1,000 steps."""
    tensors, cosine = weights(PLAIN), {"diffusion_steps": 100, "noise_schedule": "cosine"}
    linear = load_openai(tensors, PLAIN["flags"] | {"diffusion_steps": 4000}).schedule
    np.testing.assert_allclose(linear.betas[[0, -1]], [2.5e-5, 5e-3], rtol=1e-15)
    alpha_bar = load_openai(tensors, PLAIN["flags"] | cosine).schedule.alphas_cumprod
    angles = (np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2
    expected = np.cos(angles[1:99]) ** 2 / np.cos(angles[0]) ** 2
    np.testing.assert_allclose(alpha_bar[:98], expected, rtol=1e-12)


def test_time_scale_by_the_code_that_the_flags_are_of(torch):
    """improved-diffusion rescales unless told otherwise, guided-diffusion does not."""
    from torch_reference.models.openai import UNet

    flags = "--image_size 32 --num_channels 32 --num_res_blocks 1 --diffusion_steps 4000"
    tensors = UNet(32, (1, 2, 2, 2), 1, (2, 4)).state_dict()
    for more, time_scale in (
        ("--rescale_timesteps False", 1),
        ("--use_fp16 True", 0.25),
        ("--num_head_channels -1", 1),
    ):
        assert load_openai(tensors, f"{flags} {more}").model.time_scale == time_scale


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
        ({"large_size": 256}, "flags: .*large_size.*enlarges"),
        ({"num_channels": "many"}, "flags: num_channels: invalid int value: 'many'"),
        ({"class_cond": "maybe"}, "flags: class_cond: invalid boolean value: 'maybe'"),
        ({"diffusion_steps": 0}, "flags: diffusion_steps: expected more than 0, got 0"),
        ({"diffusion_steps": 10, "timestep_respacing": ""}, "flags: diffusion_steps 10, .*: betas"),
        ({"num_head_channels": 24}, "the flags that decide it: .*num_head_channels"),
        ({"timestep_respacing": "ddim400"}, "flags: .*timestep_respacing 'ddim400': steps: "),
        ({"channel_mult": "1,x"}, "flags: channel_mult: invalid numbers"),
        ({"image_size": 48, "channel_mult": ""}, "flags: image_size: expected .*got 48"),
        ("--image_size '64", "flags: No closing quotation"),
        ("--image_size 64 32", "flags: expected the model's .*, got 32"),
        ("--image_size", "flags: image_size: expected one argument"),
        # What the file contradicts.
        ({"attention_resolutions": "16.5"}, "the flags that decide it: attention_resolutions"),
        (
            {"class_cond": False},
            "label_emb.weight: .* no tensor, .* the flags .*, class_cond",
        ),
        ({"channel_mult": "1,2,2"}, "state_dict: input_blocks.5.0.*: expected"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(ValueError, match=message):
        load_openai(weights(ADM), flags if isinstance(flags, str) else ADM["flags"] | flags)


@pytest.mark.filterwarnings("ignore:classes that no image shows")
def test_labels_and_chain_go_wherever_the_network_goes(tmp_path):
    """No label stands for no class, and the chain is that of the flags."""
    save_tensors(tmp_path / "adm.safetensors", weights(ADM, np.float32))
    flags = " ".join(f"--{name} {value}" for name, value in ADM["flags"].items())
    run = runs.load_model(tmp_path / "adm.safetensors", openai_flags=flags)
    runs.save_run(tmp_path / "run", run)
    save_diffusers(tmp_path / "adm", run)
    for each in (run, runs.load_run(tmp_path / "run"), runs.load_model(tmp_path / "adm")):
        assert (each.num_classes, each.null_label, each.guidance) == (1000, None, 1.0)
        assert list(make_chain(each).timesteps) == ADM["timesteps"]
        assert make_chain(each, 7).num_timesteps == 7
    dataset = data.Dataset(np.zeros((2, 32, 32, 3), np.float32), np.arange(2, dtype=np.int32))
    for name, value in (("guidance", 3.0), ("label_dropout", 0.2)):
        settings = runs.Settings(init=tmp_path / "adm", steps=1, batch_size=1, **{name: value})
        with pytest.raises(ValueError, match=f"{name}: the .* label that stands for no"):
            runs.fit(tmp_path / "trained", dataset, settings)


PAGES = [Path(ddpm.__file__).parent / page for page in ("interop/README.md", "README.md")]
SMALLER = {
    "64, 64": "32, 32",
    "--image_size 64": "--image_size 32",
    "--num_channels 192": "--num_channels 32 --channel_mult 1,2",
    "--num_res_blocks 3": "--num_res_blocks 1",
    "--attention_resolutions 32,16,8": "--attention_resolutions 8",
    "--classifier_depth 4": "--classifier_depth 1",
    "jnp.zeros((2, 32, 32, 3))": "jax.random.uniform(jax.random.key(9), (2, 32, 32, 3)) - 0.2",
    '"ddim25"': '"ddim4"',
    "chain(50)": "chain(20)",
}


@pytest.mark.patience
def test_the_examples_of_the_readme(tmp_path, monkeypatch, defaults, torch):
    """Blocks marked `py`, which need OpenAI's files, run on small networks of their kind."""
    from torch_reference.models.openai import Classifier, UNet

    torch.manual_seed(0)
    options = {"head_channels": 64, "classes": 1000, "out_channels": 6, "updown": True}
    unet = UNet(32, (1, 2), 1, (4,), heads=None, **options, new_order=True)
    torch.save(unet.state_dict(), tmp_path / "64x64_diffusion.pt")
    classifier = Classifier(32, 128, (1, 2, 2, 2), 1, (1, 2, 4))
    torch.save(classifier.state_dict(), tmp_path / "64x64_classifier.pt")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    pages = "".join(page.read_text() for page in PAGES)
    text = "".join(re.findall(r"^```py\n(.*?)^```", pages, re.M | re.S))
    for ours, theirs in SMALLER.items():
        assert ours in text
        text = text.replace(ours, theirs)
    exec(compile(text, "the pages", "exec"), namespace)

    assert np.all(np.isfinite(namespace["samples"]))
    downscale, restored = namespace["downscale"], namespace["restored"]
    off = np.abs(downscale(restored) - namespace["measured"]).mean()
    others = np.abs(downscale(restored[::-1]) - namespace["measured"]).mean()
    assert off < 0.03 and off < others / 2
