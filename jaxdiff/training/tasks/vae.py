"""The autoencoder: reconstruct, and keep the latents near a standard normal (Rombach et al. 2022, section 3.1).

Beside the mean errors of pixels there may be LPIPS, and an adversary: a discriminator that is one of the params, and is
trained by the same step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff import build
from jaxdiff.build import Remat
from jaxdiff.config import DataConfig, VAETask
from jaxdiff.runtime.compile import Compiled
from jaxdiff.training.adversary import LOSSES, adaptive_weight, r1_penalty, with_gradient
from jaxdiff.training.inputs import LossInputs
from jaxdiff.training.noise import normal_like
from jaxdiff.training.state import Batch, Metrics, Notes, Task, apply, merge
from jaxdiff.types import Key, Params

ENCODER = ("encoder", "quant_conv")  # the half that makes latents
DISCRIMINATOR = "discriminator"
LPIPS = "lpips"


def split_moments(moments: Float[Array, "b h w c2"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """Mean and standard deviation of the posterior; the log-variance is clipped as diffusers clips it."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))


def sample_moments(moments: Float[Array, "b h w c2"], index: Array, key: Key) -> Float[Array, "b h w c"]:
    """A draw from each posterior, keyed by the sample's index (Kingma & Welling 2014, eq. 10)."""
    mean, std = split_moments(moments)
    return mean + std * normal_like(key, index, mean)


def vae_inputs(config: VAETask, data: DataConfig) -> LossInputs:
    """A batch holds "image" [b, h, w, 3] and "index" [b]; `ENCODER` is frozen where the decoder is trained alone.

    Raises:
        ValueError: where images are too small for LPIPS or the adversary.
    """
    b, (height, width) = data.batch_size, data.shapes[0]
    shapes = build.param_shapes(build.vae(config.vae), config.vae)
    frozen = {} if config.train_encoder else {name: shapes[name] for name in ENCODER if name in shapes}
    trained = tuple(name for name in shapes if name not in frozen)
    for part in (config.lpips, config.adversary):
        side, least = min(min(shape) for shape in data.shapes), build.smallest_side(part)
        if part.weight and side < least:
            raise ValueError(f"{type(part).__name__} needs images of {least} pixels along each side, and the data's "
                             f"have {side}: make them larger, or its weight 0.")  # fmt: skip
    if config.lpips.weight:
        frozen |= {LPIPS: build.param_shapes(build.lpips(config.lpips), config.lpips)}
    if config.adversary.weight:
        trained += (DISCRIMINATOR,)
    return LossInputs(
        batch={
            "index": jax.ShapeDtypeStruct((b,), jnp.int32),
            "image": jax.ShapeDtypeStruct((b, height, width, 3), jnp.float32),
        },
        trained=trained,
        frozen=frozen,
    )


def vae_task(
    config: VAETask,
    frozen: Params,
    start: Params | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
) -> Task:
    """Training of the autoencoder, and of its adversary. Its params are the parts that are not frozen.

    Args:
        config: what is trained, and how.
        frozen: what `vae_inputs` says, as weights or as shapes.
        start: the first params in place of random ones.
        dtype: what the networks compute in.
        remat: what the backward pass computes again.
    """
    module, adversary = build.vae(config.vae, dtype, remat), config.adversary
    lpips, discriminator = build.lpips(config.lpips, dtype), build.discriminator(adversary, dtype)

    def init(key: Key) -> Params:
        params = {name: tree for name, tree in build.init(module, config.vae, key).items() if name not in frozen}
        if adversary.weight:
            params[DISCRIMINATOR] = build.init(discriminator, adversary, jax.random.fold_in(key, 1))
        return params

    def loss(
        params: Params, frozen: Params, batch: Batch, key: Key, memory: Any
    ) -> tuple[Float[Array, ""], Metrics, Notes]:
        image, networks = batch["image"], merge(frozen, params)
        moments = apply(module, networks, image, method="encode")
        z = sample_moments(moments, batch["index"], key)
        copy, kept = apply(module, networks, z, method="decode", capture_intermediates=_is_last_norm, mutable=[KEPT])
        mean, std = split_moments(moments)
        # Against N(0, 1), for each latent value (Kingma & Welling 2014, appendix B).
        kl = 0.5 * (jnp.square(mean) + jnp.square(std) - 2 * jnp.log(std) - 1).mean()
        kl_weight = config.kl_weight * (mean.size / image.size if config.kl_sums else 1)
        # Of each image, as `psnr` has it: means over images are the same in micro-batches.
        off = jnp.square((jnp.clip(copy, -1, 1) - image) / 2).mean((1, 2, 3))
        metrics = {"psnr": -10 * jnp.log10(jnp.maximum(off, 1e-10)).mean(), "kl": kl}

        def likeness(copy: Array) -> tuple[Array, Metrics]:
            error = copy - image
            l1, l2 = jnp.abs(error).mean(), jnp.square(error).mean()
            total, told = config.l1_weight * l1 + config.l2_weight * l2, {"l1": l1}
            if config.lpips.weight:
                distance = apply(lpips, networks[LPIPS], image, copy).mean()
                total, told = total + config.lpips.weight * distance, told | {"lpips": distance}
            return total, told

        if not adversary.weight:
            total, told = likeness(copy)
            return total + kl_weight * kl, metrics | told, {}

        rule, began = LOSSES[adversary.loss], (memory["updates"] >= adversary.start).astype(jnp.float32)
        judge = networks[DISCRIMINATOR]

        def deception(copy: Array) -> Array:
            return rule.generator(apply(discriminator, jax.lax.stop_gradient(judge), copy))

        # Both losses' gradients with respect to the copy: the weight is theirs, and their sum goes back through the
        # decoder once.
        shown = jax.lax.stop_gradient(copy)
        (total, told), towards_image = jax.value_and_grad(likeness, has_aux=True)(shown)
        deceived, towards_real = jax.value_and_grad(deception)(shown)
        weight = adversary.weight * began
        if adversary.adaptive:
            pulls = (last_gradient(kept[KEPT], networks, pull) for pull in (towards_image, towards_real))
            told["adaptive_weight"] = adaptive_weight(*pulls)
            weight *= told["adaptive_weight"]
        total = with_gradient(total + weight * deceived, copy, towards_image + weight * towards_real)

        verdicts = partial(apply, discriminator, judge)
        penalty, real = r1_penalty(verdicts, image) if adversary.r1 else (jnp.zeros(()), verdicts(image))
        made = verdicts(shown)
        told |= {"r1": penalty} if adversary.r1 else {}
        told |= {"generator_loss": deceived, "discriminator_loss": rule.discriminator(real, made)}
        told |= {"told_real": (real > 0).mean(), "told_copy": (made < 0).mean()}
        against = told["discriminator_loss"] + adversary.r1 / 2 * penalty
        return total + kl_weight * kl + against, metrics | told, {}

    if not adversary.weight:
        return Task(init, loss, start, frozen)
    return Task(
        init,
        loss,
        start,
        frozen,
        memory={"updates": np.int32(0)},
        remember=lambda memory, notes: {"updates": memory["updates"] + 1},
        independent=not adversary.adaptive,
        apart=(DISCRIMINATOR,),
    )


KEPT = "intermediates"  # linen's name for what modules return on the way


def _is_last_norm(module: Any, method: str) -> bool:
    return module.name == "conv_norm_out"


def last_gradient(kept: Any, networks: Params, pull: Float[Array, "b h w c"]) -> Array:
    """The gradient at the decoder's last kernel of a loss with the gradient `pull` at the copy.

    Args:
        kept: what the decoder's modules returned, of which the last norm's is what the kernel is multiplied with.
        networks: has the decoder's params.
        pull: one number for each of the copy's.
    """
    (x,) = kept["decoder"]["conv_norm_out"]["__call__"]
    kernel = networks["decoder"]["conv_out"]["kernel"]

    def convolve(kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, kernel, pull = (jax.lax.stop_gradient(a).astype(jnp.float32) for a in (x, kernel, pull))
    return jax.vjp(convolve, kernel)[1](pull)[0]


def reconstruct(config: VAETask, dtype: DTypeLike = jnp.float32) -> Callable[..., tuple[Array, Array]]:
    """A compiled `(params, image [b,h,w,3]) -> (reconstruction, moments)` that takes the posterior's mean."""
    module = build.vae(config.vae, dtype)

    @Compiled
    def run(params: Params, image: Array) -> tuple[Array, Array]:
        moments = apply(module, params, image, method="encode")
        mean, _ = split_moments(moments)
        return apply(module, params, mean, method="decode"), moments

    return run


def psnr(a: Float[np.ndarray, "b h w c"], b: Float[np.ndarray, "b h w c"]) -> Float[np.ndarray, " b"]:
    """Peak signal-to-noise ratio of each image in dB; both lie in [-1, 1], and what `b` has outside is clipped."""
    error = np.square((a - b.clip(-1, 1)).astype(np.float64) / 2).mean((1, 2, 3))
    return -10 * np.log10(np.maximum(error, 1e-10))


def latent_scale(moments: list[np.ndarray]) -> float:
    """1 / the standard deviation of the latents that have these moments: what brings them to unit variance."""
    means, stds = zip(*(np.split(m, 2, axis=-1) for m in moments), strict=True)
    mean, std = np.concatenate(means), np.exp(0.5 * np.concatenate(stds).clip(-30, 20))
    return float(1 / np.sqrt(mean.var() + np.square(std).mean()))
