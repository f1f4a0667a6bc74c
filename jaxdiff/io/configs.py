"""The JSON configs of diffusers and transformers as dataclasses, in their several spellings."""

import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from jaxdiff.config import from_dict

logger = logging.getLogger(__name__)

# What transformers' configs say that has no part in what a network computes.
TRANSFORMERS_IGNORED = frozenset({
    "architectures", "dtype", "torch_dtype", "transformers_version", "initializer_factor", "initializer_range",
    "return_dict", "use_cache", "attention_dropout", "dropout", "chunk_size_feed_forward", "length_penalty",
    "max_length", "num_beams", "num_return_sequences", "output_attentions", "repetition_penalty", "temperature",
    "tie_word_embeddings", "top_k", "top_p", "typical_p", "diversity_penalty", "problem_type", "id2label", "label2id",
    "encoder_no_repeat_ngram_size", "use_bfloat16", "num_beam_groups",
})  # fmt: skip
_OF_ADDED = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")


def read_values(
    file: Path,
    values: Mapping[str, Any],
    cls: type,
    only: Mapping[str, tuple[Any, ...]],
    ignored: frozenset[str],
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """A config's values as a dataclass.

    Fields that nobody here knows are left out, as diffusers leaves them out, and named in a warning, unless they are
    off: null, false, 0 or empty.

    Args:
        file: where the values are from, for messages.
        values: by name.
        cls: the dataclass.
        only: fields beside those of `cls`, and the values that are supported.
        ignored: fields that say nothing about what is drawn.
        defaults: what the file may leave out, where it differs from the defaults of `cls`.

    Raises:
        ValueError: for a value that is not supported, or of another kind.
    """
    names = [f.name for f in fields(cls)]
    kept, unknown = dict(defaults or {}), []
    for name, value in values.items():
        if name in names:
            off = isinstance(value, list) and value and all(flag is False for flag in value)
            kept[name] = False if off else value  # off at every level is off
        elif name in only:
            if value not in only[name]:
                supported = ", ".join(map(json.dumps, only[name]))
                raise ValueError(f"{file}: {name} is {json.dumps(value)}; supported: {supported}.")
        elif not (name.startswith("_") or name in ignored or value is None or value in (False, 0, [], {})):
            unknown.append(f"{name} = {json.dumps(value)[:60]}")
    if unknown:
        told = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        logger.warning("%s: unknown fields are left out, as diffusers leaves them out: %s.", file, told)
    try:
        return from_dict(cls, kept, str(file))
    except ValueError as error:
        sentence = str(error)
        raise ValueError(sentence if sentence.startswith(str(file)) else f"{file}: {sentence}") from error


def square_sides(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The values, of which those that name both of a square's sides name one."""
    sides = {name: values.get(name) for name in names}
    squares = {n: x[0] for n, x in sides.items() if isinstance(x, list) and len(x) == 2 and x[0] == x[1]}
    return {**values, **squares}


def one_spelling(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in the one spelling that the dataclasses have, of several that mean the same.

    transformers nests the text encoder's config of a whole CLIP model; a square's sides may be two numbers; "swish" is
    SiLU, and activations may be in capitals; one width of the prompt's features may be said for each level; sizes of
    an added embedding say nothing where there is none.
    """
    out = dict(values)
    if isinstance(nested := out.get("text_config"), dict) and "hidden_size" not in out:
        out = dict(nested)
    out, width = square_sides(out, "sample_size"), out.get("cross_attention_dim")
    if isinstance(width, list) and width and width.count(width[0]) == len(width):
        out["cross_attention_dim"] = width[0]
    if isinstance(act := out.get("act_fn"), str):
        out["act_fn"] = "silu" if act.lower() == "swish" else act.lower()
    if out.get("addition_embed_type") is None and out.get("class_embed_type") is None:
        out = {name: value for name, value in out.items() if name not in _OF_ADDED}
    return out
