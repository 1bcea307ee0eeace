"""Folders that diffusers wrote are opened, and diffusers opens what is written."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

import jax_ddpm as ddpm
from jax_ddpm import runs
from jax_ddpm.interop import load_diffusers, save_diffusers
from jax_ddpm.interop.diffusers import from_hub, unet_config, unet_from_config
from jax_ddpm.parity.harness import from_torch, images, to_torch
from torch_reference.models.diffusers import CONFIGS, reference_unet

pytestmark = [
    pytest.mark.usefixtures("defaults"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers' own
]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PICKLE, SHARDS = "unet/diffusion_pytorch_model.bin", f"{WEIGHTS}.index.json"
UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
INDEX = "model_index.json"
OUTSIDE = json.dumps({"weight_map": {"conv_in.weight": "../../secret.safetensors"}})


def written(folder, config, dtype=torch.float32, **options) -> UNet2DModel:
    """A pipeline as diffusers writes it."""
    network = reference_unet({"sample_size": 8, "layers_per_block": 1, **config}, "float32")
    torch.nn.Module.to(network, dtype)  # diffusers' own `to` logs a warning
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder, **options)
    return network


@pytest.fixture
def network(tmp_path, one_level):
    return written(tmp_path / "pipeline", one_level)


@pytest.fixture
def folder(network, tmp_path):
    """A pipeline of `network`, to be edited or damaged."""
    return tmp_path / "pipeline"


def edited(path: Path, **changes):
    """A JSON file with some settings changed."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def check_weights(pretrained, network):
    for name, value in ddpm.interop.unet_to_torch(pretrained.variables).items():
        np.testing.assert_array_equal(value, network.state_dict()[name].numpy())


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_and_weights_come_and_go(tmp_path, name):
    """To the bit, and arrays may be written to, though the opened ones are views of the file."""
    network = written(tmp_path / "theirs", CONFIGS[name])
    pretrained = load_diffusers(tmp_path / "theirs")
    for array in ddpm.interop.unet_to_torch(pretrained.variables).values():
        array += 1
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
        assert np.array_equal(ours[name], theirs[name]), name
    assert theirs.keys() - ours.keys() == {"num_train_timesteps", "_use_default_values"}


COSINE, V = {"beta_schedule": "squaredcos_cap_v2"}, {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True} | V
OFFSET = {"timestep_spacing": "leading", "steps_offset": 1}
SOLVERS = "UniPCMultistep", "DEISMultistep", "EulerAncestralDiscrete", "LMSDiscrete"
SCHEDULERS = [
    ("DDPM", {"num_train_timesteps": 400} | COSINE | V),
    ("DDPM", {"beta_schedule": "sigmoid", "prediction_type": "sample"}),
    ("DDPM", {"variance_type": "learned_range", "clip_sample": False}),
    ("DDPM", {"num_train_timesteps": 5, "trained_betas": [0.1, 0.2, 0.15, 0.3, 0.5]}),
    ("DDPM", {"timestep_spacing": "trailing"} | ZERO_SNR),
    ("DDPM", {"thresholding": True, "sample_max_value": 3.0}),
    ("DDPMParallel", {"variance_type": "fixed_large", "timestep_spacing": "linspace"}),
    ("DDIM", {"set_alpha_to_one": False} | OFFSET),
    ("DDIMParallel", {"clip_sample": False}),
    ("PNDM", {"beta_start": 0.001, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
    ("DPMSolverSinglestep", {"variance_type": "learned_range"}),
    ("EulerDiscrete", ZERO_SNR),
    *((kind, {"beta_end": 0.01}) for kind in SOLVERS),
]


def check_training(pretrained, theirs, atol=3e-6):
    # diffusers multiplies ᾱ up in float32.
    table = theirs.alphas_cumprod.numpy()
    np.testing.assert_allclose(pretrained.schedule.alphas_cumprod, table, rtol=3e-4, atol=atol)
    assert pretrained.prediction_type == theirs.config.prediction_type
    assert pretrained.variance_type == (theirs.config.get("variance_type") or "fixed_small")


@pytest.mark.parametrize(("kind", "settings"), SCHEDULERS, ids=str)
def test_schedulers(folder, kind, settings):
    """How the network was trained is read, and diffusers reads it back."""
    theirs = getattr(diffusers, f"{kind}Scheduler")(**settings)
    said = theirs.config
    theirs.save_pretrained(folder / "scheduler")
    # What a pipeline leaves behind when its scheduler is replaced.
    left = {"clip_sample_range": 1.0, "skip_prk_steps": True, "use_karras_sigmas": False}
    edited(folder / SCHEDULER, **left | said)
    pretrained = load_diffusers(folder)
    # EulerDiscreteScheduler writes 2⁻²⁴ for the last ᾱ of 0.
    check_training(pretrained, theirs, atol=1e-7 if kind == "EulerDiscrete" else 3e-6)
    clips = said.get("clip_sample") or said.get("thresholding")
    assert bool(pretrained.clip_denoised) == bool(clips)

    save_diffusers(folder / "ours", pretrained)
    written_as = json.loads((folder / "ours" / INDEX).read_text())["scheduler"][1]
    back = getattr(diffusers, written_as).from_pretrained(folder / "ours/scheduler")
    check_training(pretrained, back)
    kept = {"timestep_spacing", "steps_offset", "thresholding", "set_alpha_to_one"}
    for setting in kept & said.keys() & back.config.keys():
        assert back.config[setting] == said[setting]
    again = load_diffusers(folder / "ours")
    assert again[3:10] == pretrained[3:10]  # from image_shape to set_alpha_to_one
    jax.tree.map(np.testing.assert_array_equal, again.schedule, pretrained.schedule)


@pytest.mark.parametrize(
    ("kind", "settings", "steps"),
    [
        ("DDPM", {"num_train_timesteps": 100, "beta_end": 0.2}, 100),
        ("DDPM", {"clip_sample_range": 2.5, "timestep_spacing": "linspace"} | V, 15),
        ("DDIM", {"clip_sample": True}, 15),
        ("DDIM", {"thresholding": True, "sample_max_value": 3.0}, 15),
        ("DDIM", {"set_alpha_to_one": False} | OFFSET, 15),
        ("DPMSolverMultistep", {}, 15),
        ("DPMSolverMultistep", {"solver_order": 1} | OFFSET, 15),
        ("DPMSolverMultistep", {"timestep_spacing": "trailing"} | COSINE, 15),
        ("DPMSolverMultistep", {"thresholding": True, "euler_at_final": True} | V, 15),
        # Of few steps, which tell its ᾱ_T = 2⁻²⁴ from 0.
        ("DPMSolverMultistep", ZERO_SNR, 3),
    ],
    ids=str,
)
def test_the_default_pictures_of_a_folder(folder, network, kind, settings, steps):
    """Mostly of few steps: a network that is not trained magnifies roundings at each of them."""
    theirs = getattr(diffusers, f"{kind}Scheduler")(**settings)
    theirs.save_pretrained(folder / "scheduler")
    pretrained, x_T = load_diffusers(folder), images(0, "float32", (2, 8, 8, 3))
    theirs.set_timesteps(steps)
    chain, x, noise = pretrained.chain(steps), to_torch(x_T), []
    np.testing.assert_array_equal(chain.timesteps[::-1], theirs.timesteps.numpy())
    seeded, again = (torch.Generator().manual_seed(7) for _ in range(2))
    for t in theirs.timesteps:
        with torch.no_grad():
            x = theirs.step(network(x, t).sample, t, x, generator=seeded).prev_sample
        noise.insert(0, from_torch(torch.randn(x.shape, generator=again)))

    @jax.jit
    def draw(variables, noise):
        denoise_fn = partial(pretrained.model.apply, variables)
        options = {"sampler": pretrained.sampler(), "x_T": x_T, **pretrained.policy}
        options["noise_fn"] = lambda i: noise[i]
        return ddpm.p_sample_loop(None, chain, denoise_fn, x_T.shape, **options)

    ours, expected = draw(pretrained.variables, np.stack(noise)), from_torch(x)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("settings", [{"timestep_spacing": "trailing"}, {"steps_offset": 1}])
def test_what_keeps_noise_in_diffusers_is_said(folder, settings):
    """Its last step adds noise wherever t is above 0."""
    DDPMScheduler(variance_type="fixed_large", **settings).save_pretrained(folder / "scheduler")
    with pytest.warns(match="variance_type: diffusers adds the noise of 'fixed_large' in the last"):
        save_diffusers(folder / "ours", load_diffusers(folder))


def test_folders_of_a_dpm_solver(folder):
    """The chain of all steps is whole, where diffusers would repeat an entry or leave out the last.
    Another solver is refused by name; its training is read all the same."""
    other = {"solver_order": 3, "solver_type": "heun", "final_sigmas_type": "sigma_min"}
    other |= {"lambda_min_clipped": -5.1, "algorithm_type": "dpmsolver"}
    spacings = ("leading", "trailing", "linspace")
    for name, value in (*(("timestep_spacing", each) for each in spacings), *other.items()):
        DPMSolverMultistepScheduler(100).save_pretrained(folder / "scheduler")
        edited(folder / SCHEDULER, **{name: value})
        pretrained = load_diffusers(folder)
        np.testing.assert_array_equal(pretrained.chain().timesteps, np.arange(100))
        if name in other:
            with pytest.raises(ValueError, match=f"{name}: expected"):
                pretrained.sampler()


@pytest.mark.parametrize(
    ("dtype", "shards", "safe", "variant"),
    [
        (torch.float16, 1, True, "fp16"),
        (torch.float64, 8, True, None),
        (torch.bfloat16, 1, False, None),
        (torch.float32, 4, False, "non_ema"),
    ],
)
def test_files_of_weights(tmp_path, one_level, dtype, shards, safe, variant):
    """In whole or in shards, as safetensors or pickles, of any dtype, they come and go."""
    options = {"safe_serialization": safe, "variant": variant}
    options["max_shard_size"] = "100MB" if shards == 1 else "10KB"
    network = written(tmp_path / "theirs", one_level, dtype, **options)
    files = [*(tmp_path / "theirs/unet").glob(f"*{'.safetensors' if safe else '.bin'}")]
    assert len(files) == shards
    save_diffusers(tmp_path / "ours", load_diffusers(tmp_path / "theirs", variant=variant))
    back = safetensors.torch.load_file(tmp_path / "ours" / WEIGHTS)
    for tensor, value in network.state_dict().items():
        assert back[tensor].dtype == value.dtype and torch.equal(back[tensor], value)
    files[0].unlink()
    with pytest.raises(ValueError, match="No such file|got none"):
        load_diffusers(tmp_path / "theirs", variant=variant)


def test_labels_and_image_size(folder, one_level):
    """The last label is a class and guides, unless the folder says which of both it is."""
    written(folder, one_level | {"num_class_embeds": 4})
    for said, expected in ((None, (4, 3)), ("none", (4, None)), (3, (3, 3))):
        edited(folder / UNET, _null_label=said)
        opened = load_diffusers(folder)
        assert (opened.num_classes, opened.null_label) == expected
        assert opened.image_shape == (8, 8, 3)
        save_diffusers(folder / f"ours {said}", opened)
        assert load_diffusers(folder / f"ours {said}")[3:-1] == opened[3:-1]
    edited(folder / UNET, sample_size=None)
    with pytest.raises(ValueError, match="image_shape: expected height, width and channels, got N"):
        runs.draw(jax.random.key(0), load_diffusers(folder), 1)


def test_which_variant_is_read(folder, network):
    whole = folder / WEIGHTS
    half = {name: each.half() for name, each in network.state_dict().items()}
    safetensors.torch.save_file(half, whole.with_suffix(".fp16.safetensors"))
    check_weights(load_diffusers(folder), network)
    ours = load_diffusers(folder, variant="fp16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours.variables)} == {"float16"}
    with pytest.raises(ValueError, match="expected diffusion_pytorch_model.ema.safetensors, got"):
        load_diffusers(folder, variant="ema")
    whole.rename(whole.with_suffix(".x.safetensors"))
    with pytest.raises(ValueError, match="got .*fp16.safetensors, .*x.safetensors"):
        load_diffusers(folder)
    whole.with_suffix(".fp16.safetensors").unlink()
    check_weights(load_diffusers(folder), network)


def test_an_average_is_read_where_it_is_alone(folder, network):
    """As diffusers' training scripts leave it: `EMAModel` adds its own settings."""
    average = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 7}
    average |= {"power": 0.75, "update_after_step": 0, "use_ema_warmup": True}
    edited(folder / UNET, **average)
    (folder / "unet").rename(folder / "unet_ema")
    check_weights(load_diffusers(folder), network)
    with pytest.warns(UserWarning, match="no scheduler_config.json"):
        check_weights(load_diffusers(folder / "unet_ema"), network)
    shutil.copytree(folder / "unet_ema", folder / "unet")
    with pytest.warns(UserWarning, match="reading unet/; its average is in .*unet_ema"):
        load_diffusers(folder)


def test_configs_of_2022(folder, network):
    """Other names of the classes, few settings, `predict_epsilon`, and a framework's name."""
    blocks = {f"{way}_block_types": [f"UNetRes{way.title()}Block2D"] for way in ("down", "up")}
    edited(folder / UNET, _class_name="UNetUnconditionalModel", **blocks)
    config = {"_class_name": "DDPMScheduler", "predict_epsilon": False, "tensor_format": "pt"}
    (folder / SCHEDULER).write_text(json.dumps(config))
    edited(folder / INDEX, vqvae=[None, None])
    opened = load_diffusers(folder)
    check_weights(opened, network)
    assert opened.prediction_type == "sample"


@pytest.mark.parametrize(
    ("name", "preset"),
    [("ddpm-cifar10-32", ddpm.ddpm_cifar10), ("ddpm-celebahq-256", ddpm.ddpm_celebahq)],
)
def test_the_repositories_of_google(tmp_path, name, preset):
    """Their configs at the root, with a quarter of the channels; a pickle; the names of 2022."""
    published = json.loads(Path(__file__).with_name("google.json").read_text())[name]
    config = published["config.json"]
    config["block_out_channels"] = [each // 4 for each in config["block_out_channels"]]
    network = reference_unet({k: v for k, v in config.items() if k[0] != "_"}, "float32")
    for file, settings in published.items():
        (tmp_path / file).write_text(json.dumps(settings))
    tensors = network.state_dict()
    for now, then in (("q", "query"), ("k", "key"), ("v", "value"), ("out.0", "proj_attn")):
        tensors = {name.replace(f".to_{now}.", f".{then}."): tensors[name] for name in tensors}
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")

    pretrained = load_diffusers(tmp_path)
    assert pretrained.model == preset(block_out_channels=tuple(config["block_out_channels"]))
    check_weights(pretrained, network)
    assert list(pretrained.policy.values()) == ["epsilon", "fixed_small", True]
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(pretrained.schedule.alphas_cumprod, alpha_bar, rtol=1e-12)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ((UNET, "time_embedding_type", "fourier"), "unet.*time_embedding_type: expected one of"),
        ((UNET, "_class_name", "UNet2DConditionModel"), "unet.*expected _class_name UNet2DModel"),
        ((UNET, "layers_per_block", 2), r"unet.*down_blocks\S+: expected .*, got no tensor"),
        ((UNET, "_null_label", 3), "unet.*_null_label: expected one of .*, got 3"),
        ((SCHEDULER, "beta_schedule", "laplace"), "scheduler.*beta_schedule: .* got 'laplace'"),
        ((SCHEDULER, "use_karras_sigmas", True), "scheduler.*got use_karras_sigmas: True"),
        ((INDEX, "vqvae", ["diffusers", "VQModel"]), "only a unet and .* got vqvae"),
        (lambda f: (f / SCHEDULER).unlink(), "_config.json: expected a JSON file: No such file"),
        (lambda f: (f / WEIGHTS).rename(f / PICKLE), "model.bin: expected a state dict of tensors"),
        (lambda f: (f / WEIGHTS).rename(f / SHARDS).write_text(OUTSIDE), "No such file"),
        (
            lambda f: [(f / INDEX).unlink(), (f / "checkpoints").mkdir()],
            "got a run .`runs.load_run",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(folder, untyped, damage, words):
    if callable(damage):
        damage(folder)
    else:
        edited(folder / damage[0], **dict([damage[1:]]))
    with pytest.raises(ValueError, match=words):
        load_diffusers(folder)


def test_a_scheduler_that_contradicts_its_network_is_refused(folder, untyped):
    edited(folder / SCHEDULER, variance_type="learned_range")
    with pytest.raises(ValueError, match="folder: output of denoise_fn: expected shape"):
        runs.load_model(folder)


def test_what_cannot_be_written_leaves_nothing(folder):
    pretrained = load_diffusers(folder)
    for broken, words in [
        ({"schedule": pretrained.chain(10)}, "schedule: expected the one of training"),
        ({"model": pretrained.model.clone(layers_per_block=2)}, "down_blocks.* got no tensor"),
        ({"model": ddpm.SimpleUNet()}, "model: expected a UNet, .* got a SimpleUNet"),
        ({"clip_denoised": jnp.tanh}, "clip_denoised: expected True, False, static"),
        (dict(set_alpha_to_one=False, variance_type="learned"), "variance_type: expected 'fixed_s"),
    ]:
        with pytest.raises(ValueError, match=words):
            save_diffusers(folder.parent / "b", pretrained._replace(**broken))
    assert list(folder.parent.iterdir()) == [folder]
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        save_diffusers(folder, pretrained)


@pytest.mark.parametrize(
    ("there", "variant"),
    [
        (["unet/X.safetensors", "unet/X.fp16.safetensors", "unet/X.bin"], None),
        (["unet/X.fp16.bin", "unet/X.safetensors"], "fp16"),
        (["unet/X-1-of-1.safetensors", "unet/X.bin"], None),
        (["unet/X.fp16.safetensors"], None),
        (["X.bin", "checkpoint-500/unet/X.safetensors", "vae/X.safetensors"], None),
    ],
    ids=str,
)
def test_what_comes_from_the_hub(tmp_path, monkeypatch, there, variant):
    """The configs, and of these weights the first, by huggingface_hub's own matching of names."""
    from huggingface_hub.utils import filter_repo_objects

    files = [Path(name.replace("X", "diffusion_pytorch_model")) for name in there]
    names = [INDEX, *map(str, files), *(str(file.with_name("config.json")) for file in files)]

    def snapshot_download(name, *, revision, allow_patterns):
        for file in filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert from_hub("owner/name", None, variant) == tmp_path
    assert [(tmp_path / file).exists() for file in files] == [True] + [False] * (len(files) - 1)


def test_without_huggingface_hub_its_names_are_answered_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="folder: rnus/digits: no such folder here; .*pip install"):
        runs.load_model("rnus/digits")


def test_names_on_the_hub_come_from_its_cache(folder, network, tmp_path, monkeypatch):
    """Offline, and in a folder that has none of that name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "0123456789" * 4
    repository = tmp_path / "cache" / "models--owner--tiny.v1"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.chdir(tmp_path)
    check_weights(load_diffusers("owner/tiny.v1"), network)
    check_weights(runs.load_model("owner/tiny.v1", revision=commit), network)
    with pytest.raises(runs.FieldError, match="^folder: .*fp16"):
        runs.load_model("owner/tiny.v1", variant="fp16")
    for name in ("revision", "weights"):
        with pytest.raises(runs.FieldError, match=f"^{name}: .* b, a folder of diffusers, got ema"):
            runs.load_model("b", **{name: "ema"})
    with pytest.raises(ValueError, match="owner/other: expected a folder .*, and on the hub: "):
        load_diffusers("owner/other")
    for wrong in ({"revision": "v2"}, {"variant": "fp8"}, {"revision": commit, "variant": "fp8"}):
        with pytest.raises(ValueError, match=[*wrong.values()][-1]):
            load_diffusers("owner/tiny.v1", **wrong)
    (tmp_path / "owner").mkdir()
    with pytest.raises(ValueError, match="owner/tiny.v1: expected a folder .*, got none$"):
        load_diffusers("owner/tiny.v1")
    with pytest.raises(ValueError, match="revision: expected None for a folder, got 'main'"):
        load_diffusers(tmp_path, revision="main")
