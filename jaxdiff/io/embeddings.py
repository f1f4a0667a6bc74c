"""Files of textual inversions, read: which words they teach, and the vectors of each for every text encoder.

    {token: [d] | [1 d] | [n d], ...}                   diffusers, `.bin` and `.safetensors`; any number of words
    {"string_to_param": {"*": [n d]}, "name": ..., ...}  AUTOMATIC1111 and the first trainers, `.pt`
    {"emb_params": [n d]}                               the same as safetensors
    {"clip_l": [n 768], "clip_g": [n 1280]}             SDXL's, for both its text encoders

The latter three are named by their file, which is what people write in prompts.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.adapters.embeddings import WithRows
from jaxdiff.io.weights import FLOATS, listed, open_file
from jaxdiff.types import Params

logger = logging.getLogger(__name__)
Vectors = dict[str, np.ndarray]
"""A word's vectors [n d], by the folder of the text encoder that they are for."""

ENCODERS = {
    "clip_l": "text_encoder", "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder", "text_encoders_1": "text_encoder_2",
}  # fmt: skip
"""Which text encoder files mean by these names."""
MODELS = {768: "Stable Diffusion 1 or SDXL's first text encoder", 1024: "Stable Diffusion 2",
          1280: "SDXL's second text encoder"}  # fmt: skip
"""What has tokens of so many numbers."""
HOW = ": FILE:TOKEN, or (file, token) in Python"
"""How a word is given another name."""
_A1111 = "string_to_param."
_ALONE = "emb_params"
_FLOATS = {*FLOATS.values(), np.dtype(np.float64)}
_MAX_VECTORS = 1024
"""Of a file; a prompt has room for 75 a chunk."""
_MAX_LETTERS = 100
"""Of a word."""


class Embedding(NamedTuple):
    """A file, and what its word is called in prompts; of a file with several words, the one that is taken."""

    path: Path
    word: str | None = None
    """None is the file's own, or all of them."""

    @classmethod
    def of(cls, value: Any) -> "Embedding":
        """From a path, or a path and a word.

        Raises:
            ValueError: where it is neither.
        """
        match value:
            case str() | Path():
                return cls(Path(value))
            case (str() | Path() as path, None):
                return cls(Path(path))
            case (str() | Path() as path, str() as word):
                return cls(Path(path), _word(Path(path), word))
        raise ValueError(f"An embedding is {value!r}; give a file, or a file and a word.")


def read_embedding(given: Embedding, widths: Mapping[str, int]) -> dict[str, Vectors]:
    """The words that a file teaches: the vectors of each, for every text encoder of the model.

    Args:
        given: the file, and what the word is called.
        widths: numbers that a token has, by the text encoder's folder.

    Raises:
        ValueError: where the file is missing or damaged, is no textual inversion, or is for another model.
    """
    path, wanted = given
    tensors = open_file(path)[0]
    words = _words(path, tensors)
    if wanted is not None and wanted in words:
        words = {wanted: words[wanted]}
    elif wanted is not None:
        if len(words) > 1:
            raise ValueError(f"{path} has no word {wanted!r}; it has {listed(words)}.")
        words = dict.fromkeys([wanted], next(iter(words.values())))
    found = {_word(path, word): _for_encoders(path, word, given, widths) for word, given in words.items()}
    if (n := sum(len(next(iter(vectors.values()))) for vectors in found.values())) > _MAX_VECTORS:
        raise ValueError(f"{path} has {n} vectors, more than the {_MAX_VECTORS} that are read.")
    told = ", ".join(f"{word!r} ({len(next(iter(vectors.values())))} vectors)" for word, vectors in found.items())
    logger.info("%s: write %s in prompts.", path, told)
    return found


def with_rows(params: Params, numbers: np.ndarray, rows: np.ndarray) -> Params:
    """A text encoder's params, whose table of tokens has `rows` [n d] as the rows of these `numbers` [n]."""
    tree: Params = {}
    for name, child in params.items():
        if name == "token_embedding":
            tree[name] = child | {"embedding": WithRows(child["embedding"], numbers, rows)}
        else:
            tree[name] = with_rows(child, numbers, rows) if isinstance(child, dict) else child
    return tree


def _words(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, Vectors]:
    """Each word's tensors by what they are for; "" is for the one text encoder that a model has."""
    if found := [array for name, array in tensors.items() if name.startswith(_A1111)]:
        if len(found) > 1:
            raise ValueError(f"{path} has {len(found)} entries in its string_to_param; supported is one.")
        return {path.stem: {"": found[0]}}
    if _ALONE in tensors:
        return {path.stem: {"": tensors[_ALONE]}}
    if found := {ENCODERS[name]: array for name, array in tensors.items() if name in ENCODERS}:
        return {path.stem: found}
    if not tensors or len(tensors) > _MAX_VECTORS or any(array.ndim > 2 for array in tensors.values()):
        raise ValueError(
            f"{path} is no textual inversion: it must hold vectors by their words, emb_params, string_to_param, or "
            f"clip_l and clip_g; its tensors are {listed(tensors) or 'none'}."
        )
    return {word: {"": array} for word, array in tensors.items()}


def _for_encoders(path: Path, word: str, given: Vectors, widths: Mapping[str, int]) -> Vectors:
    """A word's vectors [n d] for every text encoder."""
    if "" in given and len(widths) == 1:
        given = {next(iter(widths)): given[""]}
    if widths.keys() == {"text_encoder_2"} <= given.keys():  # as SDXL's refiner, which has the second one alone
        given = {encoder: given[encoder] for encoder in widths}
    found = {encoder: _vectors(path, word, array) for encoder, array in given.items()}
    fits = {encoder: array.shape[1] for encoder, array in found.items()} == dict(widths)
    if not fits:
        model = " and ".join(map(str, widths.values()))
        theirs = {array.shape[1] for array in found.values()}
        seems = {MODELS[d] for d in theirs if d in MODELS} if len(found) == 1 else {"SDXL"}
        told = f"; it is for {seems.pop()}" if len(seems) == 1 else ""
        raise ValueError(
            f"{path}: the vectors of {word[:_MAX_LETTERS]!r} have {' and '.join(map(str, sorted(theirs)))} "
            f"numbers{told}, and this model's text encoder{'s take' if len(widths) > 1 else ' takes'} {model}."
        )
    if len({len(array) for array in found.values()}) > 1:
        lengths = " and ".join(str(len(array)) for array in found.values())
        raise ValueError(f"{path} is damaged: it has {lengths} vectors for the text encoders; they must be as many.")
    return found


def _vectors(path: Path, word: str, array: np.ndarray) -> np.ndarray:
    """Vectors [n d], once they are known to be finite numbers."""
    shown = repr(word[:_MAX_LETTERS])
    if array.dtype not in _FLOATS or array.ndim not in (1, 2) or not array.size:
        raise ValueError(f"{path}: {shown} is {array.dtype} {list(array.shape)}; a word's vectors are floats [d] or "
                         "[n, d].")  # fmt: skip
    if math.prod(array.shape[:-1]) > _MAX_VECTORS:
        raise ValueError(f"{path}: {shown} has {len(array)} vectors, more than the {_MAX_VECTORS} that are read.")
    with np.errstate(over="ignore"):
        found = np.array(array, np.float32).reshape(-1, array.shape[-1])
    if not np.isfinite(found).all():
        raise ValueError(f"{path}: {shown} is not finite.")
    return found


def _word(path: Path, word: str) -> str:
    """A word, once it is known to be one that can be written in a prompt."""
    if not word.strip() or not word.isprintable() or len(word) > _MAX_LETTERS:
        raise ValueError(
            f"{path}: the word {word[:_MAX_LETTERS]!r} cannot be written in a prompt; give it another{HOW}."
        )
    return word.strip()
