"""One reverse step, from the papers."""

from collections.abc import Callable

import torch
from torch import Tensor

from torch_reference.forward import (
    predict_xstart_from_eps,
    predict_xstart_from_v,
    q_posterior_mean_variance,
)
from torch_reference.schedule import Tables, get_index_from_list

Model = Callable[[Tensor, Tensor], Tensor]


def p_mean_variance(
    terms: Tables,
    model: Model,
    x_t: Tensor,
    t: Tensor,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_denoised: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, variance, log-variance and x_0 of p(x_{t-1} | x_t), Ho et al. 2020 eq. 1, 7, 11."""
    output = model(x_t, t)
    # torch splits into pieces of a size, NumPy and JAX into a number of pieces.
    values = None
    if variance_type.startswith("learned"):
        output, values = torch.split(output, x_t.shape[1], dim=1)
    convert = {
        "epsilon": predict_xstart_from_eps,
        "sample": lambda terms, x_t, t, output: output,
        "v_prediction": predict_xstart_from_v,
    }[prediction_type]
    x_start = convert(terms, x_t, t, output)
    if clip_denoised:
        x_start = x_start.clamp(-1, 1)
    mean, variance, log_variance = q_posterior_mean_variance(terms, x_start, x_t, t)
    beta = get_index_from_list(terms.betas, t, x_t.shape).expand_as(x_t)
    if variance_type == "fixed_large":
        first = (t == 0).reshape(-1, *((1,) * (x_t.ndim - 1)))
        variance = torch.where(first, log_variance.exp(), beta)
        log_variance = variance.log()
    elif values is not None:
        if variance_type == "learned_range":
            # Nichol & Dhariwal 2021, eq. 15: a geometric mean of the two bounds.
            weight = (values + 1) / 2
            values = (beta**weight * log_variance.exp() ** (1 - weight)).log()
        variance, log_variance = values.exp(), values
    return mean, variance, log_variance, x_start
