"""Pictures: PNGs that say how they were made and never overwrite, and contact sheets."""

import io
import json
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

_JSON_CHUNK = "jaxdiff"


def slug(text: str, length: int = 60) -> str:
    """A file name's stem from any text: lower-case ASCII words joined by hyphens, "image" when none is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower())[:length].strip("-") or "image"


def write_png(
    folder: Path | str, stem: str, image: UInt8[np.ndarray, "h w 3"], settings: Mapping[str, Any] | None = None
) -> Path:
    """Writes `stem.png`, or `stem-2.png` and so on: a file that is there is never touched.

    Args:
        folder: made if it is not there.
        stem: the file name without its ending (see `slug`).
        image: the picture.
        settings: how it was made, as JSON values (keys as `webui_parameters` takes them); goes into the text chunks
            `jaxdiff` (JSON) and `parameters` (the form that Stable Diffusion's web UIs read).

    Returns:
        The path of the new file.

    Raises:
        ValueError: when the folder cannot be made or written to.
    """
    text = PngImagePlugin.PngInfo()
    if settings is not None:
        text.add_text("parameters", webui_parameters(settings))
        text.add_text(_JSON_CHUNK, json.dumps(dict(settings)))
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG", pnginfo=text)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        n = 1
        while True:
            path = folder / (f"{stem}.png" if n == 1 else f"{stem}-{n}.png")
            try:
                file = path.open("xb")
            except FileExistsError:
                n += 1
                continue
            try:
                with file:
                    file.write(png.getbuffer())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return path
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror}.") from error


def webui_parameters(settings: Mapping[str, Any]) -> str:
    """The `parameters` text of Stable Diffusion's web UIs.

    Reads `prompt`, `negative_prompt`, `steps`, `sampler`, `guidance`, `seed`, `width`, `height` and `model`, each if
    it is there.
    """
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    names = {"steps": "Steps", "sampler": "Sampler", "guidance": "CFG scale", "seed": "Seed"}
    pairs = [(label, settings[name]) for name, label in names.items() if name in settings]
    if "width" in settings and "height" in settings:
        pairs.append(("Size", f"{settings['width']}x{settings['height']}"))
    if "model" in settings:
        pairs.append(("Model", settings["model"]))
    # A value with a comma, colon or newline is quoted, as the web UIs do.
    told = ((label, json.dumps(v, ensure_ascii=False) if re.search(r"[,:\n]", v := str(value)) else v)
            for label, value in pairs)  # fmt: skip
    return "\n".join([*lines, ", ".join(f"{label}: {value}" for label, value in told)])


def read_settings(path: Path | str) -> dict[str, Any] | None:
    """The settings that `write_png` put into a PNG; None for a picture that carries none.

    Raises:
        ValueError: when the file is no PNG, or its settings are damaged.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(_JSON_CHUNK)
    except Exception as error:  # decoders meet damage with whatever comes to hand
        raise ValueError(f"{path} cannot be read as a PNG: {error}.") from error
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} carries settings that are not JSON: {error}.") from error


def contact_sheet(
    images: Sequence[UInt8[np.ndarray, "h w 3"]],
    captions: Sequence[str] = (),
    columns: int | None = None,
    cell: int = 160,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Pictures of one size in rows on white, each over its caption.

    Args:
        images: at least one.
        captions: as many, or none; long ones are wrapped, and cut after three lines.
        columns: pictures in a row; None makes the sheet about square.
        cell: pictures narrower than this are enlarged by a whole factor, so that captions fit and pixels stay square.

    Raises:
        ValueError: when there is no picture, sizes differ, or there are fewer or more captions than pictures.
    """
    if not len(images):
        raise ValueError("A contact sheet needs at least one image.")
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"A contact sheet's images must have one size, not {sorted({i.shape[:2] for i in images})}.")
    if captions and len(captions) != len(images):
        raise ValueError(f"There are {len(images)} images but {len(captions)} captions.")
    h, w = images[0].shape[:2]
    zoom = max(1, cell // w)
    h, w = h * zoom, w * zoom
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)

    font_size = max(10, w // 14)
    font = ImageFont.load_default(font_size)
    gap, line = max(4, w // 32), font_size + 3
    letters = max(4, int(w / font.getlength("abcdefghij nopqrs tu") * 20))
    wrapped = [textwrap.wrap(c, letters, max_lines=3, placeholder="...") for c in captions]
    text_height = line * max(map(len, wrapped), default=0)

    sheet = Image.new("RGB", (columns * (w + gap) + gap, rows * (h + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = gap + i % columns * (w + gap), gap + i // columns * (h + text_height + gap)
        sheet.paste(Image.fromarray(np.asarray(image)).resize((w, h), Image.Resampling.NEAREST), (x, y))
        for j, words in enumerate(wrapped[i] if wrapped else ()):
            draw.text((x, y + h + j * line), words, "black", font)
    return np.asarray(sheet)
