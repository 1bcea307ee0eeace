"""The bound in bits per dimension, from the paper (Ho et al. 2020, eq. 5 and 13)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from torch_reference.forward import predict_eps_from_xstart, q_posterior_mean_variance, q_sample
from torch_reference.reverse import Model, p_mean_variance
from torch_reference.schedule import Tables


def bin_probability(x: Tensor, mean: Tensor, stddev: Tensor) -> Tensor:
    """The mass in the bin of pixel x, at least 1e-12, by the tanh formula for the normal CDF.

    What lies above the mean is mirrored below it, where the difference of two small numbers
    keeps its digits. The outermost bins end at ±100, further than any mass reaches.
    """

    def cdf(z: Tensor) -> Tensor:
        return torch.sigmoid(math.sqrt(8 / math.pi) * (z + 0.044715 * z**3))

    low = ((x - 1 / 255).where(x > -0.999, -100) - mean) / stddev
    high = ((x + 1 / 255).where(x < 0.999, 100) - mean) / stddev
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    return (cdf(high) - cdf(low)).clamp(min=1e-12)


def vb_terms(
    terms: Tables, model: Model, x_start: Tensor, x_t: Tensor, t: Tensor, **policy: Any
) -> tuple[Tensor, Tensor]:
    """Each image's term of the bound at its own t, bits per dimension, and the predicted x_0."""
    mean, _, log_variance, pred_xstart = p_mean_variance(terms, model, x_t, t, **policy)
    p = Normal(mean, (log_variance / 2).exp())
    mean, _, log_variance = q_posterior_mean_variance(terms, x_start, x_t, t)
    q = Normal(mean, (log_variance / 2).exp())
    bits = [
        -bin_probability(x_start[j], p.mean[j], p.stddev[j]).log2().mean()
        if t[j] == 0
        else kl_divergence(q, p)[j].mean() / math.log(2)
        for j in range(len(t))
    ]
    return torch.stack(bits), pred_xstart


@torch.no_grad()
def bits_per_dim(
    terms: Tables,
    model: Model,
    x_start: Tensor,
    noise_fn: Callable[[int], Tensor],
    **policy: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total, prior, and the bound and the squared error of ε of every entry (ascending)."""
    vb, mse = [], []
    for i in range(len(terms.betas)):
        t, noise = torch.full((len(x_start),), i), noise_fn(i)
        x_t = q_sample(terms, x_start, t, noise)
        bits, pred_xstart = vb_terms(terms, model, x_start, x_t, t, **policy)
        eps = predict_eps_from_xstart(terms, x_t, t, pred_xstart)
        vb.append(bits)
        mse.append((eps - noise).square().flatten(start_dim=1).mean(dim=1))
    signal = terms.alphas_cumprod[-1]
    last = Normal(signal.sqrt() * x_start, (1 - signal).sqrt())
    prior = kl_divergence(last, Normal(torch.zeros_like(x_start), 1.0))
    prior = prior.flatten(start_dim=1).mean(dim=1) / math.log(2)
    return torch.stack(vb, 1).sum(dim=1) + prior, prior, torch.stack(vb, 1), torch.stack(mse, 1)
