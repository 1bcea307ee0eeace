"""The tutorial's noise schedule, and the other schedules from their papers."""

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

T = 200


def linear_beta_schedule(timesteps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tutorial's betas. Its float32 `linspace` is 1e-7 off the real numbers."""
    return torch.linspace(0.0001, 0.02, timesteps, dtype=dtype)


class Tables(NamedTuple):
    """The tutorial's pre-computed terms."""

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_recip_alphas: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    posterior_variance: Tensor


@cache
def tables(dtype: torch.dtype = torch.float32, timesteps: int = T) -> Tables:
    """The terms, all computed in `dtype` (the tutorial's: float32, cumprod included)."""
    betas = linear_beta_schedule(timesteps, dtype)
    alphas = 1.0 - betas
    alphas_cumprod = torch.cumprod(alphas, dim=0)
    alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    return Tables(
        betas=betas,
        alphas=alphas,
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=alphas_cumprod_prev,
        sqrt_recip_alphas=torch.sqrt(1.0 / alphas),
        sqrt_alphas_cumprod=torch.sqrt(alphas_cumprod),
        sqrt_one_minus_alphas_cumprod=torch.sqrt(1.0 - alphas_cumprod),
        posterior_variance=betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod),
    )


def get_index_from_list(vals: Tensor, t: Tensor, x_shape: torch.Size) -> Tensor:
    """`vals[t]` as [batch, 1, 1, …]. The gather runs on the CPU: a trip there and back a call."""
    batch_size = t.shape[0]
    out = vals.gather(-1, t.cpu())
    return out.reshape(batch_size, *((1,) * (len(x_shape) - 1))).to(t.device)


# Beyond the tutorial, in float64, from the papers' own statements.


def scaled_linear_beta_schedule(timesteps: int) -> Tensor:
    """Rombach et al. 2022: the square root of beta is linear in t."""
    ends = torch.tensor([1e-4, 0.02], dtype=torch.float64).sqrt()
    step = torch.arange(timesteps, dtype=torch.float64) / max(timesteps - 1, 1)
    return torch.lerp(ends[0], ends[1], step).square()


def cosine_beta_schedule(timesteps: int) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17, one step at a time in Python floats."""

    def f(t: float) -> float:
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f(t + 1) / f(t), 0.999) for t in range(timesteps)]
    return torch.tensor(betas, dtype=torch.float64)


def sigmoid_beta_schedule(timesteps: int) -> Tensor:
    """Jabri et al. 2022, Algorithm 4, with gamma(1) = 0 (start -3, end 3, tau 1)."""

    def gamma(t: Tensor) -> Tensor:
        low, high = torch.sigmoid(torch.tensor([-3.0, 3.0], dtype=torch.float64))
        return (high - torch.sigmoid(6 * t - 3)) / (high - low)

    now = torch.arange(timesteps, dtype=torch.float64) / timesteps
    later = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    return (1 - gamma(later) / gamma(now)).clamp(max=0.999)
