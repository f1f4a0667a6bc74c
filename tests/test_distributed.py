"""How the processes of a run find each other."""

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from shell import ROOT, free_port

from jaxdiff.config import DistributedConfig
from jaxdiff.runtime import distributed

TPU_VM = {"TPU_ML_PLATFORM": "JAX"}
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}
SLURM = NO_TPU | {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("env", "several"),
    [
        (NO_TPU, False),
        (TPU_VM, True),  # which may be one of a pod
        (TPU_VM | NO_TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        (TPU_VM | NO_TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, True),  # GKE
        (NO_TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, False),  # chips that are not there
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        (SLURM | {"SLURM_NTASKS": "2"}, True),
        (NO_TPU | {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),  # a batch script without srun
        (NO_TPU | {"OMPI_COMM_WORLD_SIZE": "1"}, False),
        (NO_TPU | {"OMPI_COMM_WORLD_SIZE": "4"}, True),
    ],
)
def test_others_are_looked_for_only_where_the_environment_speaks_of_them(env: dict[str, str], several: bool) -> None:
    assert distributed._in_cluster(env) == several


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"coordinator": "localhost:1"}, "DistributedConfig.count is missing"),
        ({"count": 2, "index": 0}, "DistributedConfig.coordinator is missing"),
        ({"coordinator": "localhost", "count": 2, "index": 0}, "coordinator is 'localhost'; it must be HOST:PORT"),
        ({"coordinator": "localhost:1", "count": 0, "index": 0}, "DistributedConfig.count is 0; it must be above 0"),
        ({"coordinator": "localhost:1", "count": 2, "index": 2}, "with a count of 2 it must lie from 0 to 1"),
    ],
)
def test_half_a_set_of_flags_is_told(flags: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DistributedConfig(**flags)


def test_a_coordinator_that_does_not_answer_is_told_and_one_that_is_late_is_waited_for() -> None:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"Nothing answers at {address}"):
            distributed._wait_for(address, seconds=0.0)
        threading.Timer(0.2, server.listen).start()
        distributed._wait_for(address, seconds=30.0)


def meetings(*processes: tuple[int, int], wait: int = 20, port: int | None = None) -> list[str]:
    """The error of each of the processes (index, count) when they call each other; "" where the run begins."""
    port = port or free_port()

    def meet(index: int, count: int) -> str:
        try:
            distributed.meet(DistributedConfig(f"localhost:{port}", count, index, wait))
        except ValueError as error:
            return str(error)
        if index == 0 and count > 1:  # JAX's service, which others look for then
            with socket.create_server(("localhost", port)) as service:
                service.settimeout(20)
                for _ in range(count - 1):
                    service.accept()[0].close()
        return ""

    with ThreadPoolExecutor() as pool:
        return list(pool.map(meet, *zip(*processes, strict=True)))


def test_processes_that_are_all_there_begin() -> None:
    assert meetings((2, 3), (0, 3), (1, 3)) == [""] * 3
    assert meetings((0, 1)) == [""]


@pytest.mark.parametrize(
    ("processes", "sentence"),
    [
        ([(0, 3), (1, 3), (1, 3)], "Two processes have --distributed.index 1"),
        ([(0, 2), (1, 3)], "Process 1 was given a --distributed.count of 3, and process 0 of 2"),
        ([(0, 2), (0, 2)], "cannot listen at port"),
        ([(0, 3), (2, 3)], "Process 1 of 3 did not come to localhost:"),
        ([(1, 3), (2, 3)], "Nothing answers at localhost:"),
    ],
    ids=["one index twice", "other counts", "two zeros", "one absent", "process 0 absent"],
)
def test_processes_that_do_not_meet_are_told_in_one_sentence(
    processes: list[tuple[int, int]],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "_PATIENCE", 0.2)
    began = time.monotonic()
    errors = meetings(*processes, wait=1)
    assert time.monotonic() - began < 20
    assert any(sentence in text for text in errors)
    assert all("\n" not in text for text in errors)
    assert time.monotonic() - began < 1 or "Waiting at most 1 s" in capsys.readouterr().err


def test_one_that_comes_to_a_run_which_has_begun_is_told() -> None:
    with socket.create_server(("localhost", 0)) as service:

        def hang_up() -> None:
            guest, _ = service.accept()
            guest.recv(1000)
            guest.sendall(b"\x00\x00\x12\x04")  # as JAX's service does
            guest.close()

        threading.Thread(target=hang_up, daemon=True).start()
        (error,) = meetings((2, 3), port=service.getsockname()[1])
    assert "the run has begun without process 2 of 3" in error


CLUSTER = """
import sys
from jaxdiff.config import DistributedConfig
from jaxdiff.runtime import distributed
from jaxdiff.runtime.cli import exit_code
distributed._PATIENCE = 1
sys.exit(exit_code(lambda: distributed.initialize(DistributedConfig(wait=3))))
"""


@pytest.mark.slow
def test_a_cluster_that_does_not_come_is_told_in_one_sentence() -> None:
    env = os.environ | SLURM | {"JAX_PLATFORMS": "cpu", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    command = [sys.executable, "-c", CLUSTER]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "Waiting at most 3 s for the run's other processes." in done.stderr
    assert "error: The run's other processes were not found by the cluster's word within 3 s" in done.stderr
    assert "***" not in done.stderr


def test_one_process_leads_waits_for_nobody_and_agrees_with_itself() -> None:
    assert distributed.leads()
    distributed.wait_for_all("here")
    distributed.check_equal({"seed": 0}, "config")
    assert distributed.leave(2) == 2
    found = distributed.whole({"a": jax.numpy.arange(3), "b": np.ones(2)})
    assert [type(leaf) for leaf in found.values()] == [np.ndarray] * 2
