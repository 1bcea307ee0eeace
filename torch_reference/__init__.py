"""The PyTorch tutorial, kept runnable: the oracle that `jax_ddpm` is compared with.

File names mirror `jax_ddpm/`. What the tutorial has, stands here with its oddities, named in
the docstrings; what it leaves out (the reverse chain, the other schedules) is written from the
papers, by another derivation than the library's wherever there is one. `models/` also has the
networks of others that parity compares.

Images are NCHW here, as PyTorch's are. Everything is float32 unless told otherwise.
"""

from torch_reference.forward import forward_diffusion_sample as forward_diffusion_sample
from torch_reference.models.simple_unet import SimpleUNet as SimpleUNet
from torch_reference.sampling import sample as sample
from torch_reference.sampling import sample_timestep as sample_timestep
from torch_reference.schedule import get_index_from_list as get_index_from_list
from torch_reference.schedule import linear_beta_schedule as linear_beta_schedule

__all__ = [
    "SimpleUNet",
    "forward_diffusion_sample",
    "get_index_from_list",
    "linear_beta_schedule",
    "sample",
    "sample_timestep",
]
