"""One run is the same on any number of devices and processes: its data, its draws and, but for rounding, its end."""

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh
from shell import ROOT, Shell, ended, free_port, lines, wait_for

from jaxdiff.config import DataConfig, VAEConfig
from jaxdiff.data.loader import batches, open_source
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.model import EMBEDDED, read_model
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.runtime.mesh import make_mesh
from jaxdiff.training.feed import local_rows, to_devices
from jaxdiff.training.tasks.diffusion import diffusion_task

STEPS = 6  # of tests/configs/topology.py
TOLERANCE = 1e-6  # of parameters, which the steps move by some 1e-3 each; measured: 2e-7

MESHES = {
    "1": {},
    "2": {"data": 2},
    "4": {"data": 2, "fsdp": 2},
    "8": {"data": 8},
    "8 in three axes": {"data": 2, "fsdp": 2, "tensor": 2},
}


def mesh_of(axes: dict[str, int]) -> Mesh:
    return make_mesh(**{"data": 1} | axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])


TASK = replace(
    tiny.TASK,
    text_encoder=replace(tiny.TASK.text_encoder, vocab_size=4096, max_position_embeddings=32),
    caption_dropout=0.5,
)
DATA = DataConfig(source="emoji", root=str(ROOT / "tests" / "data"), size=16, batch_size=16, flip=True, crop=0.8)


def what_networks_see(mesh: Mesh) -> dict[str, np.ndarray]:
    """The arguments of UNet and text encoder in the third step's loss, compiled for the mesh, and the step's batch.

    They hold all that is drawn: latents from moments, timesteps, noise, dropped captions.
    """
    tokenizer = Tokenizer.load(str(EMBEDDED / "tokenizer"), 32)
    task = diffusion_task(TASK, VAEConfig(), {"empty_tokens": tokenizer([""])[0]})
    rng = np.random.default_rng(0)
    batch = next(batches(DATA, open_source(DATA), tokenizer, seed=3, start_step=2, rows=local_rows(mesh, 16)))
    image = batch.pop("image")
    batch["moments"] = np.tile(image[:, ::4, ::4, :1], (1, 1, 1, 8)) + rng.normal(size=8).astype(np.float32)

    def step(params: Any, frozen: Any, batch: Any, key: Any) -> dict[str, Any]:
        seen = {}

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name == "__call__" and isinstance(context.module, UNet2DConditionModel):
                seen["x"], seen["t"] = args[:2]
            if context.method_name == "__call__" and isinstance(context.module, CLIPTextModel):
                seen["tokens"] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            task.loss(params, frozen, batch, jax.random.fold_in(key, 2), task.memory)
        return seen

    params = jax.jit(task.init)(jax.random.key(0))
    seen = jax.jit(step)(params, task.frozen, to_devices(batch, mesh), jax.random.key(1))
    return {name: np.asarray(a) for name, a in (seen | {"image": image, "index": batch["index"]}).items()}


@pytest.fixture(scope="session")
def seen_by_one() -> dict[str, np.ndarray]:
    return what_networks_see(mesh_of(MESHES["1"]))


@pytest.mark.parametrize(
    "name", ["8 in three axes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("2", "4", "8"))]
)
def test_networks_are_shown_the_same_bits_on_any_mesh(name: str, seen_by_one: dict[str, np.ndarray]) -> None:
    seen = what_networks_see(mesh_of(MESHES[name]))
    assert set(seen) == {"x", "t", "tokens", "image", "index"}
    assert {key: seen[key].tobytes() == a.tobytes() for key, a in seen_by_one.items()} == dict.fromkeys(seen, True)
    assert len(np.unique(seen["t"])) > 8  # they are draws
    assert len(np.unique(seen["tokens"], axis=0)) < 16  # of which some captions are dropped


# name -> (processes, devices of each, mesh)
TOPOLOGIES = {
    "1": (1, 1, ""),
    "4": (1, 4, "--mesh.fsdp 2"),
    "8": (1, 8, "--mesh.fsdp 2 --mesh.tensor 2"),
    "2x4": (2, 4, "--mesh.fsdp 2"),
    "2x4, tensor 8": (2, 4, "--mesh.tensor 8"),  # where both processes need every sample
}


def train(topology: str, workdir: Path) -> None:
    processes, devices, mesh = TOPOLOGIES[topology]
    start = Shell().start_all if processes > 1 else Shell().start
    started = start("topology", workdir, *mesh.split(), devices=devices)
    results = [ended(process) for process in (started if isinstance(started, list) else [started])]
    assert [code for code, _ in results] == [0] * processes, results
    assert [out for _, out in results[1:] if "step/s" in out or "Done" in out] == []  # process 0 talks for all


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    tree = read_model(workdir / "export").params
    return {jax.tree_util.keystr(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(tree)}


def differences(a: Path, b: Path) -> dict[str, float]:
    """The largest differences of parameters, and of losses, between two runs."""
    a_params, b_params = parameters(a), parameters(b)
    assert a_params.keys() == b_params.keys()
    a_loss, b_loss = ([line["loss"] for line in lines(run)] for run in (a, b))
    assert len(a_loss) == len(b_loss) == STEPS
    worst = max(float(np.abs(a_params[name] - b_params[name]).max()) for name in a_params)
    return {"parameters": worst, "losses": float(np.abs(np.subtract(a_loss, b_loss)).max())}


@pytest.fixture(scope="session")
def on_eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("topology") / "8"
    train("8", workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["1", "2x4", "2x4, tensor 8"])
def test_a_run_ends_with_the_same_parameters_on_any_topology(topology: str, on_eight: Path, tmp_path: Path) -> None:
    train(topology, tmp_path / "run")
    found = differences(on_eight, tmp_path / "run")
    assert found["parameters"] < TOLERANCE, found
    assert found["losses"] < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["4", "2x4"])
def test_a_checkpoint_of_eight_devices_goes_on_elsewhere(topology: str, on_eight: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(on_eight, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    shutil.rmtree(workdir / "export")
    train(topology, workdir)
    found = differences(on_eight, workdir)
    assert found["parameters"] < TOLERANCE, found
    assert found["losses"] < TOLERANCE, found


@pytest.mark.slow
def test_sigterm_to_one_process_saves_the_same_step_on_all_and_the_run_goes_on(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    processes = Shell().start_all("tiny_vae", workdir, "--checkpoint_every", 1000)
    wait_for(lambda: len(lines(workdir)) >= 3, processes[0])
    processes[1].terminate()
    results = [ended(process) for process in processes]
    assert [code for code, _ in results] == [128 + signal.SIGTERM] * 2, results
    assert "Stopped by SIGTERM after step" in results[0][1]
    assert "Traceback" not in results[0][1] + results[1][1]
    step = int(lines(workdir)[-1]["step"])
    assert (workdir / "checkpoints" / str(step) / "state").is_dir()
    code, out = Shell().run("tiny_vae", workdir)
    assert code == 0, out
    assert f"from step {step} to" in out
    assert [line["step"] for line in lines(workdir) if "loss" in line] == list(range(1, 61))


@pytest.mark.slow
def test_several_processes_save_before_they_evaluate(tmp_path: Path) -> None:
    flags = ["--checkpoint_every", 1000, "--eval_every", 5, "--steps", 8]
    results = [ended(process) for process in Shell().start_all("tiny_vae", tmp_path / "run", *flags, devices=1)]
    assert [code for code, _ in results] == [0, 0], results
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()}
    assert saved == {"5", "8"}


@pytest.mark.slow
def test_a_mistake_that_all_processes_find_ends_all_of_them_with_a_sentence(tmp_path: Path) -> None:
    results = [ended(p) for p in Shell().start_all("tiny_vae", tmp_path / "run", "--data.root", tmp_path / "nowhere")]
    assert [code for code, _ in results] == [2, 2]
    assert all("error: There is no TFDS data set" in out for _, out in results)


@pytest.mark.slow
def test_processes_with_different_settings_are_told_which(tmp_path: Path) -> None:
    flags = ["--distributed.coordinator", f"localhost:{free_port()}", "--distributed.count", 2]
    processes = [
        Shell().start("tiny_vae", tmp_path / "run", *flags, "--distributed.index", i, "--seed", i) for i in range(2)
    ]
    for code, out in map(ended, processes):
        assert code == 2
        assert "not given the same config: seed is 0 in process 0 and 1 in process 1." in out
