"""What the tutorial leaves out: Ho et al. 2020, Algorithm 2, in its vocabulary."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_reference.schedule import T, get_index_from_list, tables


@torch.no_grad()
def sample_timestep(model: nn.Module, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Subtract the predicted noise, add a little back: line 4 of Algorithm 2, variance β̃."""
    terms = tables(x.dtype)

    def at(vals: Tensor) -> Tensor:
        return get_index_from_list(vals, t, x.shape)

    mean = at(terms.sqrt_recip_alphas) * (
        x - at(terms.betas) * model(x, t) / at(terms.sqrt_one_minus_alphas_cumprod)
    )
    if t[0] == 0:
        return mean
    return mean + torch.sqrt(at(terms.posterior_variance)) * noise


@torch.no_grad()
def sample(
    model: nn.Module, x_T: Tensor, noise_fn: Callable[[int], Tensor], timesteps: int = T
) -> list[Tensor]:
    """All states of the reverse chain, x_{T-1} … x_0, with `noise_fn(i)` as step i's draw."""
    x, states = x_T, []
    for i in reversed(range(timesteps)):
        t = torch.full((x.shape[0],), i, dtype=torch.long)
        x = sample_timestep(model, x, t, noise_fn(i))
        states.append(x)
    return states
