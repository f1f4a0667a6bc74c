"""Latent diffusion: the UNet, and the text encoder with it, on the latents of a frozen VAE (Rombach et al. 2022)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdiff import build
from jaxdiff.config import DiffusionTask, VAEConfig
from jaxdiff.diffusion.loss import diffusion_loss
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.training.noise import sample_keys
from jaxdiff.training.state import Batch, Metrics, Notes, Task, apply, merge
from jaxdiff.training.tasks.vae import sample_moments
from jaxdiff.types import Key, Params


def drop_captions(
    tokens: Int[Array, "b t"], empty: Int[Array, " t"], share: float, key: Key, index: Int[Array, " b"]
) -> Int[Array, "b t"]:
    """Puts the empty prompt in place of a `share` of captions, drawn for each sample (Ho & Salimans 2022, alg. 1)."""
    dropped = jax.vmap(lambda k: jax.random.bernoulli(k, share))(sample_keys(key, index))
    return jnp.where(dropped[:, None], empty, tokens)


def diffusion_task(
    config: DiffusionTask,
    vae: VAEConfig,
    frozen: Params,
    start: Params | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> Task:
    """Params are those of "unet" and, if it is trained, "text_encoder".

    Args:
        config: what is trained, and how.
        vae: the autoencoder, of which `scaling_factor` brings latents to unit variance.
        frozen: "empty_tokens" [t], the empty prompt; "vae" where batches hold images and not moments; "text_encoder"
            where it is not trained.
        start: the first params in place of random ones.
        dtype: what the networks compute in.
        remat: recompute blocks in the backward pass.
    """
    unet = build.unet(config.unet, dtype, remat)
    text_encoder = build.text_encoder(config.text_encoder, dtype, remat)
    autoencoder = build.vae(vae, dtype)
    schedule = make_schedule(config.scheduler)

    def init(key: Key) -> Params:
        unet_key, text_key = jax.random.split(key)
        params = {"unet": build.init(unet, config.unet, unet_key)}
        if config.train_text_encoder:
            params["text_encoder"] = build.init(text_encoder, config.text_encoder, text_key)
        return params

    def loss(
        params: Params, frozen: Params, batch: Batch, key: Key, memory: Any
    ) -> tuple[Float[Array, ""], Metrics, Notes]:
        networks = merge(frozen, params)
        z_key, drop_key, noise_key = jax.random.split(key, 3)
        index = batch["index"]
        moments = batch.get("moments")
        if moments is None:
            moments = apply(autoencoder, networks["vae"], batch["image"], method="encode")
        x_0 = vae.scaling_factor * sample_moments(moments, index, z_key)
        tokens = drop_captions(batch["tokens"], frozen["empty_tokens"], config.caption_dropout, drop_key, index)
        context = apply(text_encoder, networks["text_encoder"], tokens)
        value, metrics = diffusion_loss(
            lambda x, t, context: apply(unet, networks["unet"], x, t, context),
            x_0,
            context,
            noise_key,
            index,
            schedule=schedule,
            prediction_type=config.scheduler.prediction_type,
            min_snr_gamma=config.min_snr_gamma,
        )
        return value, metrics, {}

    return Task(init, loss, start, frozen)
