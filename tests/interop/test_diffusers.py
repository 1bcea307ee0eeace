"""Folders that diffusers wrote are opened, and diffusers opens what is written."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers import DPMSolverMultistepScheduler as MultistepScheduler

import jax_ddpm as ddpm
import jax_ddpm.runs as ddpm_runs
from jax_ddpm.interop import load_diffusers, save_diffusers
from jax_ddpm.interop.diffusers import unet_config, unet_from_config
from jax_ddpm.parity.harness import from_torch, images, to_torch
from jax_ddpm.parity.unet import CONFIGS, reference_unet

pytestmark = [
    pytest.mark.usefixtures("defaults"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers' own
]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PICKLE, SHARDS = "unet/diffusion_pytorch_model.bin", f"{WEIGHTS}.index.json"
UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
TINY = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


def written(folder: Path, config=TINY, **options) -> UNet2DModel:
    """A pipeline as diffusers writes it."""
    network = reference_unet({"sample_size": 8, **config}, "float32")
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder, **options)
    return network


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return folder, written(folder)


@pytest.fixture
def network(original):
    return original[1]


@pytest.fixture
def folder(original, tmp_path):
    """A pipeline of `network`, to be edited or damaged."""
    return Path(shutil.copytree(original[0], tmp_path / "pipeline"))


def edited(path: Path, **changes):
    """A JSON file with some settings changed."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def says(file, **changes):
    return lambda folder: edited(folder / file, **changes)


def check_weights(pretrained, network):
    for name, value in ddpm.interop.unet_to_torch(pretrained.variables).items():
        np.testing.assert_array_equal(value, network.state_dict()[name].numpy())


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_and_weights_come_and_go(tmp_path, name):
    """Every setting is read, and every weight comes back to the bit."""
    network = written(tmp_path / "theirs", CONFIGS[name])
    pretrained = load_diffusers(tmp_path / "theirs")
    said = {name: value for name, value in network.config.items() if not name.startswith("_")}
    for setting in said.keys() & ddpm.UNet.__dataclass_fields__:
        assert np.array_equal(getattr(pretrained.model, setting), said[setting]), setting

    save_diffusers(tmp_path / "ours", pretrained)
    reopened = DDPMPipeline.from_pretrained(tmp_path / "ours")
    for setting, value in said.items():
        assert np.array_equal(reopened.unet.config[setting], value), setting
    for tensor, value in network.state_dict().items():
        assert torch.equal(reopened.unet.state_dict()[tensor], value), tensor


def test_settings_left_out_are_those_of_diffusers():
    theirs = dict(UNet2DModel(block_out_channels=(32,) * 4).config)
    ours = unet_config(unet_from_config({"block_out_channels": [32] * 4}, Path("x")))
    for name in ours.keys() & theirs.keys():
        value = theirs[name]
        assert ours[name] == (list(value) if isinstance(value, tuple) else value), name
    assert theirs.keys() - ours.keys() == {"num_train_timesteps", "_use_default_values"}


COSINE, V = {"beta_schedule": "squaredcos_cap_v2"}, {"prediction_type": "v_prediction"}
SCHEDULERS = {
    "Ho et al.": DDPMScheduler(variance_type="fixed_large"),
    "scaled linear": DDPMScheduler(500, 0.001, 0.012, beta_schedule="scaled_linear"),
    "cosine, v": DDPMScheduler(400, **COSINE, **V),
    "sigmoid of β": DDPMScheduler(beta_schedule="sigmoid", prediction_type="sample"),
    "learned range": DDPMScheduler(variance_type="learned_range", clip_sample=False),
    "trained β": DDPMScheduler(5, trained_betas=[0.1, 0.2, 0.15, 0.3, 0.5]),
    "zero SNR": DDPMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", **V),
    "wide clip": DDPMScheduler(clip_sample_range=2.5),
    "dynamic threshold": DDPMScheduler(thresholding=True, sample_max_value=3.0),
    "offset": DDPMScheduler(steps_offset=1),
    "linspace": DDPMScheduler(timestep_spacing="linspace"),
    "DDIM": DDIMScheduler(),
    "DDIM that ends in noise": DDIMScheduler(set_alpha_to_one=False, steps_offset=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(folder, name):
    """Schedule, parametrisation, clipping and spacing; and diffusers reads back the same."""
    theirs = SCHEDULERS[name]
    said = theirs.config
    theirs.save_pretrained(folder / "scheduler")
    pretrained = load_diffusers(folder)
    # diffusers multiplies ᾱ up in float32.
    table = theirs.alphas_cumprod.numpy()
    np.testing.assert_allclose(pretrained.schedule.alphas_cumprod, table, rtol=3e-4, atol=3e-6)
    assert pretrained.prediction_type == said.prediction_type
    assert pretrained.variance_type == said.get("variance_type", "fixed_small")
    steps = 3 if name == "trained β" else 10
    theirs.set_timesteps(steps)
    chain = pretrained.chain(steps)
    np.testing.assert_array_equal(chain.timesteps, theirs.timesteps.numpy()[::-1])
    if isinstance(theirs, DDIMScheduler):
        final = float(theirs.final_alpha_cumprod)
        np.testing.assert_allclose(chain.alphas_cumprod_prev[0], final, rtol=1e-6)
    x = torch.linspace(-4, 4, 48).reshape(1, 3, 4, 4)
    limit = said.clip_sample_range if said.clip_sample else np.inf
    expected = theirs._threshold_sample(x) if said.thresholding else x.clamp(-limit, limit)
    clip, ours = pretrained.clip_denoised, from_torch(x)
    if clip:
        ours = np.clip(ours, -1, 1) if clip is True else jax.jit(clip)(ours)
    np.testing.assert_allclose(ours, from_torch(expected), rtol=1e-6)

    save_diffusers(folder / "ours", pretrained)
    kind = json.loads((folder / "ours/model_index.json").read_text())["scheduler"][1]
    back = getattr(diffusers, kind).from_pretrained(folder / "ours/scheduler")
    if not said.get("set_alpha_to_one", True):
        assert not back.config.set_alpha_to_one
    np.testing.assert_allclose(back.alphas_cumprod.numpy(), table, rtol=3e-4, atol=3e-6)
    for setting in ("prediction_type", "timestep_spacing", "steps_offset", "thresholding"):
        assert back.config[setting] == said[setting]
    again = load_diffusers(folder / "ours")
    assert again.clip_denoised == clip
    for a, b in zip(again.schedule, pretrained.schedule, strict=True):
        np.testing.assert_array_equal(a, b)


OTHER_SCHEDULERS = {
    "PNDM": {"beta_schedule": "scaled_linear", "skip_prk_steps": True},
    "DPMSolverMultistep": {"num_train_timesteps": 500, **V},
    "DPMSolverSinglestep": {"variance_type": "learned_range"},
    "UniPCMultistep": COSINE,
    "DEISMultistep": {"beta_end": 0.01},
    "EulerDiscrete": {"rescale_betas_zero_snr": True, **V},
    "EulerAncestralDiscrete": {"beta_start": 2e-4},
    "LMSDiscrete": {"prediction_type": "sample"},
    "DDIMParallel": {"clip_sample": False},
}


@pytest.mark.parametrize("name", OTHER_SCHEDULERS)
def test_of_other_schedulers_the_training_is_read(folder, name):
    theirs = getattr(diffusers, f"{name}Scheduler")(**OTHER_SCHEDULERS[name])
    theirs.save_pretrained(folder / "scheduler")
    # What a pipeline leaves behind when its scheduler is replaced.
    edited(folder / SCHEDULER, clip_sample_range=1.0, skip_prk_steps=True, use_karras_sigmas=False)
    pretrained = load_diffusers(folder)
    # EulerDiscreteScheduler writes 2⁻²⁴ for the last ᾱ of 0.
    ours, table = pretrained.schedule.alphas_cumprod, theirs.alphas_cumprod.numpy()
    atol = 1e-7 if name == "EulerDiscrete" else 3e-6
    np.testing.assert_allclose(ours, table, rtol=3e-4, atol=atol)
    assert pretrained.prediction_type == theirs.config.prediction_type
    assert pretrained.variance_type == (theirs.config.get("variance_type") or "fixed_small")
    assert pretrained.clip_denoised is False


def draw(pretrained, chain, x_T, noise=None):
    """The pictures that the folder stands for."""
    loop = jax.jit(
        lambda variables: ddpm.p_sample_loop(
            None,
            chain,
            lambda x, t: pretrained.model.apply(variables, x, t),
            x_T.shape,
            sampler=pretrained.sampler(),
            x_T=x_T,
            noise_fn=None if noise is None else lambda i: jnp.asarray(noise)[i],
            **pretrained.policy,
        )
    )
    return loop(pretrained.variables)


@pytest.mark.parametrize(
    ("prediction_type", "timesteps", "steps"), [("epsilon", 100, 100), ("v_prediction", 1000, 10)]
)
def test_the_pipeline_draws_the_same_pictures(folder, prediction_type, timesteps, steps):
    """diffusers' own `DDPMPipeline`, its noise handed to `p_sample_loop`."""
    scheduler = DDPMScheduler(timesteps, beta_end=20 / timesteps, prediction_type=prediction_type)
    scheduler.save_pretrained(folder / "scheduler")
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(7)
    expected = pipeline(2, seeded, num_inference_steps=steps, output_type="np").images
    seeded = torch.Generator().manual_seed(7)
    draws = [from_torch(torch.randn(2, 3, 8, 8, generator=seeded)) for _ in range(steps)]
    noise = np.stack([np.zeros_like(draws[0]), *draws[:0:-1]])
    pretrained = load_diffusers(folder)
    ours = draw(pretrained, pretrained.chain(steps), draws[0], noise)
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DDIMScheduler, {"clip_sample": True}),
        (MultistepScheduler, {}),
        (MultistepScheduler, {"solver_order": 1, "timestep_spacing": "leading", "steps_offset": 1}),
        (MultistepScheduler, {"timestep_spacing": "trailing"} | COSINE),
        (MultistepScheduler, {"thresholding": True, "euler_at_final": True} | V),
    ],
    ids=str,
)
def test_the_default_pictures_of_a_folder(folder, network, kind, settings):
    """Of few steps: a network that is not trained magnifies roundings at each of them."""
    theirs = kind(**settings)
    theirs.save_pretrained(folder / "scheduler")
    pretrained, x_T = load_diffusers(folder), images(0, "float32", (2, 8, 8, 3))
    theirs.set_timesteps(15)
    chain, x = pretrained.chain(15), to_torch(x_T)
    np.testing.assert_array_equal(chain.timesteps[::-1], theirs.timesteps.numpy())
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(network(x, t).sample, t, x).prev_sample
    expected = from_torch(x)
    tolerance = 1e-3 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(draw(pretrained, chain, x_T), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("steps", [3, 4, 5])
@pytest.mark.parametrize("settings", [{}, {"timestep_spacing": "trailing", "solver_order": 1}])
def test_a_solver_starts_as_diffusers_does_at_zero_terminal_snr(folder, settings, steps):
    """At ᾱ_T = 2⁻²⁴, which is not 0: few steps tell one from the other."""
    theirs = MultistepScheduler(rescale_betas_zero_snr=True, **V, **settings)
    theirs.save_pretrained(folder / "scheduler")
    theirs.set_timesteps(steps)
    pretrained, x_T = load_diffusers(folder), images(0, "float32", (2, 8, 8, 3))
    x = to_torch(x_T)
    for t in theirs.timesteps:
        x = theirs.step(torch.tanh(3 * x + t / 500), t, x).prev_sample
    network, sampler = lambda x, t: jnp.tanh(3 * x + t[0] / 500), pretrained.sampler()
    policy = dict(sampler=sampler, x_T=x_T, **pretrained.policy)
    ours = ddpm.p_sample_loop(None, pretrained.chain(steps), network, x_T.shape, **policy)
    np.testing.assert_allclose(ours, from_torch(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "keeps"),
    [
        ({"variance_type": "fixed_large", "timestep_spacing": "trailing"}, True),
        ({"variance_type": "fixed_large", "steps_offset": 1}, True),
        ({"variance_type": "fixed_large", "timestep_spacing": "linspace"}, False),
        ({"timestep_spacing": "trailing"}, False),
    ],
    ids=str,
)
def test_what_keeps_noise_in_diffusers_is_said(folder, settings, keeps):
    """Its last step adds noise wherever t is above 0."""
    theirs = DDPMScheduler(**settings)
    theirs.save_pretrained(folder / "scheduler")
    theirs.set_timesteps(50)
    x, t = torch.zeros(1, 3, 8, 8), theirs.timesteps[-1]
    assert (float(theirs.step(x, t, x).prev_sample.abs().max()) > 0.01) == keeps
    words = "variance_type: diffusers adds the noise of 'fixed_large' in the last step"
    with pytest.warns(match=words) if keeps else warnings.catch_warnings(action="error"):
        save_diffusers(folder / "ours", load_diffusers(folder))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_all_steps_of_a_dpm_solver_folder(folder, spacing):
    """Where diffusers would repeat an entry, or leave out the last, the chain is the whole one."""
    MultistepScheduler(100, timestep_spacing=spacing).save_pretrained(folder / "scheduler")
    pretrained = load_diffusers(folder)
    np.testing.assert_array_equal(pretrained.chain(100).timesteps, np.arange(100))
    np.testing.assert_array_equal(pretrained.chain().timesteps, np.arange(100))
    with pytest.raises(ValueError, match="steps: expected 1 to 100"):
        pretrained.chain(101)


def test_a_solver_that_is_not_here_is_refused_by_name(folder):
    other = {"solver_order": 3, "solver_type": "heun", "final_sigmas_type": "sigma_min"}
    other |= {"lambda_min_clipped": -5.1, "algorithm_type": "dpmsolver"}
    for name, value in other.items():
        MultistepScheduler().save_pretrained(folder / "scheduler")
        edited(folder / SCHEDULER, **{name: value})
        pretrained = load_diffusers(folder)  # its training is read all the same
        with pytest.raises(ValueError, match=f"{name}: expected"):
            pretrained.sampler()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_come_back_to_the_bit(tmp_path, dtype):
    network = written(tmp_path / "a")
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    network.save_pretrained(tmp_path / "a" / "unet")
    save_diffusers(tmp_path / "b", load_diffusers(tmp_path / "a"))
    back = safetensors.torch.load_file(tmp_path / "b" / WEIGHTS)
    for tensor, value in network.state_dict().items():
        assert back[tensor].dtype == dtype and torch.equal(back[tensor], value)


def test_what_is_converted_back_may_be_written_to(folder, network):
    """The opened weights themselves are views of the file."""
    pretrained = load_diffusers(folder)
    for array in ddpm.interop.unet_to_torch(pretrained.variables).values():
        array += 1
    check_weights(pretrained, network)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("shards", [1, 4])
def test_files_of_weights(tmp_path, shards, safe, variant):
    size = {"max_shard_size": "100MB" if shards == 1 else "10KB"}
    network = written(tmp_path, safe_serialization=safe, variant=variant, **size)
    files = sorted(path for path in (tmp_path / "unet").iterdir() if path.suffix != ".json")
    assert len(files) == shards and all(path.suffix != ".bin" or not safe for path in files)
    check_weights(load_diffusers(tmp_path, variant=variant), network)
    files[-1].unlink()
    with pytest.raises(ValueError, match="expected .*, got none"):
        load_diffusers(tmp_path, variant=variant)


def test_a_variant_is_read_where_it_is_asked_for(folder, network):
    half = {name: each.half() for name, each in network.state_dict().items()}
    safetensors.torch.save_file(half, (folder / WEIGHTS).with_suffix(".fp16.safetensors"))
    check_weights(load_diffusers(folder), network)
    ours = load_diffusers(folder, variant="fp16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours.variables)} == {"float16"}
    with pytest.raises(ValueError, match="expected diffusion_pytorch_model.ema.safetensors, got"):
        load_diffusers(folder, variant="ema")


def test_an_average_and_a_variant_are_read(folder, network):
    """As diffusers' training scripts leave them: `EMAModel` adds its own settings."""
    before = load_diffusers(folder)
    (folder / "unet").rename(folder / "unet_ema")
    average = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 7}
    average |= {"power": 0.75, "update_after_step": 0, "use_ema_warmup": True}
    edited(folder / "unet_ema" / "config.json", **average)
    weights = folder / "unet_ema" / Path(WEIGHTS).name
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    after = load_diffusers(folder)
    assert after.model == before.model
    check_weights(after, network)
    shutil.copytree(folder / "unet_ema", folder / "unet")
    with pytest.warns(UserWarning, match="reading unet/; its average is in .*unet_ema"):
        load_diffusers(folder)
    shutil.copy(weights.with_suffix(".fp16.safetensors"), weights.with_suffix(".x.safetensors"))
    with pytest.raises(ValueError, match="got several others: .*fp16.safetensors, .*x.safetensors"):
        load_diffusers(folder / "unet_ema")


def test_the_unet_at_the_root(folder, network):
    with pytest.warns(UserWarning, match="no scheduler_config.json"):
        check_weights(load_diffusers(folder / "unet"), network)
    DDPMScheduler(77).save_pretrained(folder / "unet")
    with warnings.catch_warnings(action="error"):
        assert load_diffusers(folder / "unet").schedule.num_timesteps == 77


def test_configs_of_2022(folder):
    """Other names of the classes, few settings, `predict_epsilon`, and a framework's name."""
    before = load_diffusers(folder)
    blocks = {f"{way}_block_types": [f"UNetRes{way.title()}Block2D"] for way in ("down", "up")}
    edited(folder / UNET, _class_name="UNetUnconditionalModel", **blocks)
    config = {"_class_name": "DDPMScheduler", "predict_epsilon": False, "tensor_format": "pt"}
    config |= {"trained_betas": None, "timestep_values": None}
    (folder / SCHEDULER).write_text(json.dumps(config))
    edited(folder / "model_index.json", vqvae=[None, None])
    after = load_diffusers(folder)
    assert after.model == before.model and after.prediction_type == "sample"


@pytest.mark.parametrize(
    ("name", "preset"),
    [("ddpm-cifar10-32", ddpm.ddpm_cifar10), ("ddpm-celebahq-256", ddpm.ddpm_celebahq)],
)
def test_the_repositories_of_google(tmp_path, name, preset):
    """Network and scheduler at the root, a pickle, and the attention's names of 2022.

    `google.json` has the configs as they were published. Here the networks have a quarter of the
    channels, and are otherwise the presets.
    """
    published = json.loads(Path(__file__).with_name("google.json").read_text())[name]
    config, scheduler = published.values()
    config["block_out_channels"] = [each // 4 for each in config["block_out_channels"]]
    network = reference_unet({k: v for k, v in config.items() if k[0] != "_"}, "float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    tensors = dict(network.state_dict())
    for tensor in network.state_dict():
        for now, then in (("q", "query"), ("k", "key"), ("v", "value"), ("out.0", "proj_attn")):
            if f".to_{now}." in tensor:
                tensors[tensor.replace(f"to_{now}", then)] = tensors.pop(tensor)
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")

    pretrained = load_diffusers(tmp_path)
    assert pretrained.model == preset(block_out_channels=tuple(config["block_out_channels"]))
    check_weights(pretrained, network)
    assert list(pretrained.policy.values()) == ["epsilon", "fixed_small", True]
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(pretrained.schedule.alphas_cumprod, alpha_bar, rtol=1e-12)


OUTSIDE = json.dumps({"weight_map": {"conv_in.weight": "../../secret.safetensors"}})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (says(UNET, time_embedding_type="fourier"), "unet.*time_embedding_type: expected 'posit"),
        (says(UNET, downsample_type="fir"), "unet.*downsample_type: expected one of"),
        (says(UNET, cross_attention_dim=8), "unet.*only settings of .*, got cross_attention_dim"),
        (says(UNET, _class_name="UNet2DConditionModel"), "unet.*expected _class_name UNet2DModel"),
        (says(UNET, layers_per_block=2), r"unet.*expected a tensor down_blocks\S+, got none"),
        (says(UNET, block_out_channels=[16]), r"unet.*expected conv_in\S+ of shape \(16,\)"),
        (says(UNET, _null_label=3), "unet.*_null_label: expected a label below 0, got 3"),
        (says(SCHEDULER, _class_name="SdeVpScheduler"), "scheduler.*expected _class_name DDPMSch"),
        (says(SCHEDULER, beta_schedule="laplace"), "scheduler.*beta_schedule: .* got 'laplace'"),
        (says(SCHEDULER, prediction_type="flow"), "scheduler.*prediction_type: expected one of"),
        (says(SCHEDULER, timestep_spacing="karras"), "scheduler.*timestep_spacing: expected one"),
        (says(SCHEDULER, beta_start=-1.0), "scheduler.*betas: expected values in"),
        (says(SCHEDULER, use_karras_sigmas=True), "scheduler.*got use_karras_sigmas: True"),
        (says("model_index.json", vqvae=["diffusers", "VQModel"]), "only a unet and .* got vqvae"),
        (lambda f: (f / UNET).unlink(), "config.json: expected a JSON file, got none"),
        (lambda f: (f / UNET).write_text("{"), "config.json: expected JSON, got a damaged file"),
        (lambda f: (f / SCHEDULER).unlink(), "expected scheduler/scheduler_config.json, got none"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x" * 99), "safetensors file, got a damaged one"),
        (lambda f: (f / WEIGHTS).rename(f / PICKLE), "a pickle, which can run code; convert .* M"),
        (lambda f: (f / WEIGHTS).rename(f / SHARDS).write_text(OUTSIDE), "to files beside it"),
        (lambda f: f.rename(f.with_name("gone")), "expected a folder of diffusers, got none"),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(folder, untyped, damage, words):
    damage(folder)
    with pytest.raises(ValueError, match=words):
        load_diffusers(folder)


def test_a_run_in_the_place_of_a_folder_of_diffusers_is_named(tmp_path):
    (tmp_path / "runs/digits/checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="digits: .* got a run, which `runs.load_run` opens"):
        load_diffusers(tmp_path / "runs/digits")


def test_what_cannot_be_written_leaves_nothing(folder):
    pretrained = load_diffusers(folder)
    for broken, words in [
        ({"schedule": pretrained.chain(10)}, "schedule: expected the one of training"),
        ({"model": pretrained.model.clone(layers_per_block=2)}, "expected a tensor down_blocks"),
        ({"model": ddpm.SimpleUNet()}, "model: expected a UNet, got SimpleUNet"),
        ({"clip_denoised": jnp.tanh}, "clip_denoised: expected True, False, static"),
        (
            {"set_alpha_to_one": False, "variance_type": "learned"},
            "variance_type: expected 'fixed_small'",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            save_diffusers(folder.parent / "b", pretrained._replace(**broken))
    assert list(folder.parent.iterdir()) == [folder]
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        save_diffusers(folder, pretrained)


@pytest.mark.parametrize(
    ("there", "variant", "fetched"),
    [
        (["unet/X.safetensors", "unet/X.fp16.safetensors", "unet/X.bin"], None, "unet/X.safet"),
        (["unet/X.safetensors", "unet/X.fp16.bin"], "fp16", "unet/X.fp16.bin"),
        (["unet/X-1-of-1.safetensors", "unet/X.bin"], None, "unet/X-1-of-1.safetensors"),
        (["unet/X.fp16.safetensors"], None, "unet/X.fp16.safetensors"),
        (["X.bin", "checkpoint-500/unet/X.safetensors", "vae/X.safetensors"], None, "X.bin"),
    ],
    ids=str,
)
def test_what_comes_from_the_hub(tmp_path, monkeypatch, there, variant, fetched):
    """The configs, and of the weights what is read; by huggingface_hub's own matching of names."""
    from huggingface_hub.utils import filter_repo_objects

    from jax_ddpm.interop.hub import from_hub

    names = [name.replace("X", "diffusion_pytorch_model") for name in there]
    files = [*names, "model_index.json"]
    files += [f"{name.rpartition('/')[0]}/config.json" for name in names if "/" in name]

    def snapshot_download(name, *, revision, allow_patterns):
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert from_hub("owner/name", None, variant) == tmp_path
    found = [path for path in tmp_path.rglob("*.*") if path.suffix != ".json"]
    expected = fetched.replace("X", "diffusion_pytorch_model")
    assert [str(path.relative_to(tmp_path)).startswith(expected) for path in found] == [True]


def test_without_huggingface_hub_its_names_are_answered_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="folder: rnus/digits: no such folder here; .*pip install"):
        ddpm_runs.load_pretrained("rnus/digits")


def test_names_on_the_hub_come_from_its_cache(original, tmp_path, monkeypatch):
    """Offline, and in a folder that has none of that name."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--owner--tiny.v1"
    folder, network = original
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.chdir(tmp_path)
    check_weights(load_diffusers("owner/tiny.v1"), network)
    check_weights(load_diffusers("owner/tiny.v1", revision=commit), network)
    with pytest.raises(ValueError, match="owner/other: expected a folder .*, and on the hub: "):
        load_diffusers("owner/other")
    with pytest.raises(ValueError, match="owner/tiny.v1: expected .* on the hub: "):
        load_diffusers("owner/tiny.v1", revision="a-branch")
    (tmp_path / "owner").mkdir()
    with pytest.raises(ValueError, match="owner/tiny.v1: expected a folder .* nothing is download"):
        load_diffusers("owner/tiny.v1")
    with pytest.raises(ValueError, match="revision: expected None for a folder, got 'main'"):
        load_diffusers(tmp_path, revision="main")
