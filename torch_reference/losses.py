"""The losses, from the papers: the tutorial has only the mean squared error of ε."""

from torch import Tensor

from torch_reference.forward import predict_v, q_sample
from torch_reference.likelihood import vb_terms
from torch_reference.reverse import Model
from torch_reference.schedule import Tables


def training_losses(
    terms: Tables,
    model: Model,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    loss_type: str = "mse",
    weighting: str | None = None,
    min_snr_gamma: float = 5.0,
) -> Tensor:
    """The loss of each image: Ho et al. eq. 14 or 5, Nichol & Dhariwal 2021, Hang et al. 2023."""
    x_t = q_sample(terms, x_start, t, noise)
    target = {
        "epsilon": noise,
        "sample": x_start,
        "v_prediction": predict_v(terms, x_start, t, noise),
    }[prediction_type]

    def bound(model: Model) -> Tensor:
        return vb_terms(
            terms,
            model,
            x_start,
            x_t,
            t,
            prediction_type=prediction_type,
            variance_type=variance_type,
            clip_denoised=False,
        )[0]

    if loss_type == "vb":
        return bound(model)
    channels = x_start.shape[1]
    mse = (model(x_t, t)[:, :channels] - target).flatten(start_dim=1).square().mean(dim=1)
    if weighting == "min_snr":
        # In x_0's units the weight is min(SNR, γ); the errors of ε and v are those of x_0
        # scaled by √SNR and √(SNR + 1).
        snr = terms.alphas_cumprod[t] / (1 - terms.alphas_cumprod[t])
        units = {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[prediction_type]
        mse = snr.clamp(max=min_snr_gamma) / units * mse
    if loss_type == "mse":
        return mse

    def detached(x: Tensor, t: Tensor) -> Tensor:
        output = model(x, t).clone()
        output[:, :channels] = output[:, :channels].detach()
        return output

    return mse + len(terms.betas) / 1000 * bound(detached)
