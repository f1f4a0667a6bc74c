"""Latent diffusion: the UNet, and the text encoder with it, on the latents of a frozen VAE (Rombach et al. 2022)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from jaxdiff import build
from jaxdiff.build import Remat
from jaxdiff.config import DataConfig, DiffusionTask, VAEConfig
from jaxdiff.diffusion import timesteps, weights
from jaxdiff.diffusion.loss import WeightFn, diffusion_loss
from jaxdiff.diffusion.prediction import PREDICTIONS
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.diffusion.timesteps import DrawFn
from jaxdiff.training.inputs import LossInputs
from jaxdiff.training.noise import sample_keys
from jaxdiff.training.state import Batch, Metrics, Notes, Task, apply, merge
from jaxdiff.training.tasks.vae import sample_moments
from jaxdiff.types import Key, Params


def drop_captions(
    captions: Shaped[Array, "b t *d"], empty: Shaped[Array, "t *d"], share: float, key: Key, index: Int[Array, " b"]
) -> Shaped[Array, "b t *d"]:
    """Puts the empty prompt in place of a `share` of captions, drawn for each sample (Ho & Salimans 2022, alg. 1).

    Captions are tokens [b, t], or what the text encoder made of them [b, t, d].
    """
    dropped = jax.vmap(lambda k: jax.random.bernoulli(k, share))(sample_keys(key, index))
    return jnp.where(dropped.reshape(-1, *[1] * empty.ndim), empty.astype(captions.dtype), captions)


def diffusion_inputs(config: DiffusionTask, data: DataConfig, vae: VAEConfig) -> LossInputs:
    """What is cached decides what a batch holds, and which networks a step needs.

    A batch has "index" [b], the samples' numbers. Its images are "image" [b, H, W, 3], which the frozen VAE encodes,
    or the cached "moments" [b, h, w, 2c]. Its captions are "tokens" [b, t], which the text encoder reads, trained or
    frozen, or the cached "context" [b, t, d]. The empty prompt is a frozen array, as tokens and as they are cached.
    """
    shape, text = jax.ShapeDtypeStruct, config.text_encoder
    b, (height, width), t = data.batch_size, data.shapes[0], text.max_position_embeddings
    batch = {"index": shape((b,), jnp.int32)}
    trained, kept = ("unet",), ()
    frozen: Params = {"empty_tokens": shape((t,), jnp.int32)}

    if config.latent_variants or data.source == "latents":
        latent = height // vae.factor, width // vae.factor
        batch["moments"] = shape((b, *latent, 2 * vae.latent_channels), jnp.float32)
        kept += ("vae",)
    else:
        batch["image"] = shape((b, height, width, 3), jnp.float32)
        frozen["vae"] = build.param_shapes(build.vae(vae), vae)

    if config.text_variants:
        batch["context"] = shape((b, t, text.hidden_size), jnp.float16)
        frozen["empty_context"] = shape((t, text.hidden_size), jnp.float32)
        kept += ("text_encoder",)
    else:
        batch["tokens"] = shape((b, t), jnp.int32)
        if config.train_text_encoder:
            trained += ("text_encoder",)
        else:
            frozen["text_encoder"] = build.param_shapes(build.text_encoder(text), text)
    return LossInputs(batch, trained, frozen, kept)


def diffusion_task(
    config: DiffusionTask,
    vae: VAEConfig,
    frozen: Params,
    start: Params | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
) -> Task:
    """Training of the UNet and, if wanted, the text encoder.

    The loss applies the networks that it is given, and reads from the batch what the others have made of it before.

    Args:
        config: what is trained, and how.
        vae: the autoencoder, of which `scaling_factor` brings latents to unit variance.
        frozen: what `diffusion_inputs` says, as weights or as shapes.
        start: the first params in place of random ones.
        dtype: what the networks compute in.
        remat: what the backward pass computes again.
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
        if "vae" in networks:
            moments = apply(autoencoder, networks["vae"], _array(batch, "image"), method="encode")
        else:
            moments = _array(batch, "moments")
        x_0 = vae.scaling_factor * sample_moments(moments, index, z_key)
        if "text_encoder" in networks:
            tokens = _array(batch, "tokens")
            tokens = drop_captions(tokens, frozen["empty_tokens"], config.caption_dropout, drop_key, index)
            context = apply(text_encoder, networks["text_encoder"], tokens)
        else:
            context = _array(batch, "context")
            context = drop_captions(context, frozen["empty_context"], config.caption_dropout, drop_key, index)
        return diffusion_loss(
            lambda x, t, context: apply(unet, networks["unet"], x, t, context),
            x_0,
            context,
            noise_key,
            index,
            schedule=schedule,
            prediction=PREDICTIONS[config.scheduler.prediction_type],
            weight_fn=weight_fn(config),
            draw_fn=draw_fn(config, memory),
            noise_offset=config.noise_offset,
        )

    if config.timesteps == "importance":
        memory = timesteps.history(config.scheduler.num_train_timesteps)
        return Task(init, loss, start, frozen, memory, lambda past, seen: timesteps.remember(past, **seen))
    return Task(init, loss, start, frozen)


def _array(batch: Batch, name: str) -> Any:
    """The batch's array of this name. Where `data.source` names latents, they decide what there is."""
    if name not in batch:
        raise ValueError(
            f"The task reads {name!r}, and the data give {', '.join(sorted(batch))}: the latents there were not cached "
            "by a run with this task's text_variants."
        )
    return batch[name]


def weight_fn(config: DiffusionTask) -> WeightFn:
    """How much each noise level counts."""
    return {
        "none": weights.unweighted,
        "min_snr": partial(weights.min_snr, gamma=config.min_snr_gamma),
        "debiased": weights.debiased,
        "edm": partial(weights.edm, sigma_data=config.sigma_data),
    }[config.weighting]


def draw_fn(config: DiffusionTask, memory: Any) -> DrawFn:
    """Which noise levels are drawn; `memory` is the history that importance sampling goes by."""
    steps = config.scheduler.num_train_timesteps
    if config.timesteps == "importance":
        return timesteps.importance(memory)
    if config.timesteps == "logit_normal":
        return timesteps.logit_normal(steps, config.logit_mean, config.logit_std)
    return timesteps.uniform(steps)
