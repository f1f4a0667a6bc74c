"""Inpainting with any model: a part of the image is known."""

from jaxtyping import Array, Float

from jaxdiff.types import DenoiseFn, Latent, Sigma


def inpainted(denoise_fn: DenoiseFn, known: Latent, mask: Float[Array, "*b h w 1"], noise: Latent) -> DenoiseFn:
    """Takes the known latent where the mask is 0, and the model's guess where it is 1 (Lugmayr et al. 2022, eq. 8, for
    the guess of x_0 instead of each step's result, and so for any sampler).

    Args:
        denoise_fn: the model.
        known: the clean latent to keep.
        mask: 1 is drawn, 0 is kept, and values between mix the two.
        noise: the unit normal noise of the kept part, the same at every level.
    """

    def denoise(x: Latent, sigma: Sigma) -> Latent:
        x = mask * x + (1 - mask) * (known + sigma * noise)
        return mask * denoise_fn(x, sigma) + (1 - mask) * known

    return denoise
