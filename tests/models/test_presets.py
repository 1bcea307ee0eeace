"""The networks of the papers, to the last parameter."""

import jax
import jax.numpy as jnp
import pytest

import jax_ddpm as ddpm


@pytest.mark.parametrize(
    ("model", "side", "count"),
    [
        # Ho et al. 2020, Appendix B: 35.7 and 114 million; diffusers' ddpm-cifar10-32 and
        # ddpm-celebahq-256.
        (ddpm.ddpm_cifar10(), 32, 35_746_307),
        (ddpm.UNet(), 8, 35_746_307),
        (ddpm.ddpm_celebahq(), 256, 113_673_219),
        # Dhariwal & Nichol 2021, Table 11: 296, 422, 554 and 559 million.
        (ddpm.adm_imagenet64(), 64, 295_904_454),
        (ddpm.adm_imagenet128(), 64, 421_529_606),
        (ddpm.adm_imagenet256(), 64, 553_838_086),
        (ddpm.adm_imagenet512(), 64, 558_997_638),
    ],
)
def test_number_of_parameters(key, model, side, count):
    x, t = jnp.zeros((1, side, side, 3), jnp.float32), jnp.zeros((1,), jnp.int32)
    labels = None if model.num_class_embeds is None else t
    shapes = jax.eval_shape(model.init, key, x, t, labels)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
