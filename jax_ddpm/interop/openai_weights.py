"""The weights of OpenAI's U-Nets and classifiers: their names and layouts.

| PyTorch                                   | Flax                                          |
|-------------------------------------------|-----------------------------------------------|
| `input_blocks.4.0`, `input_blocks.4.1`    | `down_blocks_1/resnets_0`, `…/attentions_0`   |
| … `.in_layers.2`, `.emb_layers.1`         | … `/conv1`, `/time_emb_proj`                  |
| … `.qkv` [3 × channels, channels, 1]      | … `/to_q`, `/to_k`, `/to_v`                   |

OpenAI numbers all blocks on the way down in one list, and all on the way up in another. `qkv` holds
query, key and value of the first head, then of the next (order `"head"`), or all queries, then all
keys, then all values (order `"kind"`, their `use_new_attention_order`).
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from jax_ddpm.interop.layers import LayerKind, torch_shape, weight_from_torch
from jax_ddpm.interop.tensors import check_tensors, parameter_shapes
from jax_ddpm.io.arrays import unflatten
from jax_ddpm.models import NoisyClassifier, UNet

Order = Literal["head", "kind"]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_FUSED = ("to_q", "to_k", "to_v")
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "positions": "positional_embedding",
}


class _Layer(NamedTuple):
    """Where the weights of a layer of ours stand in the file."""

    name: str
    pixels: int = 0
    """Axes of length 1 behind a dense weight, which there is a convolution's."""
    part: int | None = None
    """Of the three in a fused tensor."""
    heads: int = 1
    order: Order = "head"

    def shape(self, kind: LayerKind, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of their tensor, for a weight of ours of this `shape`."""
        first, *rest = torch_shape(kind, shape)
        dense = (1,) * self.pixels if kind == "linear" else ()
        return (first if self.part is None else 3 * first, *rest, *dense)

    def read(self, kind: LayerKind, tensor: np.ndarray) -> np.ndarray:
        """Our weight, from their tensor."""
        if self.part is not None:
            rest = tensor.shape[1:]
            if self.order == "head":
                tensor = tensor.reshape(self.heads, 3, -1, *rest)[:, self.part]
            else:
                tensor = tensor.reshape(3, -1, *rest)[self.part]
            tensor = tensor.reshape(-1, *rest)
        if kind == "linear":
            tensor = tensor.reshape(tensor.shape[:2])
        return weight_from_torch(kind, tensor)


Layers = Iterator[tuple[str, _Layer]]


def unet_from_openai(
    tensors: Mapping[str, np.ndarray], model: UNet, *, order: Order
) -> dict[str, Any]:
    """Variables of `model`. Raises `ValueError` naming a tensor that does not fit."""
    layers = {
        **dict(_way_down(model, order)),
        **dict(_way_up(model, order)),
        "class_embedding": _Layer("label_emb"),
        "conv_norm_out": _Layer("out.0"),
        "conv_out": _Layer("out.2"),
    }
    return _read(tensors, layers, parameter_shapes(model), "the U-Net's")


def classifier_from_openai(
    tensors: Mapping[str, np.ndarray], model: NoisyClassifier
) -> dict[str, Any]:
    """Variables of `model`. Raises `ValueError` naming a tensor that does not fit."""
    layers = dict(_way_down(model, "head"))
    if model.pool == "attention":
        heads = _heads(model, model.block_out_channels[-1])
        layers |= dict(_fused("out", "out.2.qkv_proj", heads, "kind"))
        layers |= {"norm_out": _Layer("out.0"), "out": _Layer("out.2")}
        layers |= {"out/to_out": _Layer("out.2.c_proj", pixels=1)}
    elif model.pool == "adaptive":
        layers |= {"norm_out": _Layer("out.0"), "out": _Layer("out.3", pixels=2)}
    elif model.pool == "spatial":
        layers |= {"hidden": _Layer("out.0"), "out": _Layer("out.2")}
    else:
        layers |= {"hidden": _Layer("out.0"), "norm_out": _Layer("out.1"), "out": _Layer("out.3")}
    return _read(tensors, layers, parameter_shapes(model), "the classifier's")


def _way_down(model: UNet | NoisyClassifier, order: Order) -> Layers:
    yield "time_embedding/linear_1", _Layer("time_embed.0")
    yield "time_embedding/linear_2", _Layer("time_embed.2")
    yield "conv_in", _Layer("input_blocks.0.0")
    block, last = 1, len(model.block_out_channels) - 1
    for level, channels in enumerate(model.block_out_channels):
        path, heads = f"down_blocks_{level}", _heads(model, channels)
        for layer in range(model.layers_per_block):
            yield from _resnet(f"{path}/resnets_{layer}", f"input_blocks.{block}.0")
            yield from _attention(
                f"{path}/attentions_{layer}", f"input_blocks.{block}.1", heads, order
            )
            block += 1
        if level < last:
            yield f"{path}/downsamplers_0/conv", _Layer(f"input_blocks.{block}.0.op")
            yield from _resnet(f"{path}/downsamplers_0", f"input_blocks.{block}.0")
            block += 1
    yield from _resnet("mid_block/resnets_0", "middle_block.0")
    heads = _heads(model, model.block_out_channels[-1])
    yield from _attention("mid_block/attentions_0", "middle_block.1", heads, order)
    yield from _resnet("mid_block/resnets_1", "middle_block.2")


def _way_up(model: UNet, order: Order) -> Layers:
    block, last = 0, len(model.block_out_channels) - 1
    levels = zip(reversed(model.block_out_channels), model.up_block_types, strict=True)
    for level, (channels, kind) in enumerate(levels):
        path, heads = f"up_blocks_{level}", _heads(model, channels, up=True)
        for layer in range(model.layers_per_block + 1):
            name = f"output_blocks.{block}"
            yield from _resnet(f"{path}/resnets_{layer}", f"{name}.0")
            yield from _attention(f"{path}/attentions_{layer}", f"{name}.1", heads, order)
            if layer == model.layers_per_block and level < last:
                name = f"{name}.{2 if kind.startswith('Attn') else 1}"
                yield f"{path}/upsamplers_0/conv", _Layer(f"{name}.conv")
                yield from _resnet(f"{path}/upsamplers_0", name)
            block += 1


def _resnet(path: str, name: str) -> Layers:
    for ours, theirs in _RESNET.items():
        yield f"{path}/{ours}", _Layer(f"{name}.{theirs}")


def _attention(path: str, name: str, heads: int, order: Order) -> Layers:
    yield f"{path}/group_norm", _Layer(f"{name}.norm")
    yield from _fused(path, f"{name}.qkv", heads, order)
    yield f"{path}/to_out_0", _Layer(f"{name}.proj_out", pixels=1)


def _fused(path: str, name: str, heads: int, order: Order) -> Layers:
    for part, ours in enumerate(_FUSED):
        yield f"{path}/{ours}", _Layer(name, 1, part, heads, order)


def _heads(model: UNet | NoisyClassifier, channels: int, *, up: bool = False) -> int:
    if isinstance(model, UNet) and model.num_attention_heads is not None:
        return (up and model.num_attention_heads_upsample) or model.num_attention_heads
    return channels // (model.attention_head_dim or channels)


def _read(
    tensors: Mapping[str, np.ndarray],
    layers: Mapping[str, _Layer],
    shapes: Mapping[str, tuple[int, ...]],
    owner: str,
) -> dict[str, Any]:
    places: dict[str, tuple[str, _Layer, LayerKind]] = {}
    expected = {}
    for path, shape in shapes.items():
        module, _, leaf = path.rpartition("/")
        layer, kind = layers[module], _kind(leaf, len(shape))
        name = f"{layer.name}.{_LEAVES[leaf]}"
        places[path] = name, layer, kind
        expected[name] = layer.shape(kind, shape)
    check_tensors(tensors, expected, owner)
    params = {path: layer.read(kind, tensors[name]) for path, (name, layer, kind) in places.items()}
    return {"params": unflatten(params)}


def _kind(leaf: str, axes: int) -> LayerKind:
    if leaf not in ("kernel", "positions"):
        return "norm"  # as they are
    return "conv" if axes == 4 else "linear"
