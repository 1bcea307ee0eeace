"""The tutorial's training step. Run it: `python -m torch_reference.training`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_reference.forward import forward_diffusion_sample
from torch_reference.models.simple_unet import SimpleUNet
from torch_reference.schedule import T


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x_0: Tensor, t: Tensor
) -> tuple[float, Tensor]:
    """One step on the batch `x_0` at `t`: the loss before it, and the noise that was drawn."""
    optimizer.zero_grad()
    x_noisy, noise = forward_diffusion_sample(x_0, t)
    loss = F.mse_loss(noise, model(x_noisy, t))
    loss.backward()
    optimizer.step()
    return loss.item(), noise


def main() -> None:
    """The tutorial's demonstration: one step on four images of Gaussian noise."""
    torch.manual_seed(42)
    model = SimpleUNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x_0 = torch.randn(4, 3, 64, 64)
    t = torch.randint(0, T, (4,)).long()
    loss, _ = train_step(model, optimizer, x_0, t)
    print(f"loss of the untrained network: {loss:.1f}")


if __name__ == "__main__":
    main()
