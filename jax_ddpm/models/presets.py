"""Configurations of `UNet` with a name. The keywords `fields` replace fields of the network."""

from typing import Any

from jax_ddpm.models.unet import UNet


def ddpm_cifar10(**fields: Any) -> UNet:
    """Ho et al.'s CIFAR-10 network, 35,746,307 parameters.

    Args:
      **fields: fields of `UNet` to change, such as `dropout`.

    Examples:
      >>> model = ddpm.ddpm_cifar10(dropout=0.1)
      >>> init = lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), jnp.array([0]))
      >>> variables = jax.eval_shape(init, jax.random.key(0))  # shapes alone
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
      35746307
    """
    return _unet(fields, sample_size=32)


def ddpm_digits(num_classes: int | None = 10, **fields: Any) -> UNet:
    """A small network for digits, 8×8 to 32×32, with one channel.

    Args:
      num_classes: number of classes, or None. With classes, the last label is the null label.
      **fields: fields of `UNet` to change, such as `dropout`.

    Examples:
      >>> ddpm.ddpm_digits(num_classes=26, dropout=0.1).num_class_embeds
      27
    """
    return _unet(
        fields,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )


def ddpm_celebahq(**fields: Any) -> UNet:
    """Ho et al.'s network for 256×256 images (Appendix B), 113,673,219 parameters.

    The settings are those of Google's `ddpm-celebahq-256`, whose weights fit. `fields` change
    those of `UNet`.
    """
    return _unet(
        fields,
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
    )


def adm_imagenet64(**fields: Any) -> UNet:
    """Dhariwal & Nichol's ADM for ImageNet at 64×64, 295,904,454 parameters (their 296 M).

    Like the larger ones, it learns the variance and has 1,000 classes but no null label, since its
    guidance comes from a classifier; `num_class_embeds=1001` adds one. The original also mixes
    precisions: its norms, dense layers and last convolution stay float32. Here `dtype` applies to
    all layers. `fields` change those of `UNet`.
    """
    own = {"layers_per_block": 3, "dropout": 0.1}
    return _adm(64, (192, 384, 576, 768), plain=1, **{**own, **fields})


def adm_imagenet128(**fields: Any) -> UNet:
    """Dhariwal & Nichol's ADM for ImageNet at 128×128, 421,529,606 parameters (their 422 M).

    See `adm_imagenet64` for variance, labels and `fields`.
    """
    heads = {"num_attention_heads": 4, "attention_head_dim": None}
    return _adm(128, (256, 256, 512, 768, 1024), plain=2, **{**heads, **fields})


def adm_imagenet256(**fields: Any) -> UNet:
    """Dhariwal & Nichol's ADM for ImageNet at 256×256, 553,838,086 parameters (their 554 M).

    The unconditional networks, of ImageNet and LSUN, have `num_class_embeds=None`. See
    `adm_imagenet64` for variance, labels and `fields`.
    """
    return _adm(256, (256, 256, 512, 512, 1024, 1024), plain=3, **fields)


def adm_imagenet512(**fields: Any) -> UNet:
    """Dhariwal & Nichol's ADM for ImageNet at 512×512, 558,997,638 parameters (their 559 M).

    See `adm_imagenet64` for variance, labels and `fields`.
    """
    own = {"time_proj_dim": 256, "time_embedding_dim": 1024}
    return _adm(512, (128, 256, 256, 512, 512, 1024, 1024), plain=4, **{**own, **fields})


def _adm(size: int, channels: tuple[int, ...], *, plain: int, **fields: Any) -> UNet:
    """Attention at all levels but the first `plain`."""
    attended = len(channels) - plain
    down, up = ("ResnetDownsampleBlock2D",) * plain, ("ResnetUpsampleBlock2D",) * plain
    return _unet(
        fields,
        sample_size=size,
        out_channels=6,
        block_out_channels=channels,
        down_block_types=(*down, *("AttnDownBlock2D",) * attended),
        up_block_types=(*("AttnUpBlock2D",) * attended, *up),
        attention_head_dim=64,
        norm_eps=1e-5,
        attn_norm_num_groups=32,  # None would mean no norm with "scale_shift"
        resnet_time_scale_shift="scale_shift",
        downsample_padding=1,
        downsample_type="resnet",
        upsample_type="resnet",
        flip_sin_to_cos=True,
        freq_shift=0,
        num_class_embeds=1000,
    )


def _unet(fields: dict[str, Any], **settings: Any) -> UNet:
    return UNet(**settings | fields)
