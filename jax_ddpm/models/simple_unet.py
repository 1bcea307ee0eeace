"""The tutorial's network: four 3×3 convolutions and the step number.

Despite its name it has no resampling and no skips. Its transposed convolutions (stride 1,
padding 1) are convolutions with a flipped kernel. Here they are plain convolutions;
`interop.torch` flips the kernels that come from PyTorch.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from jax_ddpm._errors import check_floats
from jax_ddpm._typing import Image, Time
from jax_ddpm.models.layers import BlockConfig, each_time

# The layer's only input is the raw step number, 0 … T - 1. With the default initialisation the
# output would start near 100 (the tutorial's does, and its untrained loss is about 1e4).
_time_init = nn.initializers.variance_scaling(1e-4, "fan_in", "uniform")


class SimpleUNet(nn.Module):
    """The tutorial's SimpleUNet, NHWC: 151,427 parameters at 3 channels.

    Attributes:
      channels: channels of the images.
      dtype, param_dtype, precision: as in `UNet`.

    Examples:
      >>> model, x, t = ddpm.SimpleUNet(), jnp.zeros((2, 8, 8, 3)), jnp.array([0, 199])
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), x, t)  # shapes alone
      >>> jax.eval_shape(model.apply, variables, x, t).shape
      (2, 8, 8, 3)
    """

    channels: int = 3
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Image, t: Time) -> Array:
        """Predict the noise in `x`, [batch, height, width, channels], at step `t`, as in `UNet`."""
        check_floats("x", x, (*jnp.shape(x)[:3], self.channels))
        config = BlockConfig.of(self)
        time = config.dense(128, "time_mlp", kernel_init=_time_init)(each_time(t, x))
        x = nn.relu(config.conv(64, "down1")(x))
        x = nn.relu(config.conv(128, "down2")(x))
        x = x + time[:, None, None, :].astype(x.dtype)
        x = nn.relu(config.conv(64, "up1")(x))
        return config.conv(self.channels, "up2")(x)
