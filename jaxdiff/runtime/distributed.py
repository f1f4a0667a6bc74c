"""One run in several processes: they find each other, compare notes, wait for each other, and end together.

Everything here is a no-op, or next to it, where there is one process.
"""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdiff.config import DistributedConfig

_PATIENCE = 2  # seconds after which a process that waits says so
_BEGIN = 60  # seconds that those who have met need at most until JAX has joined them
_FAREWELL = 10  # seconds that a process which fails waits for the others to fail alike


def initialize(config: DistributedConfig) -> None:
    """Joins the run's other processes; to be called before anything that asks JAX for devices.

    Flags come first. Without them JAX finds the others by itself on TPU pods, GKE, Slurm and Open MPI; it is asked only
    where the environment says that there are any, since asking may mean waiting for a network.

    Where the others do not come in time to a meeting that JAX arranges, the process ends here, with a sentence and exit
    code 2: nothing can interrupt JAX's waiting, at whose end is an abort.

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
    where = f"through {config.coordinator} as {config.index} of {config.count}" if flags else "by the cluster's word"
    remedy = (
        "give --distributed.coordinator HOST:PORT, --distributed.count and --distributed.index, the first two alike."
    )
    wait = config.wait
    if flags:
        meet(config)
        wait = _BEGIN
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # so that CPUs form a cluster, too
    missed = f"The run's other processes were not found {where} within {wait} s: start all of them, or {remedy}"
    try:
        with _exit_after(wait, missed):
            # JAX aborts the process, with C++'s stack, where the others do not come in time: that must not come first.
            jax.distributed.initialize(
                **flags, initialization_timeout=wait + 2 * _FAREWELL, shutdown_timeout_seconds=60
            )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"The run's other processes cannot be found {where} ({reason}): {remedy}") from error
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # Only process 0 finds its programs there. It would be ready long before the others, for which Gloo waits 30 s.
        jax.config.update("jax_enable_compilation_cache", False)


@contextmanager
def _exit_after(seconds: float, sentence: str) -> Iterator[None]:
    """Ends the process with `sentence` and exit code 2 where the block, which nothing can interrupt, takes longer."""

    def leave() -> None:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(2)

    say = threading.Timer(_PATIENCE, _say, [f"Waiting at most {seconds:g} s for the run's other processes."])
    timers = [say, threading.Timer(seconds, leave)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The roll call --------------------------------------------------------------------------------------------------------


def meet(config: DistributedConfig) -> None:
    """Returns once every process of the run has come to process 0, and all agree on who they are.

    JAX itself aborts where one does not come or comes twice, or waits for ever; so processes call each other by their
    numbers first, at the port that JAX will listen at.

    Raises:
        ValueError: in each process that is there, where one is missing for `config.wait` seconds, two have one number,
            or they were given different counts.
    """
    if config.count == 1:
        return
    (_call_roll if config.index == 0 else _answer)(config)


def _call_roll(config: DistributedConfig) -> None:
    """Process 0: takes down who comes, and says to all of them whether the run begins."""
    count, port = config.count or 1, int(config.coordinator.rpartition(":")[2])
    here: dict[int, socket.socket] = {}
    end, announced = time.monotonic() + config.wait, False
    began = time.monotonic()

    def missing() -> str:
        absent = [str(index) for index in range(1, count) if index not in here]
        return f"{', '.join(absent[:10])}{' and others' if len(absent) > 10 else ''} of {count}"

    problem = ""
    try:
        server = _listen(port)
    except OSError as error:
        raise ValueError(
            f"Process 0 cannot listen at port {port} ({error.strerror}): another process with --distributed.index 0, "
            "or another program, does; give each process its own index, or another port."
        ) from error
    try:
        with server:
            server.settimeout(0.2)
            while len(here) < count - 1 and not problem:
                if time.monotonic() > end:
                    problem = (
                        f"Process {missing()} did not come to {config.coordinator} within {config.wait} s: start it."
                    )
                if not announced and time.monotonic() > began + _PATIENCE:
                    _say(f"Waiting at most {config.wait} s for process {missing()} at {config.coordinator}.")
                    announced = True
                try:
                    guest, _ = server.accept()
                except TimeoutError:
                    continue
                problem = _admit(guest, here, count) or problem
    finally:
        for guest in here.values():
            _reply(guest, problem)
    if problem:
        raise ValueError(problem)


def _admit(guest: socket.socket, here: dict[int, socket.socket], count: int) -> str:
    """Takes down one that comes; "" or what is wrong with the run."""
    try:
        guest.settimeout(5)
        said = json.loads(guest.makefile("rb").readline(1000))
        index, theirs = int(said["index"]), int(said["count"])
    except (OSError, ValueError, KeyError, TypeError):  # no process of a run
        guest.close()
        return ""
    problem = ""
    if theirs != count:
        problem = (
            f"Process {index} was given a --distributed.count of {theirs}, and process 0 of {count}: give both one."
        )
    elif index in here and _is_there(here[index]):
        problem = f"Two processes have --distributed.index {index}: give each its own, from 0 to {count - 1}."
    if problem:
        _reply(guest, problem)
    else:
        here[index] = guest
    return problem


def _answer(config: DistributedConfig) -> None:
    """Another process: says who it is, and waits for word from process 0."""
    began = time.monotonic()
    end, announced = began + config.wait, False
    host, port = config.coordinator.rsplit(":", 1)
    reason = "it stopped"
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as link:
                link.sendall(json.dumps({"index": config.index, "count": config.count}).encode() + b"\n")
                word = b""
                while not word:
                    # Process 0 may have come later, and wait longer.
                    link.settimeout(max(0.1, min(end + _FAREWELL, time.monotonic() + 1) - time.monotonic()))
                    try:
                        word = link.makefile("rb").readline(1000)
                        if not word:
                            break  # process 0 is gone; another may come
                    except TimeoutError:
                        if time.monotonic() > end + _FAREWELL:
                            raise ValueError(
                                f"Process 0 at {config.coordinator} had not found all {config.count} processes after "
                                f"{config.wait} s: start those that are missing."
                            ) from None
                        if not announced and time.monotonic() > began + _PATIENCE:
                            _say(f"Waiting at most {config.wait} s for the others of {config.count} processes.")
                            announced = True
            if word:
                return _heed(word, config)
        except (OSError, OverflowError) as error:
            reason = str(error)
        if time.monotonic() > end:
            raise ValueError(
                f"Nothing answers at {config.coordinator} after {config.wait} s ({reason}): is process 0 running, and "
                "can it be reached?"
            )
        if not announced and time.monotonic() > began + _PATIENCE:
            _say(f"Waiting at most {config.wait} s for process 0 at {config.coordinator}.")
            announced = True
        time.sleep(0.2)


def _heed(word: bytes, config: DistributedConfig) -> None:
    """Goes on where process 0 says so."""
    try:
        problem = json.loads(word)["problem"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"What listens at {config.coordinator} is no process 0 that waits for others: the run has begun without "
            f"process {config.index} of {config.count}, or the port is another program's."
        ) from None
    if problem:
        raise ValueError(problem)
    _wait_for(config.coordinator)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _reply(guest: socket.socket, problem: str) -> None:
    """Answers one that came, and lets it hang up first, so that the port is free at once."""
    with guest, suppress(OSError):
        guest.sendall(json.dumps({"problem": problem}).encode() + b"\n")
        guest.settimeout(2)
        guest.recv(1)


def _is_there(guest: socket.socket) -> bool:
    """Whether one that came has not hung up."""
    guest.setblocking(False)
    try:
        return bool(guest.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        guest.settimeout(5)


def _wait_for(coordinator: str, seconds: float = _BEGIN) -> None:
    """Until JAX's service listens there; it would abort the process where nothing does in time."""
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
