"""Draws docs/concepts.png: every concept that the embedded model was trained on, once, none picked.

`python scripts/concepts.py --data-dir data`, after `python -m jaxdiff.tools.prepare emoji`. Image i has seed i, styles
take turns, and the background is white. About 15 minutes on two CPU cores.
"""

import sys
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

import jaxdiff
from jaxdiff.config import DataConfig
from jaxdiff.data.captions import background
from jaxdiff.data.sources import open_source
from jaxdiff.io.images import contact_sheet

STYLES = ("3d", "flat", "gradient", "noto")
DOCS = Path(__file__).parents[1] / "docs"


def main(
    data_dir: str = "data",
    model: Path | None = None,
    out: Path = DOCS / "concepts.png",
    cell: int = 40,
    batch: int = 32,
) -> None:
    """Draws.

    Args:
        data_dir: where the drawings are.
        model: a folder or run; the embedded model if left out.
        out: the picture's file.
        cell: pixels of each image along a side.
        batch: images drawn together.
    """
    source = open_source(DataConfig(source="emoji", root=data_dir))
    labels = sorted({source.record(i).caption.label for i in range(len(source))})
    prompts = [f"{label}, {STYLES[i % len(STYLES)]} style, {background('white')}" for i, label in enumerate(labels)]
    pipe = jaxdiff.load(model)
    images: list[np.ndarray] = []
    for first in tqdm(range(0, len(prompts), batch), unit=" batches"):
        part = prompts[first : first + batch]
        rows = part + part[-1:] * (batch - len(part))
        drawn = pipe(rows, seed=[first + i for i in range(batch)], literal=True)
        images += [
            np.asarray(Image.fromarray(image).resize((cell, cell), Image.Resampling.LANCZOS))
            for image in drawn[: len(part)]
        ]
    Image.fromarray(contact_sheet(images, columns=48, cell=cell)).save(out, optimize=True)
    print(f"{len(images)} concepts in {out}")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
