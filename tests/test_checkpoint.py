"""Checkpoints: what is saved is what comes back, and damage is noticed where it can be."""

import logging
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.training.state import TrainState


def state(value: float) -> TrainState:
    params = {"conv": {"kernel": jnp.full((64, 65), value)}}
    return TrainState(jnp.asarray(int(value)), params, jax.tree.map(jnp.copy, params), {"mu": jnp.full((7,), -value)})


def equal(a: TrainState, b: TrainState) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)) and x.dtype == y.dtype, a, b))


def saved(folder: Path, *steps: int, keep: int = 3) -> Path:
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step))
    return folder


def truncate(step: Path) -> None:
    """Halves every data file of a step, as a full disk would."""
    files = [file for file in step.rglob("*") if file.is_file() and "/d/" in file.as_posix()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_the_newest_state_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1, 2, 3, keep=2)
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        assert equal(checkpoints.restore(state(0)), state(3))


def test_an_empty_folder_restores_nothing(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(state(0)) is None


def test_a_save_is_not_disturbed_by_steps_that_reuse_the_buffers(tmp_path: Path) -> None:
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    now = state(1)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, now)
        for _ in range(20):
            now = step(now)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert equal(checkpoints.restore(state(0)), state(1))


def test_a_half_written_step_is_ignored(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", 1, 2)
    (folder / "3.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert equal(checkpoints.restore(state(0)), state(2))


# Orbax leaves a coroutine behind when a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_step_is_put_aside_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "c", 1, 2, 3)
    truncate(folder / "3")
    with caplog.at_level(logging.WARNING), Checkpoints(folder) as checkpoints:
        assert equal(checkpoints.restore(state(0)), state(2))
        assert "step 3 cannot be read" in caplog.text
        assert "going on from step 2" in caplog.text
        assert (folder / "damaged-3").is_dir()
        checkpoints.save(3, state(3))
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        assert equal(checkpoints.restore(state(0)), state(3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_whose_steps_are_all_damaged_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", 1, 2)
    for step in (1, 2):
        truncate(folder / str(step))
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(ValueError, match=r"No checkpoint in .*can be read .*steps 1, 2"),
    ):
        checkpoints.restore(state(0))
    assert {path.name for path in folder.iterdir()} == {"1", "2"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", 1)
    other = TrainState(jnp.asarray(0), {"dense": {"kernel": jnp.zeros((3, 3))}}, {}, {})
    with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match="belong to another model"):
        checkpoints.restore(other)


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_disk_that_is_full_is_one_sentence_and_the_last_step_stays(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys, pathlib, numpy\n"
        "from jaxdiff.io.checkpoint import Checkpoints\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "state = {'a': numpy.random.default_rng(0).random(100_000)}\n"
        "try:\n"
        "    with Checkpoints(pathlib.Path(sys.argv[1])) as checkpoints:\n"
        "        checkpoints.save(1, state)\n"
        "        checkpoints._wait()\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "        checkpoints.save(2, state)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout == f"Step 2 could not be saved in {tmp_path} (File too large); step 1 stays.\n"
    assert done.stderr == ""
