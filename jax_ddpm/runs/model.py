"""Models on the disk: the folder of a run, with the names of diffusers' configs, and others."""

import json
import os
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from jax_ddpm import __version__
from jax_ddpm._errors import Field, FieldError, check_choice, check_kind
from jax_ddpm.data import Dataset, Preparation
from jax_ddpm.interop import DiffusionModel, load_diffusers, load_openai, simple_unet_from_torch
from jax_ddpm.interop.diffusers import is_hub_name, unet_config, unet_from_config
from jax_ddpm.interop.model import init_variables
from jax_ddpm.interop.scheduler import scheduler_config, scheduler_from_config
from jax_ddpm.io.arrays import flatten, load_tensors, unflatten
from jax_ddpm.io.checkpoint import list_checkpoints, load_checkpoint, restore, save_checkpoint
from jax_ddpm.io.files import new_folder, write_json
from jax_ddpm.models import SimpleUNet, UNet
from jax_ddpm.reverse import p_mean_variance
from jax_ddpm.schedule import linear_beta_schedule, make_schedule

FILES = {
    "config.json": "what was run",
    "metrics.jsonl": "loss, learning rate, gradient norm and speed, line by line",
    "checkpoints": "weights, their average, the optimizer: all that is needed to resume",
    "loss.png": "the loss against the step",
    "forward.png": "two images turning into noise",
    "samples.png": "generated images",
    "reverse.gif": "noise turning into the first of them",
}
"""What is in the folder of a run; the pictures are of its last weights."""
CONFIG, METRICS, CHECKPOINTS, *PICTURES = FILES

# Fields of a `DiffusionModel` that are written as they are.
_KEPT = ("num_classes", "null_label", "guidance", "class_names", "learned")
PathLike = str | os.PathLike[str]
Weights = Literal["ema", "params"]


def describe(run: DiffusionModel, train: Any = None, data: Any = None) -> dict[str, Any]:
    """All of a run that is not an array, as JSON: its config.json, and part of each checkpoint."""
    model = run.model
    simple = {"_class_name": "SimpleUNet", "channels": getattr(model, "channels", None)}
    description = {
        "model": unet_config(model) if isinstance(model, UNet) else simple,
        "scheduler": scheduler_config(run),
        "image_shape": run.shape(1)[1:],
        **{name: getattr(run, name) for name in _KEPT},
        "preparation": Preparation(**run.preparation).record(),
        "train": train,
        "data": data,
        "versions": {"jax_ddpm": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }
    return json.loads(json.dumps(description))


def save_run(folder: PathLike, model: DiffusionModel) -> None:
    """Write a model as a run of one checkpoint, of step 0, which every command reads.

    Args:
      folder: new or empty.
      model: from `load_run`, `load_model`, `load_diffusers` or `load_openai`, or changed since.

    Raises:
      ValueError: a weight is not finite. Nothing is left behind.

    Examples:
      >>> model = runs.load_run("runs/digits")
      >>> runs.save_run("runs/guided", model._replace(guidance=4.0))
      >>> runs.load_run("runs/guided").guidance
      4.0
    """
    check_kind("model", model, DiffusionModel, "load_run(folder)")
    description, arrays = describe(model), {"params": model.variables, "ema": model.variables}
    with new_folder(Path(folder)) as new:
        save_checkpoint(new / CHECKPOINTS, 0, arrays, {"run": description})
        write_json(new / CONFIG, description)


def is_run(folder: PathLike) -> bool:
    """Whether `folder` looks like a run, or one of its checkpoints, damaged or not."""
    return (Path(folder) / CHECKPOINTS).is_dir() or _is_checkpoint(Path(folder))


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == CHECKPOINTS and path.name.isdecimal()


def load_model(
    folder: PathLike,
    *,
    weights: Weights | None = None,
    openai_flags: str | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> DiffusionModel:
    """Read a model of any kind: a run, or a checkpoint of other code.

    Args:
      folder: a run or one of its checkpoints, a folder of diffusers or its name on Hugging Face's
        hub, a state dict of OpenAI's code (.pt or .safetensors), or a state dict of the tutorial's
        `SimpleUNet` (.safetensors), which gets the tutorial's schedule.
      weights: of a run, as in `load_run`.
      openai_flags: needed for OpenAI's models: their MODEL_FLAGS and DIFFUSION_FLAGS.
      image_size: of the tutorial's model, height and width. Default: 64.
      revision, variant: of diffusers, as in `load_diffusers`; only the hub has revisions.

    Raises:
      FieldError: a file is missing or does not fit, or an option is for another kind of model.
    """
    path, flags = Path(folder), openai_flags
    if is_run(path):
        kind, known = "a run", ("weights",)
    elif flags is not None:
        kind, known = "a state dict of OpenAI's", ("openai_flags",)
    elif path.is_file():
        kind, known = "a state dict of the tutorial's", ("image_size",)
    elif is_hub_name(path):
        kind, known = "a name on the hub", ("revision", "variant")
    else:
        kind, known = "a folder of diffusers", ("variant",)
    options = {"weights": weights, "openai_flags": flags, "image_size": image_size}
    options |= {"revision": revision, "variant": variant}
    for name, value in options.items():
        if value is not None and name not in known:
            raise FieldError(name, f"expected none for {path}, {kind}, got {value}")
    if is_run(path):
        return load_run(path, weights=weights or "ema")
    try:
        if flags is None and path.is_file():
            return _load_simple(path, image_size or 64)
        named = {"revision": revision, "variant": variant}
        model = load_diffusers(path, **named) if flags is None else load_openai(path, flags)
        _check_drawable(model)
        return model
    except (ImportError, ValueError) as error:
        name = "openai_flags" if getattr(error, "field", None) == "flags" else "folder"
        pickled = "image_size" in known and path.suffix in (".pt", ".pth", ".bin", ".pkl")
        hint = ("; one of OpenAI's comes with ", Field("openai_flags")) if pickled else ()
        raise FieldError(name, str(error).removeprefix("flags: "), *hint) from None


def _check_drawable(model: DiffusionModel) -> None:
    """Raises `ValueError` if scheduler, network and image size contradict each other."""
    network: Any = model.model
    labels = () if model.num_classes is None else (np.zeros(1, np.int32),)

    def step(variables: Any, x_t: Any) -> Any:
        def denoise_fn(x_t, t):
            return network.apply(variables, x_t, t, *labels)

        return p_mean_variance(model.schedule, denoise_fn, x_t, 0, **model.policy)

    jax.eval_shape(step, model.variables, jax.ShapeDtypeStruct(model.shape(1), np.float32))


def _load_simple(path: Path, image_size: int) -> DiffusionModel:
    variables: dict[str, Any] = simple_unet_from_torch(load_tensors(path))
    channels = int(np.shape(variables["params"]["down1"]["kernel"])[2])
    model, shape = SimpleUNet(channels=channels), (image_size, image_size, channels)
    schedule = make_schedule(linear_beta_schedule(200))
    return DiffusionModel(model, variables, schedule, shape, timestep_spacing="trailing")


def load_run(
    folder: PathLike, *, checkpoint: int | None = None, weights: Weights = "ema"
) -> DiffusionModel:
    """Read the model of a run from `fit`, `save_run` or `jax-ddpm train`.

    Args:
      folder: the run, or one of its checkpoints (`runs/digits/checkpoints/00001500`).
      checkpoint: the step of a checkpoint. Default: the newest.
      weights: the average of the weights ("ema"), for samples, or the last weights ("params").

    Raises:
      FieldError: a file is missing, damaged or does not fit; the message names it.

    Examples:
      >>> model = runs.load_run("runs/digits", checkpoint=0)
      >>> model.image_shape, model.num_classes, model.schedule.num_timesteps
      ((8, 8, 1), 10, 20)
    """
    check_choice("weights", weights, get_args(Weights))
    folder = Path(folder)
    if checkpoint is None and _is_checkpoint(folder):
        folder, checkpoint = folder.parents[1], int(folder.name)
    paths = {int(path.name): path for path in list_checkpoints(folder / CHECKPOINTS)}
    if not paths:
        missing = "which has no checkpoint" if folder.exists() else "which does not exist"
        raise FieldError("folder", f"expected a run's folder, got {folder}, {missing}")
    step = max(paths) if checkpoint is None else checkpoint
    if step not in paths:
        steps = ", ".join(map(str, paths))
        raise FieldError("checkpoint", f"expected one of {steps} in {folder}, got {step}")
    try:
        return _from_checkpoint(paths[step], weights)
    except ValueError as error:
        older = [path for each, path in paths.items() if each < step]
        hint = f"the one before: {older[-1]}" if older else "there is no older one"
        raise FieldError("folder", f"{error}; {hint}") from None


def _from_checkpoint(path: Path, weights: str) -> DiffusionModel:
    checkpoint, file = load_checkpoint(path), path / "state.json"
    try:
        run = {"learned": None, **checkpoint.state["run"]}  # which the first runs did not record
        config, shape = run["model"], tuple(run["image_shape"])
        simple = config["_class_name"] == "SimpleUNet"
        model = SimpleUNet(config["channels"]) if simple else unet_from_config(config, file)
        fields = scheduler_from_config(run["scheduler"], file)
        for name in _KEPT:
            fields[name] = tuple(run[name]) if isinstance(run[name], list) else run[name]
        fields["preparation"] = Preparation(**run["preparation"]).record()
        arrays = checkpoint.arrays[weights]
        shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), shape))
        # Weights that came from elsewhere keep their dtype.
        dtypes = {name: array.dtype for name, array in arrays.items()}
        expected = {k: x.update(dtype=dtypes.get(k, x.dtype)) for k, x in flatten(shapes).items()}
        variables = unflatten(restore(expected, arrays))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a run's checkpoint: {error!r}") from None
    return DiffusionModel(model, variables, image_shape=shape, **fields)


def class_number(name: str, names: Sequence[str] | None) -> int | None:
    """The label of the class `name`, in any form of Unicode, or of the same number. Where no class
    is named by a number, a number is the label itself. None without such a class."""
    labels = {unicodedata.normalize("NFC", each): k for k, each in enumerate(names or ())}
    if (plain := unicodedata.normalize("NFC", name)) in labels or not name.isdecimal():
        return labels.get(plain)
    numbers = {int(each): label for each, label in labels.items() if each.isdecimal()}
    return numbers.get(int(name)) if numbers else int(name)


def matched(
    names: Sequence[str] | None, labels: Sequence[int], data: Dataset, *, some: bool = False
) -> dict[int, int]:
    """The images' own label of each class of `labels` that they show. Warns of other classes; where
    `labels` are only `some` of the model's, not of those that only the images show."""
    called, shown = data.class_names, np.unique(np.asarray(data.labels)).tolist()
    # By name where both sides have names, or those of one are numbers, else by number.
    by_name = bool(names and called) or all(map(str.isdecimal, names or called or ()))
    name_of = {k: names[k] if names else str(k) for k in labels}
    found: Any = {k: class_number(name_of[k], called) if by_name else k for k in labels}
    there = {k: label for k, label in found.items() if label in shown}
    lacked = [name_of[k] for k in labels if k not in there]
    known = shown if some else there.values()
    strange = [str(called[k] if called else k) for k in shown if k not in known]
    for what, few in (("no image shows, left out", lacked), ("only images show", strange)):
        if few:
            warnings.warn(f"classes that {what}: {', '.join(few[:20])}", stacklevel=3)
    return there
