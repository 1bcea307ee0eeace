"""Cases for OpenAI's networks, beside `torch_reference.models.openai`, which gives what their own
code gave for the fixtures of `tests/interop/openai`, to 2e-14.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from jax_ddpm.interop import load_openai, load_openai_classifier
from jax_ddpm.parity.harness import Case, DType, from_torch, images, timesteps, to_torch
from jax_ddpm.parity.pair import Pair
from torch_reference.models.openai import Classifier, UNet


class Network(NamedTuple):
    """One network twice: by the flags of OpenAI's code, and as the reference is called."""

    flags: dict[str, Any]
    reference: Callable[[], torch.nn.Module]
    shape: tuple[int, ...] = (2, 16, 16, 3)
    timesteps: int = 1000
    labels: bool = False


_SMALL = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
UNETS = {
    # The way up has its own number of heads; t is rescaled to 1,000 steps.
    "improved-diffusion's": Network(
        {
            **_SMALL,
            "num_heads": 2,
            "num_heads_upsample": 4,
            "attention_resolutions": "16,8",
            "use_scale_shift_norm": False,
            "diffusion_steps": 4000,
            "rescale_timesteps": True,
        },
        lambda: UNet(
            32, (1, 2), 1, (1, 2), heads=2, heads_up=4, scale_shift=False, time_scale=0.25
        ),
        timesteps=4000,
    ),
    "guided-diffusion's, 64×64": Network(
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
        lambda: UNet(
            *(32, (1, 2), 2, (2,)),
            heads=None,
            head_channels=16,
            updown=True,
            new_order=True,
            classes=1000,
            out_channels=6,
        ),
        labels=True,
    ),
    # The first level has half as many channels as there are sinusoids.
    "guided-diffusion's, 512×512": Network(
        {**_SMALL, "image_size": 512, "num_channels": 64, "num_head_channels": 32}
        | {"channel_mult": "", "attention_resolutions": "16,8", "resblock_updown": True},
        lambda: UNet(
            *(64, (0.5, 1, 1, 2, 2, 4, 4), 1, (32, 64)), heads=None, head_channels=32, updown=True
        ),
        (1, 64, 64, 3),
    ),
}
_FLAGS = {"image_size": 64, "classifier_width": 64, "classifier_depth": 1}
CLASSIFIERS = {
    pool: Network(
        {**_FLAGS, "classifier_pool": pool, **flags},
        lambda pool=pool, options=options: Classifier(
            *(64, 64, (1, 2, 3, 4), 1, (2, 4, 8)), pool=pool, **options
        ),
        (2, 64, 64, 3),
    )
    for pool, flags, options in (
        ("attention", {}, {}),
        (
            "adaptive",
            {"classifier_use_scale_shift_norm": False, "classifier_resblock_updown": False},
            {"scale_shift": False, "updown": False},
        ),
        ("spatial", {}, {}),
        ("spatial_v2", {}, {}),
    )
}


def _pair(network: Network, dtype: DType) -> Pair:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = network.reference()
    load = load_openai_classifier if isinstance(module, Classifier) else load_openai
    model, *_ = load(module.state_dict(), network.flags)
    batch = network.shape[0]
    inputs = [images(0, dtype, network.shape), timesteps(network.timesteps, batch)]
    if network.labels:
        inputs.append(np.arange(batch, dtype=np.int32))
    return Pair(
        module,
        model.clone(precision="highest").apply,
        lambda tensors: load(tensors, network.flags)[1],
        inputs,
        dtype,
    )


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


def _case(
    name: str, network: Network, compare: Callable[[Pair], tuple[Any, Any]] = Pair.outputs
) -> Case:
    return Case("openai", name, lambda dtype: compare(_pair(network, dtype)))


_ATTENTION = CLASSIFIERS["attention"]

OPENAI_CASES = (
    *(_case(f"{name}: output", network) for name, network in UNETS.items()),
    _case("classifier, attention: logits, ∇ log p(y | x_t)", _ATTENTION, _score),
    *(
        _case(f"classifier, {name}: logits", network)
        for name, network in CLASSIFIERS.items()
        if network is not _ATTENTION
    ),
)
