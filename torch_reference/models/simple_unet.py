"""The tutorial's network."""

import torch.nn.functional as F
from torch import Tensor, nn


class SimpleUNet(nn.Module):
    """The tutorial's SimpleUNet: 151,427 parameters at 3 channels.

    Despite its name it neither resamples nor skips, and a transposed convolution of stride 1
    is a convolution with its kernel flipped. The step number goes in raw, 0 … T - 1, so that
    the untrained loss is about 1e4; its layer has no activation.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(channels, 64, 3, padding=1)
        self.down2 = nn.Conv2d(64, 128, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(128, 64, 3, padding=1)
        self.up2 = nn.ConvTranspose2d(64, channels, 3, padding=1)
        self.time_mlp = nn.Linear(1, 128)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time_mlp(t.to(x.dtype).unsqueeze(-1))
        x = F.relu(self.down1(x))
        x = F.relu(self.down2(x))
        x = x + time[:, :, None, None]
        x = F.relu(self.up1(x))
        return self.up2(x)
