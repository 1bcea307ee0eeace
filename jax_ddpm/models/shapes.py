"""The shapes of a network's parameters, without tracing it, which takes seconds.

The tests hold this to what `model.init` makes.
"""

from collections.abc import Generator, Iterator
from typing import Any

from jax_ddpm.models.blocks import resampling
from jax_ddpm.models.classifier import NoisyClassifier
from jax_ddpm.models.unet import UNet

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def parameter_shapes(model: UNet | NoisyClassifier) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by its path. Raises `ValueError` naming a wrong field."""
    model.check_fields()
    if isinstance(model, NoisyClassifier):
        return dict(_classifier(model))
    return dict(_unet(model))


def _unet(model: UNet) -> Shapes:
    channels, layers = model.block_out_channels, model.layers_per_block
    skips = yield from _way_down(model)
    if model.mid_block_type is not None:
        normed = model.attn_norm_num_groups or model.resnet_time_scale_shift == "default"
        attention = model.add_attention
        yield from _middle(model, attention=attention, normed=bool(normed))
    before = channels[-1]
    for level, (features, kind) in enumerate(
        zip(reversed(channels), model.up_block_types, strict=True)
    ):
        path = f"up_blocks_{level}"
        for layer in range(layers + 1):
            yield from _resnet(model, f"{path}/resnets_{layer}", before + skips.pop(), features)
            if kind.startswith("Attn"):
                yield from _attention(model, f"{path}/attentions_{layer}", features)
            before = features
        if level < len(channels) - 1:
            yield from _resampling(
                model, f"{path}/upsamplers_0", features, kind, model.upsample_type
            )
    if model.num_class_embeds is not None:
        yield "class_embedding/embedding", (model.num_class_embeds, _time(model))
    yield from _norm("conv_norm_out", channels[0])
    yield from _conv("conv_out", channels[0], model.out_channels)


def _classifier(model: NoisyClassifier) -> Shapes:
    channels = model.block_out_channels[-1]
    states = yield from _way_down(model)
    yield from _middle(model, attention=True, normed=True)
    if model.pool.startswith("spatial"):
        yield from _dense("hidden", sum(states) + channels, 2048)
        if model.pool == "spatial_v2":
            yield from _norm("norm_out", 2048)
        yield from _dense("out", 2048, model.num_classes)
        return
    yield from _norm("norm_out", channels)
    if model.pool == "adaptive":
        yield from _dense("out", channels, model.num_classes)
        return
    side = model.sample_size // 2 ** (len(model.block_out_channels) - 1)
    yield "out/positions", (side**2 + 1, channels)
    for name in ("to_q", "to_k", "to_v"):
        yield from _dense(f"out/{name}", channels, channels)
    yield from _dense("out/to_out", channels, model.num_classes)


def _way_down(
    model: UNet | NoisyClassifier,
) -> Generator[tuple[str, tuple[int, ...]], Any, list[int]]:
    """Returns the channels of each state on the way."""
    channels = model.block_out_channels
    waves, features = model.time_proj_dim or channels[0], _time(model)
    yield from _dense("time_embedding/linear_1", waves, features)
    yield from _dense("time_embedding/linear_2", features, features)
    yield from _conv("conv_in", model.in_channels, channels[0])
    states = [channels[0]]
    for level, (features, kind) in enumerate(zip(channels, model.down_block_types, strict=True)):
        path = f"down_blocks_{level}"
        for layer in range(model.layers_per_block):
            yield from _resnet(model, f"{path}/resnets_{layer}", states[-1], features)
            if kind.startswith("Attn"):
                yield from _attention(model, f"{path}/attentions_{layer}", features)
            states.append(features)
        if level < len(channels) - 1:
            name = f"{path}/downsamplers_0"
            yield from _resampling(model, name, features, kind, model.downsample_type)
            states.append(features)
    return states


def _middle(model: UNet | NoisyClassifier, *, attention: bool, normed: bool) -> Shapes:
    channels = model.block_out_channels[-1]
    yield from _resnet(model, "mid_block/resnets_0", channels, channels)
    if attention:
        yield from _attention(model, "mid_block/attentions_0", channels, normed=normed)
    yield from _resnet(model, "mid_block/resnets_1", channels, channels)


def _resnet(model: UNet | NoisyClassifier, path: str, before: int, features: int) -> Shapes:
    shifts = 1 + (model.resnet_time_scale_shift == "scale_shift")
    yield from _norm(f"{path}/norm1", before)
    yield from _conv(f"{path}/conv1", before, features)
    yield from _dense(f"{path}/time_emb_proj", _time(model), shifts * features)
    yield from _norm(f"{path}/norm2", features)
    yield from _conv(f"{path}/conv2", features, features)
    if before != features:
        yield from _conv(f"{path}/conv_shortcut", before, features, size=1)


def _attention(
    model: UNet | NoisyClassifier,
    path: str,
    channels: int,
    *,
    normed: bool = True,
) -> Shapes:
    # Channels that no head takes are left out.
    inside = channels - channels % (model.attention_head_dim or channels)
    if normed:
        yield from _norm(f"{path}/group_norm", channels)
    for name in ("to_q", "to_k", "to_v"):
        yield from _dense(f"{path}/{name}", channels, inside)
    yield from _dense(f"{path}/to_out_0", inside, channels)


def _resampling(
    model: UNet | NoisyClassifier, path: str, channels: int, kind: str, chosen: str
) -> Shapes:
    if resampling(kind, chosen) == "resnet":
        yield from _resnet(model, path, channels, channels)
    else:
        yield from _conv(f"{path}/conv", channels, channels)


def _conv(path: str, before: int, features: int, size: int = 3) -> Shapes:
    yield f"{path}/kernel", (size, size, before, features)
    yield f"{path}/bias", (features,)


def _dense(path: str, before: int, features: int) -> Shapes:
    yield f"{path}/kernel", (before, features)
    yield f"{path}/bias", (features,)


def _norm(path: str, features: int) -> Shapes:
    yield f"{path}/scale", (features,)
    yield f"{path}/bias", (features,)


def _time(model: UNet | NoisyClassifier) -> int:
    return model.time_embedding_dim or 4 * model.block_out_channels[0]
