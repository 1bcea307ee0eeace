import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from jax_ddpm.interop import simple_unet_from_torch, simple_unet_to_torch
from torch_reference.models.simple_unet import SimpleUNet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_is_exact_and_loads_back(dtype, channels):
    reference = SimpleUNet(channels).to(dtype)
    arrays = simple_unet_to_torch(simple_unet_from_torch(reference.state_dict()))
    assert all(array.flags.c_contiguous for array in arrays.values())
    other = SimpleUNet(channels).to(dtype)
    other.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    for name, value in reference.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_parameters_that_track_gradients_are_taken():
    reference = SimpleUNet()
    variables = simple_unet_from_torch(dict(reference.named_parameters()))
    np.testing.assert_array_equal(
        variables["params"]["down1"]["bias"], reference.down1.bias.detach().numpy()
    )


def test_a_state_dict_of_data_parallel_is_read():
    tensors = SimpleUNet().state_dict()
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    ours, expected = simple_unet_from_torch(wrapped), simple_unet_from_torch(tensors)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_training_on_in_torch_leaves_these_weights_alone():
    reference = SimpleUNet()
    variables = simple_unet_from_torch(reference.state_dict())
    before = variables["params"]["up1"]["kernel"].copy()
    with torch.no_grad():
        reference.up1.weight.add_(1)
    np.testing.assert_array_equal(variables["params"]["up1"]["kernel"], before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("up1.bias"), "expected a tensor up1.bias, got none"),
        (lambda d: d.update(extra=np.zeros(1)), "only SimpleUNet's tensors, got extra"),
        (
            lambda d: d.update({"up2.bias": np.zeros(4, np.float32)}),
            r"expected up2.bias of shape \(3,\), got \(4,\)",
        ),
        (lambda d: d.clear(), "expected the tutorial's SimpleUNet"),
    ],
)
def test_foreign_weights_are_named(change, words):
    tensors = {name: value.numpy() for name, value in SimpleUNet().state_dict().items()}
    change(tensors)
    with pytest.raises(ValueError, match=words):
        simple_unet_from_torch(tensors)


@pytest.mark.slow
def test_the_library_never_imports_torch():
    code = "import sys, jax_ddpm, jax_ddpm.io.arrays; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
