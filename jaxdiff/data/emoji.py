"""The `emoji` data set: about 1,700 concepts drawn in up to six styles, on transparent ground, as a TFDS builder.

The drawings are Microsoft's Fluent Emoji (MIT) in four treatments and Google's Noto Emoji (Apache-2.0) in two
generations; the labels and keywords are emojibase's (MIT). They come as npm packages of pinned versions, whose
checksums are verified. Flags and skin tones are left out.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import resvg_py
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from jaxdiff.io.storage import read_verified

STYLES = ("3d", "flat", "gradient", "high contrast", "noto", "blob")
HELDOUT_SHARE = 0.02
"""Share of the concepts that are kept from training in every style."""
TEST_SHARE = 0.05
"""Share of the other drawings that are kept from training while the concept is trained on in another style."""

_LEFT_OUT_GROUPS = (None, 2, 9)  # regional indicators, skin tones and hair styles, flags


@dataclasses.dataclass(frozen=True)
class Package:
    """An npm package of one version and the SHA-256 of its tarball."""

    name: str
    version: str
    sha256: str

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


LABELS = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
PACKAGES = {
    "3d": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
    ),
    "flat": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    "gradient": Package(
        "@iconify-json/fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"
    ),
    "high contrast": Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
    "noto": Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "blob": Package(
        "@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
    ),
}


@dataclasses.dataclass(kw_only=True)
class EmojiConfig(tfds.core.BuilderConfig):
    """`size` pixels along each side."""

    size: int = 64


class Emoji(tfds.core.GeneratorBasedBuilder):
    """RGBA images of emoji with their label, keywords and style; of only so many `concepts`, evenly spread, if not 0.

    Splits: `train`; `test`, drawings whose concept is in `train` in another style; `heldout`, concepts (and what
    differs from them only in gender) of which no drawing is in `train`.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        EmojiConfig(name=f"{size}px", size=size, description=f"{size} pixels a side.") for size in (64, 128)
    ]

    def __init__(self, *, concepts: int = 0, **kwargs: Any) -> None:
        self._n_concepts = concepts
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Emoji in six styles with English labels, on transparent ground.",
            homepage="https://emojibase.dev",
            license="MIT (Fluent Emoji, emojibase) and Apache-2.0 (Noto Emoji)",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(None, None, 4), encoding_format="png"),
                    "label": tfds.features.Text(),
                    "keywords": tfds.features.Text(),
                    "style": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        folder = Path(dl_manager.download_dir)
        concepts = _concepts(fetch(LABELS, folder))
        if self._n_concepts:
            concepts = concepts[:: len(concepts) // self._n_concepts][: self._n_concepts]
        drawings = _drawings({style: fetch(package, folder) for style, package in PACKAGES.items()}, concepts)
        members: dict[str, list[tuple[dict[str, str], str]]] = {"train": [], "test": [], "heldout": []}
        for concept in concepts:
            styles = [style for style in STYLES if concept["hexcode"] in drawings[style]]
            for style, split in zip(styles, _splits(concept, styles), strict=True):
                members[split].append((concept, style))
        return {split: self._generate_examples(split, pairs, drawings) for split, pairs in members.items() if pairs}

    def _generate_examples(
        self, split: str, pairs: list[tuple[dict[str, str], str]], drawings: dict[str, dict[str, bytes | str]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        config: Any = self.builder_config
        for concept, style in tqdm(pairs, desc=f"Drawing {split}", unit=" images"):
            name = f"{concept['hexcode']}/{style}"
            image = io.BytesIO(_png(drawings[style][concept["hexcode"]], config.size))
            yield name, {"id": name, "image": image, "style": style} | {k: concept[k] for k in ("label", "keywords")}


def fetch(package: Package, folder: Path) -> Path:
    """The package's tarball in `folder`, brought by `npm pack` where it is not there already.

    Raises:
        ValueError: where npm is missing or fails, or the file's checksum is another one.

    """
    path, spec = folder / package.tarball, f"{package.name}@{package.version}"
    if not path.exists():
        if (npm := shutil.which("npm")) is None:
            raise ValueError(
                f"{path} is not there, and npm, which would bring it, is not installed: install npm, or put what "
                f"`npm pack {spec}` makes there."
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = [npm, "pack", "--loglevel=error", "--ignore-scripts", spec]
            done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
            if done.returncode:
                reason = "; ".join(line.removeprefix("npm error ") for line in done.stderr.strip().splitlines()[:4])
                raise ValueError(f"`npm pack {spec}` failed: {reason or f'exit code {done.returncode}'}")
            os.replace(Path(temporary) / package.tarball, path)
    read_verified(path, package.sha256)
    return path


def _concepts(tarball: Path) -> list[dict[str, str]]:
    """The emoji in emojibase's order: `hexcode` (see `_key`), `label` and `keywords`."""
    rows = json.loads(_member(tarball, "package/en/data.json"))
    rows = sorted((row for row in rows if row.get("group") not in _LEFT_OUT_GROUPS), key=lambda row: row["order"])
    return [
        {"hexcode": _key(row["hexcode"]), "label": row["label"], "keywords": ", ".join(row.get("tags", ()))}
        for row in rows
    ]


def _drawings(tarballs: dict[str, Path], concepts: list[dict[str, str]]) -> dict[str, dict[str, bytes | str]]:
    """For each style, the concepts' drawings by hexcode: WebP files, or SVG documents."""
    sets = {style: json.loads(_member(path, "package/icons.json")) for style, path in tarballs.items() if style != "3d"}
    # Two of the sets do not say which character an icon is for; their icons have the names of their siblings.
    chars = {style: _characters(tarballs[style]) for style in ("flat", "high contrast", "noto")}
    drawings: dict[str, dict[str, bytes | str]] = {"3d": _webps(tarballs["3d"], {c["hexcode"] for c in concepts})}
    for style, icons in sets.items():
        drawings[style] = {}
        for concept in concepts:
            tables = (chars.get(style, {}), *chars.values())
            names = [table[concept["hexcode"]] for table in tables if concept["hexcode"] in table]
            names.append(re.sub(r"[^a-z0-9]+", "-", re.sub("[\u2019'.]", "", concept["label"].lower())).strip("-"))
            svg = next((svg for name in names if (svg := _svg(icons, name))), None)
            if svg is not None:
                drawings[style][concept["hexcode"]] = svg
    return drawings


def _webps(tarball: Path, hexcodes: set[str]) -> dict[str, bytes | str]:
    with tarfile.open(tarball) as archive:
        files = {_key(Path(m.name).stem): m for m in archive.getmembers() if m.name.endswith(".webp")}
        return {key: _read(archive, member) for key, member in files.items() if key in hexcodes}


def _characters(tarball: Path) -> dict[str, str]:
    """The icon's name for each hexcode."""
    return {_key(char): name for char, name in json.loads(_member(tarball, "package/chars.json")).items()}


def _svg(icons: dict[str, Any], name: str) -> str | None:
    """An icon of an Iconify set as an SVG document, or None where the set lacks it (see iconify.design/docs/types)."""
    icon = icons["icons"].get(name)
    if icon is None and (alias := icons.get("aliases", {}).get(name)):
        icon = icons["icons"].get(alias["parent"], {}) | alias
    if not icon or "body" not in icon or "rotate" in icon or "vFlip" in icon:
        return None
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    body = icon["body"]
    if icon.get("hFlip"):
        body = f'<g transform="matrix(-1 0 0 1 {2 * left + width} 0)">{body}</g>'
    # Noto's drawings touch the edge, Fluent's do not: with a margin, all of them show their background around them.
    side = max(width, height) * (1.1 if icons["prefix"].startswith("noto") else 1)
    box = f"{left + (width - side) / 2} {top + (height - side) / 2} {side} {side}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'


def _png(drawing: bytes | str, size: int) -> bytes:
    """The drawing as an RGBA PNG of `size` pixels a side."""
    if isinstance(drawing, str):
        return resvg_py.svg_to_bytes(svg_string=drawing, width=size, height=size, skip_system_fonts=True)
    out = io.BytesIO()
    with Image.open(io.BytesIO(drawing)) as image:
        image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS).save(out, "PNG")
    return out.getvalue()


def _splits(concept: dict[str, str], styles: list[str]) -> list[str]:
    """The split of each of the concept's drawings, by hashes of their names: the same for ever and on any machine."""
    # "woman running" is too like "man running" to be held out while the other is trained on.
    person = re.sub(r"\b(wo)?m[ae]n\b|\bpeople\b", "person", concept["label"])
    if _share(person) < HELDOUT_SHARE:
        return ["heldout"] * len(styles)
    splits = ["test" if _share(f"{concept['hexcode']}/{style}") < TEST_SHARE else "train" for style in styles]
    return splits if "train" in splits else ["train"] * len(styles)


def _share(name: str) -> float:
    """A number in [0, 1) that the name fixes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def _key(hexcode: str) -> str:
    """A hexcode in the one spelling that all packages can be brought to: lower case, no variation selectors."""
    return "-".join(part for part in re.split("[-_]", hexcode.lower()) if part != "fe0f")


def _member(tarball: Path, name: str) -> bytes:
    with tarfile.open(tarball) as archive:
        return _read(archive, archive.getmember(name))


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # it is a plain file in an archive whose checksum was verified
    return file.read()
