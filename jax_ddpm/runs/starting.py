"""The model before the first step: a new one that suits the images, or a trained one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm._checks import Field, FieldError
from jax_ddpm.data import Dataset
from jax_ddpm.interop import Pretrained
from jax_ddpm.losses import check_loss
from jax_ddpm.models import SimpleUNet, UNet, ddpm_digits
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.run import Run, init_variables, load_model
from jax_ddpm.runs.settings import Settings, named_schedule

__all__ = ["computing", "new_run", "untrained"]


def new_run(settings: Settings, data: Dataset) -> Run:
    """The model that `settings` ask for, for these images, not yet trained on them.

    Raises `FieldError` where they do not suit one another.
    """
    if (settings.batch_size or 1) > len(data.images):
        problem = f"expected at most {len(data.images)}, the number of images"
        raise FieldError("batch_size", f"{problem}, got {settings.batch_size}")
    if settings.init is not None:
        run = _from_init(settings, data)
    else:
        run = untrained(settings, data.image_shape, data.num_classes)
        key = seed_key(settings.seed)
        variables = init_variables(run.pretrained.model, key, run.image_shape)
        run = run._replace(pretrained=run.pretrained._replace(variables=variables))
    check_loss(settings.loss_type, settings.weighting, run.pretrained.variance_type)
    names = data.class_names if run.num_classes == data.num_classes else None
    return run._replace(class_names=names, preparation=data.preparation)


def untrained(
    settings: Settings, image_shape: tuple[int, int, int], num_classes: int | None
) -> Run:
    """The model that `settings` ask for; its weights are shapes.

    Raises `FieldError` where the network does not suit the images.
    """
    model = _new_model(settings, image_shape, num_classes)
    try:
        variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    except ValueError as error:
        raise FieldError("unet" if settings.unet else "data", str(error)) from None
    pretrained = Pretrained(
        model,
        variables,
        named_schedule(settings.schedule, settings.timesteps),
        prediction_type=settings.prediction_type,
        variance_type=settings.variance_type,
        timestep_spacing="trailing",
    )
    classes = num_classes if isinstance(model, UNet) else None
    guidance = 1.0 if classes is None else settings.guidance
    return Run(pretrained, image_shape, classes, null_label=classes, guidance=guidance)


def computing(run: Run, *, dtype: str, remat: bool) -> Run:
    """The run, its network with this dtype and rematerialisation."""
    model = run.pretrained.model
    if remat:
        if not isinstance(model, UNet):
            raise FieldError("remat", "the tutorial's network has no blocks to recompute")
        model = model.clone(remat=True)
    if dtype != "float32":
        model = model.clone(dtype=jnp.dtype(dtype))
    return run._replace(pretrained=run.pretrained._replace(model=model))


def _from_init(settings: Settings, data: Dataset) -> Run:
    image_shape = data.image_shape
    assert settings.init is not None
    try:
        run = load_model(settings.init)
    except FieldError as error:
        raise FieldError("init", *error.problem) from None
    # Sixteen bits hold a network, but not the small steps that train it.
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), run.pretrained.variables)
    run = run._replace(pretrained=run.pretrained._replace(variables=variables))
    if run.image_shape != image_shape:
        problem = f"expected images of {run.image_shape}, as its network, got {image_shape}"
        raise FieldError("init", problem)
    if run.num_classes is None:
        return run
    if data.num_classes is None or data.num_classes > run.num_classes:
        problem = (
            f"its network has {run.num_classes} classes, the images {data.num_classes or 'none'}"
        )
        raise FieldError("init", problem)
    if run.null_label is None:
        for name, off in (("label_dropout", 0), ("guidance", 1)):
            if getattr(settings, name) not in (getattr(Settings, name), off):
                raise FieldError(name, "the network has no label that stands for no class")
        return run._replace(num_classes=data.num_classes)
    if data.num_classes > run.null_label:
        # A checkpoint whose every label is a class: none is left to stand for no class.
        return run._replace(null_label=None, guidance=1.0)
    return run._replace(num_classes=data.num_classes, guidance=settings.guidance)


def _new_model(
    settings: Settings, image_shape: tuple[int, int, int], num_classes: int | None
) -> UNet | SimpleUNet:
    height, width, channels = image_shape
    learned = settings.variance_type.startswith("learned")
    if settings.model == "simple":
        if learned:
            raise FieldError("variance_type", "a learned one comes with ", Field("model", "unet"))
        return SimpleUNet(channels=channels)
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (settings.unet or {}).items()
    }
    # One more level for every doubling from 32 pixels on; attention at the lowest.
    levels = 2
    while (
        levels < 4
        and min(height, width) >= 2 ** (levels + 3)
        and not (height % 2**levels or width % 2**levels)
    ):
        levels += 1
    widths = given.get("block_out_channels", (32, *(64,) * (levels - 1)))
    levels = len(widths) if isinstance(widths, tuple) else levels
    small: dict[str, Any] = {
        "block_out_channels": widths,
        "down_block_types": (*("DownBlock2D",) * (levels - 1), "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", *("UpBlock2D",) * (levels - 1)),
    }
    from_images = {
        "sample_size": (height, width),
        "in_channels": channels,
        "out_channels": channels * (1 + learned),
    }
    return ddpm_digits(num_classes, **small | given | from_images)
