"""Embeddings of texts by CLIP, from a folder of transformers; those of images are `jaxdiff.evaluation.features`'."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from jaxdiff import build
from jaxdiff.config import load_json, naming
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.io.configs import one_spelling, read_values
from jaxdiff.io.convert import from_torch
from jaxdiff.io.folder import CLIP, NETWORKS
from jaxdiff.io.weights import check_params, open_weights

BATCH = 16
"""Texts that are read at once."""


def has_texts(folder: Path) -> bool:
    """Whether a folder holds both halves."""
    return load_json(folder / "config.json").get("model_type") == "clip"


def text_embeddings(folder: Path, texts: Sequence[str]) -> Float32[np.ndarray, "n p"]:
    """The vectors of texts in the space that they share with images; what is longer than CLIP reads is cut.

    Args:
        folder: of a whole CLIPModel, with its tokenizer or, where that has CLIP's own vocabulary, without.
        texts: at least one.

    Raises:
        ValueError: where the folder has no text half, or is damaged.
    """
    file = folder / "config.json"
    values = load_json(file)
    if values.get("model_type") != "clip":
        raise ValueError(
            f"{folder} is the image half of a CLIP; to compare with texts, give the folder of a CLIPModel."
        )
    kind = NETWORKS["text_encoder_2"]
    values = one_spelling(values) | {"projection_dim": values.get("projection_dim", 512)}
    config = read_values(file, values, kind.config, kind.only, kind.ignored, kind.left_out)
    tensors = open_weights(folder, kind.stem).items()
    with naming(folder):
        params = from_torch((name, t) for name, t in tensors if name.startswith(("text_model.", "text_projection.")))
    module = build.text_encoder_2(config)
    params = jax.device_put(check_params(params, build.param_shapes(module, config), folder))
    has_own = any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    tokenizer = Tokenizer.load(folder if has_own else CLIP, config.max_position_embeddings)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{folder} has no tokenizer, and its {config.vocab_size} tokens are not CLIP's own.")
    run = jax.jit(lambda params, tokens: module.apply({"params": params}, tokens)[1])  # pyright: ignore
    found = []
    for start in range(0, len(texts), BATCH):
        some = list(texts[start : start + BATCH])
        tokens = tokenizer(some + some[-1:] * (BATCH - len(some)))
        found.append(np.asarray(run(params, jnp.asarray(tokens)))[: len(some)])
    return np.concatenate(found)
