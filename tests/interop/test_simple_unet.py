import subprocess
import sys

import numpy as np
import pytest
import torch

from jax_ddpm.interop import simple_unet_from_torch, simple_unet_to_torch
from torch_reference.models.simple_unet import SimpleUNet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_come_and_go_to_the_bit(dtype, channels):
    tensors = SimpleUNet(channels).to(dtype).state_dict()
    arrays = simple_unet_to_torch(simple_unet_from_torch(tensors))
    assert arrays.keys() == tensors.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, tensors[name].numpy(), strict=True)
        assert array.flags.c_contiguous


def test_training_on_in_torch_leaves_these_weights_alone():
    """Parameters that track gradients are taken, and copied."""
    reference = SimpleUNet()
    variables = simple_unet_from_torch(dict(reference.named_parameters()))
    before = reference.up1.bias.detach().numpy().copy()
    with torch.no_grad():
        reference.up1.bias.add_(1)
    np.testing.assert_array_equal(variables["params"]["up1"]["bias"], before)


def test_foreign_weights_are_named():
    tensors = {name: value.numpy() for name, value in SimpleUNet().state_dict().items()}
    for wrong, words in (
        ({"down1.weight": tensors["down1.weight"]}, "expected a tensor down1.bias, got none"),
        (tensors | {"extra": np.zeros(1)}, "only SimpleUNet's tensors, got extra"),
        (tensors | {"up2.bias": np.zeros(4)}, r"expected up2.bias of shape \(3,\), got \(4,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            simple_unet_from_torch(wrong)


@pytest.mark.slow
def test_the_library_never_imports_torch():
    code = "import sys, jax_ddpm, jax_ddpm.io.arrays; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
