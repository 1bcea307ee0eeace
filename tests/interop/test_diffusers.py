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
import safetensors.numpy
import safetensors.torch
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

import jax_ddpm as ddpm
import jax_ddpm.runs as ddpm_runs
from jax_ddpm.interop import load_diffusers, save_diffusers
from jax_ddpm.parity.harness import from_torch, images, timesteps, to_torch
from jax_ddpm.parity.unet import CONFIGS, labels, reference_unet

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SMALL = CONFIGS["diffusers' defaults"]


def written(folder: Path, config=SMALL, scheduler=None, **options) -> UNet2DModel:
    """A pipeline as diffusers writes it."""
    network = reference_unet({"sample_size": 8, **config}, "float32")
    pipeline = DDPMPipeline(network, scheduler or DDPMScheduler())
    pipeline.save_pretrained(folder, **options)
    return network


def edited(path: Path, **changes):
    """A JSON file with some settings changed."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", CONFIGS)
def test_opens_computes_and_returns(tmp_path, name):
    """The output to 1e-4, and the file that comes back equal to the one that came, to the bit."""
    config = CONFIGS[name]
    network = written(tmp_path / "theirs", config)
    pretrained = load_diffusers(tmp_path / "theirs")
    shape = (2, 8, 12, 3)
    x, t, y = images(0, "float32", shape), timesteps(1000, 2), labels(config, 2)
    with torch.no_grad():
        class_labels = None if y is None else torch.from_numpy(y).long()
        expected = network(to_torch(x), to_torch(t).long(), class_labels=class_labels).sample
    with jax.numpy_dtype_promotion("standard"):
        output = jax.jit(pretrained.model.apply)(pretrained.variables, x, t, y)
    expected = from_torch(expected)
    np.testing.assert_allclose(output, expected, atol=1e-4 * np.abs(expected).max())

    save_diffusers(tmp_path / "ours", pretrained)
    theirs, ours = (safetensors.numpy.load_file(tmp_path / f / WEIGHTS) for f in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for tensor in theirs:
        np.testing.assert_array_equal(ours[tensor], theirs[tensor], err_msg=tensor)
    reopened = DDPMPipeline.from_pretrained(tmp_path / "ours")
    said = {name: value for name, value in network.config.items() if not name.startswith("_")}
    for setting, value in said.items():
        assert np.array_equal(reopened.unet.config[setting], value), setting
    for tensor, value in network.state_dict().items():
        assert torch.equal(reopened.unet.state_dict()[tensor], value)


SCHEDULERS = {
    "Ho et al.": DDPMScheduler(variance_type="fixed_large"),
    "scaled linear": DDPMScheduler(500, 0.001, 0.012, beta_schedule="scaled_linear"),
    "cosine, v": DDPMScheduler(
        400, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    ),
    "sigmoid of β": DDPMScheduler(beta_schedule="sigmoid", prediction_type="sample"),
    "learned range": DDPMScheduler(variance_type="learned_range", clip_sample=False),
    "trained β": DDPMScheduler(5, trained_betas=[0.1, 0.2, 0.15, 0.3, 0.5]),
    "zero SNR": DDPMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    "wide clip": DDPMScheduler(clip_sample_range=2.5),
    "dynamic threshold": DDPMScheduler(thresholding=True, sample_max_value=3.0),
    "offset": DDPMScheduler(steps_offset=1),
    "linspace": DDPMScheduler(timestep_spacing="linspace"),
    "DDIM": DDIMScheduler(),
    "DDIM that ends in noise": DDIMScheduler(set_alpha_to_one=False, steps_offset=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(tmp_path, name):
    """Schedule, parametrisation, clipping and spacing; and diffusers reads back the same."""
    theirs = SCHEDULERS[name]
    said = theirs.config
    written(tmp_path / "theirs", CONFIGS["no attention, no middle"], scheduler=theirs)
    pretrained = load_diffusers(tmp_path / "theirs")
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
    if said.thresholding:
        expected = theirs._threshold_sample(x)
    else:
        limit = said.clip_sample_range if said.clip_sample else np.inf
        expected = x.clamp(-limit, limit)
    clip = pretrained.clip_denoised
    ours = from_torch(x)
    if clip is True:
        ours = np.clip(ours, -1, 1)
    elif clip is not False:
        ours = clip(jnp.asarray(ours))
    np.testing.assert_allclose(ours, from_torch(expected), rtol=1e-6)

    save_diffusers(tmp_path / "ours", pretrained)
    back = DDPMPipeline.from_pretrained(tmp_path / "ours").scheduler
    if not said.get("set_alpha_to_one", True):
        assert not back.config.set_alpha_to_one
    np.testing.assert_allclose(back.alphas_cumprod.numpy(), table, rtol=3e-4, atol=3e-6)
    for setting in ("prediction_type", "timestep_spacing", "steps_offset", "thresholding"):
        assert back.config[setting] == said[setting]
    again = load_diffusers(tmp_path / "ours")
    assert again.clip_denoised == clip
    for a, b in zip(again.schedule, pretrained.schedule, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_pipeline_draws_the_same_pictures(tmp_path, prediction_type):
    """diffusers' own `DDPMPipeline`, its noise handed to `p_sample_loop`."""
    written(tmp_path, scheduler=DDPMScheduler(prediction_type=prediction_type))
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(7)
    expected = pipeline(2, seeded, num_inference_steps=10, output_type="np").images
    seeded = torch.Generator().manual_seed(7)
    draws = [from_torch(torch.randn(2, 3, 8, 8, generator=seeded)) for _ in range(10)]
    x_T, noise = draws[0], np.stack([np.zeros_like(draws[0]), *draws[:0:-1]])
    pretrained = load_diffusers(tmp_path)

    @jax.jit
    def loop(variables, x_T, noise):
        return ddpm.p_sample_loop(
            None,
            pretrained.chain(10),
            lambda x, t: pretrained.model.apply(variables, x, t),
            (2, 8, 8, 3),
            prediction_type=pretrained.prediction_type,
            variance_type=pretrained.variance_type,
            clip_denoised=pretrained.clip_denoised,
            x_T=x_T,
            noise_fn=lambda i: noise[i],
        )

    ours = loop(pretrained.variables, jnp.asarray(x_T), jnp.asarray(noise))
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), expected, atol=1e-3)


def test_float64_weights_stay_float64(tmp_path):
    network = reference_unet({"sample_size": 8, **SMALL}, "float64")
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path)
    pretrained = load_diffusers(tmp_path)
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(pretrained.variables))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_come_back_to_the_bit(tmp_path, dtype):
    network = written(tmp_path / "a")
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    network.save_pretrained(tmp_path / "a" / "unet")
    save_diffusers(tmp_path / "b", load_diffusers(tmp_path / "a"))
    back = UNet2DModel.from_pretrained(tmp_path / "b" / "unet", torch_dtype=dtype)
    for tensor, value in network.state_dict().items():
        assert torch.equal(back.state_dict()[tensor], value)


def test_shards(tmp_path):
    network = written(tmp_path, max_shard_size="50KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 3
    check_weights(load_diffusers(tmp_path), network)
    victim = sorted((tmp_path / "unet").glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ValueError, match=f"{victim.name}: expected a safetensors file, got none"):
        load_diffusers(tmp_path)


def test_the_unet_at_the_root(tmp_path):
    network = reference_unet(SMALL, "float32")
    network.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no scheduler_config.json"):
        check_weights(load_diffusers(tmp_path), network)
    DDPMScheduler(77).save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        assert load_diffusers(tmp_path).schedule.num_timesteps == 77


def test_attention_weights_under_their_old_names(tmp_path):
    network = written(tmp_path)
    path = tmp_path / WEIGHTS
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in safetensors.numpy.load_file(path).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        tensors[name] = value
    assert any("proj_attn" in name for name in tensors)
    safetensors.numpy.save_file(tensors, path)
    check_weights(load_diffusers(tmp_path), network)


def test_a_config_of_2022(tmp_path):
    """Few settings, `predict_epsilon`, and a framework's name."""
    written(tmp_path)
    config = {"_class_name": "DDPMScheduler", "predict_epsilon": False, "tensor_format": "pt"}
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**config, "trained_betas": None, "timestep_values": None}))
    assert load_diffusers(tmp_path).prediction_type == "sample"


def test_settings_left_out_are_those_of_diffusers():
    from jax_ddpm.interop.diffusers import unet_config, unet_from_config

    theirs = dict(UNet2DModel(block_out_channels=(32,) * 4).config)
    ours = unet_config(unet_from_config({"block_out_channels": [32] * 4}, Path("x")))
    for name in ours.keys() & theirs.keys():
        value = theirs[name]
        assert ours[name] == (list(value) if isinstance(value, tuple) else value), name
    assert theirs.keys() - ours.keys() == {"num_train_timesteps", "_use_default_values"}


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"


OTHER_SCHEDULERS = {
    "PNDM": {"beta_schedule": "scaled_linear", "skip_prk_steps": True},
    "DPMSolverMultistep": {"num_train_timesteps": 500, "prediction_type": "v_prediction"},
    "DPMSolverSinglestep": {"variance_type": "learned_range"},
    "UniPCMultistep": {"beta_schedule": "squaredcos_cap_v2"},
    "DEISMultistep": {"beta_end": 0.01},
    "EulerDiscrete": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "EulerAncestralDiscrete": {"beta_start": 2e-4},
    "LMSDiscrete": {"prediction_type": "sample"},
    "DDIMParallel": {"clip_sample": False},
}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own
@pytest.mark.parametrize("name", OTHER_SCHEDULERS)
def test_of_other_schedulers_the_training_is_read(tmp_path, name):
    theirs = getattr(diffusers, f"{name}Scheduler")(**OTHER_SCHEDULERS[name])
    written(tmp_path, CONFIGS["no attention, no middle"], scheduler=theirs)
    # What a pipeline leaves behind when its scheduler is replaced.
    left = {"interpolation_type": "linear", "skip_prk_steps": True, "use_karras_sigmas": False}
    edited(tmp_path / SCHEDULER, clip_sample_range=1.0, **left)
    pretrained = load_diffusers(tmp_path)
    rounding = {"rtol": 3e-4, "atol": 3e-6}
    if name == "EulerDiscrete":  # which writes 2⁻²⁴ for the last ᾱ of 0
        rounding["atol"] = 1e-7
    table = theirs.alphas_cumprod.numpy()
    np.testing.assert_allclose(pretrained.schedule.alphas_cumprod, table, **rounding)
    assert pretrained.prediction_type == theirs.config.prediction_type
    assert pretrained.variance_type == (theirs.config.get("variance_type") or "fixed_small")
    assert pretrained.clip_denoised is False


def test_names_of_2022(tmp_path):
    written(tmp_path)
    before = load_diffusers(tmp_path)
    content = json.loads((tmp_path / UNET).read_text())
    old = {
        name: [f"UNetRes{kind}" for kind in content[name]]
        for name in ("down_block_types", "up_block_types")
    }
    edited(tmp_path / UNET, _class_name="UNetUnconditionalModel", **old)
    assert load_diffusers(tmp_path).model == before.model


def test_an_average_and_a_variant_are_read(tmp_path):
    """As diffusers' training scripts leave them: `EMAModel` adds its own settings."""
    written(tmp_path)
    before = load_diffusers(tmp_path)
    (tmp_path / "unet").rename(tmp_path / "unet_ema")
    average = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 7}
    average |= {"power": 0.75, "update_after_step": 0, "use_ema_warmup": True}
    edited(tmp_path / "unet_ema" / "config.json", **average)
    weights = tmp_path / "unet_ema" / Path(WEIGHTS).name
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    after = load_diffusers(tmp_path)
    assert after.model == before.model
    jax.tree.map(np.testing.assert_array_equal, after.variables, before.variables)
    shutil.copytree(tmp_path / "unet_ema", tmp_path / "unet")
    with pytest.warns(UserWarning, match="reading unet/; its average is in .*unet_ema"):
        load_diffusers(tmp_path)
    shutil.copy(weights.with_suffix(".fp16.safetensors"), weights.with_suffix(".x.safetensors"))
    with pytest.raises(ValueError, match="got several others: .*fp16.safetensors, .*x.safetensors"):
        load_diffusers(tmp_path / "unet_ema")


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (UNET, {"time_embedding_type": "fourier"}, "time_embedding_type: expected 'positional'"),
        (UNET, {"downsample_type": "fir"}, "downsample_type: expected one of .* got 'fir'"),
        (UNET, {"class_embed_type": "timestep"}, "class_embed_type: expected None"),
        (UNET, {"cross_attention_dim": 8}, "expected only settings of UNet2DModel, got cross_att"),
        (UNET, {"_class_name": "UNet2DConditionModel"}, "expected _class_name UNet2DModel, got"),
        (UNET, {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "'SkipDownBlock2D'"),
        (UNET, {"layers_per_block": 2}, r"expected a tensor down_blocks\S+, got none"),
        (UNET, {"block_out_channels": [16, 40]}, r"expected down_blocks\S+ of shape \(40,\)"),
        (UNET, {"add_attention": False}, "expected only the U-Net's tensors, got mid_block.att"),
        (
            SCHEDULER,
            {"_class_name": "SdeVpScheduler"},
            "expected _class_name DDPMScheduler or DDIM",
        ),
        (SCHEDULER, {"beta_schedule": "laplace"}, "beta_schedule: expected .* got 'laplace'"),
        (SCHEDULER, {"prediction_type": "flow"}, "prediction_type: expected one of"),
        (SCHEDULER, {"variance_type": "x"}, "variance_type: expected one of"),
        (SCHEDULER, {"timestep_spacing": "karras"}, "timestep_spacing: expected one of"),
        (SCHEDULER, {"beta_start": -1.0}, "betas: expected values in"),
        (SCHEDULER, {"use_karras_sigmas": True}, "got use_karras_sigmas: True"),
    ],
)
def test_what_is_not_supported_is_named_with_its_file(tmp_path, untyped, file, changes, words):
    written(tmp_path)
    edited(tmp_path / file, **changes)
    with pytest.raises(ValueError, match=words) as raised:
        load_diffusers(tmp_path)
    assert str(tmp_path / file.partition("/")[0]) in str(raised.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / UNET).unlink(), "config.json: expected a JSON file, got none"),
        (lambda f: (f / UNET).write_text("{"), "config.json: expected JSON, got a damaged file"),
        (lambda f: (f / UNET).write_text("[]"), "config.json: expected a JSON object, got list"),
        (lambda f: (f / SCHEDULER).unlink(), "expected scheduler/scheduler_config.json, got none"),
        (lambda f: (f / WEIGHTS).unlink(), "expected diffusion_pytorch_model.safetensors, got no"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x" * 99), "safetensors file, got a damaged one"),
        (
            lambda f: (f / WEIGHTS).rename(f / "unet" / "diffusion_pytorch_model.bin"),
            "a pickle, which can run code; convert .* UNet2DModel as M; M.from_pretrained",
        ),
        (lambda f: f.rename(f.with_name("gone")), "expected a folder of diffusers, got none"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path, damage, words):
    folder = tmp_path / "pipeline"
    written(folder)
    damage(folder)
    with pytest.raises(ValueError, match=words):
        load_diffusers(folder)


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    written(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    index = {"weight_map": {"conv_in.weight": "../../secret.safetensors"}}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected a weight_map of tensors to files beside it"):
        load_diffusers(tmp_path)


def test_a_run_in_the_place_of_a_folder_of_diffusers_is_named(tmp_path):
    (tmp_path / "runs/digits/checkpoints").mkdir(parents=True)
    with pytest.raises(
        ValueError,
        match="digits: expected .*, got a run, which `runs.load_run` opens",
    ):
        load_diffusers(tmp_path / "runs/digits")


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    written(tmp_path / "a")
    pretrained = load_diffusers(tmp_path / "a")
    short = pretrained._replace(schedule=pretrained.chain(10))
    wrong = pretrained._replace(model=pretrained.model.clone(layers_per_block=2))
    odd = pretrained._replace(clip_denoised=jnp.tanh)
    ends = pretrained._replace(set_alpha_to_one=False, variance_type="learned")
    simple = pretrained._replace(model=ddpm.SimpleUNet())
    for broken, words in [
        (short, "schedule: expected the one of training"),
        (wrong, "expected a tensor down_blocks"),
        (odd, "clip_denoised: expected True, False, static"),
        (ends, "variance_type: expected 'fixed_small'"),
        (simple, "model: expected a UNet, got SimpleUNet"),
    ]:
        with pytest.raises(ValueError, match=words):
            save_diffusers(tmp_path / "b", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        save_diffusers(tmp_path / "a", pretrained)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pickle_is_read_by_torch(tmp_path, variant):
    network = written(tmp_path, safe_serialization=False, variant=variant)
    assert [path.suffix for path in (tmp_path / "unet").iterdir()].count(".bin") == 1
    check_weights(load_diffusers(tmp_path, variant=variant), network)


def test_a_variant_is_read_where_it_is_asked_for(tmp_path):
    network = written(tmp_path)
    half = {name: each.half() for name, each in network.state_dict().items()}
    safetensors.torch.save_file(half, (tmp_path / WEIGHTS).with_suffix(".fp16.safetensors"))
    check_weights(load_diffusers(tmp_path), network)
    ours = load_diffusers(tmp_path, variant="fp16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours.variables)} == {"float16"}
    with pytest.raises(ValueError, match="expected diffusion_pytorch_model.ema.safetensors, got"):
        load_diffusers(tmp_path, variant="ema")


def test_what_is_converted_back_may_be_written_to(tmp_path):
    """The opened weights themselves are views of the file."""
    network = written(tmp_path)
    pretrained = load_diffusers(tmp_path)
    for array in ddpm.interop.unet_to_torch(pretrained.variables).values():
        array += 1
    check_weights(pretrained, network)


def test_a_pickle_in_shards(tmp_path):
    network = written(tmp_path, safe_serialization=False, max_shard_size="100KB")
    assert len(list((tmp_path / "unet").glob("*.bin"))) > 1
    check_weights(load_diffusers(tmp_path), network)


def test_a_latent_pipeline_is_refused_by_name(tmp_path):
    written(tmp_path)
    edited(tmp_path / "model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(ValueError, match="model_index.json: expected only a unet and .* got vqvae"):
        load_diffusers(tmp_path)
    edited(tmp_path / "model_index.json", vqvae=[None, None])
    load_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("there", "variant", "fetched"),
    [
        (["unet/X.safetensors", "unet/X.fp16.safetensors", "unet/X.bin"], None, "unet/X.safet"),
        (["unet/X.safetensors", "unet/X.fp16.bin"], "fp16", "unet/X.fp16.bin"),
        (["unet/X-1-of-1.safetensors", "unet/X.bin"], None, "unet/X-1-of-1.safetensors"),
        (["unet/X.fp16.safetensors"], None, "unet/X.fp16.safetensors"),
        (["unet/X.bin", "vae/X.safetensors", "unet_ema/X.safetensors"], None, "unet/X.bin"),
        (["X.bin", "checkpoint-500/unet/X.safetensors"], None, "X.bin"),
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


def test_without_huggingface_hub_its_names_are_answered_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="folder: rnus/digits: no such folder here; .*pip install"):
        ddpm_runs.load_pretrained("rnus/digits")


def test_names_on_the_hub_come_from_its_cache(tmp_path, monkeypatch):
    """Offline, and in a folder that has none of that name."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--owner--tiny.v1"
    network = written(repository / "snapshots" / commit)
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


def check_weights(pretrained, network):
    for name, value in ddpm.interop.unet_to_torch(pretrained.variables).items():
        np.testing.assert_array_equal(value, network.state_dict()[name].numpy())


def test_version():
    """The folders claim to be of a version whose reader these tests ran."""
    from jax_ddpm.interop.diffusers import _WRITTEN_FOR

    assert diffusers.__version__.split(".")[:2] == _WRITTEN_FOR.split(".")[:2]


def test_the_default_pictures_of_a_ddim_folder(tmp_path, defaults):
    """Of ten steps: a network that is not trained magnifies roundings at each of them."""
    network = written(tmp_path, scheduler=DDIMScheduler(clip_sample=True))
    pretrained = load_diffusers(tmp_path)
    x_T = images(0, "float32", (2, 8, 8, 3))
    theirs = DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    theirs.set_timesteps(10)
    x = to_torch(x_T)
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(network(x, t).sample, t, x).prev_sample

    def draw(sampler):
        return jax.jit(
            lambda variables: ddpm.p_sample_loop(
                None,
                pretrained.chain(10),
                lambda x, t: pretrained.model.apply(variables, x, t),
                x_T.shape,
                sampler=sampler,
                x_T=x_T,
                **pretrained.policy,
            )
        )(pretrained.variables)

    expected = from_torch(x)
    np.testing.assert_allclose(draw(pretrained.sampler()), expected, rtol=0, atol=1e-3)
    assert np.abs(draw(ddpm.ddim()) - expected).max() > 0.1  # the other rule


# The configs that google published, as they were written in 2022: ddpm-cifar10-32; and one for
# ddpm-bedroom-256, -cat-256, -church-256, -celebahq-256 and the ema form of each.
GOOGLE = {
    "cifar10-32": {
        "sample_size": 32,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "256": {
        "sample_size": 256,
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
    },
}
GOOGLE_COMMON = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
GOOGLE_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.0.4",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "timestep_values": None,
    "trained_betas": None,
    "variance_type": "fixed_small",
}


@pytest.mark.parametrize(
    ("name", "side"), [("cifar10-32", 32), pytest.param("256", 64, marks=pytest.mark.slow)]
)
def test_the_repositories_of_google(tmp_path, name, side):
    """The network and the scheduler at the root, a pickle, and the attention's names of 2022."""
    config = GOOGLE_COMMON | GOOGLE[name]
    network = reference_unet({k: v for k, v in config.items() if k[0] != "_"}, "float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(GOOGLE_SCHEDULER))
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"} | index))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for tensor, value in network.state_dict().items():
        for now, then in old.items():
            tensor = tensor.replace(f".{now}.", f".{then}.")
        tensors[tensor] = value
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")

    pretrained = load_diffusers(tmp_path)
    assert pretrained.policy == {
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "clip_denoised": True,
    }
    np.testing.assert_allclose(
        pretrained.schedule.alphas_cumprod,
        np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)),
        rtol=1e-12,
    )
    x, t = images(0, "float32", (1, side, side, 3)), timesteps(1000, 1)
    with torch.no_grad():
        expected = from_torch(network(to_torch(x), to_torch(t)).sample)
    output = jax.jit(pretrained.model.apply)(pretrained.variables, x, t)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_default_pictures_of_a_ddpm_folder(tmp_path, defaults):
    """All steps of the pipeline's own loop, on the noise that torch draws for it."""
    network = written(tmp_path, scheduler=DDPMScheduler(100, beta_end=0.2))
    pretrained = load_diffusers(tmp_path)
    theirs = DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    shape, generator = (2, 3, 8, 8), torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    x_T, again = from_torch(x), torch.Generator()
    again.set_state(generator.get_state())
    noise = [from_torch(torch.randn(shape, generator=again)) for _ in range(99)]
    noise = jnp.asarray([np.zeros_like(x_T), *reversed(noise)])
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(network(x, t).sample, t, x, generator=generator).prev_sample

    @jax.jit
    def draw(variables):
        return ddpm.p_sample_loop(
            None,
            pretrained.chain(100),
            lambda x, t: pretrained.model.apply(variables, x, t),
            x_T.shape,
            sampler=pretrained.sampler(),
            x_T=x_T,
            noise_fn=lambda i: noise[i],
            **pretrained.policy,
        )

    np.testing.assert_allclose(draw(pretrained.variables), from_torch(x), rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"solver_order": 1, "timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction", "thresholding": True, "euler_at_final": True},
    ],
    ids=str,
)
def test_the_default_pictures_of_a_dpm_solver_folder(tmp_path, settings):
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(**settings)
    network = written(tmp_path, scheduler=theirs)
    pretrained = load_diffusers(tmp_path)
    x_T = images(0, "float32", (2, 8, 8, 3))
    theirs.set_timesteps(20)
    chain = pretrained.chain(20)
    np.testing.assert_array_equal(chain.timesteps[::-1], theirs.timesteps.numpy())
    x = to_torch(x_T)
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(network(x, t).sample, t, x).prev_sample

    @jax.jit
    def draw(variables):
        return ddpm.p_sample_loop(
            None,
            chain,
            lambda x, t: pretrained.model.apply(variables, x, t),
            x_T.shape,
            sampler=pretrained.sampler(),
            x_T=x_T,
            **pretrained.policy,
        )

    expected = from_torch(x)
    tolerance = 1e-3 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(draw(pretrained.variables), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_all_steps_of_a_dpm_solver_folder(tmp_path, spacing):
    """Where diffusers would repeat an entry, or leave out the last, the chain is the whole one."""
    from diffusers import DPMSolverMultistepScheduler

    written(tmp_path, scheduler=DPMSolverMultistepScheduler(100, timestep_spacing=spacing))
    pretrained = load_diffusers(tmp_path)
    np.testing.assert_array_equal(pretrained.chain(100).timesteps, np.arange(100))
    np.testing.assert_array_equal(pretrained.chain().timesteps, np.arange(100))
    with pytest.raises(ValueError, match="steps: expected 1 to 100"):
        pretrained.chain(101)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"solver_order": 3}, "solver_order: expected one of 1, 2, got 3"),
        ({"solver_type": "heun"}, "solver_type: expected"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type: expected"),
        ({"lambda_min_clipped": -5.1}, "lambda_min_clipped: expected -inf, got -5.1"),
    ],
)
def test_a_solver_that_is_not_here_is_refused_by_name(tmp_path, settings, words):
    from diffusers import DPMSolverMultistepScheduler

    written(tmp_path, scheduler=DPMSolverMultistepScheduler(**settings))
    pretrained = load_diffusers(tmp_path)  # its training is read all the same
    with pytest.raises(ValueError, match=words):
        pretrained.sampler()
    edited(tmp_path / SCHEDULER, algorithm_type="dpmsolver")
    with pytest.raises(ValueError, match="algorithm_type: expected"):
        load_diffusers(tmp_path).sampler()
