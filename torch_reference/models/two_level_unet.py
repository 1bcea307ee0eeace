"""A small U-Net in the style of lucidrains' denoising-diffusion-pytorch, to be ported.

Convolutions with standardized weights, RMS normalization with a gain `g`, linear attention. NCHW.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv(nn.Conv2d):
    """With weights of mean 0 and variance 1 in each output channel."""

    def forward(self, input: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * (variance + 1e-5).rsqrt()
        return F.conv2d(input, weight, self.bias, padding=1)


class RMSNorm(nn.Module):
    """Over the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(16, outputs))
        self.proj, self.norm = Conv(inputs, outputs, 3), RMSNorm(outputs)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return F.silu(self.norm(self.proj(x)) + self.mlp(time)[:, :, None, None])


class LinearAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.to_qkv = RMSNorm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        context = k.softmax(dim=2) @ v.mT
        return x + self.to_out((context.mT @ q.softmax(dim=1)).reshape(x.shape))


class TwoLevelUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(1, 16), nn.GELU(), nn.Linear(16, 16))
        self.init_conv = nn.Conv2d(3, 8, 7, padding=3)
        self.downs = nn.ModuleList([Block(8, 8), LinearAttention(8), nn.Conv2d(32, 16, 1)])
        self.mid = Block(16, 16)
        self.ups = nn.ModuleList([nn.Conv2d(16, 8, 3, padding=1), Block(16, 8)])
        self.final_conv = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        (block, attention, down), (up, up_block) = self.downs, self.ups
        time = self.time_mlp(t[:, None].to(x) / 1000)
        skip = attention(block(self.init_conv(x), time))
        h = self.mid(down(F.pixel_unshuffle(skip, 2)), time)
        h = up(F.interpolate(h, scale_factor=2))
        return self.final_conv(up_block(torch.cat([h, skip], 1), time))
