"""`train.py` from the shell: what a run leaves behind, and what it survives."""

import signal
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from PIL import Image
from shell import Shell, ended, lines, wait_for

from jaxdiff.data.captions import COLOURS, background
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.io.folder import read_network
from jaxdiff.model import read_model
from jaxdiff.training.log import Log

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


def checkpoint(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by their paths."""
    folder = (workdir / "checkpoints" / str(step) / "state").absolute()
    tree = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore())
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


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
