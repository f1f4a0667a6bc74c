"""Pictures: decoding what is hostile, backgrounds, crops."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxdiff.config import DataConfig
from jaxdiff.data.captions import COLOURS, Caption
from jaxdiff.data.images import Augmentation, augment, decode, on_background, prepare, to_float
from jaxdiff.data.record import BadRecord, Record


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values)


def drawn(seed):
    return Augmentation(0, *np.random.default_rng(seed).random(4).tolist())


def test_a_few_bytes_that_claim_a_huge_picture_are_refused_before_they_are_decoded():
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(BadRecord, match="9000x9000"):
        decode(bomb)


@pytest.mark.parametrize("side", [10_000, 16_000])
def test_a_small_file_of_very_many_pixels_is_refused(side):
    data = encoded(Image.new("1", (side, side)))
    assert len(data) < 100_000
    with pytest.raises(BadRecord, match="pixels"):
        decode(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_half_a_file_is_a_bad_record(format):
    data = encoded(noise(64, 64), format)
    assert decode(data).size == (64, 64)
    with pytest.raises(BadRecord):
        decode(data[: len(data) // 2])


def test_kinds_that_pillow_reads_with_other_programs_are_not_tried():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(BadRecord, match="it is not an image"):
        decode(eps)


@pytest.mark.parametrize("data", [b"", b"<html>", b"\x89PNG\r\n\x1a\n", bytes(100)])
def test_what_is_no_picture_is_a_bad_record(data):
    with pytest.raises(BadRecord):
        decode(data)


def test_pictures_of_any_mode_come_out_as_8_bit_colour():
    assert decode(encoded(noise(4, 4, 1))).mode == "RGB"
    assert decode(encoded(noise(4, 4, 3).convert("CMYK"), "JPEG")).mode == "RGB"
    assert decode(encoded(noise(4, 4, 3).convert("P"))).mode == "RGB"
    assert decode(encoded(noise(4, 4, 4))).mode == "RGBA"
    assert decode(encoded(noise(4, 4, 3).convert("RGBA"))).mode == "RGB"  # nothing is transparent
    deep = decode(encoded(Image.fromarray(np.full((2, 2), 40_000, np.uint16))))
    assert np.asarray(deep)[0, 0].tolist() == [round(40_000 / 257)] * 3


def test_a_photo_is_turned_as_its_exif_data_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(noise(20, 10), "JPEG", exif=exif)).size == (10, 20)


@pytest.mark.parametrize("colour", COLOURS)
def test_the_background_is_exactly_the_named_colour(colour):
    disc = Image.new("RGBA", (32, 32))
    disc.paste((12, 200, 34, 255), (8, 8, 24, 24))
    composed = np.asarray(on_background(disc, colour))
    assert tuple(composed[0, 0]) == tuple(composed[-1, -1]) == COLOURS[colour]
    assert tuple(composed[16, 16]) == (12, 200, 34)


def test_black_art_stays_visible_on_black():
    icon = Image.new("RGBA", (8, 8))
    icon.paste((0, 0, 0, 255), (2, 2, 6, 6))
    assert np.asarray(on_background(icon, "black"))[4, 4].tolist() == [255] * 3
    assert np.asarray(on_background(icon, "grey"))[4, 4].tolist() == [0] * 3


def test_the_caption_names_the_background_that_was_composed():
    art = Record(Caption("x", drawing=True), encoded(Image.new("RGBA", (16, 16))))
    seen = set()
    for i in range(60):
        image, caption, _ = prepare(art, np.random.default_rng(i), DataConfig(), (8, 8))
        assert image.shape == (8, 8, 3)
        assert tuple(image[0, 0]) == COLOURS[caption.colour]
        seen.add(caption.colour)
    assert len(seen) > 8
    _, caption, _ = prepare(
        Record(Caption("x", drawing=True), encoded(noise(16, 16))), np.random.default_rng(0), DataConfig(), (8, 8)
    )
    assert caption.colour == ""


@pytest.mark.parametrize("size", [(64, 64), (37, 91), (91, 37), (1, 5), (1000, 3)])
def test_any_picture_becomes_a_square_of_the_size_asked_for(size):
    for i in range(20):
        image, _ = augment(noise(*size), drawn(i), shape=(24, 24), crop=0.5, flip=True)
        assert (image.size, image.mode) == ((24, 24), "RGB")


def test_without_a_crop_the_middle_is_taken_and_nothing_is_resampled_needlessly():
    image = noise(64, 64)
    assert augment(image, drawn(0), shape=(64, 64), crop=1.0, flip=False)[0] is image
    wide = noise(128, 64)
    middle = np.asarray(wide)[:, 32:96]
    assert (np.asarray(augment(wide, drawn(0), shape=(64, 64), crop=1.0, flip=False)[0]) == middle).all()


@pytest.mark.parametrize(
    ("size", "shape", "crop", "draws", "cut"),
    [
        # Whole images: resized until they cover the shape, and cut on both sides.
        ((40, 20), (16, 16), 1.0, (0, 0, 0, 0.9), (20, 40, 0, 8, 16, 16)),
        ((40, 20), (16, 16), 1.0, (0, 0, 0, 0.1), (20, 40, 0, 8, 16, 16)),  # mirrored
        ((30, 40), (16, 16), 1.0, (0, 0, 0, 0.9), (40, 30, 3, 0, 16, 16)),
        ((1000, 500), (64, 192), 1.0, (0, 0, 0, 0.9), (500, 1000, 16, 0, 64, 192)),  # a bucket: 192x96, 16 off each end
        ((64, 64), (64, 64), 1.0, (0, 0, 0, 0.9), (64, 64, 0, 0, 64, 64)),
        # Half of 40 pixels as 10, so that the whole image has 20: 4 from the left become 2, and 16 from the right 8.
        ((40, 40), (10, 10), 0.5, (0, 0.2, 0.6, 0.9), (40, 40, 6, 2, 10, 10)),
        ((40, 40), (10, 10), 0.5, (0, 0.2, 0.6, 0.1), (40, 40, 6, 8, 10, 10)),
        ((20, 20), (40, 40), 0.5, (0, 0.5, 0.1, 0.9), (20, 20, 4, 20, 40, 40)),  # enlarged to 80
    ],
)
def test_numbers_of_a_crop_are_what_one_counts(size, shape, crop, draws, cut):
    drawn = Augmentation(0, *draws)
    assert augment(noise(*size), drawn, shape=shape, crop=crop, flip=True)[1] == cut


@pytest.mark.parametrize("seed", range(12))
def test_the_corner_of_a_crop_is_where_its_pixels_say(seed):
    """In a picture whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:200, :250]
    picture = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))
    image, cut = augment(picture, drawn(seed), shape=(60, 80), crop=0.4, flip=True)
    red, green = np.asarray(image, float)[..., 0].mean(0), np.asarray(image, float)[..., 1].mean(1)
    mirrored = red[-1] < red[0]
    if mirrored:
        red = 249 - red  # in the picture as it is seen
    middle = slice(10, -10)  # edges are blurred with what lies beside
    for values, n, corner in ((red, 80, cut.left), (green, 60, cut.top)):
        slope, start = np.polyfit(np.arange(n)[middle] + 0.5, values[middle] + 0.5, 1)
        assert corner == pytest.approx(start / slope, abs=0.8)
    assert cut[:2] == (200, 250)
    assert cut[4:] == (60, 80)


def test_half_of_the_pictures_are_flipped():
    image = noise(8, 8)
    draws = [np.asarray(augment(image, drawn(i), shape=(8, 8), crop=1.0, flip=True)[0]) for i in range(400)]
    flipped = [bool((draw == np.asarray(image)[:, ::-1]).all()) for draw in draws]
    assert all(f or (draw == np.asarray(image)).all() for f, draw in zip(flipped, draws, strict=True))
    assert 150 < sum(flipped) < 250


def test_floats_span_minus_one_to_one():
    values = to_float(np.asarray([0, 255], np.uint8).reshape(1, 1, 2, 1).repeat(3, -1))
    assert (values.dtype, values.min(), values.max()) == (np.float32, -1, 1)
