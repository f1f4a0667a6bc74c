"""`sample.py`: what it writes, and what it says when it cannot."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_generate import model, pipe  # noqa: F401  (fixtures)

from jaxdiff.io.images import read_settings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from sample import cli  # noqa: E402


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save(path)
    return path


@pytest.fixture
def sample(folder, tmp_path, capsys):
    """Runs the command line in the test's own folder: (exit code, lines printed, what went to stderr)."""

    def run(*words: object) -> tuple[int, list[str], str]:
        code = cli([*map(str, words), "--model", str(folder), "--out", str(tmp_path / "out"), "--steps", "3"])
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


def test_several_pictures_come_in_equal_batches_with_a_contact_sheet(sample, pipe, monkeypatch):  # noqa: F811
    monkeypatch.setattr("sample.BATCH_IMAGES", 3)
    prompts = ["a dog", "a red apple", "blue", "on a", "a"]  # a batch of 3, and one of 2 that is filled up
    code, paths, _ = sample(*prompts)
    assert code == 0
    names = [Path(path).name for path in paths]
    assert names == ["a-dog-0.png", "a-red-apple-1.png", "blue-2.png", "on-a-3.png", "a-4.png", "contact-sheet.png"]
    for seed, prompt in enumerate(prompts):
        alone = pipe([prompt], seed=seed, steps=3)[0].astype(int)
        assert np.abs(np.asarray(Image.open(paths[seed])) - alone).max() <= 1
        assert read_settings(paths[seed])["seed"] == seed


def test_n_pictures_of_a_prompt_have_seeds_in_a_row(sample, monkeypatch):
    monkeypatch.setattr("sample.BATCH_IMAGES", 1)
    _, paths, _ = sample("a dog", "--n", 2, "--seed", 8)
    assert [Path(path).name for path in paths] == ["a-dog-8.png", "a-dog-9.png", "contact-sheet.png"]


def test_seeds_reach_their_last_value_also_where_batches_overlap(sample, monkeypatch):
    monkeypatch.setattr("sample.BATCH_IMAGES", 3)
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


def test_what_does_not_fit_into_the_prompt_is_quoted(sample):
    code, _, err = sample("a dog " * 3 + "on a blue background and so on and on")
    assert code == 0
    assert "warning: a prompt is longer than the model's 12 tokens; left out: '" in err
    assert "and on'" in err


@pytest.mark.parametrize(("words", "sentence"), [
    ((), "No prompt was given"),
    (("a", "--n", "0"), "--n is 0; it must be at least 1"),
    (("a", "--steps", "-3"), "steps is -3; it must be a whole number from 1 to 1000"),
    (("a", "--size", "64"), "--size is '64'; write it as WIDTHxHEIGHT"),
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
