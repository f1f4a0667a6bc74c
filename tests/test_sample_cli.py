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
from tiny import off

import jaxdiff
from jaxdiff.generation.batch.draw import sha256
from jaxdiff.generation.edits import interpolate, trajectory
from jaxdiff.io.images import read_settings
from jaxdiff.io.single_file import write_single
from jaxdiff.io.weights import stored, write_safetensors

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from sample import cli, region  # noqa: E402


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save(path)
    return path


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Not all eight, to which batches would be filled up."""
    first = jax.local_devices()[:1]
    monkeypatch.setattr("sample.jax.local_devices", lambda: first)


@pytest.fixture
def photo(tmp_path):
    """An image of the model's size, and beside it a mask whose right half is white."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(image).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return image


def opened(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture
def sample(folder, tmp_path, capsys, monkeypatch):
    """Runs the command line in the test's own folder: (exit code, lines printed, what went to stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, list[str], str]:
        given = list(map(str, words))
        steps = () if {"--like", "--steps"} & set(given) else ("--steps", "3")
        model = () if "--model" in given else ("--model", str(folder))
        code = cli([*given, *model, *(() if "--out" in given else ("--out", "out")), *steps])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


# Prompts --------------------------------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_png_that_says_how_it_was_made(sample, pipe):
    code, (path,), _ = sample("a red apple", "--seed", 5, "--negative", "blue, green", "--guidance", "4")
    assert (code, Path(path).name) == (0, "a-red-apple-5.png")
    image = Image.open(path)
    np.testing.assert_array_equal(np.asarray(image), pipe("a red apple", "blue, green", 5, steps=3, guidance=4.0)[0])
    told = json.loads(image.info["jaxdiff"])
    expected = {"prompt": "a red apple", "negative_prompt": "blue, green", "seed": 5, "steps": 3, "guidance": 4.0,
                "sampler": "ddim", "schedule": "model", "eta": 0.0, "width": 16, "height": 16, "model": "tiny",
                "dtype": "float32"}  # fmt: skip
    assert expected.items() <= told.items()
    assert image.info["parameters"] == (
        "a red apple\nNegative prompt: blue, green\n"
        "Steps: 3, Sampler: ddim, CFG scale: 4.0, Seed: 5, Size: 16x16, Model: tiny"
    )


def test_a_single_file_draws_what_its_folder_draws(sample, pipe, folder, tmp_path):
    model = pipe.model
    networks = {model.family.FOLDERS[role]: network for role, network in model.networks.items()}
    write_single(tmp_path / "m.safetensors", networks, model.scheduler)
    code, (path,), _ = sample("a dog", "--model", tmp_path / "m.safetensors", "--tokenizer", folder)
    assert code == 0
    np.testing.assert_array_equal(opened(path), pipe("a dog", steps=3)[0])
    code, _, said = sample("a dog", "--model", tmp_path / "m.safetensors")
    assert code == 2
    assert said.startswith(f"error: {tmp_path / 'm.safetensors'} has a text encoder of 600 tokens")
    code, _, said = sample("a dog", "--model", folder, "--ema")
    assert (code, "is no single file" in said) == (2, True)


@pytest.fixture
def loras(tmp_path):
    """Two files that change one layer."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 2), (2, 16)))
        key = "lora_te_text_model_encoder_layers_0_self_attn_v_proj"
        tensors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        write_safetensors(tmp_path / f"{name}.safetensors", stored(tensors))


@pytest.mark.slow
def test_loras_are_drawn_with_and_told(sample, folder, loras):
    words = ("a dog", "--lora", "a.safetensors:0.5", "--lora", "b.safetensors")
    code, (path,), _ = sample(*words)
    assert code == 0
    given = [("a.safetensors", 0.5), "b.safetensors"]
    drawn = jaxdiff.load(folder, loras=given)("a dog", steps=3)[0]
    np.testing.assert_array_equal(opened(path), drawn)
    assert off(drawn, jaxdiff.load(folder)("a dog", steps=3)[0]) > 5
    told = [{"file": "a.safetensors", "strength": 0.5}, {"file": "b.safetensors", "strength": 1.0}]
    assert read_settings(path)["loras"] == told
    code, (again,), _ = sample("--like", path)
    assert code == 0
    assert Path(again).read_bytes() == Path(path).read_bytes()


def test_loras_are_named_in_prompts(sample, folder, loras):
    code, (path,), _ = sample("a <lora:a:0.5> dog <lora:b.safetensors>", "--lora-dir", ".")
    assert code == 0
    given = [("a.safetensors", 0.5), "b.safetensors"]
    np.testing.assert_array_equal(opened(path), jaxdiff.load(folder, loras=given)("a dog", steps=3)[0])
    assert read_settings(path)["prompt"] == "a dog"
    code, _, said = sample("a dog <lora:a>", "a dog", "--lora-dir", ".")
    assert (code, "different LoRAs" in said) == (2, True)
    for tag, words in (("c", "no c.safetensors"), ("a:x", "is no number"), ("../a", "names no file")):
        code, _, said = sample(f"a dog <lora:{tag}>", "--lora-dir", ".")
        assert (code, words in said, len(said.splitlines())) == (2, True, 1)


def test_a_second_strength_is_the_text_encoders(sample, folder, loras):
    code, (path,), _ = sample("a dog", "--lora", "a.safetensors:0.5:-0.25")
    assert code == 0
    drawn = jaxdiff.load(folder, loras=[("a.safetensors", 0.5, -0.25)])("a dog", steps=3)[0]
    np.testing.assert_array_equal(opened(path), drawn)
    assert read_settings(path)["loras"] == [{"file": "a.safetensors", "strength": 0.5, "text_strength": -0.25}]
    code, (again,), _ = sample("--like", path)
    assert code == 0
    assert Path(again).read_bytes() == Path(path).read_bytes()


def test_a_batch_is_gone_on_with_only_with_its_loras(sample, loras, tmp_path):
    (tmp_path / "p.txt").write_text("a dog\n")
    words = ("--from-file", "p.txt", "--lora")
    assert sample(*words, "a.safetensors:0.5")[0] == 0
    assert sample(*words, "a.safetensors:0.5")[0] == 0
    code, _, said = sample(*words, "a.safetensors:0.6")
    assert (code, "loras" in said) == (2, True)


@pytest.mark.parametrize(("given", "words"), [
    ("none.safetensors", "cannot be read"),
    ("none.safetensors:0.5", "none.safetensors cannot be read"),
    ("a.safetensors:strong", "a.safetensors:strong cannot be read"),
])  # fmt: skip
def test_loras_that_cannot_be_used_are_told(sample, loras, given, words):
    code, _, said = sample("a dog", "--lora", given)
    assert code == 2
    assert words in said
    assert len(said.splitlines()) == 1


def test_a_strength_that_is_no_finite_number_is_told(sample, loras, capsys):
    with pytest.raises(SystemExit):
        sample("a dog", "--lora", "a.safetensors:nan")
    assert "strength of a.safetensors is nan" in capsys.readouterr().err


@pytest.fixture
def words(tmp_path):
    """A file with two words."""
    rng = np.random.default_rng(0)
    tensors = {word: rng.standard_normal((2, 16)).astype(np.float32) for word in ("zebra", "<quagga>")}
    write_safetensors(tmp_path / "w.safetensors", stored(tensors))


@pytest.mark.slow
def test_textual_inversions_are_drawn_with_and_told(sample, folder, words):
    code, _, said = sample("a gnu", "--embedding", "w.safetensors:gnu")
    assert (code, "it has <quagga>, zebra" in said) == (2, True)
    code, (path,), _ = sample("a zebra", "--embedding", "w.safetensors:zebra")
    assert code == 0
    drawn = jaxdiff.load(folder, embeddings=[("w.safetensors", "zebra")])("a zebra", steps=3)[0]
    np.testing.assert_array_equal(opened(path), drawn)
    assert off(drawn, jaxdiff.load(folder)("a zebra", steps=3)[0]) > 5
    assert read_settings(path)["embeddings"] == [{"file": "w.safetensors", "word": "zebra"}]
    code, (again,), _ = sample("--like", path)
    assert code == 0
    assert Path(again).read_bytes() == Path(path).read_bytes()


def test_a_batch_is_gone_on_with_only_with_its_words(sample, words, tmp_path):
    (tmp_path / "p.txt").write_text("a zebra\n")
    assert sample("--from-file", "p.txt", "--embedding", "w.safetensors")[0] == 0
    code, _, said = sample("--from-file", "p.txt")
    assert (code, "embeddings" in said) == (2, True)


@pytest.mark.slow
def test_control_images_are_followed_and_told(sample, folder, tmp_path):
    from test_control import write_folder

    write_folder(tmp_path / "net")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(tmp_path / "c.png")
    asked = ("--control", "net", "--control-image", "c.png", "--control-scale", 0.7, "--control-end", 0.9)
    code, (path,), _ = sample("a dog", *asked)
    assert code == 0
    pipe = jaxdiff.load(folder, controls=["net"])
    drawn = pipe("a dog", steps=3, control_image="c.png", control_scale=0.7, control_end=0.9)[0]
    np.testing.assert_array_equal(opened(path), drawn)
    settings = read_settings(path)
    assert (settings["controls"], settings["control_image"], settings["control_scale"]) == (["net"], ["c.png"], [0.7])
    code, (again,), _ = sample("--like", path)
    assert code == 0
    assert Path(again).read_bytes() == Path(path).read_bytes()
    code, (other,), _ = sample("--like", path, "--control-scale", 0.2)
    assert (code, read_settings(other)["control_scale"]) == (0, [0.2])
    code, _, said = sample("a dog", "--control", "net")
    assert (code, "--control-image" in said) == (2, True)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog", "control_image": "c.png", "control_scale": 0.7}\n')
    assert sample("--from-file", "p.jsonl", "--control", "net")[0] == 0
    for words in (("--control-image", "none.png"), ("--control-image", "c.png"), ("--control-scale", 0.5)):
        code, _, said = sample("a dog", *words)
        assert (code, len(said.splitlines())) == (2, 1)


@pytest.mark.slow
def test_image_prompts_are_seen_and_told(sample, folder, tmp_path):
    from test_ip_adapter import write_adapter

    file = write_adapter(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(tmp_path / "p.png")
    asked = ("--ip-adapter", file.name, "--image-prompt", "p.png", "--image-prompt-scale", 0.7)
    code, (path,), _ = sample("a dog", *asked)
    assert code == 0
    pipe = jaxdiff.load(folder, ip_adapters=[file.name])
    np.testing.assert_array_equal(opened(path), pipe("a dog", steps=3, image_prompt="p.png", image_prompt_scale=0.7)[0])
    settings = read_settings(path)
    assert (settings["ip_adapters"], settings["image_prompt"]) == ([file.name], ["p.png"])
    code, (again,), _ = sample("--like", path)
    assert code == 0
    assert Path(again).read_bytes() == Path(path).read_bytes()
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog", "image_prompt": ["p.png", "p.png"]}\n')
    assert sample("--from-file", "p.jsonl", "--ip-adapter", file.name)[0] == 0
    for words in (("--image-prompt", "none.png"), ("--image-prompt", "p.png"), ("--image-prompt-scale", 0.5),
                  ("--ip-adapter", file.name)):  # fmt: skip
        code, _, said = sample("a dog", *words)
        assert (code, len(said.splitlines())) == (2, 1)


def test_nothing_is_overwritten(sample):
    _, (first,), _ = sample("a dog")
    before = Path(first).read_bytes()
    _, (second,), _ = sample("a dog", "--guidance", 1)
    assert Path(second).name == "a-dog-0-2.png"
    assert Path(first).read_bytes() == before


def test_several_images_come_in_equal_batches_with_a_contact_sheet(sample, pipe, monkeypatch):
    monkeypatch.setattr("jaxdiff.generation.batch.draw.BATCH_IMAGES", 2)
    code, paths, _ = sample("a dog", "a red apple", "blue", "--seed", 2**32 - 3)  # one of 2, and one filled up
    seeds = [2**32 - 3, 2**32 - 2, 2**32 - 1]
    assert code == 0
    assert [Path(path).stem for path in paths] == [
        f"a-dog-{seeds[0]}", f"a-red-apple-{seeds[1]}", f"blue-{seeds[2]}", "contact-sheet",
    ]  # fmt: skip
    for path, prompt, seed in zip(paths, ("a dog", "a red apple", "blue"), seeds, strict=False):
        assert off(opened(path), pipe(prompt, seed=seed, steps=3)[0]) <= 1
        assert read_settings(path)["seed"] == seed


def test_n_images_of_a_prompt_have_seeds_in_a_row(sample):
    _, paths, _ = sample("a dog", "--n", 2, "--seed", 8)
    assert [Path(path).name for path in paths] == ["a-dog-8.png", "a-dog-9.png", "contact-sheet.png"]


def test_what_was_written_is_named_when_the_work_is_stopped(sample, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sample.contact_sheet", stop)
    code, paths, _ = sample("a dog", "blue")
    assert (code, [Path(path).name for path in paths]) == (130, ["a-dog-0.png", "blue-1.png"])


def test_warnings_about_prompts_are_told_once_each(sample):
    code, paths, err = sample("a (dog", "a (red apple", "--n", 2)
    assert (code, len(paths)) == (0, 5)
    (told,) = [line for line in err.splitlines() if line.startswith("warning")]
    assert "'('" in told


def test_flags_until_version_0_1_are_taken_with_a_warning(sample):
    _, (new,), err = sample("a dog", "--schedule", "karras")
    assert "warning" not in err
    code, (old,), err = sample("a dog", "--grid", "karras")
    assert code == 0
    assert Path(old).read_bytes() == Path(new).read_bytes()
    (told,) = [line for line in err.splitlines() if line.startswith("warning")]
    assert "grid" in told
    assert "schedule" in told


@pytest.mark.parametrize("words", [
    ("--region", "0,0,0.5,1:a dog", "--region", "0.5,0,1,1:red: (apple:1.2)"),
    ("--image", "photo.png", "--strength", 0.7),
    pytest.param(("--guidance-interval", 0.5, 2), marks=pytest.mark.slow),
])  # fmt: skip
def test_regions_images_and_intervals_are_what_they_are_in_python(words, sample, pipe, photo):
    fields = {
        "--region": {"regions": [("a dog", (0, 0, 0.5, 1)), ("red: (apple:1.2)", (0.5, 0, 1, 1))]},
        "--image": {"image": photo, "strength": 0.7},
        "--guidance-interval": {"guidance_interval": (0.5, 2)},
    }[words[0]]
    code, (path,), _ = sample("blue", *words)
    assert code == 0
    np.testing.assert_array_equal(opened(path), pipe("blue", steps=3, **fields)[0])


def test_frames_lead_from_one_image_to_another(sample, pipe):
    code, paths, _ = sample("a dog", "--to-prompt", "a red apple", "--to-seed", 9, "--frames", 4)
    assert code == 0
    assert [Path(path).name for path in paths] == [*(f"a-dog-0-frame-00{i}.png" for i in range(4)), "a-dog-0.gif"]
    expected = interpolate(pipe, ["a dog", "a red apple"], [0, 9], frames=3, batch=4, steps=3)
    for path, image in zip(paths, expected, strict=False):
        assert off(opened(path), image) <= 1
    with Image.open(paths[-1]) as gif:
        assert gif.n_frames == 4


def test_a_trajectory_lies_beside_its_image(sample, pipe):
    _, paths, _ = sample("a dog", "--trajectory")
    assert [Path(path).name for path in paths] == ["a-dog-0.png", "a-dog-0-steps.png", "a-dog-0-steps.gif"]
    frames = trajectory(pipe, "a dog", steps=3)
    np.testing.assert_array_equal(opened(paths[0]), frames[-1])
    with Image.open(paths[2]) as gif:
        assert gif.n_frames == len(frames) == 3


def test_wildcards_are_filled_in_and_told_as_they_were(sample, pipe, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thing.txt").write_text("dog\nred apple\nblue background\n")
    code, paths, _ = sample("a __thing__", "--wildcards", "w", "--n", 4)
    assert code == 0
    prompts = [read_settings(path)["prompt"] for path in paths[:-1]]
    assert {"a dog", "a red apple", "a blue background"} >= set(prompts)
    assert len(set(prompts)) > 1
    assert off(opened(paths[3]), pipe("a __thing__", seed=3, steps=3, wildcards=tmp_path / "w")[0]) <= 1


def test_a_wildcard_without_a_folder_is_text_and_told_once(sample):
    code, _, err = sample("__x__ and __x__")
    assert code == 0
    assert err.count("warning: __x__") == 1


# What an image says of itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    ("--seed", 7, "--negative", "blue", "--guidance-interval", 0.5, 3, "--schedule", "karras"),
    ("--image", "photo.png", "--mask", "mask.png", "--feather", 2, "--seed", 3),
    pytest.param(("--image", "photo.png", "--invert", "exact", "--source-prompt", "a red apple", "--keep-layout", 0.5),
                 marks=pytest.mark.slow),
    pytest.param(("--image", "photo.png", "--outpaint", 0, 0, 8, 0), marks=pytest.mark.slow),
    pytest.param(("--image", "photo.png", "--upscale", 2, "--strength", 0.5), marks=pytest.mark.slow),
    pytest.param(("--image", "photo.png", "--latent-upscale", 2), marks=pytest.mark.slow),
    pytest.param(("--region", "0,0,0.3333333333333333,1:a red apple", "--size", "32x16"), marks=pytest.mark.slow),
    pytest.param(("--to-prompt", "a red apple", "--to-seed", 4, "--mix", 0.25, "--rng", "torch", "--literal"),
                 marks=pytest.mark.slow),
    pytest.param(("--format", "webp", "--sampler", "euler", "--pag-scale", 2, "--guidance-rescale", 0.5),
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_an_image_is_drawn_again_from_what_it_says_of_itself(sample, photo, words):
    code, (first,), _ = sample("a (dog:1.2)", *words)
    assert code == 0
    code, (second,), err = sample("--like", first, *(words[:2] if words[0] == "--format" else ()))
    assert (code, "warning" in err) == (0, False)
    assert Path(second) != Path(first)
    assert Path(second).read_bytes() == Path(first).read_bytes()


def test_what_is_given_beside_like_counts(sample, pipe):
    _, (first,), _ = sample("a dog", "--seed", 7, "--guidance", 3)
    code, (path,), _ = sample("--like", first, "--seed", 8, "a red apple")
    assert code == 0
    np.testing.assert_array_equal(opened(path), pipe("a red apple", seed=8, guidance=3, steps=3)[0])


@pytest.mark.parametrize("text", ["0,0,1,0.5", "0,0,1:a dog", "a dog", ""])
def test_a_region_has_a_box_and_a_prompt(text):
    with pytest.raises(ValueError, match="LEFT,TOP,RIGHT,BOTTOM:PROMPT"):
        region(text)


@pytest.mark.slow
def test_a_list_that_is_given_beside_like_takes_the_place_of_the_images_own(sample):
    _, (first,), _ = sample("a dog", "--region", "0,0,0.5,1:a cat", "--region", "0.5,0,1,1:a bird")
    code, (path,), _ = sample("--like", first, "--region", "0,0,1,0.5:an apple")
    assert code == 0
    assert [region["prompt"] for region in read_settings(path)["regions"]] == ["an apple"]
    code, (path,), _ = sample("--like", first, "--seed", 4)
    assert [region["prompt"] for region in read_settings(path)["regions"]] == ["a cat", "a bird"]


def test_an_image_that_has_changed_since_is_told(sample, photo):
    _, (first,), _ = sample("a dog", "--image", "photo.png")
    Image.new("RGB", (16, 16)).save("photo.png")
    sha256.cache_clear()  # of this process, which has read the old one
    code, _, err = sample("--like", first)
    assert code == 0
    assert err.startswith("warning: photo.png")


def test_without_metadata_nothing_is_told(sample):
    code, (first, *_), _ = sample("a dog", "blue", "--no-metadata")
    assert (code, Path(first).name) == (0, "image-0.png")
    with Image.open(first) as image:
        assert image.info == {}
    assert sample("--like", first)[0] == 2


@pytest.mark.parametrize(("told", "part"), [
    ("[1]", ""),
    ("[" * 100_000, ""),
    ("{}", "no prompt"),
    ('{"prompt": "a", "seed": "x"}', "seed is 'x'"),
    ('{"prompt": "a", "steps": 1e400}', "steps is inf"),
    ('{"prompt": "a", "steps": 10000000, "model": "tiny"}', "steps is 10000000"),
    ('{"prompt": "a", "size": [99999998, 99999998], "model": "tiny"}', "8192"),
    ('{"prompt": "a", "dtype": ["float32"]}', "dtype is ['float32']"),
    ('{"prompt": "a", "image": "/dev/zero", "model": "tiny"}', "/dev/zero"),
    ('{"prompt": "a", "image": "a\\u0000b", "model": "tiny"}', "no such file"),
])  # fmt: skip
def test_settings_that_nobody_vouches_for_are_checked(sample, told, part):
    text = PngImagePlugin.PngInfo()
    text.add_text("jaxdiff", told)
    Image.new("RGB", (16, 16)).save("a.png", pnginfo=text)
    code, paths, err = sample("--like", "a.png")
    assert (code, paths) == (2, [])
    assert err.startswith("error: ")
    assert part in err


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    (),
    ("a", "--steps", "0"),
    ("a", "--size", "15x16"),
    ("a", "--guidance-interval", "3", "1"),
    ("a", "--seed", "-1"),
    ("a", "--seed", str(2**32 - 1), "--n", "2"),
    ("a", "--n", "1000000000", "--sampler", "ddmi"),  # no list of all images comes first
    (*"abcdefghijk", "--n", "100000"),
    ("a", "--dtype", "float23"),
    ("a", "--model", "no/such/folder"),
    ("a", "--out", "/dev/null"),
    ("a", "--out", "/proc/nothing"),
    ("a", "--format", "bmp"),
    ("a", "--part", "3/2"),
    ("a", "--from-file", "prompts.txt"),
    ("--from-file", "gone.txt"),
    ("--from-file", "prompts.txt", "--trajectory"),
    ("a", "--frames", "0", "--to-seed", "1"),
    ("a", "--frames", "100000", "--to-seed", "1"),
    ("a", "--frames", "4"),
    ("a", "--frames", "4", "--to-seed", "1", "--trajectory"),
    ("a AND b", "--to-prompt", "b"),
    ("a", "--image", "gone.png"),
    ("a", "--strength", "0.5"),
    ("a", "--wildcards", "gone"),
    ("--like", "gone.png"),
    ("a", "--image", "empty.png"),
    ("a", "--image", "cut.png"),
    ("a", "--image", "bomb.png"),
    ("a", "--image", "prompts.txt"),
    ("a", "--image", "thin.png"),
    ("a", "--image", "photo.png", "--mask", "small.png"),
    ("a", "--image", "photo.png", "--mask", "cut.png"),
])  # fmt: skip
def test_an_error_is_a_sentence_and_exit_code_2_and_nothing_is_written(sample, photo, tmp_path, words):
    Path("empty.png").touch()
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:-40])
    Path("bomb.png").write_bytes(bomb())
    Path("prompts.txt").write_text("a dog\n")
    Image.new("L", (8, 8)).save("small.png")
    Image.new("L", (1, 20_000)).save("thin.png")
    code, paths, err = sample(*words)
    assert (code, paths) == (2, [])
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("out/*"))


def bomb() -> bytes:
    """A PNG of a few bytes that says it has billions of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    head = (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("words", [("--stepz", "3"), ("--region", "dog"), ("--steps", "many")])
def test_flags_that_cannot_be_read_are_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli(["a", *words])
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("file", "damage", "part"), [
    ("model_index.json", Path.unlink, "model_index.json"),
    ("vae", shutil.rmtree, "'vae'"),
    ("tokenizer/merges.txt", Path.unlink, "merges.txt"),
    ("unet/config.json", lambda p: p.write_text("{"), "unet/config.json"),
    (WEIGHTS, cut, WEIGHTS),
    (WEIGHTS, lambda p: p.write_text("<!doctype html><title>404"), "web page"),
    (WEIGHTS, lambda p: p.write_bytes(b"\x80\x02}q\x00."), "pickle"),
    (WEIGHTS, lambda p: p.rename(p.with_name("diffusion_pytorch_model.bin")), "not a file of torch.save"),
])  # fmt: skip
def test_a_damaged_model_folder_is_a_sentence_that_names_what_is_damaged(sample, folder, file, damage, part):
    broken = shutil.copytree(folder, "broken")
    damage(Path(broken) / file)
    code, paths, err = sample("a dog", "--model", "broken")
    assert (code, paths) == (2, [])
    assert err.startswith("error: ")
    assert part in err


# Files of prompts -----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_of_prompts_is_drawn_and_its_bad_lines_are_told_and_stop_no_other(sample, pipe, photo, tmp_path):
    Image.new("L", (8, 8)).save("small.png")
    lines = [
        {"prompt": "a dog"},
        {"prompt": "a red apple", "seed": 50, "negative_prompt": "blue", "steps": 2},
        {"prompt": "a dog", "stepz": 3},
        {"prompt": "blue", "image": "photo.png", "strength": 0.5},
        {"prompt": "blue", "image": "photo.png", "mask": "small.png"},
        {"prompt": "on a", "size": [15, 16], "n": 3},
        {"prompt": "(a:1.2) dog", "guidance": 2},
    ]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("--from-file", "prompts.jsonl", "--seed", 20, "--guidance", 4)
    code, paths, err = sample(*words)
    assert code == 2
    bad = [line for line in err.splitlines() if line.startswith("error")]
    for number, part, told in zip((3, 5, 6), ("stepz", "8x8", "15x16"), bad, strict=True):
        assert told.startswith(f"error: prompts.jsonl line {number}: ")
        assert part in told
    expected = {
        "00001-a-dog-20": pipe("a dog", seed=20, steps=3, guidance=4),
        "00002-a-red-apple-50": pipe("a red apple", "blue", 50, steps=2, guidance=4),
        "00004-blue-23": pipe("blue", seed=23, image=photo, strength=0.5, steps=3, guidance=4),
        "00007-a-1-2-dog-28": pipe("(a:1.2) dog", seed=28, steps=3, guidance=2),
    }
    out = Path("out")
    assert {path.stem for path in out.glob("0*.png")} == set(expected)
    assert {Path(path).name for path in paths} >= {"index.html", "contact-sheet.png"}
    for name, (image,) in expected.items():
        assert off(opened(out / f"{name}.png"), image) <= 1
        assert (out / "index.html").read_text().count(f"{name}.png") == 2
    before = contents(out)
    code, paths, _ = sample(*words)
    assert (code, len(paths)) == (2, 2)  # the page and the sheet
    assert contents(out) == before


def test_what_is_missing_is_drawn_again_to_the_last_bit(sample, monkeypatch):
    monkeypatch.setattr("jaxdiff.generation.batch.draw.BATCH_IMAGES", 2)
    Path("prompts.csv").write_text("prompt,n,steps\na dog,3,\nblue,2,2\nred,1,\n")
    assert sample("--from-file", "prompts.csv")[0] == 0
    out = Path("out")
    before = contents(out)
    gone = ["00002-a-dog-1.png", "00003-blue-4.png", "00004-red-5.png"]
    for name in gone:
        (out / name).unlink()
    code, paths, _ = sample("--from-file", "prompts.csv")
    assert (code, sorted(Path(path).name for path in paths[:-2])) == (0, gone)
    after = contents(out)
    assert {name: after[name] for name in before if name.endswith(".png")} == {
        name: data for name, data in before.items() if name.endswith(".png")
    }
    code, _, err = sample("--from-file", "prompts.csv", "--guidance", 2)
    assert code == 2
    assert "requests" in err
    assert contents(out) == after


def test_parts_of_a_file_make_the_whole(sample):
    Path("prompts.txt").write_text("a dog\na red apple\nblue\non a\n")
    for part in ("1/2", "2/2"):
        assert sample("--from-file", "prompts.txt", "--part", part)[0] == 0
    assert len(list(Path("out").glob("0*.png"))) == 4
    assert "4 of 4" in (Path("out") / "index.html").read_text()


def test_an_image_that_cannot_be_written_ends_it_and_loses_no_other(sample):
    Path("prompts.txt").write_text("a dog\nblue\n")
    assert sample("--from-file", "prompts.txt")[0] == 0
    out = Path("out")
    for name in ("00001-a-dog-0.png", "00002-blue-1.png"):
        (out / name).unlink()
    (out / "00001-a-dog-0.png").mkdir()
    code, _, err = sample("--from-file", "prompts.txt")
    assert code == 2
    assert "00001-a-dog-0.png" in err
    assert (out / "00002-blue-1.png").is_file()


def test_a_file_without_a_good_line_is_exit_code_2(sample):
    for text, part in (("", "p.jsonl"), ('{"prompt": 3}', "p.jsonl line 1: prompt is 3")):
        Path("p.jsonl").write_text(text)
        code, paths, err = sample("--from-file", "p.jsonl")
        assert (code, paths) == (2, [])
        assert part in err
    assert not Path("out").exists()


# Processes ------------------------------------------------------------------------------------------------------------


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
    # Threads list images as they are written, in any order.
    lines = [sorted(found.pop("images.jsonl").splitlines()) for found in (first, second)]
    assert lines[0] == lines[1]
    assert len(lines[1]) == len(set(lines[1])) == 200
    assert first == second


@pytest.mark.slow
def test_processes_of_one_run_share_a_files_images(folder, tmp_path):
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


@pytest.mark.slow
def test_a_second_process_finds_the_compiled_programs(folder, tmp_path):
    env = environment(tmp_path / "cache")
    words = command(folder, "a dog", "--out", tmp_path / "out")
    for _ in range(2):
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
        for name in ("denoise", "decode", "encode_prompts"):
            assert len(list((tmp_path / "cache").glob(f"jit_{name}-*-cache"))) <= 1, done.stderr
            assert len(list((tmp_path / "cache" / "traced").glob(f"{name}-*"))) == 1
    off = subprocess.run(
        words, env=env | {"JAXDIFF_CACHE": "off", "XDG_CACHE_HOME": str(tmp_path / "xdg")}, check=False
    )
    assert off.returncode == 0
    assert not (tmp_path / "xdg").exists()


def test_importing_the_package_imports_no_jax_and_sampling_nothing_heavy():
    code = "import jaxdiff, sys; assert 'jax' not in sys.modules; assert jaxdiff.__version__"
    heavy = "{'transformers', 'orbax', 'tensorflow_datasets', 'grain', 'optax', 'torch', 'tensorflow'}"
    code += f"; import sample; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
