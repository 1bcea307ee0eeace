"""The model before the first step: a new one that suits the images, or a trained one."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm._errors import Field, FieldError
from jax_ddpm.data import Dataset
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.losses import check_loss
from jax_ddpm.models import SimpleUNet, UNet, ddpm_digits
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.model import by_name, init_variables, load_model, matched
from jax_ddpm.runs.settings import Settings, named_schedule


def new_run(settings: Settings, data: Dataset) -> DiffusionModel:
    """The model that `settings` ask for, for these images, not yet trained on them.

    Raises `FieldError` where they do not suit one another.
    """
    if (settings.batch_size or 1) > len(data.images):
        problem = f"expected at most {len(data.images)}, the number of images"
        raise FieldError("batch_size", f"{problem}, got {settings.batch_size}")
    if settings.init is not None:
        run = _from_init(settings, settings.init, data)
    else:
        run = untrained(settings, data.image_shape, data.num_classes)
        variables = init_variables(run.model, seed_key(settings.seed), data.image_shape)
        run = run._replace(variables=variables)
    check_loss(settings.loss_type, settings.weighting, run.variance_type)
    run = run._replace(preparation=data.preparation.record())
    if run.num_classes is None:
        return run
    learned = np.unique(np.asarray(data.labels)).tolist() if settings.label_dropout < 1 else ()
    return run._replace(class_names=data.class_names or run.class_names, learned=tuple(learned))


def untrained(
    settings: Settings, image_shape: tuple[int, int, int], num_classes: int | None
) -> DiffusionModel:
    """The model that `settings` ask for; its weights are shapes.

    Raises `FieldError` where the network does not suit the images.
    """
    classes = num_classes if settings.model == "unet" else None
    null_label = classes if settings.label_dropout else None
    model = _new_model(settings, image_shape, classes and classes + (null_label is not None))
    try:
        variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    except ValueError as error:
        raise FieldError("unet" if settings.unet else "data", str(error)) from None
    return DiffusionModel(
        model,
        variables,
        named_schedule(settings.schedule, settings.timesteps),
        image_shape,
        prediction_type=settings.prediction_type,
        variance_type=settings.variance_type,
        timestep_spacing="trailing",
        num_classes=classes,
        null_label=null_label,
        guidance=_guidance(settings, null_label),
    )


def computing(run: DiffusionModel, *, dtype: str, remat: bool) -> DiffusionModel:
    """The run, its network with this dtype and rematerialisation."""
    model = run.model
    if remat:
        if not isinstance(model, UNet):
            raise FieldError("remat", "the tutorial's network has no blocks to recompute")
        model = model.clone(remat=True)
    if dtype != "float32":
        model = model.clone(dtype=jnp.dtype(dtype))
    return run._replace(model=model)


def _from_init(settings: Settings, init: Path, data: Dataset) -> DiffusionModel:
    try:
        run = load_model(init)
    except FieldError as error:
        raise FieldError("init", *error.problem) from None
    # Sixteen bits hold a network, but not the small steps that train it.
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), run.variables)
    run = run._replace(variables=variables)
    if run.image_shape != data.image_shape:
        problem = f"expected images of {run.image_shape}, as its network, got {data.image_shape}"
        raise FieldError("init", problem)
    if run.num_classes is None:
        if data.labels is not None:
            warnings.warn("labels are left out: the network of init has no classes", stacklevel=2)
        return run
    named = by_name(run.class_names, data.class_names)
    if data.num_classes is None or (data.num_classes > run.num_classes and not named):
        problem = f"its network has {run.num_classes} classes"
        raise FieldError("init", f"{problem}, the images {data.num_classes or 'none'}")
    # With fewer classes than the network has, its null label is none of them.
    null = run.null_label if data.num_classes < run.num_classes else None
    found = matched(run.class_names, [k for k in range(run.num_classes) if k != null], data)
    known = {there: label for label, there in found.items()}
    rows = [known.get(label) if named else label for label in range(data.num_classes)]
    names = run.class_names[: len(rows)] if run.class_names and not named else None
    # A checkpoint whose every label is a class has none left to stand for no class.
    null_label = run.null_label if settings.label_dropout and run.null_label not in rows else None
    if null_label is None and settings.label_dropout not in (Settings.label_dropout, 0):
        raise FieldError("label_dropout", "the network has no label that stands for no class")
    if named or null_label is None:
        # Label k becomes the network's own label `rows[k]`, or a new one for None.
        labels = rows if null_label is None else [*rows, null_label]
        network: Any = run.model
        network = network.clone(num_class_embeds=len(labels))
        new = init_variables(network, jax.random.key(settings.seed), data.image_shape)["params"]
        params, table = run.variables["params"], "class_embedding"
        new, old = (each[table]["embedding"] for each in (new, params))
        chosen = [new[k] if row is None else old[row] for k, row in enumerate(labels)]
        variables = {"params": {**params, table: {"embedding": np.stack(chosen)}}}
        run = run._replace(model=network, variables=variables)
        null_label = None if null_label is None else len(rows)
    guidance = _guidance(settings, null_label)
    run = run._replace(num_classes=len(rows), null_label=null_label, guidance=guidance)
    return run._replace(class_names=names)


def _guidance(settings: Settings, null_label: int | None) -> float:
    """The scale in the settings, where images with and without a label are learned."""
    scale = settings.guidance
    if null_label is not None and settings.label_dropout < 1:
        return 2.0 if scale is None else scale
    if scale not in (None, 1):
        problem = "the network has no label that stands for no class, or ", Field("label_dropout")
        sides = f" {settings.label_dropout:g} trains but one side: expected 1, got {scale:g}"
        raise FieldError("guidance", *problem, sides)
    return 1.0


def _new_model(settings: Settings, image_shape: tuple[int, ...], num_labels: int | None) -> Any:
    height, width, channels = image_shape
    learned = settings.variance_type.startswith("learned")
    if settings.model == "simple":
        if learned:
            raise FieldError("variance_type", "a learned one comes with ", Field("model", "unet"))
        return SimpleUNet(channels=channels)
    given: dict[str, Any] = {
        k: tuple(x) if isinstance(x, list) else x for k, x in (settings.unet or {}).items()
    }
    # One more level for every doubling from 32 pixels on, up to four; attention at the lowest.
    levels = 2
    for side in (32, 64):
        levels += min(height, width) >= side and not (height % (side // 8) or width % (side // 8))
    widths: Any = given.get("block_out_channels", (32, *(64,) * (levels - 1)))
    plain = len(widths) - 1 if isinstance(widths, tuple) else levels - 1
    small: dict[str, Any] = {
        "block_out_channels": widths,
        "down_block_types": (*("DownBlock2D",) * plain, "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", *("UpBlock2D",) * plain),
        "sample_size": (height, width),
        "in_channels": channels,
        "out_channels": channels * (1 + learned),
        "num_class_embeds": num_labels,
    }
    return ddpm_digits(**small | given)
