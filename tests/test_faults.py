"""What goes wrong on a machine that is not one's own: it is noticed, told, and costs nothing that was saved.

Each test prints what it counted; `pytest -m slow tests/test_faults.py -s` shows it.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from shell import ROOT, Shell, ended, free_port, lines, wait_for

from jaxdiff.config import DataConfig
from jaxdiff.data.loader import batches, open_source
from jaxdiff.data.record import BadRecord, Record, Source
from jaxdiff.io.checkpoint import Checkpoints

pytestmark = pytest.mark.slow


# --- Damaged checkpoints ---------------------------------------------------------------------------------------------


def small_state(step: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(step), 3)
    return {
        "step": jnp.asarray(step, jnp.int32),
        "kernel": jax.random.normal(keys[0], (64, 64)),
        "moments": jax.random.normal(keys[1], (64, 64), jnp.bfloat16),
        "constant": jnp.full((32, 32), float(step)),
    }


def same(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> bool:
    return all(np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes() for name in a)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flips") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small_state(step))
    return folder


@contextmanager
def changed(file: Path, content: bytes, folder: Path) -> Iterator[None]:
    """The file with other content; afterwards it, and the name of its step, are as before."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        if (damaged := folder / "damaged-2").exists():
            damaged.rename(folder / "2")
        file.write_bytes(before)


def restored(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What a restore gave, after checking that it is one of the two states and that damage was told."""
    caplog.clear()
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(small_state(0))
    step = int(state["step"])
    assert step in (1, 2)
    assert same(state, small_state(step))
    told = "The checkpoint of step 2 cannot be read" in caplog.text
    assert told == (step == 1) == (folder / "damaged-2").exists()
    return "the older step, told" if told else "harmless"


def test_no_flipped_bit_in_a_checkpoint_is_loaded_silently(two_steps: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    files = sorted(path for path in (two_steps / "2").rglob("*") if path.is_file())
    sizes = np.asarray([file.stat().st_size for file in files])
    rng = np.random.default_rng(0)
    counts = {"array data": Counter(), "the rest": Counter()}
    for trial in range(200):
        # Most by size, which is array data; some in every file.
        file = files[rng.choice(len(files), p=sizes / sizes.sum())] if trial % 4 else files[trial // 4 % len(files)]
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        with changed(file, bytes(content), two_steps):
            counts["array data" if file.parent.name == "d" else "the rest"][restored(two_steps, caplog)] += 1
    print(f"\nflips: {counts}")
    assert sum(counter.total() for counter in counts.values()) == 200
    assert counts["array data"].total() > 100
    assert counts["array data"]["the older step, told"] > 100


def test_no_truncated_file_in_a_checkpoint_is_loaded_silently(
    two_steps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    files = sorted(path for path in (two_steps / "2").rglob("*") if path.is_file())
    data = [file for file in files if file.parent.name == "d"]
    rng = np.random.default_rng(1)
    counts: Counter[str] = Counter()
    for trial in range(20):
        file = data[trial // 2 % len(data)] if trial % 2 else files[rng.integers(len(files))]
        content = file.read_bytes()
        with changed(file, content[: rng.integers(len(content))], two_steps):
            counts[restored(two_steps, caplog)] += 1
    print(f"\ntruncations: {dict(counts)}")
    assert counts.total() == 20
    assert counts["the older step, told"] > 5


# --- Killed runs -----------------------------------------------------------------------------------------------------

STEPS = 60  # of tests/configs/tiny_vae.py
HALF_WRITTEN = "*.orbax-checkpoint-tmp"


def state_of(workdir: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """All of a checkpoint (parameters, averages, optimiser, counts) by path."""
    folder = epath.Path(workdir) / "checkpoints" / str(step) / "state"
    tree = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore())
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_ends_as(workdir: Path, uninterrupted: Path) -> None:
    """Bit for bit, the losses of all steps included."""
    expected, found = state_of(uninterrupted), state_of(workdir)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name].tobytes() != found[name].tobytes()] == []
    losses = [
        [(line["step"], line["loss"]) for line in lines(run) if "loss" in line] for run in (uninterrupted, workdir)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("faults") / "uninterrupted"
    code, out = Shell().run("tiny_vae", workdir, "--checkpoint_every", 1000)
    assert code == 0, out
    return workdir


def kill(process: subprocess.Popen[str]) -> str:
    """What it had printed."""
    process.kill()
    out, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, out
    return out


def half_written(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").glob(HALF_WRITTEN)}


def kill_again_and_again(workdir: Path, kills: int, seed: int) -> int:
    """Starts a run that saves at every step, and kills it in a save, at times anywhere; how many kills hit a save."""
    rng, hits = np.random.default_rng(seed), 0
    for _ in range(kills):
        before = left = half_written(workdir)
        process = Shell().start("tiny_vae", workdir, "--checkpoint_every", 1)
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, 6))
            kill(process)
            hits += bool(half_written(workdir) - before)
            continue
        for _ in range(rng.integers(1, 4)):  # the first, second or third save; what an earlier life left goes first
            wait_for(lambda left=left: not half_written(workdir) & left, process)
            wait_for(lambda: bool(half_written(workdir)), process)
            left = half_written(workdir)
        time.sleep(rng.uniform(0, 0.1))
        out = kill(process)
        hits += bool(half_written(workdir))
        assert not before or "was cut off; what there is of it is removed" in out
    return hits


KILLS = int(os.environ.get("JAXDIFF_KILLS", "12"))


def test_kills_most_of_them_in_saves_change_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]  # side by side, for the time it takes
    with ThreadPoolExecutor(len(runs)) as pool:
        hits = list(pool.map(kill_again_and_again, runs, [KILLS // 2] * 2, [0, 1]))
        ends = list(pool.map(lambda run: Shell().run("tiny_vae", run, "--checkpoint_every", 1000), runs))
    print(f"\nkills: {KILLS}, of which {sum(hits)} hit a save")
    assert sum(hits) >= KILLS // 2
    for run, (code, out) in zip(runs, ends, strict=True):
        assert code == 0, out
        assert "from step 0 to" not in out
        assert "cannot be read" not in out
        assert_ends_as(run, uninterrupted)


# --- A full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_stops_a_run_with_a_sentence_and_it_goes_on_when_there_is_room(
    uninterrupted: Path, small_disk: Path
) -> None:
    workdir, ballast = small_disk / "run", small_disk / "ballast"
    process = Shell().start("tiny_vae", workdir)
    wait_for(lambda: (workdir / "checkpoints" / "4").exists(), process)
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    code, out = ended(process)
    assert code == 2, out
    assert "No space left on device" in out
    assert "Traceback" not in out
    print(f"\n{out.splitlines()[-1]}")
    ballast.unlink()
    code, out = Shell().run("tiny_vae", workdir)
    assert code == 0, out
    assert "from step 0 to" not in out
    assert "cannot be read" not in out
    assert_ends_as(workdir, uninterrupted)


# --- Damaged data ----------------------------------------------------------------------------------------------------

SHARD = "emoji/64px/1.0.0/emoji-train.array_record-00000-of-00001"


class Without:
    """A source of which some records are declared bad."""

    def __init__(self, source: Source, bad: set[int]) -> None:
        self.source, self.bad = source, bad

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def sizes(self) -> np.ndarray:
        return self.source.sizes()

    def record(self, index: int) -> Record:
        if index in self.bad:
            raise BadRecord("declared bad")
        return self.source.record(index)


def test_no_flipped_bit_in_a_data_shard_is_trained_on_silently(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests" / "data", tmp_path / "data")
    shard = tmp_path / "data" / SHARD
    content = shard.read_bytes()
    used = np.flatnonzero(np.frombuffer(content, np.uint8))  # the rest is padding
    config = DataConfig(source="emoji", root=str(tmp_path / "data"), size=16, batch_size=8, max_bad_share=0.9)
    clean = open_source(replace(config, root=str(ROOT / "tests" / "data")))
    n = len(clean) // 8

    def read(source: Source) -> tuple[list[dict[str, np.ndarray]], dict[str, str]]:
        with closing(batches(config, source, seed=0)) as read:
            return list(islice(read, n)), read.bad

    def equal(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> bool:
        return all(x[name].tobytes() == y[name].tobytes() for x, y in zip(a, b, strict=True) for name in x)

    rng = np.random.default_rng(0)
    counts: Counter[str] = Counter()
    for _ in range(25):
        flipped = bytearray(content)
        flipped[rng.choice(used)] ^= 1 << rng.integers(8)
        shard.write_bytes(flipped)
        try:
            source = open_source(config)
            found, bad = read(source)
        except ValueError:
            counts["refused in a sentence"] += 1
            continue
        skipped = {index for index in range(len(source)) if source.name(index) in bad}
        assert len(skipped) == len(bad)
        assert equal(found, read(Without(clean, skipped))[0])
        counts["records skipped, and named" if bad else "harmless"] += 1
    print(f"\nflips in a data shard: {dict(counts)}")
    assert counts["records skipped, and named"] > 5


def test_a_run_on_a_damaged_shard_counts_and_names_what_it_skips(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests" / "data", tmp_path / "data")
    shard = tmp_path / "data" / SHARD
    content = bytearray(shard.read_bytes())
    content[len(content) // 4] ^= 1
    shard.write_bytes(content)
    code, out = Shell().run("tiny_vae", tmp_path / "run", "--data.root", tmp_path / "data", "--data.max_bad_share", 0.9)
    assert code == 0, out
    assert "Skipped: " in out
    assert [line["bad_records"] for line in lines(tmp_path / "run") if "loss" in line][-1] >= 1


# --- A lost process --------------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import pathlib, sys
import jax, numpy as np
from jaxdiff.config import DistributedConfig
from jaxdiff.runtime.distributed import initialize, wait_for_all, whole
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.runtime.mesh import make_mesh, tree_shardings

folder, port, index = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
initialize(DistributedConfig(coordinator=f"localhost:{port}", count=2, index=index))
mesh = make_mesh(1, 4, 1)

def state(step):
    tree = {"to_q": {"kernel": np.random.default_rng(step).random((64, 32), np.float32)}}
    place = lambda a, sharding: jax.make_array_from_callback(a.shape, sharding, lambda part: a[part])
    return jax.tree.map(place, tree, tree_shardings(mesh, tree))

try:
    Checkpoints(folder / f"of-process-{index}")
except ValueError as error:
    print(error)
with Checkpoints(folder) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state(step))
wait_for_all("saved")
if index == 0:
    for file in (folder / "2/state/ocdbt.process_1/d").iterdir():  # which process 0 does not read
        file.write_bytes(file.read_bytes()[:50])
wait_for_all("damaged")
with Checkpoints(folder) as checkpoints:
    found = whole(checkpoints.restore(state(0)))
    print("as step 1:", np.array_equal(found["to_q"]["kernel"], whole(state(1))["to_q"]["kernel"]), checkpoints.steps())
"""


def test_what_one_process_alone_cannot_read_is_left_by_both(tmp_path: Path) -> None:
    folder, port = tmp_path / "checkpoints", free_port()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, "env": env}
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(folder), str(port), str(index)], **pipes)
        for index in range(2)
    ]
    results = [ended(process, 120) for process in processes]
    for code, out in results:
        assert code == 0, out
        assert "is not shared: process 1 does not see what process 0 writes there." in out
        assert "as step 1: True [1]" in out
    assert ["The checkpoint of step 2 cannot be read" in out for _, out in results] == [True, False]
    assert {path.name for path in folder.iterdir()} == {"1", "damaged-2", "of-process-0"}


def newest(workdir: Path) -> int:
    return max((int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()), default=0)


def test_when_a_process_is_killed_the_other_ends_and_both_or_one_go_on(uninterrupted: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    for victim in (0, 1):
        before = newest(workdir)
        processes = Shell().start_all("tiny_vae", workdir, "--checkpoint_every", 1, processes=2, devices=1)
        wait_for(lambda before=before: newest(workdir) >= before + 3, processes[0], 300)
        out = {victim: kill(processes[victim])}
        began = time.monotonic()
        code, out[1 - victim] = ended(processes[1 - victim], 200)
        print(f"\nprocess {1 - victim} ended {time.monotonic() - began:.1f} s after process {victim} was killed")
        assert code != 0, out
        assert f"from step {before} to" in out[0]
    before = newest(workdir)
    code, said = Shell().run("tiny_vae", workdir, "--checkpoint_every", 1000)
    assert code == 0, said
    assert f"from step {before} to" in said
    expected, found = state_of(uninterrupted), state_of(workdir)
    for name in expected:
        # The gradient of a key's bias is zero but for rounding, which Adam makes whole steps of.
        if name.startswith(("['params']", "['ema']")) and "['to_k']['bias']" not in name:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
    assert [line["step"] for line in lines(workdir) if "loss" in line] == list(range(1, STEPS + 1))
