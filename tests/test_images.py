"""Pictures on disk: they say how they were made, never overwrite; what comes from outside is not trusted; masks."""

import io
import os
import struct
import zlib

import numpy as np
import odd
import pytest
from PIL import Image

from jaxdiff.io.images import (
    FORMATS,
    contact_sheet,
    encode_image,
    feathered,
    film_strip,
    outpaint_canvas,
    read_image,
    read_mask,
    read_settings,
    slug,
    webui_parameters,
    write_gif,
    write_image,
    write_png,
)
from jaxdiff.io.images.decode import header_size

SETTINGS = {
    "prompt": "a red apple, 日本", "negative_prompt": "blurry", "steps": 30, "sampler": "ddim", "guidance": 7.5,
    "seed": 3, "width": 8, "height": 6, "model": "emoji",
}  # fmt: skip


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_a_png_gives_back_its_pixels_and_settings(tmp_path, image):
    path = write_png(tmp_path / "new" / "folder", "apple", image, SETTINGS)
    assert path.name == "apple.png"
    assert read_settings(path) == SETTINGS
    with Image.open(path) as png:
        np.testing.assert_array_equal(np.asarray(png), image)
        assert png.text["parameters"] == (
            "a red apple, 日本\nNegative prompt: blurry\n"
            "Steps: 30, Sampler: ddim, CFG scale: 7.5, Seed: 3, Size: 8x6, Model: emoji"
        )


def test_values_that_would_break_the_webui_line_are_quoted():
    assert webui_parameters({"prompt": "x", "model": "a, b: c"}) == 'x\nModel: "a, b: c"'


def test_a_picture_without_settings_has_none(tmp_path, image):
    assert read_settings(write_png(tmp_path, "plain", image)) is None


def test_nothing_is_overwritten(tmp_path, image):
    (tmp_path / "a-2.png").write_bytes(b"mine")
    paths = [write_png(tmp_path, "a", image).name for _ in range(3)]
    assert paths == ["a.png", "a-3.png", "a-4.png"]
    assert (tmp_path / "a-2.png").read_bytes() == b"mine"


def test_a_place_that_cannot_be_written_is_named(tmp_path, image):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out .*Not a directory"):
        write_png(tmp_path / "file" / "out", "a", image)


@pytest.mark.parametrize(
    ("text", "stem"),
    [("A red apple, 3D!", "a-red-apple-3d"), ("Ünïcode", "unicode"), ("日本", "image"), ("../../etc", "etc"),
     ("x" * 99, "x" * 60)],
)  # fmt: skip
def test_any_text_gives_a_safe_file_name(text, stem):
    assert slug(text) == stem


def test_a_contact_sheet_holds_every_picture_unscathed(image):
    images = [image, 255 - image, image // 2]
    bare = contact_sheet(images, columns=2, cell=8)
    assert sum(np.array_equal(bare[y : y + 6, x : x + 8], one) for one in images
               for y in range(bare.shape[0] - 5) for x in range(bare.shape[1] - 7)) == 3  # fmt: skip
    captioned = contact_sheet(images, ["short", "a long caption " * 20, ""], columns=2)
    big = images[1].repeat(20, 0).repeat(20, 1)
    assert np.array_equal(captioned[5 : 5 + 120, 5 + 165 : 5 + 165 + 160], big)
    ink = (captioned[125:, 5:165] < 128).any()
    assert ink


def test_a_contact_sheet_that_makes_no_sense_is_refused(image):
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
    with pytest.raises(ValueError, match="one size"):
        contact_sheet([image, image[:4]])
    with pytest.raises(ValueError, match=r"1 image.*2 caption"):
        contact_sheet([image], ["a", "b"])


def test_settings_are_read_from_pngs_only(tmp_path):
    for name in ("a.eps", "a.png"):
        (tmp_path / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a PNG"):
            read_settings(tmp_path / name)
    with pytest.raises(ValueError, match=r"gone\.png cannot be read"):
        read_settings(tmp_path / "gone.png")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_back_its_settings(tmp_path, image, format):
    path = write_image(tmp_path, "apple", image, SETTINGS, format)
    assert path.name == f"apple.{'jpg' if format == 'jpeg' else format}"
    assert read_settings(path) == SETTINGS
    assert write_image(tmp_path, "apple", image, SETTINGS, format).stem == "apple-2"
    with Image.open(path) as file:
        assert (file.format, file.size) == (format.upper(), (8, 6))


@pytest.mark.parametrize("format", FORMATS)
def test_without_settings_nothing_says_how_a_picture_was_made(tmp_path, image, format):
    assert read_settings(write_image(tmp_path, "a", image, None, format)) is None
    with Image.open(tmp_path / f"a.{FORMATS[format]}") as file:
        assert not file.getexif()
        assert not {"parameters", "jaxdiff", "exif", "comment"} & set(file.info)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_web_uis_find_their_text_in_the_exif_data(image, format):
    """UserComment: eight bytes that name the encoding, then big-endian UTF-16; the header says big-endian, too."""
    data = encode_image(image, SETTINGS, format)
    with Image.open(io.BytesIO(data)) as file:
        comment = file.getexif().get_ifd(0x8769)[0x9286]
        assert file.info["exif"].removeprefix(b"Exif\0\0")[:2] == b"MM"
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == webui_parameters(SETTINGS)


def test_lossy_formats_stay_close(tmp_path):
    y, x = np.mgrid[:64, :64]
    smooth = np.stack([4 * x, 4 * y, 255 - 2 * x - 2 * y], -1).astype(np.uint8)
    for format in ("jpeg", "webp"):
        read = read_image(write_image(tmp_path, "a", smooth, format=format))
        assert np.abs(read.astype(int) - smooth).mean() < 2
    np.testing.assert_array_equal(read_image(write_image(tmp_path, "a", smooth)), smooth)


def test_what_a_format_cannot_hold_is_told(tmp_path, image):
    with pytest.raises(ValueError, match=r"format is 'bmp'.*png, jpeg, webp"):
        write_image(tmp_path, "a", image, format="bmp")
    with pytest.raises(ValueError, match=r"\d{5} bytes.*65527"):
        write_image(tmp_path, "a", image, {"prompt": "x" * 30_000}, "jpeg")
    assert read_settings(write_image(tmp_path, "a", image, {"prompt": "x" * 30_000}))
    assert read_settings(write_image(tmp_path, "a", image, {"prompt": "x" * 20_000}, "jpeg"))
    with pytest.raises(ValueError, match=r"17000x1 .*webp"):
        write_image(tmp_path, "a", np.zeros((1, 17_000, 3), np.uint8), format="webp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.png"]


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\ud800"])
def test_settings_that_make_no_sense_are_told(tmp_path, image, text):
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("jaxdiff", text.encode("utf-8", "replace").decode())
    Image.fromarray(image).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"a\.png .*settings"):
        read_settings(tmp_path / "a.png")


# Reading


def saved(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


def test_pictures_of_any_kind_are_read_as_8_bit_colour(tmp_path, image):
    picture = Image.fromarray(image)
    for name in ("a.png", "a.bmp", "a.tiff"):
        np.testing.assert_array_equal(read_image(saved(picture, tmp_path / name)), image)
    grey = picture.convert("L")
    for mode in ("L", "P", "LA", "I;16"):
        kind = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
        read = read_image(saved(kind, tmp_path / "b.png"))
        np.testing.assert_array_equal(read, np.repeat(np.asarray(grey)[..., None], 3, -1))
    np.testing.assert_array_equal(read_image((tmp_path / "a.png").read_bytes()), image)
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png")), image)


@pytest.mark.parametrize("name", odd.IMAGES)
def test_an_odd_image_is_its_pixels_or_a_sentence(name):
    data, pixels = odd.IMAGES[name]
    if pixels is None:
        with pytest.raises(ValueError, match="cannot be read: "):
            read_image(data)
        return
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:] / 255
        pixels = pixels[..., :3] * alpha + 255 * (1 - alpha)
        assert np.abs(read_image(data) - pixels).max() <= 1
    else:
        odd.assert_alike(read_image(data), pixels, name)
    assert header_size(data) == pixels.shape[1::-1]


def test_what_is_transparent_becomes_white(tmp_path):
    see_through = Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    see_through.putpixel((0, 0), (10, 20, 30, 255))
    read = read_image(saved(see_through, tmp_path / "a.png"))
    assert read[0, 0].tolist() == [10, 20, 30]
    assert (read[1] == 255).all()


def png_of(width: int, height: int) -> bytes:
    """A few bytes that claim a picture of any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", ""),
        (b"<html>", ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ""),
        (png_of(9000, 9000), "9000x9000.*64000000"),
        (png_of(60_000, 60_000), "64000000"),
        (png_of(8, 8), ""),
    ],
)
def test_what_is_no_picture_is_told_in_a_sentence(tmp_path, data, said):
    (tmp_path / "a.png").write_bytes(data)
    for read in (read_image, lambda file: read_mask(file, (8, 8))):
        with pytest.raises(ValueError, match=rf"a\.png .*read.*{said}"):
            read(tmp_path / "a.png")
        with pytest.raises(ValueError, match=rf"read.*{said}"):
            read(data)


def test_half_a_picture_is_told(tmp_path, image):
    for format in FORMATS:
        data = encode_image(image.repeat(20, 0).repeat(20, 1), None, format)
        with pytest.raises(ValueError, match="cannot be read"):
            read_image(data[: len(data) // 2])


def test_places_that_are_no_files_are_told(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe is not a file"):
        read_image(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a file"):
        read_image(tmp_path)
    with pytest.raises(ValueError, match=r"gone\.png .*No such file"):
        read_image(tmp_path / "gone.png")
    monkeypatch.setattr("jaxdiff.io.images.read.MAX_BYTES", 3)
    (tmp_path / "large").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"large has 4 bytes.*3"):
        read_image(tmp_path / "large")


def test_a_masks_white_is_drawn_anew_and_what_is_transparent_is_kept(tmp_path):
    values = np.array([[0, 51, 255], [255, 128, 0]], np.uint8)
    mask = read_mask(saved(Image.fromarray(values), tmp_path / "a.png"), (3, 2))
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, values.astype(np.float32) / 255)
    strokes = Image.new("RGBA", (3, 2), (255, 255, 255, 0))
    strokes.putpixel((1, 0), (255, 255, 255, 255))
    strokes.putpixel((2, 0), (0, 0, 0, 255))
    mask = read_mask(saved(strokes, tmp_path / "b.png"), (3, 2))
    np.testing.assert_array_equal(mask, [[0, 1, 0], [0, 0, 0]])
    assert set(read_mask(saved(Image.new("1", (3, 2), 1), tmp_path / "c.png"), (3, 2)).ravel()) == {1.0}


def test_a_mask_of_another_size_is_refused(tmp_path):
    path = saved(Image.new("L", (3, 2)), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is 3x2.*2x3"):
        read_mask(path, (2, 3))


# Masks


def test_feathering_leaves_what_is_kept_at_0_and_rises_to_1_inside():
    mask = np.zeros((40, 60), np.float32)
    mask[10:30, 20:50] = 1
    for radius in (1, 4, 7.5):
        soft = feathered(mask, radius)
        assert soft.dtype == np.float32
        assert (soft[mask == 0] == 0).all()
        assert ((soft > 0) == (mask > 0)).all()
        row = soft[20, 20:35]
        assert (np.diff(row) >= 0).all()
        assert row[0] < 1
        assert (
            soft[int(10 + radius + 1) : int(30 - radius - 1), int(20 + radius + 1) : int(50 - radius - 1)] == 1
        ).all()
    np.testing.assert_array_equal(feathered(mask, 0), mask)
    np.testing.assert_allclose(feathered(mask, 4)[20, 20:24], [t * t * (3 - 2 * t) for t in (0.2, 0.4, 0.6, 0.8)], 1e-6)


def test_the_pictures_borders_are_no_edges():
    np.testing.assert_array_equal(feathered(np.ones((5, 5), np.float32), 3), np.ones((5, 5)))
    np.testing.assert_array_equal(feathered(np.zeros((5, 5), np.float32), 3), np.zeros((5, 5)))
    half = np.zeros((6, 40), np.float32)
    half[:, 20:] = 1
    assert (feathered(half, 5)[:, 26:] == 1).all()


def test_a_grey_mask_keeps_its_values_inside():
    mask = np.zeros((20, 20))
    mask[:, 5:] = 0.5
    soft = feathered(mask, 3)
    assert soft.max() == 0.5
    assert (soft[:, 9:] == 0.5).all()
    assert (soft[:, :5] == 0).all()


@pytest.mark.parametrize("radius", [-1, float("nan"), float("inf")])
def test_a_radius_that_makes_no_sense_is_refused(radius):
    with pytest.raises(ValueError, match=rf"radius is {radius}.*0"):
        feathered(np.zeros((2, 2)), radius)


def test_a_mask_out_of_range_is_refused():
    for value in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="0 to 1"):
            feathered(np.full((2, 2), value), 1)


def test_a_canvas_grows_and_its_mask_says_where(image):
    canvas, mask = outpaint_canvas(image, left=3, bottom=2)
    assert canvas.shape == (8, 11, 3)
    np.testing.assert_array_equal(canvas[:6, 3:], image)
    np.testing.assert_array_equal(canvas[:6, 0], image[:, 0])
    np.testing.assert_array_equal(canvas[7, 3:], image[5])
    assert mask.dtype == np.float32
    assert (mask[:6, 3:] == 0).all()
    assert mask.sum() == 8 * 11 - 6 * 8


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        ({"left": -1}, r"left is -1.*0"),
        ({"top": 1.5}, r"top is 1\.5"),
        ({"right": True}, r"right is True"),
        ({}, "added"),
        ({"left": 9000}, r"9008x6.*8192"),
    ],
)
def test_sides_that_make_no_sense_are_refused(image, sides, said):
    from jaxdiff.io.images import masks

    # Past the types that the tests check at every call.
    with pytest.raises(ValueError, match=said):
        getattr(masks.outpaint_canvas, "__wrapped__", masks.outpaint_canvas)(image, **sides)


# Frames


def test_a_gif_shows_its_frames_for_ever(tmp_path):
    frames = [np.full((8, 12, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = write_gif(tmp_path, "a", frames, seconds=0.25)
    assert path.name == "a.gif"
    assert write_gif(tmp_path, "a", frames).name == "a-2.gif"
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.info["loop"], gif.info["duration"]) == (3, 0, 250)
        for i, frame in enumerate(frames):
            gif.seek(i)
            np.testing.assert_array_equal(np.asarray(gif.convert("RGB")), frame)


def test_frames_that_make_no_gif_are_refused(tmp_path, image):
    with pytest.raises(ValueError, match="at least one frame"):
        write_gif(tmp_path, "a", [])
    with pytest.raises(ValueError, match="one size"):
        write_gif(tmp_path, "a", [image, image[:3]])
    for seconds in (0, 0.01, 1000, float("nan")):
        with pytest.raises(ValueError, match=rf"{seconds} seconds.*0\.02 to 600"):
            write_gif(tmp_path, "a", [image], seconds)
    assert not list(tmp_path.iterdir())


def test_a_film_strip_is_one_row_with_the_first_and_the_last_frame(image):
    frames = [np.full((160, 160, 3), i, np.uint8) for i in range(100)]
    strip = film_strip(frames, [f"sigma {i}" for i in range(100)], most=5)
    assert strip.shape[1] == 5 * 165 + 5
    shown = strip[20, 10::165][:5, 0]
    assert shown.tolist() == [0, 25, 50, 74, 99]
    assert film_strip(frames[:2]).shape == (170, 2 * 165 + 5, 3)
    with pytest.raises(ValueError, match="at least one"):
        film_strip([])
    with pytest.raises(ValueError, match=r"2 frame.*1 caption"):
        film_strip(frames[:2], ["a"])
    with pytest.raises(ValueError, match="most is 0"):
        film_strip(frames, most=0)
