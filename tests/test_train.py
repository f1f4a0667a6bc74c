"""`train.py` from the shell: what a run leaves behind, and what it survives."""

import os
import runpy
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image
from shell import ROOT, Shell, checkpoint, ended, lines, wait_for

from jaxdiff.config import DataConfig, DiffusionTask, SchedulerConfig, TrainConfig, VAETask
from jaxdiff.data.captions import COLOURS, Caption, background
from jaxdiff.data.record import BadRecord, Record
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.generation.request import Request
from jaxdiff.io.folder import read_network, write_network
from jaxdiff.model import read_model
from jaxdiff.training.log import Log
from jaxdiff.training.options import read_config
from jaxdiff.training.stop import Stop, leave_threads

STEPS = 60  # of tiny_vae.py


@pytest.fixture(scope="session")
def shell() -> Shell:
    return Shell()


@pytest.fixture(scope="session")
def vae_run(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, uninterrupted run of `tiny_vae.py`."""
    workdir = tmp_path_factory.mktemp("runs") / "vae"
    code, out = shell.run("tiny_vae", workdir, "--profile", 2, "--checkpoint_every", 30)
    assert code == 0, out
    assert "4 to 5" in out
    return workdir


@pytest.fixture(scope="session")
def diffusion_run(shell: Shell, vae_run: Path) -> Path:
    """A finished run of `tiny.py` on the latents of `vae_run`."""
    tokenizer = vae_run.parent / "tokenizer"
    words = ["apple", "dog", "face", "noto", "flat", "gradient", "blob", "style"]
    Tokenizer.train([*words, *map(background, COLOURS)] * 2, 600, 12).save(tokenizer)
    code, out = shell.run("tiny", vae_run.parent / "tiny", "--task.vae", vae_run, "--task.tokenizer", tokenizer)
    assert code == 0, out
    return vae_run.parent / "tiny"


@pytest.mark.slow
def test_metrics_tell_what_a_user_watches(vae_run: Path) -> None:
    line = lines(vae_run)[0]
    assert {"step", "loss", "lr", "grad_norm", "images_per_s", "data_wait_share"} <= line.keys()
    assert 0 <= line["data_wait_share"] <= 1
    assert lines(vae_run)[-1]["heldout_psnr"] > 5
    assert list((vae_run / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_the_loss_of_the_autoencoder_falls(vae_run: Path) -> None:
    losses = [line["loss"] for line in lines(vae_run) if "loss" in line]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.slow
def test_an_autoencoder_run_exports_weights_whose_latents_have_unit_variance(vae_run: Path) -> None:
    config, params = read_network(vae_run / "export", "vae")
    assert config.scaling_factor == lines(vae_run)[-1]["scaling_factor"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    ema = {path: leaf for path, leaf in checkpoint(vae_run, STEPS).items() if path.startswith("['ema']")}
    assert np.array_equal(
        params["encoder"]["conv_in"]["kernel"], ema["['ema']['0.999']['encoder']['conv_in']['kernel']"]
    )
    with Image.open(vae_run / "samples" / f"{STEPS:07}.png") as sheet:
        assert min(sheet.size) > 16


@pytest.mark.slow
def test_a_text_to_image_run_exports_a_model_that_draws_what_its_sample_grid_shows(diffusion_run: Path) -> None:
    import jaxdiff

    model = read_model(diffusion_run)
    assert model.configs["denoiser"].block_out_channels == (8, 16)
    with Image.open(diffusion_run / "samples" / "0000008.png") as sheet:
        assert len(sheet.getcolors(1 << 20) or ()) > 10
    images = jaxdiff.load(diffusion_run)(["a red apple"], steps=2)
    assert images.shape == (1, 16, 16, 3)
    assert all(np.isfinite(line["loss"]) for line in lines(diffusion_run) if "loss" in line)


@pytest.mark.slow
@pytest.mark.parametrize(("variants", "said"), [(0, "are cut at their ends"), (1, "their ends were cut")])
def test_a_run_tells_what_it_reads_what_it_leaves_out_and_which_captions_it_cuts(
    shell: Shell, diffusion_run: Path, tmp_path: Path, variants: int, said: str
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"{i}: " + 20 * "dog " if i == 3 else "a dog")
    (photos / "phone.heic").touch()
    (photos / "6.txt").write_text("a dog", encoding="utf-16")
    cached = ("--task.latent_variants", 1, "--task.text_variants", 1, "--task.init", diffusion_run / "export")
    once = (*cached, "--task.train_text_encoder", False) if variants else ("--task.latent_variants", 0)
    folder = ("--data.source", "folder", "--data.root", photos, "--data.max_bad_share", 0.5, "--steps", 2)
    parts = ("--task.vae", diffusion_run.parent / "vae", "--task.tokenizer", diffusion_run.parent / "tokenizer")
    code, out = shell.run("tiny", tmp_path / "run", *parts, *folder, *once)
    assert code == 0, out
    assert "8 images, 7 with captions" in out
    assert "left out: 1 .heic" in out
    assert "6.png" in out
    assert out.count(said) == 1
    assert "3: dog dog" in out


@pytest.mark.slow
def test_long_calls_on_resident_data_end_with_the_same_parameters(
    shell: Shell, vae_run: Path, diffusion_run: Path, tmp_path: Path
) -> None:
    fast = ("--data.resident", True, "--steps_per_call", 7)
    code, out = shell.run("tiny_vae", tmp_path / "vae", *fast, "--log_every", 9, "--checkpoint_every", 30)
    assert code == 0, out
    parts = ("--task.vae", vae_run, "--task.tokenizer", vae_run.parent / "tokenizer")
    code, out = shell.run("tiny", tmp_path / "tiny", *parts, *fast)
    assert code == 0, out
    for found, wanted, step in ((tmp_path / "vae", vae_run, STEPS), (tmp_path / "tiny", diffusion_run, 8)):
        expected = checkpoint(wanted, step)
        for name, leaf in checkpoint(found, step).items():
            np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.mark.slow
def test_a_run_against_an_adversary_goes_on_bit_for_bit_and_exports_the_autoencoder_alone(
    shell: Shell, vae_run: Path, tmp_path: Path
) -> None:
    """Of the decoder alone, from an encoder that another run has trained."""
    task = ["--task.adversary.weight", 0.5, "--task.adversary.layers", 1, "--task.adversary.channels", 4]
    task += ["--task.adversary.start", 3, "--task.init", vae_run, "--task.train_encoder", False]
    told = [
        *task,
        "--optim.schedule",
        "constant",
        "--optim.warmup_steps",
        0,
        "--optim.rates",
        "discriminator/.*=2",
        "--checkpoint_every",
        100,
    ]
    for workdir, ends in ((tmp_path / "whole", [12]), (tmp_path / "parts", [5, 12])):
        for end in ends:
            code, out = shell.run("tiny_vae", workdir, *told, "--steps", end)
            assert code == 0, out
    whole, parts = checkpoint(tmp_path / "whole", 12), checkpoint(tmp_path / "parts", 12)
    assert any("discriminator" in name for name in whole)
    assert whole["['memory']['updates']"] == 12
    for name, leaf in parts.items():
        np.testing.assert_array_equal(leaf, whole[name], err_msg=name)
    assert {"told_real", "told_copy", "adaptive_weight", "discriminator_loss"} <= lines(tmp_path / "whole")[-2].keys()

    before, after = read_network(vae_run / "export", "vae")[1], read_network(tmp_path / "whole" / "export", "vae")[1]
    assert before.keys() == after.keys()
    jax.tree.map(np.testing.assert_array_equal, before["encoder"], after["encoder"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before["decoder"], after["decoder"])
    assert max(jax.tree.leaves(moved)) > 1e-4
    code, out = shell.run("tiny_vae", tmp_path / "parts", *told, "--steps", 13, "--task.adversary.r1", 1)
    assert (code, "another config: task.adversary.r1" in out) == (2, True), out


@pytest.mark.slow
def test_a_run_by_the_clock_ends_with_its_rate_at_the_end_and_more_time_goes_on(shell: Shell, tmp_path: Path) -> None:
    workdir, every = tmp_path / "clocked", ("--steps_per_call", 5, "--log_every", 10, "--checkpoint_every", 1000)
    code, out = shell.run("tiny_vae", workdir, "--seconds", 4, *every)
    assert code == 0, out
    line = [line for line in lines(workdir) if "lr" in line][-1]
    assert line["seconds"] >= 4
    assert line["lr"] < 0.3e-3  # that at the beginning of the last call
    assert (workdir / "checkpoints" / str(line["step"])).is_dir()
    before = checkpoint(workdir, line["step"])
    assert before["['seconds']"] >= 4
    code, out = shell.run("tiny_vae", workdir, "--seconds", 4, *every)
    assert code == 0, out
    assert [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()] == [str(line["step"])]
    code, out = shell.run("tiny_vae", workdir, "--seconds", 6, *every)
    assert code == 0, out
    assert f"from step {line['step']} for 6 seconds in all" in out
    later = [line for line in lines(workdir) if "lr" in line][-1]
    assert later["step"] > line["step"]
    assert 6 <= later["seconds"] < 9


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(shell: Shell, tmp_path: Path) -> None:
    workdir = tmp_path / "stopped"
    process = shell.start("tiny_vae", workdir, "--checkpoint_every", 1000)
    wait_for(lambda: len(lines(workdir)) >= 3, process)
    process.terminate()
    code, out = ended(process)
    assert code == 128 + signal.SIGTERM, out
    assert "the same command goes on" in out
    assert "Traceback" not in out
    last = int(lines(workdir)[-1]["step"])
    assert checkpoint(workdir, last)["['step']"] == last


def test_work_is_left_as_soon_as_there_is_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    never, exits = threading.Event(), []
    monkeypatch.setattr(os, "_exit", exits.append)

    def fail() -> None:
        raise ValueError("what the work raises")

    with Stop() as stop:
        assert stop.unless_stopped(lambda: 3) == 3
        with pytest.raises(ValueError, match="what the work raises"):
            stop.unless_stopped(fail)
        assert leave_threads(0) == 0
        assert not exits
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert stop.unless_stopped(never.wait) is None
        assert stop.received == stop.at(5) == signal.SIGTERM
        leave_threads(143)
    assert exits == [143]
    never.set()


@pytest.mark.slow
def test_sigterm_during_an_evaluation_saves_its_step(shell: Shell, tmp_path: Path) -> None:
    workdir, vae = tmp_path / "run", "jaxdiff/assets/emoji"
    flags = ["--task.vae", vae, "--eval_every", 3, "--checkpoint_every", 1000, "--steps", 60]
    process = shell.start("topology", workdir, *flags)
    wait_for(lambda: (workdir / "export").exists(), process)
    process.terminate()
    code, out = ended(process, 60)
    assert code == 128 + signal.SIGTERM, out
    assert "Stopped by SIGTERM after step 3" in out
    assert checkpoint(workdir, 3)["['step']"] == 3
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3]


@pytest.mark.slow
def test_a_run_goes_on_with_a_start_that_moved_and_tells_that_its_images_changed(shell: Shell, tmp_path: Path) -> None:
    """Images without captions, of which the only wide one is bad."""
    images, start, moved = tmp_path / "images", tmp_path / "start", tmp_path / "moved"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        image = Image.fromarray(rng.integers(0, 256, (16, 32 if i == 9 else 16, 3), np.uint8))
        image.save(images / f"{i}.png")
    (images / "9.png").write_bytes((images / "9.png").read_bytes()[:200])
    config = read_config(str(ROOT / "tests" / "configs" / "tiny_vae.py"), [])
    assert isinstance(config.task, VAETask)
    params = tiny.random_params("vae", config.task.vae, rng)
    write_network(start, "vae", config.task.vae, params)

    data = ["--data.source", "folder", "--data.root", images, "--data.aspects", "1:1", "2:1", "--data.side_multiple", 8]
    data += ["--data.max_bad_share", 0.2, "--data.heldout", "", "--data.batch_size", 2]
    code, out = shell.run("tiny_vae", tmp_path / "run", *data, "--task.init", start, "--steps", 12)
    assert code == 0, out
    assert "Skipped: 9.png" in out

    (start / "vae").rename(moved)
    code, out = shell.run("tiny_vae", tmp_path / "run", *data, "--task.init", moved, "--steps", 14)
    assert code == 0, out
    assert "from step 12 to 14" in out
    assert "data changed" not in out
    Image.new("RGB", (16, 16)).save(images / "3.png")
    write_network(tmp_path / "other", "vae", config.task.vae, tiny.random_params("vae", config.task.vae, rng))
    other = ["--task.init", tmp_path / "other", "--steps", 16]
    code, out = shell.run("tiny_vae", tmp_path / "run", *data, *other)
    assert (code, "other contents of task.init" in out) == (2, True), out
    write_network(tmp_path / "again", "vae", config.task.vae, params)
    code, out = shell.run("tiny_vae", tmp_path / "run", *data, "--task.init", tmp_path / "again", "--steps", 16)
    assert code == 0, out
    assert "the data changed since this run stopped" in out


@pytest.mark.slow
def test_an_evaluation_that_fails_loses_no_step(shell: Shell, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    process = shell.start("tiny_vae", workdir, "--checkpoint_every", 1000, "--eval_every", 10)
    wait_for(lambda: (workdir / "export" / "vae").exists(), process)
    (workdir / "export" / "vae" / "notes.txt").write_text("mine")
    code, out = ended(process)
    assert code == 2, out
    assert "not ours to replace" in out
    (step,) = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert step % 10 == 0
    assert checkpoint(workdir, step)["['step']"] == step


# Evaluations ----------------------------------------------------------------------------------------------------------


class Captions:
    """Records of captions alone."""

    def __len__(self) -> int:
        return 3

    def name(self, index: int) -> str:
        return str(index)

    def sizes(self) -> np.ndarray:
        return np.ones((3, 2), int)

    def record(self, index: int) -> Record:
        if index == 0:
            raise BadRecord("declared bad")
        return Record(Caption(f"a (dog:1.{index})"))


def requests_of(data: dict | None = None, scheduler: SchedulerConfig = tiny.SCHEDULER, **settings) -> list[Request]:
    """What the evaluations of a run draw."""
    module = runpy.run_path(str(ROOT / "train.py"))
    task = DiffusionTask(unet=tiny.UNET, text_encoder=tiny.TEXT_ENCODER, scheduler=scheduler, **settings)
    config = TrainConfig("x", task, data=DataConfig(**{"size": 16} | (data or {})))
    return module["sample_requests"](config, tiny.VAE, (tiny.tokenizer(),), Captions())


def test_captions_are_drawn_as_they_are_written_and_prompts_as_they_are_meant() -> None:
    captions = requests_of()
    assert {one.literal for one in captions} == {True}
    assert [one.prompt for one in captions[:2]] == ["a (dog:1.1)"] * 2
    assert [one.seed for one in captions] == list(range(16))
    (prompt,) = requests_of(prompts=("a (dog:1.2)",))
    assert (prompt.prompt, prompt.literal) == ("a (dog:1.2)", False)


def test_evaluations_draw_what_the_model_can_and_what_it_cannot_is_told_before_the_run() -> None:
    wide = {"size": 15, "side_multiple": 8, "aspects": ("2:1", "4:1")}
    assert requests_of(wide)[0].size == (24, 8)
    assert requests_of(scheduler=replace(tiny.SCHEDULER, num_train_timesteps=10))[0].steps == 5
    assert requests_of()[0].steps == 25
    with pytest.raises(ValueError, match="samples of an evaluation could not be drawn: size is 15x15"):
        requests_of({"size": 15})


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_and_too_many_stop_the_run(shell: Shell, tmp_path: Path) -> None:
    workdir = tmp_path / "nan"
    code, out = shell.run("tiny_vae", workdir, "--optim.lr", 1e30, "--checkpoint_every", 1, "--max_skipped", 4)
    assert code == 2
    last = lines(workdir)[-1]
    told = f"The last 4 updates, up to step {int(last['step'])}, were skipped"
    assert told in out
    assert "Traceback" not in out
    assert last["skipped"] == 4
    assert last["lr"] == pytest.approx(1e30 * (last["step"] - 4) / 6)  # of the last update that was made
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert all(np.isfinite(leaf).all() for leaf in checkpoint(workdir, max(steps)).values())


def test_means_are_those_of_the_updates_that_were_made(tmp_path: Path) -> None:
    losses = [1.0, np.nan, 3.0, np.inf, np.nan]
    with Log(epath.Path(tmp_path), 0, 9, 1, skipped=(2, 7)) as log:
        for loss in losses:
            log.step({"loss": np.float32(loss), "skipped": np.int32(not np.isfinite(loss))}, 0.0)
        line = log.flush(5)
        assert (line["loss"], line["skipped"], log.in_a_row) == (2.0, 10, 2)
        log.step({"loss": np.float32(np.nan), "skipped": np.int32(1)}, 0.0)
        log.flush(6)
    assert (log.skipped, log.in_a_row) == (11, 3)
    log.settle()  # which counts each update once
    assert (log.skipped, log.in_a_row) == (11, 3)
    assert lines(tmp_path)[1]["loss"] is None


def children(pid: int) -> list[int]:
    """All processes below one."""
    below = [int(p) for file in Path(f"/proc/{pid}/task").glob("*/children") for p in file.read_text().split()]
    return below + [grandchild for child in below for grandchild in children(child)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_do_not_outlive_the_trainer(shell: Shell, tmp_path: Path, number: signal.Signals) -> None:
    process = shell.start("tiny_vae", tmp_path / "run", "--data.workers", 2)
    wait_for(lambda: len(lines(tmp_path / "run")) >= 2, process)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(number)
    ended(process)
    end = time.monotonic() + 10
    while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, alive
        time.sleep(0.1)
