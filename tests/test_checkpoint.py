"""Checkpoints: what is saved is what comes back, and damage is noticed."""

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.runtime.mesh import make_mesh, tree_shardings
from jaxdiff.training.state import TrainState


def state(value: float) -> TrainState:
    params = {"conv": {"kernel": jnp.full((64, 65), float(value))}}
    return TrainState(
        step=jnp.asarray(int(value)),
        params=params,
        ema={"0.999": jax.tree.map(jnp.copy, params)},
        opt={"mu": jnp.full((7,), -value, jnp.bfloat16)},
        memory={},
        skipped=jnp.zeros(2, jnp.int32),
    )


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


def test_a_half_written_step_is_named_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path / "c", 1, 2)
    (folder / "3.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    with caplog.at_level(logging.WARNING), Checkpoints(folder) as checkpoints:
        assert "The save of step 3 in" in caplog.text
        assert checkpoints.steps() == [1, 2]
        assert equal(checkpoints.restore(state(0)), state(2))
    assert {path.name for path in folder.iterdir()} == {"1", "2"}


def test_every_so_many_steps_one_stays_for_ever(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c", keep=1, keep_every=2) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, state(step))
    with Checkpoints(tmp_path / "c", keep=1, keep_every=2) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]


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
    truncate(folder / "3")
    with Checkpoints(folder) as checkpoints:
        assert equal(checkpoints.restore(state(0)), state(2))
    assert {path.name for path in folder.iterdir()} == {"1", "2", "damaged-3", "damaged-3-again"}


def test_a_leaf_with_other_values_than_were_saved_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path / "c", 1, 2)
    other = state(2)
    other.params["conv"]["kernel"] = other.params["conv"]["kernel"].at[3, 4].add(1e-6)
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(2, other)
    shutil.copytree(tmp_path / "other" / "2" / "state", folder / "2" / "state", dirs_exist_ok=True)
    with caplog.at_level(logging.WARNING), Checkpoints(folder) as checkpoints:
        assert equal(checkpoints.restore(state(0)), state(1))
    assert "(other bits than were saved in params/conv/kernel) and is now" in caplog.text


def test_a_changed_manifest_is_damage_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path / "c", 1, 2)
    file = folder / "2" / "manifest" / "metadata"
    assert "float32" in file.read_text()
    file.write_text(file.read_text().replace("float32", "float16"))
    with caplog.at_level(logging.WARNING), Checkpoints(folder) as checkpoints:
        assert equal(checkpoints.restore(state(0)), state(1))
    assert "other bits than were saved in its manifest" in caplog.text


def test_a_run_whose_steps_are_all_damaged_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", 1, 2)
    truncate(folder / "1")
    shutil.rmtree(folder / "2" / "manifest")
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(ValueError, match=r"No checkpoint in .*can be read \(step 2: it has no manifest.*; step 1: "),
    ):
        checkpoints.restore(state(0))
    assert {path.name for path in folder.iterdir()} == {"1", "2"}


def test_a_state_of_other_names_shapes_or_dtypes_is_refused_and_nothing_renamed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", 1)
    kernel = {"kernel": jnp.zeros((64, 65))}
    for params, told in (
        ({"dense": kernel}, r"params/conv/kernel is float32 \[64, 65\] there and missing here"),
        ({"conv": {"kernel": jnp.zeros((64, 66))}}, r"\[64, 65\] there and float32 \[64, 66\] here"),
        ({"conv": {"kernel": jnp.zeros((64, 65), jnp.bfloat16)}}, r"float32 .* there and bfloat16 .* here"),
        ({"conv": kernel["kernel"]}, r"params/conv is missing there and float32 \[64, 65\] here"),
    ):
        with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match=f"another model .*{told}"):
            checkpoints.restore(replace(state(0), params=params))
    assert {path.name for path in folder.iterdir()} == {"1"}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, bad: float) -> None:
    now = state(2)
    now.opt["mu"] = now.opt["mu"].at[3].set(bad)
    with Checkpoints(saved(tmp_path / "c", 1)) as checkpoints:
        with pytest.raises(ValueError, match=r"Step 2 is not saved .* not all of opt/mu is finite; step 1 stays\."):
            checkpoints.save(2, now)
        assert checkpoints.steps() == [1]
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"1"}


def test_a_checkpoint_of_eight_devices_comes_back_on_any_mesh(tmp_path: Path) -> None:
    kernel = jax.random.normal(jax.random.key(0), (16, 24, 40))

    def spread(devices: int, data: int, fsdp: int, tensor: int, like: bool = False) -> dict[str, Any]:
        mesh = make_mesh(data, fsdp, tensor, jax.devices()[:devices])
        tree = {"to_q": {"kernel": kernel}, "step": jnp.asarray(5)}
        tree = jax.device_put(tree, tree_shardings(mesh, tree))
        shape = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
        return shape if like else tree

    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(5, spread(8, 2, 2, 2))
    for mesh in ((8, 1, 8, 1), (4, 1, 2, 2), (2, 2, 1, 1), (1, 1, 1, 1)):
        like = spread(*mesh, like=True)
        with Checkpoints(tmp_path / "c") as checkpoints:
            found = checkpoints.restore(like)
        assert np.array_equal(found["to_q"]["kernel"], kernel)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, found, like))


def test_what_is_not_trained_is_stored_once_and_verified(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    frozen = {"vae": {"kernel": jnp.arange(12.0)}, "empty_tokens": jnp.arange(3)}
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore_frozen(zeros) is None
        checkpoints.save_frozen(frozen)
        written = (folder / "frozen" / "0" / "manifest" / "metadata").stat().st_mtime_ns
        checkpoints.save(1, state(1))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save_frozen(frozen)  # it is there
        assert checkpoints.steps() == [1]
        found = checkpoints.restore_frozen(zeros)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, frozen))
        with pytest.raises(ValueError, match="not trained in this run, but vae/kernel had other values there"):
            checkpoints.save_frozen(frozen | {"vae": {"kernel": jnp.arange(12.0) + 1}})
        with pytest.raises(ValueError, match=r"empty_tokens is int32 \[3\] there and missing here"):
            checkpoints.save_frozen({"vae": frozen["vae"]})
    assert (folder / "frozen" / "0" / "manifest" / "metadata").stat().st_mtime_ns == written


def test_nothing_frozen_is_nothing_stored(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save_frozen({})
        assert checkpoints.restore_frozen({}) == {}
    assert list((tmp_path / "c").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_disk_that_is_full_is_one_sentence_and_the_last_step_stays(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys, pathlib, numpy\n"
        "from jaxdiff.io.checkpoint import Checkpoints\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "state = {'a': numpy.random.default_rng(0).random(200_000, numpy.float32)}\n"
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
    env = os.environ | {"JAX_PLATFORMS": "cpu"}  # or a TPU compiler that is installed has its say
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
    assert done.stdout == f"Step 2 could not be saved in {tmp_path} (File too large); step 1 stays.\n"
    assert done.stderr == ""
