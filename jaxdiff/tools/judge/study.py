"""Makes a study: a page of pairs for raters, and a key, kept from them, that says which model drew which image."""

import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxdiff.generation.batch.files import read_requests
from jaxdiff.generation.batch.store import read_entries
from jaxdiff.io.images import FORMATS, encode_image, read_image
from jaxdiff.io.pages import content_policy
from jaxdiff.runtime.cli import check_writable

PAGE = Path(__file__).parent / "page.html"
KEY, FOLDER, IMAGES = "key.json", "page", "images"

Slot = tuple[int, int]
"""What is drawn by every model: a line of the prompt file, and which of its images, from 0."""


class Pair(NamedTuple):
    """Two models' images of one slot."""

    slot: Slot
    first: int
    second: int


class Study(NamedTuple):
    """What was made."""

    pairs: int
    checks: int
    sizes: Sequence[tuple[int, int]]
    """Width and height of all images, each once."""
    formats: Sequence[str]
    """The endings of the models' files, each once."""
    no_image: Sequence[int]
    """Lines of the prompt file that no model drew."""


def read_prompts(path: Path) -> dict[int, str]:
    """The prompt of each line that has one.

    Raises:
        ValueError: where the file cannot be read, or has a bad line.
    """
    prompts = {}
    for line in read_requests(path):
        if line.request is None:
            raise ValueError(line.problem)
        prompts[line.number] = line.request.prompt
    return prompts


def read_folder(folder: Path, prompts: Mapping[int, str], file: Path) -> dict[Slot, Path]:
    """The images of a folder that `sample.py --from-file` wrote.

    Args:
        folder: with its index.
        prompts: by lines, of the file that it was drawn from.
        file: that file's name, for messages.

    Raises:
        ValueError: where it has none, or they are of other prompts.
    """
    entries = read_entries(folder)
    if not entries:
        raise ValueError(
            f"{folder} has no images that an index lists; draw them by `sample.py --from-file {file} --out {folder}`."
        )
    found: dict[Slot, Path] = {}
    so_far: dict[int, int] = {}
    for entry in entries:  # by line and seed
        line = entry["line"]
        if line not in prompts:
            raise ValueError(f"{folder} has an image of line {line}, where {file} has no prompt; give the file that it "
                             "was drawn from.")  # fmt: skip
        drawn = entry["settings"].get("prompt", prompts[line])  # --no-metadata leaves it out
        if drawn != prompts[line]:
            raise ValueError(f"{folder} has an image of {_short(drawn)} for line {line}, where {file} has "
                             f"{_short(prompts[line])}; give the file that it was drawn from.")  # fmt: skip
        found[line, so_far.setdefault(line, 0)] = folder / entry["file"]
        so_far[line] += 1
    return found


def _short(text: Any) -> str:
    told = repr(text)
    return told if len(told) <= 80 else f"{told[:77]}..."


def common_slots(models: Mapping[str, Mapping[Slot, Path]]) -> list[Slot]:
    """The slots, in order.

    Raises:
        ValueError: where a model lacks an image that another has.
    """
    (first, *others) = models
    for other in others:
        odd = sorted(set(models[first]) ^ set(models[other]))
        if odd:
            line = odd[0][0]
            counts = [sum(slot[0] == line for slot in models[name]) for name in (first, other)]
            raise ValueError(f"{first} has {counts[0]} images of line {line}, {other} has {counts[1]}; they must have "
                             "as many: draw what is missing by the same command again.")  # fmt: skip
    return sorted(models[first])


def choose_pairs(slots: Sequence[Slot], models: int, most: int | None, rng: np.random.Generator) -> list[Pair]:
    """Every two models' images of every slot; or as many of them as asked, the same number for all two models."""
    ways = [(i, j) for i in range(models) for j in range(i + 1, models)]
    orders = [rng.permutation(len(slots)) for _ in ways]
    pairs = [Pair(slots[order[k]], i, j) for k in range(len(slots)) for (i, j), order in zip(ways, orders, strict=True)]
    return pairs[:most]


def noise(image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """What no rater takes for a picture: of an image's size, each value by chance."""
    return rng.integers(0, 256, image.shape, np.uint8)


def make_study(
    folders: Mapping[str, Path],
    prompts_file: Path,
    out: Path,
    *,
    pairs: int | None = None,
    check_every: int = 10,
    repeat_every: int = 10,
    seed: int = 0,
    format: str = "png",
) -> Study:
    """Writes OUT/page, which raters get, and OUT/key.json, which they do not.

    Args:
        folders: by the models' names, what `sample.py --from-file` wrote for the same prompts.
        prompts_file: those prompts.
        out: a folder that is empty or not there yet.
        pairs: at most so many; all of them if left out.
        check_every: to so many pairs comes one of an image and noise; 0 for none.
        repeat_every: of so many images shown, one pair is shown again, sides swapped; 0 for none.
        seed: of all that is left to chance, but for each rater's own order and sides, which the name chooses.
        format: of the page's images, one of `FORMATS`.

    Raises:
        ValueError: where folders do not match, numbers make no sense, or the folder is not empty.
    """
    if len(folders) < 2:
        raise ValueError(f"A study compares at least two models; {len(folders)} was given.")
    if pairs is not None and pairs < 1:
        raise ValueError(f"pairs is {pairs}; it must be at least 1.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative.")
    if check_every < 0:
        raise ValueError(f"check_every is {check_every}; it must be 0, for none, or more.")
    if repeat_every < 0 or 0 < repeat_every < 4:
        raise ValueError(f"repeat_every is {repeat_every}; it must be 0, for none, or at least 4.")
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; choose one of {', '.join(FORMATS)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; choose another folder, since raters may have answered this one.")

    prompts = read_prompts(prompts_file)
    found = {name: read_folder(folder, prompts, prompts_file) for name, folder in folders.items()}
    slots = common_slots(found)
    rng = np.random.default_rng(seed)
    chosen = choose_pairs(slots, len(found), pairs, rng)
    checks = math.ceil(len(chosen) / check_every) if check_every else 0
    files = list(found.values())

    # Every image once, whatever the number of pairs that it is in; then noise, of the size of an image of the study.
    sources: list[tuple[int, Slot]] = sorted({(m, pair.slot) for pair in chosen for m in (pair.first, pair.second)})
    shown = [sources[k] for k in rng.integers(0, len(sources), checks)]
    number = rng.permutation(len(sources) + checks)  # an image's name is its place in an order by chance
    digits = len(str(len(number) - 1))
    names = [f"{k:0{digits}}.{FORMATS[format]}" for k in number]
    name_of = dict(zip(sources, names, strict=False))
    noises = names[len(sources) :]

    listed = [(pair.slot[0], name_of[pair.first, pair.slot], name_of[pair.second, pair.slot]) for pair in chosen]
    listed += [(slot[0], name_of[m, slot], name) for (m, slot), name in zip(shown, noises, strict=True)]
    listed = [listed[k] for k in rng.permutation(len(listed))]
    listed = [(line, *sorted(two)) for line, *two in listed]  # the order says nothing

    check_writable(out / FOLDER / IMAGES)
    digest, sizes = hashlib.sha256(), set()
    for k in np.argsort(number):  # files' times say nothing either
        if k < len(sources):
            m, slot = sources[k]
            image = read_image(files[m][slot])
        else:
            m, slot = shown[k - len(sources)]
            image = noise(read_image(files[m][slot]), rng)
        sizes.add(image.shape[1::-1])
        data = encode_image(image, None, format)
        digest.update(data)
        (out / FOLDER / IMAGES / names[k]).write_bytes(data)

    manifest = {
        "pairs": [{"prompt": prompts[line], "images": two} for line, *two in listed],
        "repeat_every": repeat_every,
        "images_sha256": digest.hexdigest(),
    }
    text = json.dumps(manifest).replace("<", "\\u003c")  # no prompt ends the script that holds it
    study = hashlib.sha256(text.encode()).hexdigest()
    key = {
        "study": study,
        "models": list(found),
        "images": {name_of[m, slot]: {"model": m, "file": files[m][slot].name} for m, slot in sources}
        | {name: {"model": None, "file": None} for name in noises},
        "pairs": [{"line": line, "images": two} for line, *two in listed],
        "seed": seed,
    }
    (out / KEY).write_text(f"{json.dumps(key, indent=1)}\n")
    (out / FOLDER / "index.html").write_text(page(text, study), encoding="utf-8")
    drawn = {slot[0] for slot in slots}
    endings = {path.suffix for slots in files for path in slots.values()}
    return Study(len(chosen), checks, sorted(sizes), sorted(endings), sorted(set(prompts) - drawn))


def page(manifest: str, study: str) -> str:
    """The page's HTML: it needs no other file but the images beside it, and fetches nothing."""
    template = PAGE.read_text(encoding="utf-8")
    values = {
        "policy": html.escape(content_policy(template, "'self' data:")),
        "study": study,
        "manifest": manifest,
    }
    return re.sub(r"%(policy|study|manifest)%", lambda name: values[name[1]], template)
