"""Clocks and scales: how long a program takes to make and to run, what it needs, and what the machine could do."""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff
from jaxdiff.runtime import memory
from jaxdiff.runtime.programs import give_back_memory
from jaxdiff.tools.chips import CHIPS, chip_name


@dataclass(frozen=True)
class Spread:
    """The middle of repeated measurements and the quarters around it."""

    median: float
    q1: float
    q3: float
    runs: tuple[float, ...]
    """In the order they were made."""

    @classmethod
    def of(cls, runs: Sequence[float]) -> "Spread":
        """Of at least one measurement; quartiles lie between neighbours where they must."""
        q1, median, q3 = (float(q) for q in np.percentile(runs, [25, 50, 75]))
        return cls(median, q1, q3, tuple(runs))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """How many seconds one call takes, to the end of what it started, and what it gave."""
    began = time.perf_counter()
    out = jax.block_until_ready(run())
    return time.perf_counter() - began, out


def seconds(run: Callable[[], Any]) -> float:
    """How long one call takes."""
    return timed(run)[0]


# Making a program -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A compiled program and the seconds that each part of making it took."""

    compiled: Any
    trace: float
    lower: float
    compile: float


def make(f: Any, args: tuple[Any, ...]) -> Made:
    """Traces, lowers and compiles a jitted function for these arguments."""
    began = time.perf_counter()
    traced = f.trace(*args)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    compiled = lowered.compile()
    return Made(compiled, after_trace - began, after_lower - after_trace, time.perf_counter() - after_lower)


# Memory ---------------------------------------------------------------------------------------------------------------


def forget_peak() -> None:
    """Gives back what is not used any more, and where the system can (Linux), counts the process's peak from here."""
    give_back_memory()
    memory.forget_peak()


def peak() -> tuple[int, str]:
    """Bytes at most since `forget_peak`, and whose they are.

    An accelerator's own count starts with the process and is of one device; a CPU's is all that the process holds.
    """
    if stats := jax.local_devices()[0].memory_stats():
        return stats["peak_bytes_in_use"], "device, since the process began"
    if (most := memory.resident_bytes("VmHWM")) is not None:
        return most, "process, during the runs"
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "process, since it began"


# The machine ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """What the devices together can do in a second, and where the figures are from."""

    flops: float
    bandwidth: float
    source: str


def machine() -> dict[str, Any]:
    """What ran it: device and versions."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    return {
        "platform": device.platform,
        "device": _cpu_name() if on_cpu else device.device_kind,
        "cores": cores() if on_cpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jaxdiff": jaxdiff.__version__,  # which a checkout has that is not installed
        **{name: version(name) for name in ("jax", "jaxlib", "flax")},
        "compilation_cache": jax.config.values["jax_compilation_cache_dir"],
    }


def cores() -> int:
    """Of the processor, as many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best(devices: int) -> Peak | None:
    """The peak of so many devices like the first: from the table of chips, or for a CPU measured; else None."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _cpu_peak()
    if (name := chip_name(device.device_kind)) is None:
        return None
    chip = CHIPS[name]
    return Peak(devices * chip.flops, devices * chip.hbm_bandwidth, f"{name}'s data sheet, bfloat16")


@cache
def _cpu_peak() -> Peak:
    """Of the whole processor, whichever way JAX cuts it into devices: the best of some runs each."""
    n = 2048 if cores() <= 8 else 4096
    square = jax.device_put(np.ones((n, n), np.float32))
    product = jax.jit(jnp.matmul).lower(square, square).compile()
    times = [seconds(lambda: product(square, square)) for _ in range(6)]

    parts = np.ones((cores(), 2**26 // cores()), np.float32)  # together larger than caches
    copies = np.empty_like(parts)

    def copy() -> None:
        list(pool.map(np.copyto, copies, parts))

    with ThreadPoolExecutor(cores()) as pool:
        copied = [seconds(copy) for _ in range(4)]
    return Peak(2 * n**3 / min(times), 2 * parts.nbytes / min(copied), "measured: float32 matrix product, copy")


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
