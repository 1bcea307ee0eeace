"""Where two networks part: mistakes that ports really have, and the module that each is in.

Three networks in PyTorch, each with a port that is right, or makes one mistake: two here, and the
one of PORTING.md, whose text is edited. The names that are expected were worked out by hand from
the PyTorch code: the first module whose output differs though its inputs agree, or, where lines
between modules are wrong, the first that gets the wrong input.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn as tnn
from torch.nn import functional as F

from jax_ddpm.parity import compare
from jax_ddpm.parity.tolerances import Tolerance
from torch_reference.models.two_level_unet import TwoLevelUNet

pytestmark = pytest.mark.usefixtures("defaults")
QUICK = {"adam_steps": 0, "chain": False, "dtypes": ("float64",)}
INPUTS = np.random.default_rng(0).standard_normal((2, 8, 8, 3)), np.array([3, 150])


def sinusoid(t, xp=torch):
    angles = t[:, None] * xp.asarray([[1, 0.1, 0.01, 0.001]], dtype=xp.float64)
    return xp.concatenate([xp.sin(angles), xp.cos(angles)], 1)


def from_torch(tensors):
    """Variables of any of the ports: axes moved, and the layer `a.0.b` named `a_0_b`."""
    params = {}
    for name, w in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight":
            leaf = "kernel" if w.ndim > 1 else "scale"
            w = w.transpose(*range(2, w.ndim), 1, 0) if w.ndim > 1 else w
        params.setdefault(layer.replace(".", "_"), {})[leaf] = w
    return {"params": params | params.pop("", {})}


class Port(nn.Module):
    """What the ports share. `edit` is the mistake, made at `place`."""

    place: str = ""
    edit: Callable = lambda right: right

    def at(self, place, value):
        """`value`, which is wrong at one place."""
        return self.edit(value) if place == self.place else value

    def layer(self, kind, name, x, **options):
        return kind(name=name.replace(".", "_"), **self.at(name, options))(x)

    def conv(self, name, x, features, size=3, **options):
        options = {"kernel_size": (size, size), "padding": size // 2, **options}
        return self.layer(nn.Conv, name, x, features=features, **options)

    def norm(self, name, x, num_groups=4):
        return self.layer(nn.GroupNorm, name, x, num_groups=num_groups, epsilon=1e-5)

    def attention(self, name, x, c):
        qkv = self.layer(nn.Dense, f"{name}.qkv", x, features=3 * c)
        split = lambda qkv: jnp.moveaxis(qkv.reshape(len(x), -1, 3, 2, c // 2), 2, 0)
        q, k, v = self.at(f"{name}: q, k, v", self.at(f"{name}: split", split)(qkv))
        logits = jnp.einsum("bqhc,bkhc->bhqk", q, k) / self.at(f"{name}: scale", (c // 2) ** 0.5)
        logits = self.at(f"{name}: logits", logits)
        weights = nn.softmax(logits, axis=self.at(f"{name}: softmax", -1)).astype(x.dtype)
        out = jnp.einsum("bhqk,bkhc->bqhc", weights, v).reshape(x.shape)
        return self.layer(nn.Dense, f"{name}.proj", out, features=c)


class TorchRes(tnn.Module):
    def __init__(self, c, d):
        super().__init__()
        self.norm1, self.conv1 = tnn.GroupNorm(4, c), tnn.Conv2d(c, d, 3, padding=1)
        self.norm2, self.conv2 = tnn.GroupNorm(4, d), tnn.Conv2d(d, d, 3, padding=1)
        self.skip = tnn.Conv2d(c, d, 1) if c != d else tnn.Identity()
        self.emb = tnn.Linear(8, d)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(F.silu(emb))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class TorchAttention(tnn.Module):
    def __init__(self, c):
        super().__init__()
        self.qkv, self.proj = tnn.Linear(c, 3 * c), tnn.Linear(c, c)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TorchImageAttention(TorchAttention):
    def __init__(self, c, norm):
        super().__init__(c)
        self.norm = norm

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return x + super().forward(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class TorchUNet(tnn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.conv_in = tnn.Linear(8, 8), tnn.Conv2d(3, 8, 3, padding=1)
        self.res1, self.res2, self.res3 = TorchRes(8, 8), TorchRes(8, 16), TorchRes(16, 8)
        self.down, self.up = tnn.Conv2d(8, 8, 3, 2, padding=1), tnn.Conv2d(16, 8, 3, padding=1)
        self.attn = TorchImageAttention(16, tnn.GroupNorm(4, 16))
        self.norm_out, self.conv_out = tnn.GroupNorm(2, 8), tnn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t):
        emb = self.time(sinusoid(t))
        skip = self.res1(self.conv_in(x), emb)
        h = self.attn(self.res2(self.down(skip), emb))
        h = self.up(F.interpolate(h, scale_factor=2))
        h = self.res3(torch.cat([h, skip], 1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))


class UNet(Port):
    def res(self, name, x, emb, d):
        normed = nn.silu(self.norm(f"{name}.norm1", x))
        emb = self.at(f"{name}: activation", nn.silu)(emb)
        emb = self.layer(nn.Dense, f"{name}.emb", emb, features=d)[:, None, None]
        h = self.norm(f"{name}.norm2", self.conv(f"{name}.conv1", normed, d) + emb)
        h = self.conv(f"{name}.conv2", nn.silu(h), d)
        x, _ = self.at(f"{name}: skip", [x, normed])
        return h + (x if x.shape[-1] == d else self.conv(f"{name}.skip", x, d, 1))

    @nn.compact
    def __call__(self, x, t):
        emb = self.layer(nn.Dense, "time", self.at("sinusoid", sinusoid(t, jnp)), features=8)
        skip = self.res("res1", self.conv("conv_in", x, 8), emb, 8)
        h = self.res("res2", self.conv("down", skip, 8, strides=2), emb, 16)
        h = self.at("residual", h) + self.attention("attn", self.norm("attn.norm", h), 16)
        h = jax.image.resize(h, (*skip.shape[:3], 16), self.at("resize", "nearest"))
        h = jnp.concatenate(self.at("concatenate", [self.conv("up", h, 8), skip]), -1)
        h = self.norm("norm_out", self.res("res3", h, emb, 8), 2)
        return self.conv("conv_out", nn.silu(h), 3)


class TorchTransformerBlock(tnn.Module):
    def __init__(self):
        super().__init__()
        self.ada = tnn.Sequential(tnn.SiLU(), tnn.Linear(8, 6 * 24))
        norms = [tnn.LayerNorm(24, eps=1e-6, elementwise_affine=False) for _ in range(2)]
        (self.norm1, self.norm2), self.attn = norms, TorchAttention(24)
        self.mlp = tnn.Sequential(tnn.Linear(24, 32), tnn.GELU("tanh"), tnn.Linear(32, 24))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c)[:, None].chunk(6, 2)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class TorchTransformer(tnn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.time = tnn.Conv2d(3, 24, 2, 2), tnn.Linear(8, 8)
        self.pos = tnn.Parameter(torch.zeros(1, 16, 24))
        self.blocks = tnn.ModuleList([TorchTransformerBlock() for _ in range(2)])
        self.norm, self.head = tnn.LayerNorm(24), tnn.Linear(24, 12)

    def forward(self, x, t):
        h, c = self.patch(x).flatten(2).mT + self.pos, self.time(sinusoid(t))
        for block in self.blocks:
            h = block(h, c)
        h = self.head(self.norm(h)).unflatten(2, (2, 2, 3)).unflatten(1, (4, 4))
        return h.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class Transformer(Port):
    def layer_norm(self, name, x, **options):
        return self.layer(nn.LayerNorm, name, x, **{"reduction_axes": -1, **options})

    def block(self, name, h, c):
        c = self.at("ada.0", nn.silu)(c)
        c = self.layer(nn.Dense, f"{name}.ada.1", c, features=6 * 24)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(c, 6, -1)
        shift1, scale1 = self.at(f"{name}: shift, scale", [shift1, scale1])
        gate1, gate2 = self.at(f"{name}: gates", [gate1, gate2])
        gate2 = self.at(f"{name}: last gate", gate2)
        plain = {"epsilon": 1e-6, "use_bias": False, "use_scale": False}
        normed = self.layer_norm(f"{name}.norm1", h, **plain) * (1 + scale1) + shift1
        h = h + gate1 * self.attention(f"{name}.attn", normed, 24)
        factor = self.at(f"{name}: factor", 1 + scale2)
        normed = self.layer_norm(f"{name}.norm2", h, **plain) * factor + shift2
        normed = self.layer(nn.Dense, f"{name}.mlp.0", normed, features=32)
        gelu = self.at(f"{name}: gelu", nn.gelu)
        return h + gate2 * self.layer(nn.Dense, f"{name}.mlp.2", gelu(normed), features=24)

    @nn.compact
    def __call__(self, x, t):
        h = self.conv("patch", x, 24, 2, strides=2, padding=0)
        pos = self.param("pos", nn.initializers.zeros, (1, 16, 24))
        h = self.at("tokens", h).reshape(2, 16, 24) + pos
        c = self.layer(nn.Dense, "time", sinusoid(t, jnp), features=8)
        for name in ("blocks.0", "blocks.1"):
            h = self.block(name, h, c)
        h = self.layer(nn.Dense, "head", self.layer_norm("norm", h, epsilon=1e-5), features=12)
        order = self.at("unpatchify", (0, 1, 3, 2, 4, 5))
        return h.reshape(2, 4, 4, 2, 2, 3).transpose(order).reshape(2, 8, 8, 3)


def pooled(x, kernel, strides, *given, **options):
    """A convolution whose stride is that of a pooling after it."""
    h = jax.lax.conv_general_dilated(x, kernel, (1, 1), *given, **options)
    return nn.avg_pool(h, strides, strides)


def kernel(layer, edit):
    edited = lambda leaves: leaves | {"kernel": edit(leaves["kernel"])}
    return lambda params: params | {layer: edited(params[layer])}


exchanged = lambda one, other: lambda params: params | {one: params[other], other: params[one]}
options = lambda **wrong: lambda right: right | wrong
to = lambda value: lambda _: value
axes_swapped = lambda w: w.swapaxes(-1, -2)
flipped = lambda w: w[::-1, ::-1]
turned = lambda two: two[::-1]
same = lambda x: x
exact_gelu = partial(nn.gelu, approximate=False)
interleaved = lambda qkv: jnp.moveaxis(qkv.reshape(2, -1, 3, 12, 2), 2, 0).swapaxes(-1, -2)
# What is wrong, where, how, and the module at fault: two where a module begins with the layer that
# gets the wrong input, or its own lines go wrong and a layer in it gets what they give.
UNET = [
    ("cosines first", "sinusoid", lambda x: jnp.roll(x, 4, 1), "time"),
    ("Flax's epsilon", "res1.norm1", options(epsilon=1e-6), "res1.norm1"),
    ("scale ignored", "res1.norm2", options(use_scale=False), "res1.norm2"),
    ("two convs exchanged", "weights", exchanged("res1_conv1", "res1_conv2"), "res1.conv1"),
    ("padding at the end", "down", options(padding=((0, 1), (0, 1))), "down"),
    ("stride by pooling", "down", options(conv_general_dilated=pooled), "down"),
    ("no activation", "res2: activation", to(same), "res2.emb"),
    ("skip of the normed", "res2: skip", turned, "res2.skip"),
    ("conv's axes", "weights", kernel("res2_conv2", axes_swapped), "res2.conv2"),
    ("q, v, k", "attn: q, k, v", lambda qkv: [qkv[0], qkv[2], qkv[1]], "attn attn.proj"),
    ("softmax unscaled", "attn: scale", to(1.0), "attn attn.proj"),
    ("softmax over queries", "attn: softmax", to(-2), "attn attn.proj"),
    ("float32", "attn: logits", lambda x: x.astype(jnp.float32), "attn attn.proj"),
    ("transposed", "weights", kernel("attn_proj", axes_swapped), "attn.proj"),
    ("no residual", "residual", jnp.zeros_like, "attn"),
    ("bilinear", "resize", to("bilinear"), "up"),
    ("skip first", "concatenate", turned, "res3 res3.norm1"),
    ("no bias", "res3.conv1", options(use_bias=False), "res3.conv1"),
    ("groups", "norm_out", options(num_groups=4), "norm_out"),
    ("flipped", "weights", kernel("conv_out", flipped), "conv_out"),
]
# What stands in the right port of PORTING.md, a mistake in its place, and the module at fault.
GELU = "nn.gelu(time)", "nn.gelu(time, approximate=False)"  # the page's mistake, and its mending
TWO_LEVELS = [
    (*reversed(GELU), "time_mlp.1"),
    (" * x.shape[-1] ** 0.5", "", "downs.0.norm"),
    (" * g * ", " * ", "downs.0.norm"),
    ("kernel.var((0, 1, 2))", "kernel.var((0, 1, 2), ddof=1)", "downs.0.proj"),
    (" + 1e-5)", ")", "downs.0.proj"),
    ("nn.silu(time)", "time", "downs.0.mlp.0"),
    ("nn.softmax(k, axis=1)", "nn.softmax(k, axis=2)", "downs.1.to_out"),
    ("nn.softmax(k, axis=1)", "nn.softmax(k.astype('float32'), axis=1)", "downs.1.to_out"),
    ("q, k, v = jnp", "q, v, k = jnp", "downs.1.to_out"),
    ("bnc,bcd->bnd", "bnc,bdc->bnd", "downs.1.to_out"),
    ("return x + nn", "return nn", "downs.1"),
    ("(0, 1, 3, 5, 2, 4)", "(0, 1, 3, 2, 4, 5)", "downs.2"),
    ("(h), skip]", "(h), 0 * skip]", "ups.1"),
    ("(7, 7), name", "(7, 7), padding='CIRCULAR', name", "init_conv"),
]
PROJ = "blocks_0_attn_proj", "blocks_1_attn_proj"
TRANSFORMER = [
    ("flipped", "weights", kernel("patch", flipped), "patch"),
    ("columns first", "tokens", lambda h: h.swapaxes(1, 2), "blocks.0 blocks.0.norm1"),
    ("no activation", "ada.0", to(same), "blocks.0.ada.0"),
    ("scale first", "blocks.0: shift, scale", turned, "blocks.0.attn blocks.0.attn.qkv"),
    ("two layers exchanged", "weights", exchanged(*PROJ), "blocks.0.attn.proj"),
    ("exact GELU", "blocks.0: gelu", to(exact_gelu), "blocks.0.mlp.1"),
    ("PyTorch's epsilon", "blocks.1.norm1", options(epsilon=1e-5), "blocks.1.norm1"),
    ("heads", "blocks.1.attn: split", to(interleaved), "blocks.1.attn blocks.1.attn.proj"),
    ("gates exchanged", "blocks.1: gates", turned, "blocks.1.norm2"),
    ("scale without 1", "blocks.1: factor", lambda f: f - 1, "blocks.1.mlp blocks.1.mlp.0"),
    ("no last gate", "blocks.1: last gate", jnp.ones_like, "blocks.1"),
    ("over tokens too", "norm", options(reduction_axes=(1, 2)), "norm"),
    ("height and width", "unpatchify", to((0, 2, 3, 1, 4, 5)), ""),  # PyTorch's name of the whole
]
PAIRS = [(TorchUNet, UNet, UNET), (TorchTransformer, Transformer, TRANSFORMER)]
# What is said of the likely cause; these rows are in the first circle.
SAID = {
    "Flax's epsilon": "if its eps were 1e-06",
    "padding at the end": "if its padding were one less before and one more after",
    "q, v, k": "of the output of attn.qkv were in the order (0, 2, 1)",
    "float32": "float32 begins at test_first_difference.py:",
    "transposed": "if its weight were transposed",
    "no residual": "if the output of res2 were not added",
    "skip first": "if the last 8 in axis 1 came first",
}
ROWS = [
    pytest.param(
        network,
        port(place, edit),
        names.split(" "),
        SAID.get(wrong, ""),
        id=f"{port.__name__}: {wrong}",
        marks=() if wrong in SAID else pytest.mark.slow,
    )
    for network, port, rows in PAIRS
    for wrong, place, edit, names in rows
]


def report(network, port):
    convert = lambda tensors: {"params": port.at("weights", from_torch(tensors)["params"])}
    return compare(drawn(network()), port.apply, convert, INPUTS, **QUICK)


def drawn(module):
    """The module with other numbers in every parameter, so that nothing is hidden."""
    random = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        tnn.init.normal_(parameter, std=0.3, generator=random)
    return module


def of_page(right="", wrong=""):
    """The report of PORTING.md, whose port is mended and then edited."""
    page = Path(__file__).parents[2] / "jax_ddpm/parity/PORTING.md"
    (code,) = re.findall(r"```python\n(.*?)^x, t = ", page.read_text(), re.DOTALL | re.MULTILINE)
    for old, new in (GELU, (right, wrong)):
        assert old in code
        code = code.replace(old, new)
    namespace = {"__name__": "port"}
    exec(code, namespace)
    port, convert = namespace["FlaxUNet"](), namespace["from_torch"]
    return compare(drawn(TwoLevelUNet()), port, convert, INPUTS, **QUICK)


@pytest.mark.parametrize(
    "right", [of_page, *(partial(report, network, port()) for network, port, _ in PAIRS)]
)
def test_right_ports_differ_nowhere(monkeypatch, right):
    found = right()
    assert all(row.error < 1e-12 for row in found.rows), str(found)
    tight = dict.fromkeys(("forward", "gradients"), Tolerance(0, 0))  # so that it is looked for
    monkeypatch.setitem(QUICK, "tolerances", tight)
    found = right()
    assert not found.passed and found.first_difference is None
    assert "every module agrees" in str(found)


@pytest.mark.parametrize(("network", "port", "names", "said"), ROWS)
def test_the_module_at_fault_is_named(network, port, names, said):
    found = report(network, port)
    assert not found.passed
    assert found.first_difference in names
    assert said in str(found)


@pytest.mark.slow
@pytest.mark.parametrize(("right", "wrong", "name"), TWO_LEVELS)
def test_the_module_at_fault_is_named_in_the_page(right, wrong, name):
    found = of_page(right, wrong)
    assert not found.passed and found.first_difference == name


class TorchLayers(tnn.Sequential):
    def __init__(self):
        super().__init__(tnn.Linear(3, 8), tnn.LayerNorm(8), tnn.SiLU(), tnn.Linear(8, 3))


def in_nnx(eps):
    norm = partial(nnx.LayerNorm, epsilon=eps)
    layers = nnx.Linear(3, 8, rngs=nnx.Rngs(0)), norm(8, rngs=nnx.Rngs(0)), nnx.silu
    graph, state = nnx.split(nnx.Sequential(*layers, nnx.Linear(8, 3, rngs=nnx.Rngs(0))))

    def convert(tensors):
        names = {"kernel": "weight", "scale": "weight", "bias": "bias"}
        value = lambda path, _: tensors[f"{path[1].key}.{names[path[2].key]}"].T
        return jax.tree_util.tree_map_with_path(value, state)

    return lambda state, x: nnx.merge(graph, state)(x), convert


def in_equinox(eps):
    key = jax.random.key(0)
    layers = equinox.nn.Linear(3, 8, key=key), equinox.nn.LayerNorm(8, eps), jax.nn.silu
    layers = [*layers, equinox.nn.Linear(8, 3, key=key)]
    arrays, static = equinox.partition(layers, equinox.is_array)

    def convert(tensors):
        value = lambda path, _: tensors[f"{path[0].idx}.{path[1].name}"]
        return jax.tree_util.tree_map_with_path(value, arrays)

    def apply(arrays, x):
        for layer in equinox.combine(arrays, static):
            x = jax.vmap(layer)(x)
        return x

    return apply, convert


def in_functions(eps):
    def apply(p, x):
        h = x @ p["0.weight"].T + p["0.bias"]
        h = (h - h.mean(1, keepdims=True)) / jnp.sqrt(h.var(1, keepdims=True) + eps)
        h = jax.nn.silu(h * p["1.weight"] + p["1.bias"])
        return h @ p["3.weight"].T + p["3.bias"]

    return apply, dict


@pytest.mark.parametrize("written", [in_nnx, in_equinox, in_functions])
def test_any_framework(written):
    x = np.random.default_rng(0).standard_normal((4, 3))
    for eps, name in ((1e-5, None), (1e-3, "1")):
        found = compare(drawn(TorchLayers()), *written(eps), (x,), **QUICK)
        assert found.passed == (name is None) and found.first_difference == name, str(found)
