"""A race with diffusers on torch: the same work with the same weights, each in a process of its own.

Threads of a process go on spinning after its turn, and take the cores from the other, so one waits until the other has
come to rest, and how far it stayed so is told with the figures.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.runtime.memory import forget_peak, resident_bytes
from jaxdiff.tools.bench import peer
from jaxdiff.tools.bench.measure import Spread, cores, seconds
from jaxdiff.tools.bench.targets import Setting, Work


@dataclass(frozen=True)
class Versus:
    """Pairs of runs, one of ours and one of theirs after the other."""

    against: str
    layout: str
    """Of torch's memory: the faster of its two was taken."""
    threads: int | None
    """Of both, on a CPU."""
    first: float
    """Seconds of their first call, after the layout was chosen; it compiles, where they compile."""
    seconds: Spread
    ratio: Spread
    """Our time over theirs, pair by pair."""
    error: float
    error_of: str
    peak_memory: int | None = None
    """Bytes that their process held at most during the pairs; None on a device, or where the system does not say."""
    alive: tuple[int | None, int | None] | None = None
    """Threads of our process and of theirs; None where the system does not say, as with all that follows."""
    beside: float | None = None
    """Of a core, what the process that waited took at most during the other's turn."""
    load: float | None = None
    """Of the machine in the last minute, in processes that want to run."""
    clock: float | None = None
    """Of the cores in the mean, in hertz."""


def check_torch() -> None:
    """Refuses in a sentence where torch or diffusers is missing, before anything is measured."""
    for name in ("torch", "diffusers"):  # not imported yet: our own memory is measured without them
        if find_spec(name) is None:
            raise ValueError(f"--vs needs {name}, which is not installed: pip install 'jaxdiff[parity]'.")
    if jax.default_backend() not in ("cpu", "gpu"):
        raise ValueError(f"--vs compares on CPUs and NVIDIA GPUs; torch has no backend for {jax.default_backend()}.")


def versus(
    target: str,
    setting: Setting,
    work: Work,
    ours: Callable[[], Any],
    our_first: Any,
    *,
    runs: int,
    warmup: int,
    compiled: bool,
) -> Versus:
    """Alternates `ours` with diffusers' program for the same work.

    Args:
        target: its name.
        setting: the model and the sizes.
        work: our program; its `inputs` are theirs, too, and its weights are what they read or draw themselves.
        ours: runs it once.
        our_first: what it gave at first.
        runs: pairs.
        warmup: their runs before these, after the first.
        compiled: whether torch.compile makes their program.

    Raises:
        ValueError: where the other process says that it cannot, or ends.
    """
    with _opponent(_brief(target, setting, work, compiled)) as (pid, ask):
        made = ask(None)
        error, error_of = _error(target, our_first, made.out)
        for _ in range(warmup):
            ask("run")
        forget_peak(pid)
        turns = {"ours": (lambda: seconds(ours), pid), "theirs": (lambda: ask("run"), os.getpid())}
        theirs, ratios, beside = [], [], []
        for i in range(runs):
            times = {}
            for name in ("ours", "theirs") if i % 2 == 0 else ("theirs", "ours"):  # neither always comes second
                turn, waiting = turns[name]
                _rest(pid, os.getpid())
                before = _cpu_seconds(waiting)
                times[name] = turn()
                after = _cpu_seconds(waiting)
                if before is not None and after is not None:
                    beside.append((after - before) / times[name])
            theirs.append(times["theirs"])
            ratios.append(times["ours"] / times["theirs"])
        alive = _threads(os.getpid()), _threads(pid)
        peak = resident_bytes("VmHWM", pid) if jax.default_backend() == "cpu" else None
    return Versus(
        against=made.name,
        layout=made.layout,
        threads=made.threads,
        first=made.first,
        seconds=Spread.of(theirs),
        ratio=Spread.of(ratios),
        error=error,
        error_of=error_of,
        peak_memory=peak,
        alive=alive,
        beside=max(beside, default=None),
        load=_load(),
        clock=_clock(),
    )


def _brief(target: str, setting: Setting, work: Work, compiled: bool) -> peer.Brief:
    inputs: dict[str, Any] = work.inputs
    if target == "train":
        assert work.config is not None
        inputs = {"seen": _example(setting, work), "optim": work.config.optim, "steps": work.config.steps}
    host = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, inputs)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return peer.Brief(
        target, setting.model, setting.size, setting.dtype, device, cores(), setting.options, host, compiled
    )


@contextmanager
def _opponent(brief: peer.Brief) -> Iterator[tuple[int, Callable[[Any], Any]]]:
    """Their process: its number, and a function that sends it a message, or with None waits for its first answer."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=peer.serve, args=(there, brief), daemon=True)
    process.start()
    there.close()

    def ask(message: Any) -> Any:
        try:
            if message is not None:
                here.send(message)
            answer = here.recv()
        except (EOFError, OSError):
            process.join()
            raise ValueError(f"The process of torch's program ended (exit code {process.exitcode}); its own message is "
                             "above. Use a smaller --batch or --size, or leave out --vs.") from None  # fmt: skip
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        assert process.pid is not None
        yield process.pid, ask
    finally:
        here.close()
        process.join(10)
        process.kill()


# Both at rest ---------------------------------------------------------------------------------------------------------

PAUSE, LONGEST = 0.05, 3.0
"""Seconds: a process that takes less than a tenth of these rests; and how long that is waited for."""


def _rest(*pids: int) -> None:
    """Waits until the processes do nothing, which threads that spin for more work take some time for."""
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        before = [_cpu_seconds(pid) for pid in pids]
        time.sleep(PAUSE)
        after = [_cpu_seconds(pid) for pid in pids]
        if None in before + after or all(b - a < PAUSE / 10 for a, b in zip(before, after, strict=True)):  # pyright: ignore
            return


def _cpu_seconds(pid: int) -> float | None:
    """What a process has taken of all cores; None where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _threads(pid: int) -> int | None:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return None


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _clock() -> float | None:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return 1e6 * float(np.mean(clocks)) if clocks else None


# What is compared -----------------------------------------------------------------------------------------------------


def _error(target: str, ours: Any, theirs: Any) -> tuple[float, str]:
    """How far the two results are apart."""
    if target == "sample":
        difference = np.abs(np.asarray(ours, np.float64) - 255 * theirs)
        return float(difference.mean()), "mean difference of pixels, of 255"
    if target == "train":
        pairs = [(float(ours[name]), theirs[name]) for name in ("loss", "grad_norm")]
        return max(abs(a - b) / abs(b) for a, b in pairs), "relative difference of the first loss and gradient norm"
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)), "relative error of the output"


def _example(setting: Setting, work: Work) -> dict[str, jax.Array]:
    """What our loss shows the UNet at the first step, and what it wants of it.

    The loss is asked itself: with a constant in place of the UNet's answer it says, by its gradient there, what the
    answer should have been.
    """
    task, frozen, batch = (work.inputs[name] for name in ("task", "frozen", "batch"))
    seen: dict[str, jax.Array] = {}
    answer = jnp.zeros(setting.latent)

    def loss(answer: jax.Array) -> jax.Array:
        def intercept(next_fn: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            if isinstance(context.module, UNet2DConditionModel) and context.method_name == "__call__":
                seen.update(zip(("x", "t", "context"), args, strict=True))
                return answer
            return next_fn(*args, **kwargs)

        with nn.intercept_methods(intercept):
            step_key = jax.random.fold_in(jax.random.key(0), 0)
            return task.loss({"unet": work.raw["unet"]}, frozen, batch, step_key, task.memory)[0]

    wanted = jax.grad(loss)(answer) * (-answer.size / 2)
    return seen | {"target": wanted}
