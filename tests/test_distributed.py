"""How the processes of a run find each other."""

import socket
import threading

import jax
import numpy as np
import pytest

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


def test_one_process_leads_waits_for_nobody_and_agrees_with_itself() -> None:
    assert distributed.leads()
    distributed.wait_for_all("here")
    distributed.check_equal({"seed": 0}, "config")
    assert distributed.leave(2) == 2
    found = distributed.whole({"a": jax.numpy.arange(3), "b": np.ones(2)})
    assert [type(leaf) for leaf in found.values()] == [np.ndarray] * 2
