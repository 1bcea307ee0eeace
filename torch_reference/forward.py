"""The tutorial's forward process; beyond it, what ε, x_0 and v say of one another, and Bayes."""

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


# Beyond the tutorial. x_t and v are x_0 and ε turned by an angle φ with cos φ = √ᾱ
# (Salimans & Ho 2022, App. D), so everything below follows from that angle.


def _angle(terms: Tables, t: Tensor, x: Tensor) -> Tensor:
    signal = get_index_from_list(terms.sqrt_alphas_cumprod, t, x.shape)
    noise = get_index_from_list(terms.sqrt_one_minus_alphas_cumprod, t, x.shape)
    return torch.atan2(noise, signal)


def q_sample(terms: Tables, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """cos φ x_0 + sin φ ε."""
    angle = _angle(terms, t, x_start)
    return angle.cos() * x_start + angle.sin() * noise


def predict_v(terms: Tables, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """dx_φ / dφ = cos φ ε - sin φ x_0."""
    angle = _angle(terms, t, x_start)
    return angle.cos() * noise - angle.sin() * x_start


def predict_xstart_from_v(terms: Tables, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Turned back by φ."""
    angle = _angle(terms, t, x_t)
    return angle.cos() * x_t - angle.sin() * v


def predict_eps_from_v(terms: Tables, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Turned back by φ."""
    angle = _angle(terms, t, x_t)
    return angle.sin() * x_t + angle.cos() * v


def predict_xstart_from_eps(terms: Tables, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t / cos φ - tan φ ε."""
    angle = _angle(terms, t, x_t)
    return x_t / angle.cos() - angle.tan() * eps


def predict_eps_from_xstart(terms: Tables, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
    """x_t / sin φ - x_0 / tan φ."""
    angle = _angle(terms, t, x_t)
    return x_t / angle.sin() - x_start / angle.tan()


def q_mean_variance(terms: Tables, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log-variance of q(x_t | x_0)."""
    angle = _angle(terms, t, x_start)
    variance = angle.sin().square().expand_as(x_start)
    return angle.cos() * x_start, variance, variance.log()


def q_posterior_mean_variance(
    terms: Tables, x_start: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_{t-1} | x_t, x_0) as the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0).

    Two Gaussians in x_{t-1}: precisions add, and means are weighed by them. At t = 0 the second
    is a point at x_0; its log-variance is taken at t = 1, as OpenAI does.
    """

    def product(t: Tensor) -> tuple[Tensor, Tensor]:
        def at(vals: Tensor) -> Tensor:
            return get_index_from_list(vals, t, x_t.shape)

        alpha, beta, previous = at(terms.alphas), at(terms.betas), at(terms.alphas_cumprod_prev)
        step_precision, prior_precision = alpha / beta, 1 / (1 - previous)
        variance = 1 / (step_precision + prior_precision)
        weighed = step_precision * x_t / alpha.sqrt() + prior_precision * previous.sqrt() * x_start
        return variance * weighed, variance.expand_as(x_t)

    # Where t = 0 the product would be inf * 0: the mean is chosen before anything is infinite.
    mean, later_variance = product(t.clamp(min=1))
    first = (t == 0).reshape(-1, *((1,) * (x_t.ndim - 1)))
    return torch.where(first, x_start, mean), product(t)[1], later_variance.log()
