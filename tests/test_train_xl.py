"""`train.py` on a model of Stable Diffusion XL's kind, from the shell: it starts from a folder and ends with one."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from shell import Shell, checkpoint, lines

import jaxdiff
from jaxdiff.config import DiffusionTask, TrainConfig
from jaxdiff.families import StableDiffusionXL
from jaxdiff.model import read_model
from jaxdiff.training.options import resolve
from jaxdiff.training.parts import read_tokenizers


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that runs start from."""
    folder = tmp_path_factory.mktemp("start") / "model"
    tiny.xl_model().save(folder)
    return folder


def run(start: Path, workdir: Path, *overrides: object, devices: int = 1) -> None:
    """Eight steps on crops that are mirrored, at a constant rate, with parameters exported as they are."""
    flags = ["--model", start, "--task.vae", start, "--task.tokenizer", start, "--data.crop", 0.7, "--data.flip", True]
    flags += ["--optim.schedule", "constant", "--optim.eps", 1e-4, "--ema.decay", 0.0, "--eval_every", 1000]
    flags += ["--task.caption_dropout", 0.3]
    code, out = Shell().run("tiny", workdir, *flags, *overrides, devices=devices)
    assert code == 0, out


@pytest.fixture(scope="module")
def whole(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(start, workdir)
    return workdir


def test_a_folder_gives_both_text_encoders_their_tokenizers_and_what_dropped_captions_are(start: Path) -> None:
    model = read_model(start)
    task = resolve(TrainConfig("x", DiffusionTask(), model=str(start))).task
    assert isinstance(task, DiffusionTask)
    assert task.text_encoders == {role: model.configs[role] for role in ("text_encoder", "text_encoder_2")}
    assert task.zeroes_empty
    words = ["a dog!", ""]
    for ours, theirs in zip(read_tokenizers(task), model.tokenizers, strict=True):
        np.testing.assert_array_equal(ours(words), theirs(words))
    named = resolve(TrainConfig("x", DiffusionTask(tokenizer=str(start)), model=str(start))).task
    assert isinstance(named, DiffusionTask)
    np.testing.assert_array_equal(read_tokenizers(named)[1](words), model.tokenizers[1](words))


def test_an_empty_prompt_that_is_no_zeros_stays_so(tmp_path: Path) -> None:
    tiny.xl_model(zero_empty=False).save(tmp_path / "model")
    task = resolve(TrainConfig("x", DiffusionTask(), model=str(tmp_path / "model"))).task
    assert isinstance(task, DiffusionTask)
    assert not task.zeroes_empty
    task = resolve(TrainConfig("x", DiffusionTask(zero_empty=True), model=str(tmp_path / "model"))).task
    assert isinstance(task, DiffusionTask)
    assert task.zeroes_empty


@pytest.mark.slow
def test_a_run_exports_a_whole_model_that_draws(start: Path, whole: Path) -> None:
    before, model = read_model(start), read_model(whole)
    assert model.family is StableDiffusionXL
    assert model.zero_empty
    assert model.configs == before.configs
    for role in ("denoiser", "text_encoder", "text_encoder_2"):
        moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), before.params[role], model.params[role])
        assert any(jax.tree.leaves(moved)), role
    for ours, theirs in zip(model.tokenizers, before.tokenizers, strict=True):
        np.testing.assert_array_equal(ours(["a dog!"]), theirs(["a dog!"]))
    image = jaxdiff.load(whole)("a dog", steps=2, size=(16, 16), original_size=(64, 48))
    assert image.std() > 1
    with Image.open(whole / "samples" / "0000008.png") as sheet:
        assert len(sheet.getcolors(1 << 20) or ()) > 10
    assert all(np.isfinite(line["loss"]) for line in lines(whole) if "loss" in line)
    assert lines(whole)[-1]["error_full_0.6"] > 0


@pytest.mark.slow
def test_a_run_that_stops_goes_on_with_the_same_parameters(start: Path, whole: Path, tmp_path: Path) -> None:
    for steps in (4, 8):
        run(start, tmp_path / "run", "--steps", steps)
    expected = checkpoint(whole, 8)
    for name, leaf in checkpoint(tmp_path / "run", 8).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.mark.slow
def test_eight_devices_take_the_same_steps(start: Path, whole: Path, tmp_path: Path) -> None:
    axes = ("--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2, "--optim.accumulate", 2)
    run(start, tmp_path / "run", *axes, devices=8)
    losses = [[line["loss"] for line in lines(folder) if "loss" in line] for folder in (whole, tmp_path / "run")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("resident", [False, True])
def test_what_is_encoded_once_is_trained_on(start: Path, tmp_path: Path, resident: bool) -> None:
    once = ("--task.train_text_encoder", False, "--task.text_variants", 2, "--data.resident", resident, "--steps", 4)
    run(start, tmp_path / "run", *once)
    before, after = read_model(start), read_model(tmp_path / "run")
    for role in ("text_encoder", "text_encoder_2"):
        jax.tree.map(np.testing.assert_array_equal, before.params[role], after.params[role])
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "run") if "loss" in line)
