"""Latent diffusion: the UNet, and text encoders with it, on the latents of a frozen VAE (Rombach et al. 2022).

Stable Diffusion XL's UNet reads, beside the captions' features, a vector for each caption as a whole and the numbers of
each image: its height and width before it was resized, the top and left edge of the crop, and the crop's height and
width (Podell et al. 2023, section 2.2).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from jaxdiff import build
from jaxdiff.build import Remat
from jaxdiff.config import DataConfig, DiffusionTask, VAEConfig
from jaxdiff.data.images import Cut
from jaxdiff.diffusion import timesteps, weights
from jaxdiff.diffusion.loss import WeightFn, diffusion_loss
from jaxdiff.diffusion.prediction import PREDICTIONS
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.diffusion.timesteps import DrawFn
from jaxdiff.training.captions import TOKENS, read, readers
from jaxdiff.training.inputs import LossInputs
from jaxdiff.training.noise import sample_keys
from jaxdiff.training.state import Batch, Metrics, Notes, Task, apply, merge
from jaxdiff.training.tasks.vae import sample_moments
from jaxdiff.types import Key, Params


def drop_captions(
    captions: Shaped[Array, "b *d"], empty: Shaped[Array, "*d"], share: float, key: Key, index: Int[Array, " b"]
) -> Shaped[Array, "b *d"]:
    """Puts the empty prompt in place of a `share` of captions, drawn for each sample (Ho & Salimans 2022, alg. 1).

    Captions are tokens [b, t], or what text encoders made of them, [b, t, d] or [b, d]. Whose captions are dropped
    depends on (key, index) alone, so that all that is known of a caption is dropped at once.
    """
    dropped = jax.vmap(lambda k: jax.random.bernoulli(k, share))(sample_keys(key, index))
    return jnp.where(dropped.reshape(-1, *[1] * empty.ndim), empty.astype(captions.dtype), captions)


def diffusion_inputs(config: DiffusionTask, data: DataConfig, vae: VAEConfig) -> LossInputs:
    """What is cached decides what a batch holds, and which networks a step needs.

    A batch has "index" [b], the samples' numbers. Its images are "image" [b, H, W, 3], which the frozen VAE encodes,
    or the cached "moments" [b, h, w, 2c]. Its captions are "tokens" [b, t], which the text encoder reads, trained or
    frozen, or the cached "context" [b, t, d]. The empty prompt is a frozen array, as tokens and as they are cached.

    For Stable Diffusion XL there are "tokens_2" [b, t], too, or "pooled" [b, p] beside the context; and the "numbers"
    [b, 6] of each image. No array is the empty prompt where it is zeros.
    """
    shape, texts = jax.ShapeDtypeStruct, config.text_encoders
    b, (height, width), t = data.batch_size, data.shapes[0], config.text_encoder.max_position_embeddings
    batch = {"index": shape((b,), jnp.int32)}
    trained, kept = ("unet",), ()
    frozen: Params = {}
    if not config.zeroes_empty:
        frozen |= {f"empty_{TOKENS[name]}": shape((t,), jnp.int32) for name in texts}
    if config.reads_sizes:
        batch["numbers"] = shape((b, len(Cut._fields)), jnp.float32)

    if config.latent_variants or data.source == "latents":
        latent = height // vae.factor, width // vae.factor
        batch["moments"] = shape((b, *latent, 2 * vae.latent_channels), jnp.float32)
        kept += ("vae",)
    else:
        batch["image"] = shape((b, height, width, 3), jnp.float32)
        frozen["vae"] = build.param_shapes(build.vae(vae), vae)

    if config.text_variants:
        made: dict[str, tuple[int, ...]] = {"context": (t, sum(text.hidden_size for text in texts.values()))}
        if config.text_encoder_2 is not None:
            made["pooled"] = (config.text_encoder_2.projection_dim,)
        batch |= {name: shape((b, *sides), jnp.float16) for name, sides in made.items()}
        if not config.zeroes_empty:
            frozen |= {f"empty_{name}": shape(sides, jnp.float32) for name, sides in made.items()}
        kept += tuple(texts)
    else:
        batch |= {TOKENS[name]: shape((b, t), jnp.int32) for name in texts}
        if config.train_text_encoder:
            trained += tuple(texts)
        else:
            frozen |= {name: build.param_shapes(getattr(build, name)(text), text) for name, text in texts.items()}
    return LossInputs(batch, trained, frozen, kept)


def diffusion_task(
    config: DiffusionTask,
    vae: VAEConfig,
    frozen: Params,
    start: Params | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
) -> Task:
    """Training of the UNet and, if wanted, the text encoder or encoders.

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
    text_encoders = readers(config, dtype, remat)
    autoencoder = build.vae(vae, dtype)
    schedule = make_schedule(config.scheduler)

    def init(key: Key) -> Params:
        texts = config.text_encoders if config.train_text_encoder else {}
        unet_key, *text_keys = jax.random.split(key, 1 + len(config.text_encoders))
        params = {"unet": build.init(unet, config.unet, unet_key)}
        for (name, text), text_key in zip(texts.items(), text_keys, strict=False):
            params[name] = build.init(getattr(build, name)(text), text, text_key)  # whole, with what nothing reads
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

        def dropping(name: str, rows: Any) -> Any:
            empty = jnp.zeros_like(rows[0]) if config.zeroes_empty else frozen[f"empty_{name}"]
            return drop_captions(rows, empty, config.caption_dropout, drop_key, index)

        if "text_encoder" in networks:
            tokens = {TOKENS[name]: _array(batch, TOKENS[name]) for name in text_encoders}
            if not config.zeroes_empty:
                tokens = {name: dropping(name, rows) for name, rows in tokens.items()}
            context, pooled, _ = read(text_encoders, networks, tokens)
            if config.zeroes_empty:
                context, pooled = dropping("context", context), dropping("pooled", pooled)
        else:
            context = dropping("context", _array(batch, "context"))
            pooled = dropping("pooled", _array(batch, "pooled")) if config.reads_sizes else None
        numbers = _array(batch, "numbers") if config.reads_sizes else None
        return diffusion_loss(
            lambda x, t, context: apply(unet, networks["unet"], x, t, context, pooled=pooled, numbers=numbers),
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
