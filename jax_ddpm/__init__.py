"""DDPM (Ho et al. 2020) as pure functions in JAX, proven equal to PyTorch.

    import jax_ddpm as ddpm

A chain is a `NoiseSchedule`, a network is a function `(x_t, t) -> output`, and randomness comes
from explicit keys. Images are NHWC in [-1, 1]. t runs 0 … T - 1; entry 0 has one step of noise.
"""

from jax_ddpm import interop
from jax_ddpm._typing import DenoiseFn
from jax_ddpm.editing import ddim_invert, image_to_image, inpaint, interpolate, slerp
from jax_ddpm.forward import (
    predict_eps_from_v,
    predict_eps_from_xstart,
    predict_v,
    predict_xstart_from_eps,
    predict_xstart_from_v,
    q_mean_variance,
    q_posterior_mean_variance,
    q_sample,
)
from jax_ddpm.guidance import classifier_free_guidance, classifier_guidance, reconstruction_guidance
from jax_ddpm.likelihood import BitsPerDim, bits_per_dim
from jax_ddpm.losses import training_losses
from jax_ddpm.models import (
    SimpleUNet,
    UNet,
    adm_imagenet64,
    adm_imagenet128,
    adm_imagenet256,
    adm_imagenet512,
    ddpm_celebahq,
    ddpm_cifar10,
    ddpm_digits,
)
from jax_ddpm.noise import sample_noise
from jax_ddpm.reverse import DynamicThreshold as dynamic_threshold  # used as functions
from jax_ddpm.reverse import PMeanVariance, p_mean_variance
from jax_ddpm.reverse import StaticThreshold as static_threshold
from jax_ddpm.samplers import Sampler, ancestral, ddim, dpm_solver_pp, heun
from jax_ddpm.sampling import SampleState, p_sample_init, p_sample_loop, p_sample_steps
from jax_ddpm.schedule import (
    NoiseSchedule,
    cosine_beta_schedule,
    extract,
    linear_beta_schedule,
    make_schedule,
    rescale_zero_terminal_snr,
    respace,
    scaled_linear_beta_schedule,
    sigmoid_beta_schedule,
    spaced_timesteps,
)
from jax_ddpm.training import TrainState, ema_warmup, init_train_state, make_train_step

__version__ = "0.1.0"

__all__ = [
    # the noise schedule
    "NoiseSchedule", "make_schedule", "linear_beta_schedule", "scaled_linear_beta_schedule",
    "cosine_beta_schedule", "sigmoid_beta_schedule", "rescale_zero_terminal_snr",
    "spaced_timesteps", "respace", "extract", "sample_noise",
    # the forward process q
    "q_sample", "q_mean_variance", "q_posterior_mean_variance", "predict_xstart_from_eps",
    "predict_eps_from_xstart", "predict_v", "predict_xstart_from_v", "predict_eps_from_v",
    # the reverse process p
    "DenoiseFn", "PMeanVariance", "p_mean_variance", "static_threshold", "dynamic_threshold",
    # sampling
    "p_sample_loop", "p_sample_init", "p_sample_steps", "SampleState", "Sampler", "ancestral",
    "ddim", "dpm_solver_pp", "heun",
    # guidance and editing
    "classifier_free_guidance", "classifier_guidance", "reconstruction_guidance", "image_to_image",
    "inpaint", "ddim_invert", "interpolate", "slerp",
    # losses and likelihood
    "training_losses", "bits_per_dim", "BitsPerDim",
    # training
    "TrainState", "init_train_state", "make_train_step", "ema_warmup",
    # networks
    "SimpleUNet", "UNet", "ddpm_cifar10", "ddpm_celebahq", "ddpm_digits", "adm_imagenet64",
    "adm_imagenet128", "adm_imagenet256", "adm_imagenet512",
    # checkpoints of others
    "interop",
]  # fmt: skip
