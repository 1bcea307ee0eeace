"""DDPM as pure functions in JAX, proven equal to PyTorch.

import jax_ddpm as ddpm
"""

from jax_ddpm import interop as interop
from jax_ddpm._typing import DenoiseFn as DenoiseFn
from jax_ddpm.editing import ddim_invert as ddim_invert
from jax_ddpm.editing import image_to_image as image_to_image
from jax_ddpm.editing import inpaint as inpaint
from jax_ddpm.editing import interpolate as interpolate
from jax_ddpm.editing import repaint_walk as repaint_walk
from jax_ddpm.editing import slerp as slerp
from jax_ddpm.forward import predict_eps_from_v as predict_eps_from_v
from jax_ddpm.forward import predict_eps_from_xstart as predict_eps_from_xstart
from jax_ddpm.forward import predict_v as predict_v
from jax_ddpm.forward import predict_xstart_from_eps as predict_xstart_from_eps
from jax_ddpm.forward import predict_xstart_from_v as predict_xstart_from_v
from jax_ddpm.forward import q_mean_variance as q_mean_variance
from jax_ddpm.forward import q_posterior_mean_variance as q_posterior_mean_variance
from jax_ddpm.forward import q_sample as q_sample
from jax_ddpm.guidance import classifier_free_guidance as classifier_free_guidance
from jax_ddpm.guidance import classifier_guidance as classifier_guidance
from jax_ddpm.guidance import reconstruction_guidance as reconstruction_guidance
from jax_ddpm.likelihood import BitsPerDim as BitsPerDim
from jax_ddpm.likelihood import bits_per_dim as bits_per_dim
from jax_ddpm.losses import training_losses as training_losses
from jax_ddpm.models import SimpleUNet as SimpleUNet
from jax_ddpm.models import UNet as UNet
from jax_ddpm.models import adm_imagenet64 as adm_imagenet64
from jax_ddpm.models import adm_imagenet128 as adm_imagenet128
from jax_ddpm.models import adm_imagenet256 as adm_imagenet256
from jax_ddpm.models import adm_imagenet512 as adm_imagenet512
from jax_ddpm.models import ddpm_celebahq as ddpm_celebahq
from jax_ddpm.models import ddpm_cifar10 as ddpm_cifar10
from jax_ddpm.models import ddpm_digits as ddpm_digits
from jax_ddpm.noise import sample_noise as sample_noise
from jax_ddpm.reverse import DynamicThreshold as DynamicThreshold
from jax_ddpm.reverse import PMeanVariance as PMeanVariance
from jax_ddpm.reverse import StaticThreshold as StaticThreshold
from jax_ddpm.reverse import dynamic_threshold as dynamic_threshold
from jax_ddpm.reverse import p_mean_variance as p_mean_variance
from jax_ddpm.reverse import static_threshold as static_threshold
from jax_ddpm.samplers import Sampler as Sampler
from jax_ddpm.samplers import ancestral as ancestral
from jax_ddpm.samplers import ddim as ddim
from jax_ddpm.samplers import dpm_solver_pp as dpm_solver_pp
from jax_ddpm.samplers import heun as heun
from jax_ddpm.sampling import SampleState as SampleState
from jax_ddpm.sampling import p_sample_init as p_sample_init
from jax_ddpm.sampling import p_sample_loop as p_sample_loop
from jax_ddpm.sampling import p_sample_steps as p_sample_steps
from jax_ddpm.schedule import NoiseSchedule as NoiseSchedule
from jax_ddpm.schedule import cosine_beta_schedule as cosine_beta_schedule
from jax_ddpm.schedule import extract as extract
from jax_ddpm.schedule import linear_beta_schedule as linear_beta_schedule
from jax_ddpm.schedule import make_schedule as make_schedule
from jax_ddpm.schedule import rescale_zero_terminal_snr as rescale_zero_terminal_snr
from jax_ddpm.schedule import respace as respace
from jax_ddpm.schedule import scaled_linear_beta_schedule as scaled_linear_beta_schedule
from jax_ddpm.schedule import sigmoid_beta_schedule as sigmoid_beta_schedule
from jax_ddpm.schedule import spaced_timesteps as spaced_timesteps
from jax_ddpm.training import TrainState as TrainState
from jax_ddpm.training import ema_warmup as ema_warmup
from jax_ddpm.training import init_train_state as init_train_state
from jax_ddpm.training import make_train_step as make_train_step

__version__ = "0.1.0"
