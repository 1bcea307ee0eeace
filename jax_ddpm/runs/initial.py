"""The model before the first step: a new one that suits the images, or a trained one."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm._errors import Field, FieldError
from jax_ddpm.data import Dataset
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.interop.model import init_variables
from jax_ddpm.losses import check_loss
from jax_ddpm.models import SimpleUNet, UNet, ddpm_digits
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.drawing import with_guidance
from jax_ddpm.runs.model import load_model, matched
from jax_ddpm.runs.settings import Settings, named_schedule


def new_run(settings: Settings, data: Dataset) -> DiffusionModel:
    """The model that `settings` ask for, for these images, not yet trained on them."""
    if (settings.batch_size or 1) > len(data.images):
        problem = f"expected at most {len(data.images)} images, got {settings.batch_size}"
        raise FieldError("batch_size", problem)
    if settings.init is not None:
        run = _trained(settings, settings.init, data)
    else:
        run = untrained(settings, data.image_shape, data.num_classes)
        key = seed_key(settings.seed)
        run = run._replace(variables=init_variables(run.model, key, data.image_shape))
    check_loss(settings.loss_type, settings.weighting, run.variance_type)
    run = run._replace(preparation=data.preparation.record())
    if run.num_classes is not None:
        learned = np.unique(np.asarray(data.labels)).tolist() if settings.label_dropout < 1 else ()
        names = data.class_names or run.class_names
        run = run._replace(class_names=names, learned=tuple(learned))
    return with_guidance(run, settings.guidance)


def untrained(
    settings: Settings, image_shape: tuple[int, int, int], num_classes: int | None
) -> DiffusionModel:
    """A new model, as `settings` ask for; its weights are shapes."""
    classes = num_classes if settings.model == "unet" else None
    null_label = classes if settings.label_dropout else None
    model = _new_model(settings, image_shape, classes and classes + (null_label is not None))
    try:
        variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    except ValueError as error:
        problem = f"the network refuses images of {image_shape}: {error}"
        raise FieldError("unet" if settings.unet else "data", problem) from None
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
        guidance=1.0 if null_label is None or settings.label_dropout == 1 else 2.0,
    )


def _new_model(settings: Settings, image_shape: tuple[int, ...], num_labels: int | None) -> Any:
    height, width, channels = image_shape
    learned = settings.variance_type.startswith("learned")
    if settings.model == "simple":
        if learned:
            raise FieldError("variance_type", "a learned one comes with ", Field("model", "unet"))
        return SimpleUNet(channels=channels)
    # A level more for every doubling from 32 pixels on, up to four; attention at the lowest.
    levels = 2
    for side in (32, 64):
        levels += min(height, width) >= side and not (height % (side // 8) or width % (side // 8))
    given: Any = settings.unet or {}
    given = {k: tuple(x) if isinstance(x, list) else x for k, x in given.items()}
    widths = given.get("block_out_channels", (32, *(64,) * (levels - 1)))
    plain = np.size(widths) - 1
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


def _trained(settings: Settings, init: Path, data: Dataset) -> DiffusionModel:
    """The model in `init`; its label k now is class k of the images."""
    try:
        run = load_model(init)
    except FieldError as error:
        raise FieldError("init", *error.problem) from None
    # Sixteen bits hold a network, but not the small steps that train it.
    run = run._replace(variables=jax.tree.map(lambda x: np.asarray(x, "float32"), run.variables))
    if run.image_shape != data.image_shape:
        raise FieldError("init", f"expected images of {run.image_shape}, got {data.image_shape}")
    if run.num_classes is None:
        if data.labels is not None:
            warnings.warn("labels are left out: the network of init has no classes", stacklevel=2)
        return run
    if data.num_classes is None:
        raise FieldError("init", f"its network has {run.num_classes} classes, the images none")

    # The network has a row for each label: which one is that of each class of the images?
    classes = [*range(data.num_classes)]
    labels = [k for k in range(run.num_classes) if k != run.null_label or k in classes]
    shown = replace(data, labels=np.asarray(classes))  # a class without an image has its row, too
    row_of = {k: row for row, k in matched(run.class_names, labels, shown).items()}
    rows = [row_of.get(k) for k in classes]  # None: the class is new
    # By name, rows of other classes are dropped. By number, a larger table stays as it is.
    stay = rows == classes and not (run.class_names and data.class_names)
    names = run.class_names[: len(rows)] if stay and run.class_names else None
    # The label of no class goes where a class of the images has its row, or no label is dropped.
    null = run.null_label if settings.label_dropout and run.null_label not in rows else None
    if null is None and settings.label_dropout not in (Settings.label_dropout, 0):
        raise FieldError("label_dropout", "the network has no label that stands for no class")
    if null is None or not stay:
        run = _with_rows(run, rows if null is None else [*rows, null], settings.seed)
        null = None if null is None else len(rows)
    guidance = 1.0 if null is None or settings.label_dropout == 1 else 2.0
    run = run._replace(num_classes=len(rows), null_label=null, guidance=guidance)
    return run._replace(class_names=names)


def _with_rows(run: DiffusionModel, rows: list[int | None], seed: int) -> DiffusionModel:
    """The run, its network with these of its rows for the labels 0, 1, …; None: a new one."""
    network: Any = run.model
    network = network.clone(num_class_embeds=len(rows))
    fresh = init_variables(network, seed_key(seed), run.shape(1)[1:])
    own, new = (x["params"]["class_embedding"]["embedding"] for x in (run.variables, fresh))
    chosen = np.stack([new[k] if row is None else own[row] for k, row in enumerate(rows)])
    params = {**run.variables["params"], "class_embedding": {"embedding": chosen}}
    return run._replace(model=network, variables={"params": params})


def computing(run: DiffusionModel, *, dtype: str, remat: bool) -> DiffusionModel:
    """The run, its network with this dtype and rematerialisation."""
    if remat and not isinstance(run.model, UNet):
        raise FieldError("remat", "the tutorial's network has no blocks to recompute")
    changes: dict[str, Any] = {"remat": True} if remat else {}
    if dtype != "float32":
        changes["dtype"] = jnp.dtype(dtype)
    return run._replace(model=run.model.clone(**changes))
