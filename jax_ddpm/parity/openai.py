"""Cases for OpenAI's networks, beside `torch_reference.models.openai`, which gives what their own
code gave for the fixtures of `tests/interop/openai`, to 2e-14.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import torch

from jax_ddpm.interop import load_openai, load_openai_classifier
from jax_ddpm.parity.compare import Pair
from jax_ddpm.parity.harness import Case, DType, from_torch, images, timesteps, to_torch
from torch_reference.models.openai import Classifier, UNet


def _case(
    name: str,
    reference: Callable[[], torch.nn.Module],
    flags: dict[str, Any],
    shape: tuple[int, ...] = (2, 16, 16, 3),
    compare: Callable[[Pair], tuple[Any, Any]] = Pair.outputs,
) -> Case:
    """One network twice: as the reference is called, and by the flags of OpenAI's code."""

    def pair(dtype: DType) -> Pair:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = reference()
        load = load_openai_classifier if "classifier_pool" in flags else load_openai
        model: Any = load(module.state_dict(), flags)[0]
        steps = timesteps(flags.get("diffusion_steps", 1000), shape[0])
        labels = [np.arange(shape[0], dtype=np.int32)] if flags.get("class_cond") else []
        return Pair(
            module,
            model.clone(precision="highest").apply,
            lambda tensors: load(tensors, flags)[1],
            [images(0, dtype, shape), steps, *labels],
            dtype,
        )

    return Case("openai", name, lambda dtype: compare(pair(dtype)))


def _classifier_case(
    pool: str, outputs: str = "logits", *, plain: bool = False, **how: Any
) -> Case:
    flags: dict[str, Any] = {"image_size": 64, "classifier_width": 64, "classifier_depth": 1}
    options = {"scale_shift": False, "updown": False} if plain else {}
    if plain:
        flags |= {"classifier_use_scale_shift_norm": False, "classifier_resblock_updown": False}
    layers = 64, 64, (1, 2, 3, 4), 1, (2, 4, 8)
    reference = partial(Classifier, *layers, pool=pool, **options)
    flags["classifier_pool"] = pool
    return _case(f"classifier, {pool}: {outputs}", reference, flags, (2, 64, 64, 3), **how)


def _score(pair: Pair) -> tuple[Any, Any]:
    """The logits, and the gradient of log p(y | x_t) by x_t, which guides."""
    x, t = pair.inputs
    labels = np.arange(len(x))

    def log_prob(x):
        logits = pair.apply(pair.variables, x, t)
        return jax.nn.log_softmax(logits)[labels, labels].sum(), logits

    score, logits = jax.jit(jax.grad(log_prob, has_aux=True))(x)
    inputs = to_torch(x).requires_grad_()
    theirs = pair.module(inputs, to_torch(t))
    theirs.log_softmax(1)[labels, labels].sum().backward()
    assert inputs.grad is not None
    expected = {"logits": from_torch(theirs), "score": from_torch(inputs.grad)}
    return {"logits": logits, "score": score}, expected


_SMALL = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
OPENAI_CASES = (
    # The way up has its own number of heads; t is rescaled to 1,000 steps.
    _case(
        "improved-diffusion's: output",
        partial(
            *(UNet, 32, (1, 2), 1, (1, 2)), heads=2, heads_up=4, scale_shift=False, time_scale=0.25
        ),
        {
            **_SMALL,
            "num_heads": 2,
            "num_heads_upsample": 4,
            "attention_resolutions": "16,8",
            "use_scale_shift_norm": False,
            "diffusion_steps": 4000,
            "rescale_timesteps": True,
        },
    ),
    _case(
        "guided-diffusion's, 64×64: output",
        partial(
            *(UNet, 32, (1, 2), 2, (2,)),
            heads=None,
            head_channels=16,
            updown=True,
            new_order=True,
            classes=1000,
            out_channels=6,
        ),
        {
            **_SMALL,
            "num_res_blocks": 2,
            "num_head_channels": 16,
            "attention_resolutions": "8",
            "resblock_updown": True,
            "use_new_attention_order": True,
            "class_cond": True,
            "learn_sigma": True,
        },
    ),
    # The first level has half as many channels as there are sinusoids.
    _case(
        "guided-diffusion's, 512×512: output",
        partial(
            *(UNet, 64, (0.5, 1, 1, 2, 2, 4, 4), 1, (32, 64)),
            heads=None,
            head_channels=32,
            updown=True,
        ),
        {**_SMALL, "image_size": 512, "num_channels": 64, "num_head_channels": 32}
        | {"channel_mult": "", "attention_resolutions": "16,8", "resblock_updown": True},
        (1, 64, 64, 3),
    ),
    _classifier_case("attention", "logits, ∇ log p(y | x_t)", compare=_score),
    _classifier_case("adaptive", plain=True),
    _classifier_case("spatial"),
    _classifier_case("spatial_v2"),
)
