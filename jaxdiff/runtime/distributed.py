"""One run in several processes: they find each other, compare notes, wait for each other, and end together.

Everything here is a no-op, or next to it, where there is one process.
"""

import json
import os
import re
import socket
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdiff.config import DistributedConfig

_FAREWELL = 10  # seconds that a process which fails waits for the others to fail alike


def initialize(config: DistributedConfig) -> None:
    """Joins the run's other processes; to be called before anything that asks JAX for devices.

    Flags come first. Without them JAX finds the others by itself on TPU pods, GKE, Slurm and Open MPI; it is asked only
    where the environment says that there are any, since asking may mean waiting for a network.

    Raises:
        ValueError: in one sentence, where the others cannot be found.
    """
    # XLA's CPU devices share a pool of as many threads. Two collectives over different axes of a mesh can then wait for
    # each other for ever, each on a thread that the other needs; more threads than devices let both go on.
    if devices := re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")):
        os.environ.setdefault("NPROC", str(4 * int(devices[1])))
    flags: dict[str, Any] = {}
    if config.coordinator:
        flags = {
            "coordinator_address": config.coordinator,
            "num_processes": config.count,
            "process_id": config.index,
            "cluster_detection_method": "deactivate",
        }
    elif not _in_cluster(os.environ):
        return
    if config.index:
        _wait_for(config.coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # so that CPUs form a cluster, too
    try:
        jax.distributed.initialize(**flags, shutdown_timeout_seconds=60)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        where = (
            f"through {config.coordinator} as {config.index} of {config.count}" if flags else "by the cluster's word"
        )
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The run's other processes cannot be found {where} ({reason}): give --distributed.coordinator HOST:PORT, "
            "--distributed.count and --distributed.index, the first two alike for all."
        ) from error
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # Only process 0 finds its programs there. It would be ready long before the others, for which Gloo waits 30 s.
        jax.config.update("jax_enable_compilation_cache", False)


def _wait_for(coordinator: str, seconds: float = 300) -> None:
    """Until something listens there; JAX would abort the process where nothing does in time."""
    host, port = coordinator.rsplit(":", 1)
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"Nothing answers at {coordinator} ({error}): is process 0 running, and can it be reached?"
                ) from error
            time.sleep(0.5)


def _in_cluster(env: Any) -> bool:
    """Whether the environment speaks of several processes, or of a TPU VM, which may be one of a pod."""

    def number(name: str) -> int:
        return int(env[name]) if env.get(name, "").isdecimal() else 0

    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
    return (
        # `import jax` sets the first where it finds TPU chips, and the second where it finds none.
        ("TPU_ML_PLATFORM" in env and "TPU_SKIP_MDS_QUERY" not in env)
        or ("TPU_ML_PLATFORM" in env and ("," in workers or number("MEGASCALE_NUM_SLICES") > 1))
        or ("SLURM_STEP_NODELIST" in env and number("SLURM_NTASKS") > 1)  # a step of srun's, not a script on one node
        or number("OMPI_COMM_WORLD_SIZE") > 1
    )


def leads() -> bool:
    """Whether this is the process that writes, draws and talks for all."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Returns once every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def gather(value: Any) -> list[Any]:
    """What each process gives, JSON values all, in their order; every one must call this."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(mine))))
    texts = multihost_utils.process_allgather(np.pad(mine, (0, int(lengths.max()) - len(mine))))
    return [json.loads(text[:n].tobytes()) for text, n in zip(np.asarray(texts), lengths, strict=True)]


def check_equal(values: dict[str, Any], what: str) -> None:
    """That all processes were given the same; every one must call this.

    Raises:
        ValueError: in every process, naming the values that differ from those of process 0.
    """
    everyone = gather(values)
    for index, theirs in enumerate(everyone):
        for name in sorted(everyone[0].keys() | theirs.keys()):
            if everyone[0].get(name) != theirs.get(name):
                raise ValueError(
                    f"The processes were not given the same {what}: {name} is {everyone[0].get(name)!r} in process 0 "
                    f"and {theirs.get(name)!r} in process {index}."
                )


def whole(tree: Any) -> Any:
    """Arrays that are spread over the processes, as NumPy arrays in each; every process must call this."""
    return jax.tree.map(
        lambda a: (
            multihost_utils.process_allgather(a, tiled=True)
            if isinstance(a, jax.Array) and not a.is_fully_addressable
            else np.asarray(a)
        ),
        tree,
    )


def leave(code: int) -> int:
    """`code`, to exit with; after an error of this process alone it exits here and now.

    Otherwise it would wait for the others, which wait for it in the next step. Where all fail alike, they leave in
    order.
    """
    if code == 0 or not jax.distributed.is_initialized():
        return code
    from jax._src import distributed  # there is no public barrier that can time out

    try:
        distributed.global_state.client.wait_at_barrier("jaxdiff: leaving", _FAREWELL * 1000)  # pyright: ignore
    except Exception:
        print(
            "error: The other processes cannot go on without this one, and will end, too.", file=sys.stderr, flush=True
        )
        sys.stdout.flush()
        os._exit(code)
    return code
