"""`train.py` from the shell: what a run leaves behind, and what it survives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from jaxdiff.data.captions import COLOURS, background
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.io.folder import read_folder, read_network

ROOT = Path(__file__).parents[1]
STEPS = 60  # of tiny_vae.py


class Shell:
    """Starts `train.py` on one device, as a user would."""

    def __init__(self) -> None:
        self.env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.env |= {"JAX_PLATFORMS": "cpu"}

    def start(self, config: str, workdir: Path, *overrides: object) -> subprocess.Popen[str]:
        command = [sys.executable, "train.py", f"tests/configs/{config}.py", "--workdir", str(workdir)]
        command += map(str, overrides)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=ROOT, env=self.env, text=True, **pipes)

    def run(self, config: str, workdir: Path, *overrides: object) -> tuple[int, str]:
        with self.start(config, workdir, *overrides) as process:
            out, _ = process.communicate(timeout=300)
            return process.returncode, out


@pytest.fixture(scope="session")
def shell() -> Shell:
    return Shell()


@pytest.fixture(scope="session")
def vae_run(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, uninterrupted run of `tiny_vae.py`."""
    workdir = tmp_path_factory.mktemp("runs") / "vae"
    code, out = shell.run("tiny_vae", workdir)
    assert code == 0, out
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


def lines(workdir: Path) -> list[dict[str, float]]:
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def checkpoint(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by their paths."""
    folder = (workdir / "checkpoints" / str(step) / "state").absolute()
    tree = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore())
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_run_killed_twice_ends_with_the_parameters_of_an_uninterrupted_one(
    shell: Shell, vae_run: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "killed"
    for until in (9, 30):
        process = shell.start("tiny_vae", workdir)
        wait_for(lambda until=until: len(done := lines(workdir)) and done[-1]["step"] >= until, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert lines(workdir)[-1]["step"] < STEPS
    code, out = shell.run("tiny_vae", workdir)
    assert code == 0, out
    assert "from step 0 to" not in out  # it did go on, not start again
    expected, found = checkpoint(vae_run, STEPS), checkpoint(workdir, STEPS)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name].tobytes() != found[name].tobytes()] == []
    assert [line["step"] for line in lines(workdir) if "loss" in line] == list(range(1, STEPS + 1))
    losses = [[line["loss"] for line in lines(run) if "loss" in line] for run in (vae_run, workdir)]
    assert losses[0] == losses[1]


def test_metrics_tell_what_a_user_watches(vae_run: Path) -> None:
    line = lines(vae_run)[0]
    assert {"step", "loss", "lr", "grad_norm", "images_per_s", "data_wait_share"} <= line.keys()
    assert 0 <= line["data_wait_share"] <= 1
    assert lines(vae_run)[-1]["heldout_psnr"] > 5


def test_the_loss_of_the_autoencoder_falls(vae_run: Path) -> None:
    losses = [line["loss"] for line in lines(vae_run) if "loss" in line]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_an_autoencoder_run_exports_weights_whose_latents_have_unit_variance(vae_run: Path) -> None:
    config, params = read_network(vae_run / "export", "vae")
    assert config.scaling_factor == lines(vae_run)[-1]["scaling_factor"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    ema = {path: leaf for path, leaf in checkpoint(vae_run, STEPS).items() if path.startswith("['ema']")}
    assert np.array_equal(params["encoder"]["conv_in"]["kernel"], ema["['ema']['0.999']['encoder']['conv_in']['kernel']"])
    with Image.open(vae_run / "samples" / f"{STEPS:07}.png") as sheet:
        assert min(sheet.size) > 16


@pytest.mark.slow
def test_a_text_to_image_run_exports_a_model_that_draws_what_its_sample_grid_shows(diffusion_run: Path) -> None:
    import jaxdiff

    model = read_folder(diffusion_run / "export")
    assert model.unet.block_out_channels == (8, 16)
    with Image.open(diffusion_run / "samples" / "0000008.png") as sheet:
        assert len(sheet.getcolors(1 << 20) or ()) > 10
    images = jaxdiff.load(diffusion_run)(["a red apple"], steps=2)
    assert images.shape == (1, 16, 16, 3)
    assert all(np.isfinite(line["loss"]) for line in lines(diffusion_run) if "loss" in line)


def test_sigterm_saves_and_the_same_command_goes_on(shell: Shell, tmp_path: Path) -> None:
    workdir = tmp_path / "stopped"
    process = shell.start("tiny_vae", workdir, "--checkpoint_every", 1000)
    wait_for(lambda: len(lines(workdir)) >= 3, process)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "the same command goes on" in out
    assert "Traceback" not in out
    last = int(lines(workdir)[-1]["step"])
    assert checkpoint(workdir, last)["['step']"] == last


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(
    shell: Shell, tmp_path: Path
) -> None:
    code, out = shell.run("tiny_vae", tmp_path / "nan", "--optim.lr", 1e30, "--checkpoint_every", 1)
    assert code == 2
    assert "training stops; the last good checkpoint, of step" in out
    assert "Traceback" not in out
    steps = [int(path.name) for path in (tmp_path / "nan" / "checkpoints").iterdir() if path.name.isdigit()]
    assert steps
    assert all(np.isfinite(leaf).all() for leaf in checkpoint(tmp_path / "nan", max(steps)).values())


def test_a_changed_config_is_refused_by_name_and_a_longer_run_is_not(shell: Shell, vae_run: Path) -> None:
    code, out = shell.run("tiny_vae", vae_run, "--seed", 1)
    assert code == 2
    assert "seed was 0 and is now 1" in out
    assert json.loads((vae_run / "config.json").read_text())["seed"] == 0
