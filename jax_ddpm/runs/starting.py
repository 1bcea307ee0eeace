"""The model before the first step: a new one that suits the images, or a trained one."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm._checks import FieldError
from jax_ddpm.data import Dataset
from jax_ddpm.interop import Pretrained
from jax_ddpm.models import SimpleUNet, UNet, ddpm_digits
from jax_ddpm.runs.run import Run, init_variables, load_model
from jax_ddpm.runs.settings import Settings, named_schedule

__all__ = ["computing", "new_run"]


def new_run(settings: Settings, data: Dataset) -> Run:
    """The model that `settings` ask for, for these images, not yet trained on them.

    Raises `FieldError` where they do not suit one another.
    """
    if settings.batch_size > len(data.images):
        problem = f"expected at most {len(data.images)}, the number of images"
        raise FieldError("batch_size", f"{problem}, got {settings.batch_size}")
    if settings.init is not None:
        return _from_init(settings, data)
    image_shape = tuple(data.images.shape[1:])
    model = _new_model(settings.model, data)
    try:
        variables = init_variables(model, jax.random.key(settings.seed), image_shape)
    except ValueError as error:
        raise FieldError("data", str(error)) from None
    pretrained = Pretrained(
        model,
        variables,
        named_schedule(settings.schedule, settings.timesteps),
        prediction_type=settings.prediction_type,
        timestep_spacing="trailing",
    )
    classes = data.num_classes if isinstance(model, UNet) else None
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
    image_shape = tuple(data.images.shape[1:])
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
    if run.null_label is not None and data.num_classes > run.null_label:
        # A checkpoint whose every label is a class: none is left to stand for no class.
        return run._replace(null_label=None, guidance=1.0)
    return run._replace(num_classes=data.num_classes, guidance=settings.guidance)


def _new_model(name: str, data: Dataset) -> UNet | SimpleUNet:
    height, width, channels = data.images.shape[1:]
    if name == "simple":
        return SimpleUNet(channels=channels)
    # One more level for every doubling from 32 pixels on; attention at the lowest.
    levels = 2
    while (
        levels < 4
        and min(height, width) >= 2 ** (levels + 3)
        and not (height % 2**levels or width % 2**levels)
    ):
        levels += 1
    return ddpm_digits(
        data.num_classes,
        sample_size=(height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, *(64,) * (levels - 1)),
        down_block_types=(*("DownBlock2D",) * (levels - 1), "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *("UpBlock2D",) * (levels - 1)),
    )
