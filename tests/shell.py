"""`train.py` from the shell, as a user would start it."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[1]
Process = subprocess.Popen[str]


QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Runs of a few steps compile far longer than they compute."""


class Shell:
    """Starts runs of `tests/configs/`, each on CPU devices of its own."""

    def start(self, config: str, workdir: Path, *overrides: object, devices: int = 1) -> Process:
        flags = f"{QUICKLY_COMPILED} --xla_force_host_platform_device_count={devices}"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        command = [sys.executable, "train.py", f"tests/configs/{config}.py", "--workdir", str(workdir)]
        command += map(str, overrides)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)

    def start_all(
        self, config: str, workdir: Path, *overrides: object, processes: int = 2, devices: int = 4
    ) -> list[Process]:
        """The processes of one run."""
        flags = ["--distributed.coordinator", f"localhost:{free_port()}", "--distributed.count", processes]
        return [
            self.start(config, workdir, *overrides, *flags, "--distributed.index", index, devices=devices)
            for index in range(processes)
        ]

    def run(self, config: str, workdir: Path, *overrides: object, devices: int = 1) -> tuple[int, str]:
        """The exit code and all that was printed."""
        return ended(self.start(config, workdir, *overrides, devices=devices))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def ended(process: Process, seconds: float = 600) -> tuple[int, str]:
    """The exit code and all that was printed, of a process that ends by itself."""
    with process:
        try:
            out, _ = process.communicate(timeout=seconds)
        finally:
            process.kill()
        return process.returncode, out


def wait_for(condition: Callable[[], bool], process: Process, seconds: float = 300) -> None:
    """Until the condition holds, while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)


def lines(workdir: Path) -> list[dict[str, float]]:
    """The whole lines of `metrics.jsonl`."""
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def checkpoint(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by their paths."""
    folder = (workdir / "checkpoints" / str(step) / "state").absolute()
    tree = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore())
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
