"""Trains a CLIP-style tokenizer on a data set's captions: `python -m jaxdiff.tools.tokenizer --out DIR`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tqdm import tqdm

from jaxdiff.config import DataConfig
from jaxdiff.data.captions import COLOURS, background
from jaxdiff.data.record import BadRecord, Source
from jaxdiff.data.sources import open_source
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.runtime.cli import exit_code


@dataclass(frozen=True)
class Args:
    """Trains a byte-level BPE tokenizer on a data set's captions; transformers' CLIPTokenizer loads it too."""

    out: Path
    """Folder to write vocab.json, merges.txt and their two companions to."""
    vocab_size: int = 4096
    """Most tokens: 512 bytes, the merges, start and end."""
    max_length: int = 32
    """Tokens of a prompt, start and end included."""
    data: DataConfig = field(default_factory=DataConfig)


def texts(source: Source) -> Iterator[str]:
    """All that captions can be made of."""
    for colour in COLOURS:
        yield background(colour)
    for index in tqdm(range(len(source)), desc="Captions", unit=" records"):
        try:
            caption = source.record(index).caption
        except BadRecord:
            continue
        yield from (caption.full(), *caption.others, *caption.keywords)


def main(args: Args) -> None:
    """Trains, saves and says what came out."""
    tokenizer = Tokenizer.train(texts(open_source(args.data)), args.vocab_size, args.max_length)
    tokenizer.save(args.out)
    print(f"{args.out}: {len(tokenizer)} tokens.")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(tyro.cli(Args))))
