"""The networks of the papers, to the last parameter."""

import math

import pytest

import jax_ddpm as ddpm
from jax_ddpm.models import parameter_shapes


@pytest.mark.parametrize(
    ("model", "count"),
    [
        # Ho et al. 2020, Appendix B: 35.7 and 114 million; diffusers' ddpm-cifar10-32 and
        # ddpm-celebahq-256.
        (ddpm.ddpm_cifar10(), 35_746_307),
        (ddpm.UNet(), 35_746_307),
        (ddpm.ddpm_celebahq(), 113_673_219),
        # Dhariwal & Nichol 2021, Table 11: 296, 422, 554 and 559 million.
        (ddpm.adm_imagenet64(), 295_904_454),
        (ddpm.adm_imagenet128(), 421_529_606),
        (ddpm.adm_imagenet256(), 553_838_086),
        (ddpm.adm_imagenet512(), 558_997_638),
    ],
)
def test_number_of_parameters(model, count):
    """By their shapes, which `test_shapes` holds to what `init` makes."""
    assert sum(map(math.prod, parameter_shapes(model).values())) == count
