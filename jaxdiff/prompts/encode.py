"""From a batch's prompts to the arrays that a text encoder, a sampler and guidance take."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from jaxdiff.data.tokens import Tokenizer
from jaxdiff.prompts.grammar import NEW_CHUNK, Part, parse, plain
from jaxdiff.prompts.wildcards import Wildcards

MAX_CHUNKS = 32
"""A prompt has no more chunks than this; what comes after is left out, with a warning."""


class Words(NamedTuple):
    """What one image shall show."""

    prompt: str
    negative_prompt: str = ""
    regions: tuple[str, ...] = ()
    """A prompt for each region of the image."""


class Prompts(NamedTuple):
    """The prompts of a batch. A phase is a run of steps over which no image's text changes.

    Each image's are padded to the batch's sizes so that its image stays the same in any batch: parts with weight
    0, phases that never begin, and chunks by repeating all of a text's own, which attention over them does not notice.
    """

    ids: Int32[np.ndarray, "b phases 1+parts chunks length"]
    """Tokens, for each chunk with start, end and padding; at 0 the negative prompt, then the parts."""
    token_weights: Float32[np.ndarray, "b phases 1+parts chunks length"]
    """Each token's weight; 1 for start, end and padding."""
    part_weights: Float32[np.ndarray, "b phases parts"]
    """How far each part counts; 0 for padding. The same in all phases."""
    part_region: Int32[np.ndarray, "b parts"]
    """The region that a part belongs to; -1 is all of the image, and padding."""
    starts: Int32[np.ndarray, "b phases"]
    """The step at which each phase begins, 0 for the first; padding begins at `steps`, which is never."""


def nothing(b: int) -> Prompts:
    """A batch's prompts for a model that reads none: one part in one phase, and no words."""
    return Prompts(
        ids=np.zeros((b, 1, 2, 1, 1), np.int32),
        token_weights=np.ones((b, 1, 2, 1, 1), np.float32),
        part_weights=np.ones((b, 1, 1), np.float32),
        part_region=np.full((b, 1), -1, np.int32),
        starts=np.zeros((b, 1), np.int32),
    )


def alike(prompts: Sequence[Prompts]) -> list[Prompts]:
    """One batch's prompts by several tokenizers, with as many chunks by each.

    Raises:
        ValueError: where that would be more than `MAX_CHUNKS`.
    """
    counts = [one.ids.shape[-2] for one in prompts]
    if (n := math.lcm(*counts)) > max(MAX_CHUNKS, *counts):
        raise ValueError(f"The model's tokenizers make {' and '.join(map(str, counts))} chunks of the prompts, which "
                         "do not go together; use shorter prompts.")  # fmt: skip
    repeats = [(1, 1, 1, n // count, 1) for count in counts]
    return [
        one._replace(ids=np.tile(one.ids, repeat), token_weights=np.tile(one.token_weights, repeat))
        for one, repeat in zip(prompts, repeats, strict=True)
    ]


def fill(words: Words, wildcards: Wildcards, seed: int) -> tuple[Words, list[str]]:
    """The words with a line in place of each wildcard, chosen by the image's seed; and sentences of warning."""
    texts = {"prompt": words.prompt, "negative": words.negative_prompt}
    texts |= {f"region{i}": text for i, text in enumerate(words.regions)}
    filled = {place: wildcards.fill(text, seed, place) for place, text in texts.items()}
    prompt, negative, *regions = (text for text, _ in filled.values())
    return Words(prompt, negative, tuple(regions)), _unique(w for _, warnings in filled.values() for w in warnings)


def encode(
    batch: Sequence[Words], tokenizer: Tokenizer, steps: int, *, literal: bool = False
) -> tuple[Prompts, list[str]]:
    """The tokens of a batch's prompts and how they are weighed; and sentences of warning, each once.

    Textual inversions are words of the tokenizer; `embedding:WORD`, as ComfyUI writes it, is the word.

    A text without syntax that fits gives the one phase, part and chunk that `tokenizer` makes of it. Longer ones go on
    in further chunks, which end after a comma, or else a word, where one is near, and at BREAK. Where texts of one
    batch have several numbers of chunks, each text's are repeated to a common multiple. The negative prompt may have
    weights and schedules; AND in it is text.

    Args:
        batch: at least one image's words.
        tokenizer: the text encoder's.
        steps: how many steps the images are drawn in, at least 1.
        literal: takes all texts as they are, without any syntax.

    Raises:
        ValueError: where the batch is empty, or there are no steps.
    """
    if not batch:
        raise ValueError("No prompt was given; give at least one.")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1.")
    warnings: list[str] = []

    def parts_of(text: str, compose: bool = True) -> list[Part]:
        if literal:
            return [plain(text, steps)]
        parts, told = parse(_with_words(text, tokenizer.words), steps, compose=compose)
        warnings.extend(told)
        return parts

    negatives = [parts_of(words.negative_prompt, compose=False) for words in batch]
    regions = [[(-1, words.prompt), *enumerate(words.regions)] for words in batch]
    owned = [[(region, part) for region, text in texts for part in parts_of(text)] for texts in regions]
    rows = [[*negative, *(part for _, part in parts)] for negative, parts in zip(negatives, owned, strict=True)]

    starts = [_starts(row, steps) for row in rows]
    texts = [[[part.at(start) for part in row] for start in begins] for row, begins in zip(rows, starts, strict=True)]
    known = list(dict.fromkeys(text for phases in texts for row in phases for text in row))
    chunks = dict(zip(known, _chunks(known, tokenizer, warnings), strict=True))

    n = _common(chunks, warnings, tokenizer)
    phases, parts = _power_of_two(max(map(len, starts))), max(map(len, owned))
    shape = len(batch), phases, 1 + parts, n, tokenizer.max_length
    out = Prompts(
        ids=np.broadcast_to(tokenizer([""]), shape).astype(np.int32),
        token_weights=np.ones(shape, np.float32),
        part_weights=np.zeros((len(batch), phases, parts), np.float32),
        part_region=np.full((len(batch), parts), -1, np.int32),
        starts=np.full((len(batch), phases), steps, np.int32),
    )
    for b, begins in enumerate(starts):
        out.starts[b, : len(begins)] = begins
        for p, (region, part) in enumerate(owned[b]):
            out.part_weights[b, :, p], out.part_region[b, p] = part.weight, region
        for phase in range(phases):
            for p, text in enumerate(texts[b][min(phase, len(begins) - 1)]):
                ids, weights = chunks[text]
                out.ids[b, phase, p] = np.tile(ids, (n // len(ids), 1))
                out.token_weights[b, phase, p] = np.tile(weights, (n // len(ids), 1))
    return out, _unique(warnings)


def _with_words(text: str, words: Iterable[str]) -> str:
    """The text with further words in place of their spelling in ComfyUI, `embedding:WORD` or `embedding:WORD.pt`."""
    known = sorted(map(re.escape, words), key=len, reverse=True)
    if not known or "embedding:" not in text.lower():
        return text
    spelling = rf"\bembedding:({'|'.join(known)})(?:\.(?:pt|bin|safetensors))?(?!\w)"
    return re.sub(spelling, r"\1", text, flags=re.IGNORECASE)


def _starts(parts: Sequence[Part], steps: int) -> list[int]:
    """The steps at which any of the parts changes."""
    ends = {step for part in parts for piece in part.pieces for step in (piece.start, piece.stop)}
    return sorted({0} | {step for step in ends if step < steps})


def _chunks(
    texts: Sequence[tuple[tuple[str, float], ...]], tokenizer: Tokenizer, warnings: list[str]
) -> list[tuple[Int32[np.ndarray, "chunks length"], Float32[np.ndarray, "chunks length"]]]:
    """Each text's tokens and their weights."""
    room = tokenizer.max_length - 2
    sections = [[(part, weight) for piece, weight in text for part in _sections(piece)] for text in texts]
    encoded = iter(tokenizer.encode([part for text in sections for part, _ in text if part is not None]))
    out = []
    for text in sections:
        runs: list[tuple[list[int], list[float]]] = [([], [])]
        for part, weight in text:
            if part is None:
                runs.append(([], []))
            else:
                tokens = next(encoded)
                runs[-1][0].extend(tokens)
                runs[-1][1].extend([weight] * len(tokens))
        pieces: list[tuple[np.ndarray, np.ndarray]] = []
        for tokens, weights in [run for run in runs if run[0]] or runs[:1]:
            run, factors = np.array(tokens, np.int32), np.array(weights, np.float32)
            ends = _cuts(run, tokenizer)
            pieces += [(run[a:b], factors[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        if len(pieces) > MAX_CHUNKS:
            total, taken = (sum(len(run) for run, _ in some) for some in (pieces, pieces[:MAX_CHUNKS]))
            warnings.append(f"A prompt has {total} tokens, more than {MAX_CHUNKS} chunks of {room}; what comes "
                            f"after the first {taken} is left out.")  # fmt: skip
            pieces = pieces[:MAX_CHUNKS]
        ids = np.tile(tokenizer([""]), (len(pieces), 1))
        factors = np.ones((len(pieces), tokenizer.max_length), np.float32)
        for i, (run, own) in enumerate(pieces):
            ids[i, 1 : len(run) + 1], ids[i, len(run) + 1] = run, tokenizer.eos_id
            factors[i, 1 : len(run) + 1] = own
        out.append((ids, factors))
    return out


def _sections(piece: str) -> list[str | None]:
    """The texts between BREAKs, with None for each BREAK."""
    first, *others = piece.split(NEW_CHUNK)
    return [first, *(part for other in others for part in (None, other))]


def _common(chunks: dict[Any, tuple[np.ndarray, np.ndarray]], warnings: list[str], tokenizer: Tokenizer) -> int:
    """The least number of chunks that all texts can be repeated to: attention does not notice that all of a text's keys
    are there twice, and does notice an empty chunk.

    Where that are too many, the longest text's number stands, and empty chunks fill up others.
    """
    n = math.lcm(*(len(ids) for ids, _ in chunks.values()))
    if n <= MAX_CHUNKS:
        return n
    n = _power_of_two(max(len(ids) for ids, _ in chunks.values()))
    for text, (ids, weights) in chunks.items():
        more = _power_of_two(len(ids)) - len(ids)
        if more:
            warnings.append(f"A prompt of {len(ids)} chunks is drawn beside others of other numbers, and gets {more} "
                            "empty ones; drawn alone, it gets none.")  # fmt: skip
        empty, ones = np.repeat(tokenizer([""]), more, 0), np.ones((more, tokenizer.max_length), np.float32)
        chunks[text] = np.concatenate([ids, empty]), np.concatenate([weights, ones])
    return n


def _cuts(tokens: Int32[np.ndarray, " n"], tokenizer: Tokenizer) -> list[int]:
    """Where chunks end: when full, or before, after a comma, or else after a word, that is near (20 tokens of 75)."""
    room = tokenizer.max_length - 2
    near = 20 * room // 75
    ends, start = [], 0
    while len(tokens) - start > room:
        full = start + room
        window = tokens[full - near : full]
        commas = window == tokenizer.comma_id
        # A comma that begins the next chunk would leave the words before it nothing to be moved for.
        found = commas if commas.any() and tokens[full] != tokenizer.comma_id else tokenizer.ends_word[window]
        start = full - near + int(np.flatnonzero(found)[-1]) + 1 if found.any() else full
        ends.append(start)
    return [*ends, len(tokens)]


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def _unique(warnings: object) -> list[str]:
    return list(dict.fromkeys(warnings))  # pyright: ignore
