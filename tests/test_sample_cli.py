"""`sample.py`: what it writes, and what it says when it cannot."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_generate import model, pipe  # noqa: F401  (fixtures)

from jaxdiff.io.images import outpaint_canvas, read_settings
from jaxdiff.tasks import fitted, interpolate, trajectory, upscale

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from sample import cli  # noqa: E402


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save(path)
    return path


@pytest.fixture
def one_device(monkeypatch):
    """Not all eight, to which batches would be filled up."""
    first = jax.local_devices()[:1]
    monkeypatch.setattr("sample.jax.local_devices", lambda: first)


@pytest.fixture
def photo(tmp_path):
    """A picture of the model's size, and a mask whose right half is white."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(image).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return image, mask


def opened(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture
def sample(folder, tmp_path, capsys):
    """Runs the command line in the test's own folder: (exit code, lines printed, what went to stderr)."""

    def run(*words: object) -> tuple[int, list[str], str]:
        steps = () if {"--like", "--steps"} & set(map(str, words)) else ("--steps", "3")
        code = cli([*map(str, words), "--model", str(folder), "--out", str(tmp_path / "out"), *steps])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def test_a_prompt_becomes_a_png_that_says_how_it_was_made(sample, pipe):  # noqa: F811
    code, (path,), _ = sample("a red apple", "--seed", 5, "--negative", "blue, green", "--guidance", "4")
    assert (code, Path(path).name) == (0, "a-red-apple-5.png")
    image = Image.open(path)
    np.testing.assert_array_equal(
        np.asarray(image), pipe(["a red apple"], negative_prompt="blue, green", seed=5, steps=3, guidance=4.0)[0]
    )
    told = json.loads(image.info["jaxdiff"])
    expected = {"prompt": "a red apple", "negative_prompt": "blue, green", "seed": 5, "steps": 3, "guidance": 4.0,
                "sampler": "ddim", "grid": "model", "eta": 0.0, "width": 16, "height": 16, "model": "tiny",
                "dtype": "float32"}  # fmt: skip
    assert expected.items() <= told.items()
    assert image.info["parameters"] == (
        "a red apple\nNegative prompt: blue, green\n"
        "Steps: 3, Sampler: ddim, CFG scale: 4.0, Seed: 5, Size: 16x16, Model: tiny"
    )


def test_a_png_says_where_guidance_was_and_how_long_features_were_kept(sample, pipe):  # noqa: F811
    code, (path,), _ = sample("a dog", "--guidance-interval", 0.5, 2, "--cache-interval", 2)
    assert code == 0
    drawn = pipe(["a dog"], steps=3, guidance_interval=(0.5, 2), cache_interval=2)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), drawn)
    told = read_settings(path)
    assert (told["guidance_interval"], told["cache_interval"]) == ([0.5, 2.0], 2)


def test_nothing_is_overwritten(sample):
    _, (first,), _ = sample("a dog")
    before = Path(first).read_bytes()
    _, (second,), _ = sample("a dog", "--guidance", 1)
    assert Path(second).name == "a-dog-0-2.png"
    assert Path(first).read_bytes() == before


def test_several_pictures_come_in_equal_batches_with_a_contact_sheet(sample, pipe, monkeypatch, one_device):  # noqa: F811
    monkeypatch.setattr("jaxdiff.batch.BATCH_IMAGES", 3)
    prompts = ["a dog", "a red apple", "blue", "on a", "a"]  # a batch of 3, and one of 2 that is filled up
    code, paths, _ = sample(*prompts)
    assert code == 0
    names = [Path(path).name for path in paths]
    assert names == ["a-dog-0.png", "a-red-apple-1.png", "blue-2.png", "on-a-3.png", "a-4.png", "contact-sheet.png"]
    for seed, prompt in enumerate(prompts):
        alone = pipe([prompt], seed=seed, steps=3)[0].astype(int)
        assert np.abs(np.asarray(Image.open(paths[seed])) - alone).max() <= 1
        assert read_settings(paths[seed])["seed"] == seed


def test_n_pictures_of_a_prompt_have_seeds_in_a_row(sample, monkeypatch, one_device):
    monkeypatch.setattr("jaxdiff.batch.BATCH_IMAGES", 1)
    _, paths, _ = sample("a dog", "--n", 2, "--seed", 8)
    assert [Path(path).name for path in paths] == ["a-dog-8.png", "a-dog-9.png", "contact-sheet.png"]


def test_seeds_reach_their_last_value_also_where_batches_are_filled_up(sample):
    code, paths, _ = sample("a dog", "--n", 5, "--seed", 2**32 - 5)
    assert code == 0
    assert [Path(path).stem for path in paths] == [*(f"a-dog-{2**32 - i}" for i in (5, 4, 3, 2, 1)), "contact-sheet"]


def test_what_was_written_is_named_when_the_work_is_stopped(sample, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sample.contact_sheet", stop)
    code, paths, _ = sample("a dog", "a red apple", "blue")
    assert code == 130
    assert [Path(path).name for path in paths] == ["a-dog-0.png", "a-red-apple-1.png", "blue-2.png"]


def test_warnings_about_prompts_are_told_once_each(sample):
    code, paths, err = sample("a (dog", "a (red apple", "and so on and on " * 9, "a dog)", "--n", 2)
    assert (code, len(paths)) == (0, 9)
    told = "warning: The bracket '(' is never closed; it is taken as text."
    assert [line for line in err.splitlines() if line.startswith("warning")] == [
        told,
        told.replace("'(' is never closed", "')' is never opened"),
    ]


def test_an_image_is_begun_from(sample, pipe, photo, tmp_path):  # noqa: F811
    code, (path,), _ = sample("a dog", "--image", tmp_path / "photo.png", "--strength", 0.7)
    assert code == 0
    np.testing.assert_array_equal(opened(path), pipe(["a dog"], image=photo[0], strength=0.7, steps=3)[0])
    told = read_settings(path)
    assert (told["image"], told["strength"], told["mask"]) == (str(tmp_path / "photo.png"), 0.7, None)
    assert len(told["image_sha256"]) == 64


def test_an_image_of_another_size_is_made_to_fit_and_its_mask_alike(sample, pipe, tmp_path):  # noqa: F811
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (40, 70, 3), np.uint8)
    white = np.zeros((40, 70, 3), np.uint8)
    white[:, 35:] = 255
    Image.fromarray(large).save(tmp_path / "large.png")
    Image.fromarray(white).save(tmp_path / "white.png")
    for words, size in (((), (28, 16)), (("--size", "16x16"), (16, 16))):
        image = ("--image", tmp_path / "large.png", "--mask", tmp_path / "white.png")
        code, (path,), _ = sample("a dog", *image, *words)
        assert (code, opened(path).shape) == (0, (size[1], size[0], 3))
        small, mask = fitted(pipe, large, size), fitted(pipe, white, size)[..., 0]
        np.testing.assert_array_equal(opened(path)[mask == 0], small[mask == 0])
        np.testing.assert_array_equal(opened(path), pipe(["a dog"], image=small, mask=mask, steps=3)[0])


def test_outpainting_keeps_the_image_and_draws_around_it(sample, pipe, photo, tmp_path):  # noqa: F811
    _, (path,), _ = sample("a dog", "--image", tmp_path / "photo.png", "--outpaint", 4, 0, 8, 2)
    image, mask = outpaint_canvas(photo[0], left=4, right=8, bottom=2)
    np.testing.assert_array_equal(opened(path), pipe(["a dog"], image=image, mask=mask, steps=3)[0])
    np.testing.assert_array_equal(opened(path)[:16, 4:20], photo[0])


def test_upscaling_makes_an_image_larger(sample, pipe, photo, tmp_path):  # noqa: F811
    code, (path,), _ = sample("a dog", "--image", tmp_path / "photo.png", "--upscale", 2)
    assert code == 0
    np.testing.assert_array_equal(opened(path), upscale(pipe, "a dog", photo[0], steps=3))
    told = read_settings(path)
    assert (told["upscale"], told["width"], told["size"], told["strength"]) == (2, 32, None, None)


def test_regions_have_their_own_prompts(sample, pipe):  # noqa: F811
    code, (path,), _ = sample("blue", "--region", "0,0,0.5,1:a dog", "--region", "0.5,0,1,1:red: (apple:1.2)")
    assert code == 0
    regions = [("a dog", (0, 0, 0.5, 1)), ("red: (apple:1.2)", (0.5, 0, 1, 1))]
    np.testing.assert_array_equal(opened(path), pipe(["blue"], regions=regions, steps=3)[0])


def test_frames_lead_from_one_picture_to_another(sample, pipe):  # noqa: F811
    code, paths, _ = sample("a dog", "--to-prompt", "a red apple", "--to-seed", 9, "--frames", 4)
    assert code == 0
    assert [Path(path).name for path in paths] == [*(f"a-dog-0-frame-00{i}.png" for i in range(4)), "a-dog-0.gif"]
    expected = interpolate(pipe, ["a dog", "a red apple"], [0, 9], frames=3, steps=3)
    for path, image in zip(paths, expected, strict=False):
        assert np.abs(opened(path).astype(int) - image).max() <= 1
    with Image.open(paths[-1]) as gif:
        assert gif.n_frames == 4


def test_a_trajectory_lies_beside_its_picture(sample, pipe):  # noqa: F811
    _, paths, _ = sample("a dog", "--trajectory")
    assert [Path(path).name for path in paths] == ["a-dog-0.png", "a-dog-0-steps.png", "a-dog-0-steps.gif"]
    frames = trajectory(pipe, "a dog", steps=3)
    np.testing.assert_array_equal(opened(paths[0]), frames[-1])
    with Image.open(paths[2]) as gif:
        assert gif.n_frames == len(frames) == 3


def test_wildcards_are_filled_in_and_told_as_they_were(sample, pipe, tmp_path):  # noqa: F811
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thing.txt").write_text("dog\nred apple\nblue background\n")
    code, paths, _ = sample("a __thing__", "--wildcards", tmp_path / "w", "--n", 5)
    assert code == 0
    prompts = [read_settings(path)["prompt"] for path in paths[:-1]]
    assert {"a dog", "a red apple", "a blue background"} >= set(prompts)
    assert len(set(prompts)) > 1
    alone = pipe(["a __thing__"], seed=3, steps=3, wildcards=tmp_path / "w")[0].astype(int)
    assert np.abs(opened(paths[3]) - alone).max() <= 1


def test_a_wildcard_without_a_folder_is_text_and_told(sample):
    code, _, err = sample("a __thing__ and a __thing__")
    assert code == 0
    assert err.count("warning: __thing__ is taken as text; say where its file is, by --wildcards.") == 1


@pytest.mark.parametrize("words", [
    ("--seed", 7, "--negative", "blue", "--guidance-interval", 0.5, 3, "--grid", "karras"),
    ("--image", "photo.png", "--mask", "mask.png", "--feather", 2, "--seed", 3),
    ("--image", "photo.png", "--invert", "exact", "--source-prompt", "a red apple", "--keep", 0.5),
    ("--image", "photo.png", "--outpaint", 0, 0, 8, 0),
    ("--image", "photo.png", "--upscale", 2, "--strength", 0.5),
    ("--image", "photo.png", "--enlarge", 2),
    ("--region", "0,0,0.3333333333333333,1:a red apple", "--size", "32x16"),
    ("--to-prompt", "a red apple", "--to-seed", 4, "--share", 0.25, "--noise", "torch", "--literal"),
    ("--format", "webp", "--sampler", "euler", "--perturbed", 2, "--rescale", 0.5),
])  # fmt: skip
def test_a_picture_is_drawn_again_from_what_it_says_of_itself(sample, photo, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    code, (first,), _ = sample("a (dog:1.2)", *words)
    assert code == 0
    code, (second,), err = sample("--like", first, *(words[:2] if words[0] == "--format" else ()))
    assert (code, "warning" in err) == (0, False)
    assert Path(second) != Path(first)
    assert Path(second).read_bytes() == Path(first).read_bytes()


def test_what_is_given_beside_like_counts(sample, pipe):  # noqa: F811
    _, (first,), _ = sample("a dog", "--seed", 7, "--guidance", 3)
    code, (path,), _ = sample("--like", first, "--seed", 8, "a red apple")
    assert code == 0
    np.testing.assert_array_equal(opened(path), pipe(["a red apple"], seed=8, guidance=3, steps=3)[0])


def test_an_image_that_has_changed_since_is_told(sample, photo, tmp_path):
    _, (first,), _ = sample("a dog", "--image", tmp_path / "photo.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    sys.modules["sample"].sha256.cache_clear()  # of this process, which has read the old one
    code, _, err = sample("--like", first)
    assert code == 0
    assert f"warning: {tmp_path / 'photo.png'} has changed since {first} was drawn from it." in err


def test_without_metadata_nothing_is_told(sample):
    code, (first, *_), _ = sample("a dog", "blue", "--no-metadata")
    assert (code, Path(first).name) == (0, "image-0.png")
    with Image.open(first) as image:
        assert image.info == {}
    assert sample("--like", first)[0] == 2


@pytest.mark.parametrize(("told", "sentence"), [
    ("[1]", "no JSON object"),
    ("{", "are not JSON"),
    ("[" * 100_000, "are not JSON"),
    ("{}", "cannot be drawn again: There is no prompt."),
    ('{"prompt": ["a"]}', "cannot be drawn again: prompt is ['a']; it must be text."),
    ('{"prompt": "a", "seed": "x"}', "seed is 'x'; it must be a whole number"),
    ('{"prompt": "a", "steps": 1e400}', "steps is inf; it must be a whole number"),
    ('{"prompt": "a", "steps": 10000000, "model": "tiny"}', "steps is 10000000; it must be"),
    ('{"prompt": "a", "size": {"w": 3}}', "size is {'w': 3}"),
    ('{"prompt": "a", "size": [99999998, 99999998], "model": "tiny"}', "a side may have 8192 pixels at most"),
    ('{"prompt": "a", "dtype": ["float32"]}', "dtype is ['float32']"),
    ('{"prompt": "a", "image": "/etc/passwd", "model": "tiny"}', "/etc/passwd cannot be read: it is no picture."),
    ('{"prompt": "a", "image": "/dev/zero", "model": "tiny"}', "--image is '/dev/zero', and there is no such file"),
    ('{"prompt": "a", "image": "a\\u0000b", "model": "tiny"}', "and there is no such file"),
    ('{"prompt": "a", "regions": [[[]]], "model": "tiny"}', "regions[0] is [[]]"),
])  # fmt: skip
def test_settings_that_nobody_vouches_for_are_checked(sample, tmp_path, told, sentence):
    text = PngImagePlugin.PngInfo()
    text.add_text("jaxdiff", told)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", pnginfo=text)
    code, paths, err = sample("--like", tmp_path / "a.png")
    assert (code, paths) == (2, [])
    assert err.startswith("error: ")
    assert sentence in err


@pytest.mark.parametrize(("words", "sentence"), [
    ((), "No prompt was given"),
    (("a", "--n", "0"), "n is 0; it must be at least 1"),
    (("a", "--steps", "-3"), "steps is -3; it must be at least 1"),
    (("a", "--size", "64"), "size is '64'; write it as WIDTHxHEIGHT"),
    (("a", "--size", "15x16"), "size is 15x16; both sides must be multiples of 2"),
    (("a", "--size", "999998x999998"), "a side may have 8192 pixels at most"),
    (("a", "--guidance", "nan"), "guidance is nan; it must be a finite number"),
    (("a", "--guidance-interval", "3", "1"), "guidance_interval is (3.0, 1.0); it must be two noise levels"),
    (("a", "--cache-interval", "0"), "cache_interval is 0; it must be at least 1"),
    (("a", "--seed", "-1"), "--seed is -1"),
    (("a", "--seed", str(2**32 - 1), "--n", "2"), "with 2 pictures it must lie from 0 to 4294967294"),
    (("a", "--n", "1000000000", "--sampler", "ddmi"), "Unknown sampler"),  # no list of all pictures comes first
    (("a", "--sampler", "unipcc"), "Unknown sampler 'unipcc'; did you mean 'unipc'?"),
    (("a", "--dtype", "float23"), "dtype is 'float23'; supported: float32, bfloat16"),
    (("a", "--model", "no/such/folder"), "no/such/folder is not a folder"),
    (("a", "--out", "/dev/null"), "/dev/null cannot be written to: it is a file, not a folder"),
    (("a", "--out", "/proc/nothing"), "/proc/nothing cannot be written to: "),
    (("a", "--format", "bmp"), "--format is 'bmp'; choose one of png, jpeg, webp"),
    (("a", "--part", "3/2"), "--part is '3/2'; write it as I/N, from 1/N to N/N"),
    (("a", "--n", "2000000"), "n is 2000000; it must be 100000 at most"),
    ((*"abcdefghijk", "--n", "100000"), "These are 1100000 pictures, more than 1000000"),
    (("a", "--from-file", "prompts.txt"), "--from-file has the prompts; leave out the others, and --like"),
    (("--from-file", "gone.txt"), "gone.txt cannot be read: No such file or directory"),
    (("--from-file", "gone.txt", "--trajectory"), "--trajectory are for prompts on the command line"),
    (("a", "--frames", "0", "--to-seed", "1"), "--frames is 0; it must be at least 2"),
    (("a", "--frames", "4"), "--frames lie between two pictures; give the second"),
    (("a", "--frames", "4", "--to-seed", "1", "--trajectory"), "--frames and --trajectory both make a GIF"),
    (("a", "--share", "2", "--to-seed", "1"), "share is 2.0; it must be from 0 to 1"),
    (("a AND b", "--to-prompt", "b"), "A second prompt is for prompts without AND"),
    (("a", "--image", "gone.png"), "--image is 'gone.png', and there is no such file"),
    (("a", "--strength", "1.5"), "strength is 1.5; it must lie from 0 to 1"),
    (("a", "--strength", "0.5"), "strength is 0.5, and there is no image that it is for"),
    (("a", "--upscale", "2"), "upscale is 2, and there is no image that it is for"),
    (("a", "--invert", "magic"), "invert is 'magic'; it must be 'ddim' or 'exact'"),
    (("a", "--sampler", "pndm", "--grid", "karras"), "pndm cannot use the schedule 'karras'; it can use: model"),
    (("a", "--sampler", "euler", "--eta", "1"), "eta is 1, which the sampler euler does not take"),
    (("a", "--region", "dog"), "--region is 'dog'; write it as LEFT,TOP,RIGHT,BOTTOM:PROMPT"),
    (("a", "--region", "0,0,2,1:dog"), "regions[0].box is [0.0, 0.0, 2.0, 1.0]; it must be"),
    (("a", "--wildcards", "gone"), "gone is no folder of wildcards"),
    (("--like", "gone.png"), "gone.png cannot be read as a PNG, JPEG or WebP"),
    (("a", "--window", "3"), "window is 3x3; both sides must be multiples of 4"),
])  # fmt: skip
def test_bad_input_is_a_sentence_and_exit_code_2(folder, tmp_path, capsys, words, sentence):
    defaults = {"--model": folder, "--out": tmp_path / "out"}
    rest = [str(word) for pair in defaults.items() if pair[0] not in words for word in pair]
    assert cli([*words, *rest]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert not list(tmp_path.rglob("*.png"))


def test_an_unknown_option_is_exit_code_2(folder):
    with pytest.raises(SystemExit) as stop:
        cli(["a", "--stepz", "3"])
    assert stop.value.code == 2


def bomb() -> bytes:
    """A PNG of a few bytes that says it has billions of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    head = (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("words", "sentence"), [
    (("--image", "empty.png"), "empty.png cannot be read: it is no picture."),
    (("--image", "cut.png"), "cut.png cannot be read: "),
    (("--image", "bomb.png"), "bomb.png cannot be read: "),
    (("--image", "prompts.txt"), "prompts.txt cannot be read: it is no picture."),
    (("--image", "photo.png", "--mask", "small.png"), "The mask small.png is 8x8, the picture 16x16; they must have"),
    (("--image", "photo.png", "--mask", "cut.png"), "cut.png cannot be read: "),
    (("--image", "photo.png", "--size", "15x16"), "The picture is 15x16; both sides must be multiples of 2"),
    (("--image", "photo.png", "--size", "9998x9998"), "The picture is 9998x9998; a side may have 8192 pixels at most"),
    (("--image", "photo.png", "--upscale", "1000"), "The picture is 16000x16000; a side may have 8192 pixels"),
    (("--image", "photo.png", "--outpaint", "0", "0", "0", "0"), "Nothing is added to the picture"),
    (("--image", "photo.png", "--outpaint", "-2", "0", "0", "0"), "outpaint is (-2, 0, 0, 0); it must be four"),
    (("--image", "photo.png", "--outpaint", "3", "0", "0", "0"), "both sides must be multiples of 2"),
    (("--image", "photo.png", "--outpaint", "8", "0", "0", "0", "--mask", "mask.png"), "leave out mask"),
    (("--image", "photo.png", "--outpaint", "8", "0", "0", "0", "--size", "16x16"), "leave out size"),
    (("--image", "photo.png", "--upscale", "2", "--outpaint", "8", "0", "0", "0"), "are steps of their own"),
    (("--image", "photo.png", "--upscale", "2", "--enlarge", "2"), "are steps of their own"),
    (("--image", "photo.png", "--enlarge", "2", "--size", "16x16"), "leave out size"),
    (("--image", "photo.png", "--enlarge", "2", "--mask", "mask.png"), "as a whole; give one, without mask and invert"),
    (("--image", "photo.png", "--invert", "ddim", "--mask", "mask.png"), "leave out mask and latents"),
    (("--image", "thin.png"), "a side may have 8192 pixels at most"),
])  # fmt: skip
def test_bad_pictures_are_a_sentence_and_exit_code_2(sample, photo, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    Path("empty.png").touch()
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:-40])
    Path("bomb.png").write_bytes(bomb())
    Path("prompts.txt").write_text("a dog\n")
    Image.new("L", (8, 8)).save("small.png")
    Image.new("L", (1, 20_000)).save("thin.png")
    code, paths, err = sample("a dog", *words)
    assert (code, paths) == (2, [])
    assert err.startswith("error: ")
    assert sentence in err
    assert not list(Path("out").glob("*.png"))


# Files of prompts -----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_of_prompts_is_drawn_and_its_bad_rows_told(sample, pipe, photo, tmp_path, one_device):  # noqa: F811
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    rows = [
        {"prompt": "a dog"},
        {"prompt": "a red apple", "size": "24x16", "seed": 50, "negative_prompt": "blue", "steps": 2},
        {"prompt": "a dog", "stepz": 3},
        {"prompt": "blue", "image": "photo.png", "strength": 0.5},
        {"prompt": "blue", "image": "photo.png", "mask": "small.png"},
        {"prompt": "on a", "size": [15, 16]},
        {"prompt": "(a:1.2) dog", "n": 2, "guidance": 2},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    code, paths, err = sample("--from-file", file, "--seed", 20, "--guidance", 4)
    assert code == 2
    assert [line for line in err.splitlines() if line.startswith("error")] == [
        f"error: {file} line 3: There is no argument 'stepz'; did you mean 'steps'?",
        f"error: {file} line 5: The mask {tmp_path / 'small.png'} is 8x8, the picture 16x16; they must have one size.",
        f"error: {file} line 6: size is 15x16; both sides must be multiples of 2, the VAE's factor.",
    ]
    out = tmp_path / "out"
    expected = {
        "00001-a-dog-20": pipe(["a dog"], seed=20, steps=3, guidance=4),
        "00002-a-red-apple-50": pipe(["a red apple"], "blue", 50, steps=2, guidance=4, size=(24, 16)),
        "00004-blue-23": pipe(["blue"], seed=23, image=photo[0], strength=0.5, steps=3, guidance=4),
        "00007-a-1-2-dog-26": pipe(["(a:1.2) dog"], seed=26, steps=3, guidance=2),
        "00007-a-1-2-dog-27": pipe(["(a:1.2) dog"], seed=27, steps=3, guidance=2),
    }
    assert {path.stem for path in out.glob("0*.png")} == set(expected)
    assert {Path(path).name for path in paths} >= {"index.html", "contact-sheet.png"}
    for name, (image,) in expected.items():
        assert np.abs(opened(out / f"{name}.png").astype(int) - image).max() <= 1
        assert (out / "index.html").read_text().count(f"{name}.png") == 2
    before = contents(out)
    code, paths, _ = sample("--from-file", file, "--seed", 20, "--guidance", 4)
    assert (code, len(paths)) == (2, 2)  # the page and the sheet
    assert contents(out) == before


def test_what_is_missing_is_drawn_again_to_the_last_bit(sample, tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,n,size\na dog,5,\na red apple,4,24x16\nblue,5,\n")
    assert sample("--from-file", file)[0] == 0
    before = contents(tmp_path / "out")
    gone = ["00002-a-dog-1.png", "00003-a-red-apple-8.png", "00004-blue-13.png"]
    for name in gone:
        (tmp_path / "out" / name).unlink()
    code, paths, _ = sample("--from-file", file)
    assert (code, [Path(path).name for path in paths[:-2]]) == (0, sorted(gone, key=lambda name: "apple" in name))
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before if name.endswith(".png")} == {
        name: data for name, data in before.items() if name.endswith(".png")
    }
    code, _, err = sample("--from-file", file, "--guidance", 2)
    assert code == 2
    assert "holds another batch: rows was" in err
    assert contents(tmp_path / "out") == after


def test_parts_of_a_file_make_the_whole(sample, tmp_path, one_device):
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\na red apple\nblue\non a\n")
    for part in ("1/2", "2/2"):
        assert sample("--from-file", file, "--part", part)[0] == 0
    assert len(list((tmp_path / "out").glob("0*.png"))) == 4
    assert "4 of 4" in (tmp_path / "out" / "index.html").read_text()


def test_a_picture_that_cannot_be_written_ends_it_and_loses_no_other(sample, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\nblue\non a\n")
    assert sample("--from-file", file)[0] == 0
    for name in ("00002-blue-1.png", "00003-on-a-2.png"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "00002-blue-1.png").mkdir()
    code, _, err = sample("--from-file", file)
    assert code == 2
    assert "00002-blue-1.png cannot be written: Is a directory." in err
    assert (tmp_path / "out" / "00003-on-a-2.png").is_file()


def test_a_file_without_a_good_row_is_exit_code_2(sample, tmp_path):
    for text, said in (("", "holds no prompt"), ('{"prompt": 3}', "line 1: prompt is 3; it must be text")):
        (tmp_path / "p.jsonl").write_text(text)
        code, paths, err = sample("--from-file", tmp_path / "p.jsonl")
        assert (code, paths) == (2, [])
        assert said in err
    assert not (tmp_path / "out").exists()


def command(folder: Path, *words: object) -> list[str]:
    return [sys.executable, str(ROOT / "sample.py"), "--model", str(folder), *map(str, words)]


def environment(cache: Path) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return plain | {"JAXDIFF_CACHE": str(cache), "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_200_prompts_that_are_killed_twice_equal_an_unbroken_run(folder, tmp_path):
    rng = random.Random(int.from_bytes(os.urandom(4)))
    words = ["a dog", "a red apple", "blue background", "(on:1.2) a", "a AND a dog"]
    file = tmp_path / "prompts.jsonl"
    with file.open("w") as out:
        for i in range(200):
            row = {"prompt": f"{words[i * 7 % 5]} {i}", "size": ["16x16", "24x16"][i % 2], "steps": 2 + i // 3 % 2,
                   "sampler": ["ddim", "euler"][i // 2 % 2], "guidance": [3, 7.5][i // 4 % 2]}  # fmt: skip
            out.write(json.dumps(row) + "\n")
    env = environment(tmp_path / "cache")

    def run(where: Path, kill_at: int | None = None) -> int:
        with subprocess.Popen(command(folder, "--from-file", file, "--out", where), env=env,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
            while kill_at is not None and process.poll() is None and len(list(where.glob("0*.png"))) < kill_at:
                time.sleep(0.005)
            if kill_at is not None:
                time.sleep(rng.uniform(0, 0.2))
                process.send_signal(signal.SIGKILL)
            process.communicate()
        return process.returncode

    unbroken, killed = tmp_path / "unbroken" / "pictures", tmp_path / "killed" / "pictures"
    assert run(unbroken) == 0
    assert run(killed, rng.randrange(1, 90)) == -signal.SIGKILL
    assert run(killed, rng.randrange(100, 180)) == -signal.SIGKILL
    assert run(killed) == 0
    first, second = contents(unbroken), contents(killed)
    assert len([name for name in second if name[0] == "0"]) == 200
    # Threads list pictures as they are written, in any order.
    lines = [sorted(found.pop("images.jsonl").splitlines()) for found in (first, second)]
    assert lines[0] == lines[1]
    assert len(lines[1]) == len(set(lines[1])) == 200
    assert first == second


@pytest.mark.slow
def test_processes_of_one_run_share_a_files_pictures(folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\na red apple\nblue\non a\na\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    words = ("--from-file", file, "--out", tmp_path / "out", "--steps", 2, "--distributed.coordinator", place,
             "--distributed.count", 2, "--distributed.index")  # fmt: skip
    processes = [
        subprocess.Popen(command(folder, *words, i), env=environment(tmp_path / "cache"), stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]  # fmt: skip
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert len(list((tmp_path / "out").glob("0*.png"))) == 5
    assert "5 of 5" in (tmp_path / "out" / "index.html").read_text()
    assert {path.name for path in (tmp_path / "out").glob("*.jsonl")} == {"images-0.jsonl", "images-1.jsonl"}


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("file", "damage", "sentence"), [
    ("model_index.json", Path.unlink, "has no model_index.json"),
    ("vae", shutil.rmtree, "has no folder 'vae'"),
    ("tokenizer/merges.txt", Path.unlink, "has neither tokenizer.json nor merges.txt"),
    ("unet/config.json", lambda p: p.write_text("{"), "unet/config.json is not JSON"),
    (WEIGHTS, cut, "is cut short"),
    (WEIGHTS, lambda p: p.write_text("<!doctype html><title>404"), "is a web page, not weights"),
    (WEIGHTS, lambda p: p.write_bytes(b"\x80\x02}q\x00."), "is a pickle, which can run code and is not read"),
    (WEIGHTS, lambda p: p.rename(p.with_name("diffusion_pytorch_model.bin")), "has only pickled weights"),
])  # fmt: skip
def test_a_damaged_model_folder_is_a_sentence_that_names_the_file(folder, tmp_path, capsys, file, damage, sentence):
    broken = shutil.copytree(folder, tmp_path / "broken")
    damage(broken / file)
    assert cli(["a dog", "--model", str(broken), "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_process_finds_the_compiled_program(folder, tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {"JAXDIFF_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "sample.py", "a dog", "--model", folder, "--out", tmp_path / "out"]
    for _ in range(2):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        programs = [path.name for path in (tmp_path / "cache").glob("jit_text_to_image-*")]
        assert len(programs) == 1, done.stderr
        assert len(list((tmp_path / "cache" / "traced").glob("text_to_image-*"))) == 1
    off = subprocess.run(
        command, env=env | {"JAXDIFF_CACHE": "off", "XDG_CACHE_HOME": str(tmp_path / "xdg")}, check=False
    )
    assert off.returncode == 0
    assert not (tmp_path / "xdg").exists()


def test_importing_the_package_imports_no_jax():
    code = "import jaxdiff, sys; assert 'jax' not in sys.modules; assert jaxdiff.__version__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_sampling_imports_nothing_heavy():
    heavy = "{'transformers', 'orbax', 'tensorflow_datasets', 'grain', 'optax', 'torch', 'tensorflow'}"
    code = f"import sample, sys; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
