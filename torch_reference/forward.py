"""The tutorial's forward process, and its posterior by Bayes' rule."""

import torch
from torch import Tensor

from torch_reference.schedule import Tables, get_index_from_list, tables


def forward_diffusion_sample(x_0: Tensor, t: Tensor, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The tutorial's: takes an image and a step, returns the noisy version of it and the noise.

    Draws from torch's global generator. The terms are taken in the dtype of `x_0`.
    """
    terms = tables(x_0.dtype)
    noise = torch.randn_like(x_0)
    sqrt_alphas_cumprod_t = get_index_from_list(terms.sqrt_alphas_cumprod, t, x_0.shape)
    sqrt_one_minus_alphas_cumprod_t = get_index_from_list(
        terms.sqrt_one_minus_alphas_cumprod, t, x_0.shape
    )
    mean = sqrt_alphas_cumprod_t.to(device) * x_0.to(device)
    noisy = mean + sqrt_one_minus_alphas_cumprod_t.to(device) * noise.to(device)
    return noisy, noise.to(device)


# Beyond the tutorial.


def q_posterior_mean_variance(
    terms: Tables, x_start: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """q(x_{t-1} | x_t, x_0) as the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0).

    Two Gaussians in x_{t-1}: precisions add, and means are weighed by them. At t = 0 the second
    is a point at x_0.
    """

    def at(vals: Tensor) -> Tensor:
        return get_index_from_list(vals, t, x_t.shape)

    alpha, beta, alpha_bar_prev = at(terms.alphas), at(terms.betas), at(terms.alphas_cumprod_prev)
    step_precision = alpha / beta
    prior_precision = 1 / (1 - alpha_bar_prev)
    variance = 1 / (step_precision + prior_precision)
    mean = variance * (
        step_precision * x_t / alpha.sqrt() + prior_precision * alpha_bar_prev.sqrt() * x_start
    )
    first = (t == 0).reshape(-1, *((1,) * (x_t.ndim - 1)))
    return torch.where(first, x_start, mean), variance.expand_as(x_t)
