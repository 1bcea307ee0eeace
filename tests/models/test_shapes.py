"""What is said of the parameters without tracing is what `init` makes."""

import jax
import jax.numpy as jnp
import pytest

import jax_ddpm as ddpm
from jax_ddpm.io.arrays import flatten
from jax_ddpm.models import NoisyClassifier, parameter_shapes

SMALL = {"norm_num_groups": 3, "layers_per_block": 1}
ONE_LEVEL = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
MODELS = {
    "digits": ddpm.ddpm_digits(),
    "odd": ddpm.UNet(
        **SMALL,
        out_channels=6,
        block_out_channels=(9, 15, 21),
        down_block_types=("AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        upsample_type="resnet",
        num_class_embeds=5,
        time_proj_dim=7,
        time_embedding_dim=10,
    ),
    "one level": ddpm.UNet(**SMALL, **ONE_LEVEL, block_out_channels=(9,), mid_block_type=None),
    **{pool: NoisyClassifier(sample_size=8, layers_per_block=1, pool=pool) for pool in POOLS},
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_init(key, name):
    model = MODELS[name]
    x = jnp.zeros((1, 8, 8, model.in_channels), jnp.float32)
    t = jnp.zeros((1,), jnp.int32)
    labels = [t] if getattr(model, "num_class_embeds", None) else []
    variables = jax.eval_shape(model.init, key, x, t, *labels)
    expected = {path: leaf.shape for path, leaf in flatten(variables["params"]).items()}
    assert parameter_shapes(model) == expected
