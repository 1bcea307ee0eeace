"""The folder of a run, and the model in it.

Network and schedule are written in the words of diffusers' configs, as `interop` reads them.
"""

import json
import os
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from jax_ddpm import __version__
from jax_ddpm._errors import Field, FieldError, check_choice, check_kind
from jax_ddpm.data.dataset import Dataset
from jax_ddpm.data.preparation import Preparation
from jax_ddpm.interop import DiffusionModel, load_diffusers, load_openai, simple_unet_from_torch
from jax_ddpm.interop.diffusers import unet_config, unet_from_config
from jax_ddpm.interop.model import init_variables as initialized
from jax_ddpm.interop.scheduler import scheduler_config, scheduler_from_config
from jax_ddpm.io.arrays import flatten, load_tensors, unflatten
from jax_ddpm.io.checkpoint import list_checkpoints, load_checkpoint, restore, save_checkpoint
from jax_ddpm.io.files import new_folder, write_json
from jax_ddpm.models import SimpleUNet, UNet
from jax_ddpm.reverse import check_prediction
from jax_ddpm.schedule import linear_beta_schedule, make_schedule

FILES = {
    "config.json": "what was run",
    "metrics.jsonl": "loss, learning rate, gradient norm and speed, line by line",
    "checkpoints": "weights, their average, the optimizer: all that is needed to resume",
    "loss.png": "the loss against the step",
    "forward.png": "an image, and the tutorial's square, turning into noise",
    "samples.png": "generated images",
    "reverse.gif": "noise turning into the first of them",
}
"""What is in the folder of a run; the pictures are of its last weights."""
CONFIG, METRICS, CHECKPOINTS, *PICTURES = FILES

_TUTORIAL_TIMESTEPS = 200
PathLike = str | os.PathLike[str]
Weights = Literal["ema", "params"]


def class_number(name: str, names: Sequence[str] | None) -> int | None:
    """The label of the class `name`, in any form of Unicode, or else of the same number; where no
    class has a number for a name, that of a number is itself. None where there is no such class."""
    labels = {unicodedata.normalize("NFC", each): k for k, each in enumerate(names or ())}
    if (plain := unicodedata.normalize("NFC", name)) in labels or not name.isdecimal():
        return labels.get(plain)
    numbers = {int(each): label for each, label in labels.items() if each.isdecimal()}
    return numbers.get(int(name)) if numbers else int(name)


def by_name(names: Sequence[str] | None, others: Sequence[str] | None) -> bool:
    """Whether classes are matched by name: both sides have names, or those of one are numbers, and
    so the other's numbers are its names."""
    return bool(names and others) or all(map(str.isdecimal, names or others or ("none",)))


def matched(
    names: Sequence[str] | None, labels: Sequence[int], data: Dataset, *, some: bool = False
) -> dict[int, int]:
    """The images' own label of each of `labels` whose class they show, by name or by number, as
    `by_name` says. Warns of `labels` that no image has, and of classes that only the images
    have, unless `labels` may be `some` of theirs."""
    called, shown = data.class_names, np.unique(np.asarray(data.labels)).tolist()
    name_of, named = {k: names[k] if names else str(k) for k in labels}, by_name(names, called)
    found: Any = {k: class_number(name_of[k], called) if named else k for k in labels}
    lacked = [name_of[k] for k in labels if found[k] not in shown]
    known = shown if some else found.values()
    strange = [str(called[k] if called else k) for k in shown if k not in known]
    for what, few in (("no image shows, left out", lacked), ("only images show", strange)):
        if few:
            warnings.warn(f"classes that {what}: {', '.join(few[:20])}", stacklevel=3)
    return {label: there for label, there in found.items() if there in shown}


def init_variables(model: UNet | SimpleUNet, key: Any, image_shape: tuple[int, ...]) -> Any:
    """Initial variables. Raises `ValueError` if images of this shape do not suit the network."""
    try:
        return initialized(model, key, image_shape)
    except ValueError as error:
        raise ValueError(f"the network refuses images of {image_shape}: {error}") from None


def describe(run: DiffusionModel, train: Any = None, data: Any = None) -> dict[str, Any]:
    """All of a run that is not an array, as JSON: its config.json, and part of each checkpoint."""
    model = run.model
    if isinstance(model, UNet):
        network = unet_config(model)
    else:
        network = {"_class_name": "SimpleUNet", "channels": model.channels}
    description = {
        "model": network,
        "scheduler": scheduler_config(run),
        "image_shape": run.shape(1)[1:],
        "num_classes": run.num_classes,
        "null_label": run.null_label,
        "guidance": run.guidance,
        "class_names": run.class_names,
        "learned": run.learned,
        "preparation": Preparation(**run.preparation).record(),
        "train": train,
        "data": data,
        "versions": {"jax_ddpm": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }
    return json.loads(json.dumps(description))


def save_run(folder: PathLike, model: DiffusionModel) -> None:
    """Write a run of one checkpoint, in a new folder: its weights are their own average.

    Raises `ValueError` if a weight is not finite, and `OSError`; nothing is left behind then.
    """
    check_kind("model", model, DiffusionModel, "load_run(folder)")
    description, weights = describe(model), model.variables
    with new_folder(Path(folder)) as new:
        save_checkpoint(
            new / CHECKPOINTS, 0, {"params": weights, "ema": weights}, {"run": description}
        )
        write_json(new / CONFIG, description)


def is_run(folder: PathLike) -> bool:
    """Whether `folder` looks like a run, or one of its checkpoints, damaged or not."""
    return (Path(folder) / CHECKPOINTS).is_dir() or _is_checkpoint(Path(folder))


def load_run(
    folder: PathLike, *, checkpoint: int | None = None, weights: Weights = "ema"
) -> DiffusionModel:
    """Read a run that `fit` or `jax-ddpm train` made.

    Args:
      folder: of the run, or one of its checkpoints (`runs/digits/checkpoints/00001500`).
      checkpoint: the step of a checkpoint. Default: the newest.
      weights: their average ("ema"), which samples are drawn from, or the weights ("params").

    Raises:
      FieldError: naming the file that is missing, damaged or does not fit.
    """
    check_choice("weights", weights, get_args(Weights))
    folder = Path(folder)
    alone = checkpoint is None and _is_checkpoint(folder)
    path = folder if alone else _find_checkpoint(folder, checkpoint)
    try:
        return _read_run(path, weights)
    except ValueError as error:
        older = [each for each in list_checkpoints(path.parent) if int(each.name) < int(path.name)]
        hint: tuple[str | Field, ...] = ("; there is no older one",)
        if older:
            before = str(older[-1]) if alone else Field("checkpoint", int(older[-1].name))
            hint = ("; the one before: ", before)
        raise FieldError("folder", _line(error), *hint) from None


def _is_checkpoint(folder: Path) -> bool:
    return folder.parent.name == CHECKPOINTS and folder in list_checkpoints(folder.parent)


def _find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The newest of a run, or that of `step`."""
    if not (folder / CHECKPOINTS).is_dir():
        problem = f"expected a run's folder, got {folder} (no {CHECKPOINTS}/ in it)"
        hint = ": a folder of diffusers, for ", Field("load_pretrained")
        is_theirs = (folder / "model_index.json").exists()
        raise FieldError("folder", problem, *(hint if is_theirs else ()))
    paths = {int(path.name): path for path in list_checkpoints(folder / CHECKPOINTS)}
    if not paths:
        raise FieldError("folder", f"{folder} has no checkpoint yet: train it again to resume")
    if step is not None and step not in paths:
        steps = ", ".join(map(str, paths))
        raise FieldError("checkpoint", f"expected one of {steps} in {folder}, got {step}")
    return paths[max(paths) if step is None else step]


def _read_run(path: Path, weights: str) -> DiffusionModel:
    checkpoint = load_checkpoint(path)
    try:
        description = checkpoint.state["run"]
        height, width, channels = description["image_shape"]
        model = _model(description["model"], path / "state.json")
        scheduler = scheduler_from_config(description["scheduler"], path / "state.json")
        labels = {name: description[name] for name in ("num_classes", "null_label", "guidance")}
        for name in ("class_names", "learned"):
            named = description.get(name)
            labels[name] = None if named is None else tuple(named)
        preparation = Preparation(**description["preparation"]).record()
        image_shape = (height, width, channels)
        flat = checkpoint.arrays[weights]
        expected = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a run's checkpoint: {_line(error)}") from None
    # Weights that came from elsewhere keep their dtype.
    template = {
        name: jax.ShapeDtypeStruct(leaf.shape, flat[name].dtype if name in flat else leaf.dtype)
        for name, leaf in flatten(expected).items()
    }
    try:
        variables = restore(unflatten(template), flat)
    except ValueError as error:
        raise ValueError(f"{path / weights}.safetensors: {error}") from None
    scheduler |= {"image_shape": image_shape, "preparation": preparation}
    return DiffusionModel(model, variables, **scheduler, **labels)


def load_pretrained(folder: PathLike, *, openai_flags: str | None = None) -> DiffusionModel:
    """Read a folder of diffusers; where it does not say which label is the null label, it is the
    last, if samples are guided.

    With `openai_flags`, MODEL_FLAGS and DIFFUSION_FLAGS of OpenAI's code in one string, `folder` is
    a state dict of theirs, a .pt or a .safetensors. It has no null label.

    Raises `FieldError` naming what is missing or does not fit.
    """
    folder = Path(folder)
    if folder.is_file() and openai_flags is None:
        problem = f"{folder} is a file, and no folder of diffusers; one of OpenAI's comes with "
        raise FieldError("folder", problem, Field("openai_flags"))
    if is_run(folder):
        problem = (f"{folder} is a run, for ", Field("load_run"), ", and no folder of diffusers")
        raise FieldError("folder", *problem)
    try:
        if openai_flags is None:
            model = load_diffusers(folder)
        else:
            model = load_openai(folder, openai_flags)
    except (ImportError, ValueError) as error:
        if isinstance(error, FieldError) and error.field == "flags":
            raise FieldError("openai_flags", *error.problem) from None
        raise FieldError("folder", str(error)) from None
    try:
        _check_drawable(model)
    except ValueError as error:
        raise FieldError("folder", f"{folder}: {error}") from None
    return model


def _check_drawable(model: DiffusionModel) -> None:
    """Raises `ValueError` if schedule, network and image size contradict each other."""
    network: Any = model.model
    if model.image_shape is None:
        raise ValueError("expected sample_size in the U-Net's config, got null")
    channels = network.in_channels * (2 if model.variance_type.startswith("learned") else 1)
    if network.out_channels != channels:
        raise ValueError(
            f"expected {channels} output channels for variance_type {model.variance_type!r}, "
            f"got {network.out_channels}"
        )
    check_prediction(model.schedule, model.prediction_type)
    try:
        jax.eval_shape(lambda: init_variables(network, jax.random.key(0), model.shape(1)[1:]))
    except ValueError as error:
        raise ValueError(f"sample_size: {error}") from None


def load_model(folder: PathLike, *, weights: Weights = "ema") -> DiffusionModel:
    """A run, one of its checkpoints or a folder of diffusers, whichever `folder` is."""
    folder = Path(folder)
    if folder.is_file():
        raise FieldError("folder", f"{folder} is a file; `jax-ddpm convert` makes a run of it")
    if not is_run(folder):
        if weights != "ema":
            raise FieldError("weights", f"a folder of diffusers has no choice, got {weights!r}")
        return load_pretrained(folder)
    # By its own folder, which then also names the one before it.
    path = folder if _is_checkpoint(folder) else _find_checkpoint(folder)
    return load_run(path, weights=weights)


def load_state_dict(path: PathLike, *, image_size: int = 64) -> DiffusionModel:
    """Read a state dict of the tutorial's `SimpleUNet`, a .safetensors; its schedule is the
    tutorial's, and `image_size` the height and width of its images, which the file does not say.

    Raises `FieldError` naming what is wrong.
    """
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".bin", ".pkl") and path.exists():
        raise FieldError(
            "path",
            f"{path} is a pickle, which can run code; one of OpenAI's comes with ",
            Field("openai_flags"),
            "; convert another where you trust it: "
            f'python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path}', weights_only=True), 'weights.safetensors')\"",
        )
    try:
        variables: dict[str, Any] = simple_unet_from_torch(load_tensors(path))
    except ValueError as error:
        raise FieldError("path", str(error)) from None
    channels = int(np.shape(variables["params"]["down1"]["kernel"])[2])
    schedule = make_schedule(linear_beta_schedule(_TUTORIAL_TIMESTEPS))
    model, shape = SimpleUNet(channels=channels), (image_size, image_size, channels)
    return DiffusionModel(model, variables, schedule, shape, timestep_spacing="trailing")


def _model(content: Mapping[str, Any], path: Path) -> UNet | SimpleUNet:
    if content.get("_class_name") == "SimpleUNet":
        return SimpleUNet(channels=content["channels"])
    return unet_from_config(content, path)


def _line(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
