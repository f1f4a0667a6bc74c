"""Odd images and captions as files hold them, each with what it is: pixels or texts, or None for a bad record.

The pixels are NumPy's: each file is written here from known samples, by Pillow or byte by byte.
"""

import gzip
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)
FLAT = (200, 100, 50)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, bits: int, colour: int, trns: bytes = b"") -> bytes:
    """A PNG of samples [h, w] or [h, w, c] in `bits` and a colour type, with every kind of row filter that is easy."""
    height, width = samples.shape[:2]
    step = max(1, bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] // 8)
    lines, above = [], bytes(8 * samples[0].size)
    for y, row in enumerate(samples):
        if bits < 8:
            digits = "".join(f"{value:0{bits}b}" for value in row)
            line = bytes(int(digits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(digits), 8))
        else:
            line = row.astype(f">u{bits // 8}").tobytes()
        before = (bytes(len(line)), bytes(step) + line, above)[y % 3]  # no filter, the pixel before, the row above
        lines.append(bytes([y % 3, *((a - b) % 256 for a, b in zip(line, before, strict=False))]))
        above = line
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + (chunk(b"PLTE", bytes(range(48))) if colour == 3 else b"")
        + (chunk(b"tRNS", trns) if trns else b"")
        + chunk(b"IDAT", zlib.compress(b"".join(lines)))
        + chunk(b"IEND", b"")
    )


def tiff(samples: np.ndarray, order: str = "<", packed: bool = False, **tags: Any) -> bytes:
    """A TIFF of samples [h, w] or [h, w, c] of any type, of this byte order, deflated if `packed`."""
    height, width, *channels = samples.shape
    n = channels[0] if channels else 1
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if packed else data
    fields = {256: width, 257: height, 258: [8 * samples.itemsize] * n, 259: 8 if packed else 1, 262: 2 if n > 2 else 1}
    fields |= {273: 0, 277: n, 278: height, 279: len(data), 284: 1, 339: ["uif".index(samples.dtype.kind) + 1] * n}
    fields |= {int(name.removeprefix("t")): value for name, value in tags.items()}
    extra, head, end = b"", b"", 10 + 12 * len(fields) + 4
    long = sum(2 * len(value) for value in fields.values() if isinstance(value, list) and len(value) > 2)
    for tag, value in sorted((fields | {273: end + long}).items()):
        values = value if isinstance(value, list) else [value]
        packed_values = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed_values) > 4:
            extra, packed_values = extra + packed_values, struct.pack(f"{order}I", end + len(extra))
        head += struct.pack(f"{order}HHI", tag, 3, len(values)) + packed_values.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IH", 8, len(fields)) + head + bytes(4) + extra + data


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(grey)[..., None], 3, -1)


def to_8_bits(values: np.ndarray, white: float = 65535) -> np.ndarray:
    return np.rint(values.astype(np.float64) * 255 / white).astype(np.uint8)


def _images() -> dict[str, tuple[bytes, np.ndarray | None]]:
    grey, colour, two, four = (RNG.integers(0, 65536, (4, 5, *c), np.uint16) for c in ((), (3,), (2,), (4,)))
    grey[0, :3], colour[0, 0], four[1, 1, 3] = (0, 65535, 300), 65535, 0
    small = RNG.integers(0, 256, (4, 5, 3), np.uint8)
    out: dict[str, tuple[bytes, np.ndarray | None]] = {}

    for bits in (1, 2, 4, 8):
        values = np.arange(1 << bits)[None]
        pixels = rgb(to_8_bits(values, 2**bits - 1))
        out[f"grey{bits}.png"] = png(values, bits, 0), pixels
        hidden = np.where(values == 1, 0, 255).astype(np.uint8)
        out[f"grey{bits}-hidden.png"] = png(values, bits, 0, b"\0\1"), np.dstack([pixels, hidden])
    hidden = np.where(grey == 300, 0, 255).astype(np.uint8)
    out["grey16.png"] = png(grey, 16, 0), rgb(to_8_bits(grey))
    out["grey16-hidden.png"] = png(grey, 16, 0, struct.pack(">H", 300)), np.dstack([rgb(to_8_bits(grey)), hidden])
    out["rgb16.png"] = png(colour, 16, 2), to_8_bits(colour)
    hidden = np.where((colour == colour[2, 3]).all(-1), 0, 255).astype(np.uint8)
    trns = struct.pack(">HHH", *colour[2, 3])
    out["rgb16-hidden.png"] = png(colour, 16, 2, trns), np.dstack([to_8_bits(colour), hidden])
    grey_alpha = np.dstack([rgb(to_8_bits(two[..., 0])), to_8_bits(two[..., 1])])
    out["grey-alpha16.png"] = png(two, 16, 4), grey_alpha
    out["rgba16.png"] = png(four, 16, 6), to_8_bits(four)
    palette = np.arange(16)[None]
    colours = np.arange(48, dtype=np.uint8).reshape(1, 16, 3)
    out["palette.png"] = png(palette, 4, 3), colours
    alpha = np.full((1, 16), 255, np.uint8)
    alpha[0, :2] = 0, 128
    out["palette-alpha.png"] = png(palette, 4, 3, b"\0\x80"), np.dstack([colours, alpha])

    for order in "<>":
        for packed in (False, True):
            end = f"-{'little' if order == '<' else 'big'}{'-packed' * packed}.tiff"
            unit = RNG.random((4, 5)).astype(np.float32)
            unit[0, 0] = 1
            out["float-of-0-to-1" + end] = tiff(unit, order, packed), rgb(to_8_bits(unit, 1))
            whole = small[..., 0].astype(np.int32)
            out["int32-of-0-to-255" + end] = tiff(whole, order, packed), rgb(small[..., 0])
            out["float-of-0-to-255" + end] = tiff(whole.astype(np.float32), order, packed), rgb(small[..., 0])
            out["int32-of-16-bits" + end] = tiff(grey.astype(np.int32), order, packed), rgb(to_8_bits(grey))
            out["grey16" + end] = tiff(grey, order, packed), rgb(to_8_bits(grey))
            out["rgb16" + end] = tiff(colour, order, packed), to_8_bits(colour)
            out["rgba16" + end] = tiff(four, order, packed, t338=2), to_8_bits(four)
    out["uint32-of-0-to-255.tif"] = tiff(small[..., 0].astype(np.uint32)), rgb(small[..., 0])
    out["white-is-0.tif"] = tiff(small[..., 0], t262=0), rgb(255 - small[..., 0])
    out["white-is-0-of-16-bits.tif"] = tiff(grey, t262=0), 255 - rgb(to_8_bits(grey))
    out["on-its-side.tif"] = tiff(small, t274=6), np.rot90(small, -1)
    out["float-on-its-side.tif"] = tiff(unit, t274=6), np.rot90(rgb(to_8_bits(unit, 1)), -1)

    image = Image.fromarray(small)
    exif = Image.Exif()
    exif[0x0112] = 6
    out["on-its-side.png"] = encoded(image, "PNG", exif=exif), np.rot90(small, -1)
    deep = Image.fromarray(grey)
    out["deep-on-its-side.png"] = encoded(deep, "PNG", exif=exif), np.rot90(rgb(to_8_bits(grey)), -1)
    out["8-bits.webp"] = encoded(image, "WEBP", lossless=True), small
    out["8-bits.bmp"] = encoded(image, "BMP"), small
    out["1-bit.bmp"] = encoded(Image.fromarray(small[..., 0] > 99), "BMP"), rgb(255 * (small[..., 0] > 99))
    out["moving.gif"] = encoded(Image.new("RGB", (6, 4), (255, 0, 0)), "GIF", save_all=True,
                                append_images=[Image.new("RGB", (6, 4))]), np.full((4, 6, 3), (255, 0, 0))  # fmt: skip
    flat = np.full((16, 16, 3), FLAT, np.uint8)
    for suffix in ("jpg", "jpeg", "jpe", "jfif", "JPG"):
        out[f"photo.{suffix}"] = encoded(Image.fromarray(flat), "JPEG", quality=100, subsampling=0), flat
    out["photo.avif"] = encoded(Image.fromarray(flat), "AVIF", quality=100, subsampling="4:4:4"), flat
    cmyk = np.full((8, 8, 4), (10, 200, 90, 40), np.uint8)
    image = Image.frombytes("CMYK", (8, 8), cmyk.tobytes())
    out["print.jpg"] = encoded(image, "JPEG", quality=100), np.asarray(image.convert("RGB"))

    for name, values in {
        "above-1": [0, 1.2], "below-0": [-0.1, 0.5], "not-a-number": [np.nan, 0.5], "infinite": [np.inf, 0.5],
        "fractions-to-255": [0.5, 200.25],
    }.items():  # fmt: skip
        out[f"float-{name}.tif"] = tiff(np.array([values], np.float32)), None
    for value in (-1, 300, 70_000, 2**31 - 1):
        out[f"int32-of-{value}.tif"] = tiff(np.array([[0, value]], np.int32)), None
    out["signed16.tif"] = tiff(np.array([[5, 30_000]], np.int16)), None
    out["signed8.tif"] = tiff(np.array([[5, -3]], np.int8)), None
    out["float16.tif"] = tiff(np.array([[0, 1]], np.float16)), None
    out["planes.tif"] = tiff(colour, t284=2), None
    out["colour-floats.tif"] = tiff(np.zeros((2, 2, 3), np.float32)), None
    whole = png(grey, 16, 0)
    out["half.png"] = whole[: len(whole) // 2], None
    out["half.jpg"] = out["photo.jpg"][0][:300], None
    out["half.avif"] = out["photo.avif"][0][: len(out["photo.avif"][0]) // 2], None
    out["nothing.png"] = b"", None
    out["page.jpg"] = b"<html><body>404</body></html>", None
    out["photo-of-a-phone.jpg"] = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), None
    out["jpeg-xl.jpg"] = b"\xff\x0a" + bytes(99), None
    out["drawing.png"] = b'<svg xmlns="http://www.w3.org/2000/svg"/>', None
    out["program.png"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", None
    out["huge.png"] = (
        (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0))
            + chunk(b"IEND", b"")
        ),
        None,
    )
    return out


IMAGES = _images()
"""File name -> its bytes, and the RGB or RGBA pixels, or None."""

CAPTIONS: dict[bytes, str | None] = {
    # What is a caption
    b"a dog": "a dog",
    b"\xef\xbb\xbfa dog": "a dog",
    b"\xef\xbb\xbf\xef\xbb\xbftwo marks": "two marks",
    b"a dog\r\n": "a dog",
    b"a dog,\r\nrunning\r\n": "a dog, running",
    b"old\rMac": "old Mac",
    b"\ta \t dog\n\n": "a dog",
    b"a\x0bdog\x0c": "a dog",
    "no\u00a0break, wide\u3000space\u2028line".encode(): "no break, wide space line",
    "café, naïve".encode(): "café, naïve",
    "cafe\u0301".encode(): "cafe\u0301",
    "日本の犬".encode(): "日本の犬",
    "собака".encode(): "собака",
    "كلب \u200fجميل".encode(): "كلب \u200fجميل",
    "👩\u200d👩\u200d👧 family".encode(): "👩\u200d👩\u200d👧 family",
    "🐕".encode(): "🐕",
    "“quotes” — and … dots".encode(): "“quotes” — and … dots",
    b"AT&amp;T &lt;3": "AT&amp;T &lt;3",
    b'{"caption": "not unpacked"}': '{"caption": "not unpacked"}',
    b'a "dog", with; commas': 'a "dog", with; commas',
    b"back\\slash \\n": "back\\slash \\n",
    b"=1+1": "=1+1",
    b"# no comment": "# no comment",
    b"0": "0",
    b"null": "null",
    b"NaN": "NaN",
    b"?": "?",
    b"100 %s {x} <lora:y:1>": "100 %s {x} <lora:y:1>",
    b"word " * 5000: " ".join(["word"] * 5000),
    # What is none
    b"": None,
    b" ": None,
    b"\r\n\t\n": None,
    b"\xef\xbb\xbf": None,
    "\u00a0\u3000".encode(): None,
    "\u200b\u2060\ufeff".encode(): None,
    "\u00ad".encode(): None,
    b"a\0dog": None,
    b"a\x07dog": None,
    b"\x1b[31mred": None,
    b"a\x7fdog": None,
    "it\u0092s cp1252, taken for latin-1".encode(): None,
    "it\u0085".encode(): None,
    "caf\ufffd".encode(): None,
    "\ufffd".encode(): None,
    "a dog".encode("utf-16"): None,
    "a dog".encode("utf-16-le"): None,
    "a dog".encode("utf-16-be"): None,
    b"\xfe\xff" + "a dog".encode("utf-16-be"): None,
    "собака".encode("utf-16-le"): None,
    "日本の犬".encode("utf-16"): None,
    "a dog".encode("utf-32"): None,
    "a dog".encode("utf-32-le"): None,
    "café".encode("cp1252"): None,
    "“quotes”".encode("cp1252"): None,
    "it\u2019s".encode("cp1252"): None,
    "собака".encode("cp1251"): None,
    "собака".encode("koi8-r"): None,
    "日本の犬".encode("shift-jis"): None,
    "日本の犬".encode("euc-jp"): None,
    "日本の犬".encode("iso2022-jp"): None,
    "一只狗".encode("gbk"): None,
    "日本".encode()[:-1]: None,
    b"\xc0\x80": None,
    b"\xed\xa0\xbd\xed\xb0\x95": None,
    gzip.compress(b"a dog", mtime=0): None,
}
"""A caption's bytes, and its text, or None."""


def assert_alike(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Equal pixels; of formats that lose some, within 2."""
    lossy = name.lower().endswith((".jpg", ".jpeg", ".jpe", ".jfif", ".avif"))
    assert found.shape == expected.shape, name
    assert np.abs(found.astype(int) - expected).max() <= (2 if lossy else 0), name
