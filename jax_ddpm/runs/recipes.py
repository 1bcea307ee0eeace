"""Trainings with a name: every value is that of the paper or the code named beside it.

Whatever a recipe does not say is the default of `Settings`.
"""

from typing import Any, NamedTuple

from jax_ddpm.data import Preparation
from jax_ddpm.models import UNet, adm_imagenet64, ddpm_celebahq, ddpm_cifar10
from jax_ddpm.runs.settings import UNET_FIELDS, Settings


class Recipe(NamedTuple):
    """A published training: its settings, and the images that it is meant for."""

    settings: Settings
    preparation: Preparation
    image_shape: tuple[int, int, int]
    num_classes: int | None
    source: str


def unet_fields(model: UNet) -> dict[str, Any]:
    """The fields of a network that `Settings.unet` takes."""
    return {name: getattr(model, name) for name in UNET_FIELDS}


_PUBLISHED: dict[str, Any] = {
    "learning_rate_schedule": "constant",  # also scripts/image_train.py: lr_anneal_steps=0
    "ema_decay": 0.9999,  # Appendix B; scripts/image_train.py: ema_rate
    "ema_warmup": False,  # tpu_utils.py: constant after the first step
    "checkpoint_every": 1000,
}

# Ho et al. 2020, and their code (hojonathanho/diffusion: scripts/run_cifar.py and run_celebahq.py,
# diffusion_tf/tpu_utils/tpu_utils.py). Adam, and gradients clipped at 1, are the defaults.
_HO_ET_AL = _PUBLISHED | {
    "timesteps": 1000,  # §4
    "schedule": "linear",  # §4: β from 1e-4 to 0.02
    "loss_type": "mse",  # §3.4, L_simple
    "warmup_steps": 5000,  # run_cifar.py: warmup=5000
}

# Nichol & Dhariwal 2021, Appendix A, and the flags of their README (openai/improved-diffusion). The
# cosine schedule and a weight decay of 0 are the defaults.
_NICHOL_DHARIWAL = _PUBLISHED | {
    "variance_type": "learned_range",  # --learn_sigma True
    "loss_type": "hybrid",  # §3.1, L_hybrid
    "optimizer": "adamw",  # train_util.py
    "warmup_steps": 0,
    "grad_clip": 0.0,  # none
}

_IMPROVED = ddpm_cifar10(
    layers_per_block=3,  # --num_res_blocks 3
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),  # 16, 8
    attention_head_dim=64,  # four heads of 256 channels
    attn_norm_num_groups=32,
    resnet_time_scale_shift="scale_shift",
    dropout=0.3,  # --dropout 0.3
    norm_eps=1e-5,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    time_scale=0.25,  # --rescale_timesteps True, their default: t · 1000 / 4000
)

RECIPES = {
    "digits": Recipe(Settings(), Preparation(), (8, 8, 1), 10, "chosen here: benchmarks/README.md"),
    "mnist": Recipe(
        # Twice the channels and four times the steps of the digits, for images of 28×28.
        Settings(unet={"block_out_channels": (64, 128)}, steps=6000, learning_rate=1e-3),
        Preparation(channels=1),
        (28, 28, 1),
        10,
        "chosen here",
    ),
    "cifar10": Recipe(
        Settings(
            **_HO_ET_AL,
            variance_type="fixed_large",  # run_cifar.py: model_var_type="fixedlarge"
            unet=unet_fields(ddpm_cifar10(dropout=0.1)),  # Appendix B
            batch_size=128,
            learning_rate=2e-4,
            steps=800_000,  # Appendix B
        ),
        Preparation(channels=3, flip=True, labels="none"),  # unconditional, random flips
        (32, 32, 3),
        None,
        "Ho et al. 2020, CIFAR-10",
    ),
    "celebahq256": Recipe(
        Settings(
            **_HO_ET_AL,
            unet=unet_fields(ddpm_celebahq()),  # Appendix B: no dropout
            batch_size=64,  # run_celebahq.py
            learning_rate=2e-5,  # Appendix B: 256×256
            steps=500_000,  # Appendix B
        ),
        Preparation(image_size=256, channels=3, flip=True, labels="none"),
        (256, 256, 3),
        None,
        "Ho et al. 2020, CelebA-HQ 256×256",
    ),
    "cifar10_iddpm": Recipe(
        Settings(
            **_NICHOL_DHARIWAL,
            unet=unet_fields(_IMPROVED),
            timesteps=4000,  # --diffusion_steps 4000
            learning_rate=1e-4,  # --lr 1e-4
            batch_size=128,  # --batch_size 128
            steps=500_000,  # of their checkpoint: cifar10_uncond_50M_500K.pt
        ),
        Preparation(channels=3, labels="none"),
        (32, 32, 3),
        None,
        "Nichol & Dhariwal 2021, CIFAR-10, L_hybrid",
    ),
    "imagenet64_adm": Recipe(
        Settings(
            **_NICHOL_DHARIWAL,
            unet=unet_fields(adm_imagenet64()),
            timesteps=1000,  # --diffusion_steps 1000
            learning_rate=3e-4,  # Table 11
            batch_size=2048,  # Table 11
            steps=540_000,  # Table 11
            label_dropout=0.0,  # their guidance is a classifier's
            guidance=1.0,
        ),
        Preparation(image_size=64, channels=3, flip=True),  # image_datasets.py: random_flip
        (64, 64, 3),
        1000,
        "Dhariwal & Nichol 2021, ImageNet 64×64",
    ),
}
"""Published trainings by name. Each has `settings` (`Settings`), `preparation` (`Preparation`),
`image_shape`, `num_classes` and `source`, the paper."""
