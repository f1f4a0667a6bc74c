"""What is encoded once, before training: images to latents, and captions to contexts, if the task caches them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxdiff.config import DataConfig, DiffusionTask, TrainConfig, VAEConfig, to_dict, to_name
from jaxdiff.data.latents import TextFn, cache_latents, identity
from jaxdiff.data.record import Source
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.io.folder import TOKENIZERS
from jaxdiff.io.storage import is_remote, place_of
from jaxdiff.runtime.distributed import gather, wait_for_all
from jaxdiff.training.options import FREE
from jaxdiff.training.parts import digest, encoder, text_encoder
from jaxdiff.training.tasks.vae import ENCODER
from jaxdiff.types import Params

FORMAT = 3
"""Of the cache: another one where the same settings would make other content."""
SAMPLED = 4096
"""Records, at most, by which a run that caches nothing notices that its data changed."""


def records_of(source: Source, every: bool) -> str:
    """How many records a source has, and letters by which others differ; all processes share the reading.

    Args:
        source: the records.
        every: whether all of them count, or `SAMPLED` of them.
    """
    share = identity(source, None if every else SAMPLED, jax.process_index(), jax.process_count())
    total = sum(map(int, gather(str(share)))) % 2**256
    return f"{len(source)} records ({total.to_bytes(32).hex()[:12]})"


def encode_once(
    config: TrainConfig,
    vae: VAEConfig,
    weights: Params,
    tokenizers: Sequence[Tokenizer],
    source: Source,
    records: str,
    workdir: epath.Path,
) -> tuple[DataConfig, Params]:
    """Fills the run's cache of latents, as far as it is not there yet; all processes share the work.

    The cache is a folder that is named after all that its content depends on, so that one run never reads what
    another made of other weights or data.

    Args:
        config: the run, of a `DiffusionTask` with `latent_variants`.
        vae: the autoencoder that encodes the images.
        weights: those of "vae" and, where captions are encoded, too, of the text encoders.
        tokenizers: the text encoders'.
        source: the records with the images.
        records: what `records_of` gives.
        workdir: the run directory, which holds the cache unless `config.cache` names another place.

    Returns:
        What reads the cache in place of the images, and, if captions are encoded, the empty one: "empty_context"
        [t, d], and of Stable Diffusion XL "empty_pooled" [p].

    Raises:
        ValueError: where the cache would lie in a bucket, or as `cache_latents` does.
    """
    assert isinstance(config.task, DiffusionTask)
    task, data, dtype = config.task, config.data, jnp.dtype(config.dtype)
    made = {name: value for name, value in to_dict(data).items() if not FREE.fullmatch(f"data.{name}")}
    made |= {"format": FORMAT, "variants": task.latent_variants, "seed": config.seed, "dtype": config.dtype}
    made |= {"records": records, "vae": to_name(replace(vae, scaling_factor=1.0))}  # moments are not scaled
    makers = {name: weights["vae"][name] for name in ENCODER if name in weights["vae"]}
    text_fn: TextFn | None = None
    empty, cut = {}, set[str]()
    if task.text_variants:
        texts = {name: weights[name] for name in task.text_encoders}
        makers |= texts
        made |= {"text_variants": task.text_variants} | {n: to_dict(text) for n, text in task.text_encoders.items()}
        made |= {TOKENIZERS[name]: own.identity for name, own in zip(texts, tokenizers, strict=True)}
        encode_texts = text_encoder(task, texts, tokenizers, dtype)
        found = encode_texts([""])
        empty = {f"empty_{name}": rows[0] for name, rows in zip(("context", "pooled"), found, strict=False)}

        def counting(texts: list[str]) -> tuple[np.ndarray, ...]:
            cut.update(text for text in texts if any(tokenizer.cut(text) for tokenizer in tokenizers))
            return encode_texts(texts)

        text_fn = counting
    path = (place_of(config.cache) if config.cache else workdir) / f"latents-{digest(makers, made)}"
    if is_remote(path):
        raise ValueError(f"Latents cannot be read from a bucket ({path}): name a folder by --cache.")
    cache_latents(
        encoder(vae, weights["vae"], dtype),
        data,
        source,
        Path(path),
        variants=task.latent_variants,
        seed=config.seed,
        text_fn=text_fn,
        text_variants=task.text_variants,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if cut:
        print(f"{len(cut)} captions are longer than the text encoder's {tokenizers[0].max_length} tokens; their ends "
              f"were cut, as of {min(cut)!r}.")  # fmt: skip
    wait_for_all("latents")
    return replace(data, source="latents", root=str(path)), empty
