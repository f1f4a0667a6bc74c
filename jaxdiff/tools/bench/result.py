"""What a measurement gives, and how it is written, told, compared and drawn."""

import errno
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxdiff.config import load_json
from jaxdiff.tools.bench.measure import Spread
from jaxdiff.tools.bench.versus import Versus

FORMAT = 1
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Result:
    """One target at one batch. Rates are of all devices together, unless they are named otherwise.

    What a loader does not have, which is no program, is None.
    """

    target: str
    model: str
    batch: int
    size: int
    """Pixels along each side."""
    dtype: str
    devices: int
    mesh: dict[str, int]
    options: dict[str, Any]
    first: float
    """Seconds of the first call, of the compiled program."""
    seconds: Spread
    """Of the calls after it and those that warm up."""
    images_per_second: float
    images_per_second_per_device: float
    peak_memory: int
    peak_memory_of: str
    trace: float | None = None
    """Seconds, as are the next two."""
    lower: float | None = None
    compile: float | None = None
    flops: int | None = None
    """Of the networks' mathematics: see `flops`."""
    xla_flops: float | None = None
    """Of the compiled program, as XLA counts; None where a loop has a number of turns that it does not know."""
    flops_per_second: float | None = None
    peak_share: float | None = None
    """Of the operations that the machine could do, those of `flops` that it did."""
    bytes_moved: float | None = None
    """To and from main memory, by the compiled program's text."""
    bandwidth_share: float | None = None
    peak_source: str | None = None
    temporaries: int | None = None
    """Bytes of each device that the program needs besides its arguments and results, as the compiler says."""
    wait_share: float | None = None
    """Of the time, that spent waiting for input; None where there is none to wait for."""
    versus: tuple[Versus, ...] = ()


def write(path: Path, machine: dict[str, Any], date: str, results: Sequence[Result]) -> None:
    """All results of one command, as JSON."""
    values = {"format": FORMAT, "date": date, "machine": machine, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_writable(option: str, path: Path, is_folder: bool = False) -> None:
    """Refuses in a sentence what cannot be written, before anything is measured; makes the folder that it lies in."""
    folder = path if is_folder else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.is_dir() != is_folder and path.exists():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise ValueError(f"--{option} {path} cannot be written: {error.strerror}.") from error


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        ValueError: where the file is missing, no JSON, or no benchmark's.
    """
    values = load_json(path)
    results = values.get("results")
    if values.get("format") != FORMAT or not isinstance(results, list) or not results:
        raise ValueError(f"{path} holds no results of this benchmark; write one by --json {path}.")
    for result in results:
        named = isinstance(result, dict) and {"target", "model", "batch", "size", "seconds"} <= result.keys()
        times = result["seconds"] if named and isinstance(result["seconds"], dict) else {}
        if not all(isinstance(times.get(name), int | float) and times[name] > 0 for name in ("q1", "median", "q3")):
            raise ValueError(f"{path} holds a result that is damaged: measure again by --json {path}.")
    return values


# In words -------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """With three digits that count."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def scaled(value: int | float, unit: str) -> str:
    """With three digits that count and the prefix that suits it."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def spread(times: Spread) -> str:
    """Median, and quartiles in brackets."""
    return f"{duration(times.median)} ({duration(times.q1)} to {duration(times.q3)}, {len(times.runs)} runs)"


def report(result: Result) -> str:
    """One result in words."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in result.mesh.items())
    where = f"{result.devices} devices ({mesh})" if result.devices > 1 else "1 device"
    options = "".join(f", {name} {value}" for name, value in result.options.items() if value not in (None, False))
    rows = [
        f"{result.target} {result.model}, batch {result.batch}, {result.size} pixels, {result.dtype}, {where}{options}"
    ]

    def row(name: str, text: str) -> None:
        rows.append(f"  {name:<22}{text}")

    if result.compile is not None and result.trace is not None and result.lower is not None:
        row("to make it", f"{duration(result.trace + result.lower + result.compile)} (trace {duration(result.trace)}, "
                          f"lower {duration(result.lower)}, compile {duration(result.compile)})")  # fmt: skip
    row("first call", duration(result.first))
    row("then", spread(result.seconds))
    rate, each = result.images_per_second, result.images_per_second_per_device
    row("images/s", f"{rate:.4g}" + (f" ({each:.4g} a device)" if result.devices > 1 else ""))
    if result.flops and result.flops_per_second:
        xla = f"; XLA counts {scaled(result.xla_flops, 'FLOP')}" if result.xla_flops else ""
        share = f", {result.peak_share:.0%} of peak" if result.peak_share else ""
        row("operations", f"{scaled(result.flops, 'FLOP')}{xla}")
        row("", f"{scaled(result.flops_per_second, 'FLOP/s')}{share}")
    if result.bytes_moved:
        share = f", {result.bandwidth_share:.0%} of bandwidth" if result.bandwidth_share else ""
        row("memory traffic", f"{scaled(result.bytes_moved, 'B')}{share}")
    if result.peak_source and (result.peak_share or result.bandwidth_share):
        row("", f"(peak: {result.peak_source})")
    temporaries = f"; {scaled(result.temporaries, 'B')} temporary" if result.temporaries is not None else ""
    row("peak memory", f"{scaled(result.peak_memory, 'B')} ({result.peak_memory_of}){temporaries}")
    if result.wait_share is not None:
        row("waiting for input", f"{result.wait_share:.1%}")
    for rival in result.versus:
        threads = f", {rival.threads} threads" if rival.threads else ""
        row("against", f"{rival.against} ({rival.layout}{threads})")
        memory = "" if rival.peak_memory is None else f", {scaled(rival.peak_memory, 'B')} at most"
        row("  theirs", f"{spread(rival.seconds)}{memory}")
        ratio = rival.ratio
        row("  ours / theirs", f"{ratio.median:.3f} ({ratio.q1:.3f} to {ratio.q3:.3f}, {len(ratio.runs)} pairs)")
        told = {
            "threads alive {0[0]} and {0[1]}": rival.alive,
            "the one that waits takes {:.1%} of a core at most": rival.beside,
            "load {:.1f}": rival.load,
            "{:.2f} GHz": None if rival.clock is None else rival.clock / 1e9,
        }
        row("  each alone", ", ".join(text.format(value) for text, value in told.items() if value is not None))
        row("  differ by", f"{rival.error:.2g} ({rival.error_of})")
    return "\n".join(rows)


# Compared -------------------------------------------------------------------------------------------------------------


def compare(a: Path, b: Path) -> str:
    """The ratios of times of two files, for what both have measured: under 1 is faster in `b`.

    Raises:
        ValueError: where a file is none of ours, or they share nothing.
    """
    before, after = ({_key(result): result for result in read(path)["results"]} for path in (a, b))
    shared = [key for key in before if key in after]
    if not shared:
        raise ValueError(f"{a} and {b} have no target, model, batch and size in common: there is nothing to compare.")
    lines = [f"time of {b} over that of {a} (under 1: {b} is faster)"]
    for key in shared:
        old, new = before[key], after[key]
        target, model, batch, size = key
        ratio = _ratio(old, new, ("seconds", "median"))
        apart = "" if _apart(old, new) else "   (their quartiles overlap)"
        lines.append(f"  {target} {model}, batch {batch}, {size} pixels".ljust(44) + f"{ratio:.3f}{apart}")
        for name in ("compile", "peak_memory"):
            ratio = _ratio(old, new, (name,))
            if math.isfinite(ratio):
                lines.append(f"    {name.replace('_', ' ')}".ljust(44) + f"{ratio:.3f}")
        differing = [f"{name} {old.get(name)} -> {new.get(name)}" for name in ("dtype", "devices", "options")
                     if old.get(name) != new.get(name)]  # fmt: skip
        if differing:
            lines.append(f"    they are not alike: {', '.join(differing)}")
    alone = [*(key for key in before if key not in after), *(key for key in after if key not in before)]
    lines += [f"  {' '.join(map(str, key))}: in one file only" for key in alone]
    return "\n".join(lines)


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(str(result[name]) for name in ("target", "model", "batch", "size"))


def _ratio(old: dict[str, Any], new: dict[str, Any], path: tuple[str, ...]) -> float:
    for name in path:
        old, new = (values.get(name) if isinstance(values, dict) else None for values in (old, new))  # pyright: ignore
    numbers = all(isinstance(value, int | float) and value > 0 for value in (old, new))
    return new / old if numbers else math.nan  # pyright: ignore[reportOperatorIssue]


def _apart(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether the middle halves of both have nothing in common."""
    (a1, a3), (b1, b3) = ((times["q1"], times["q3"]) for times in (old["seconds"], new["seconds"]))
    return a3 < b1 or b3 < a1


# Drawn ----------------------------------------------------------------------------------------------------------------


def check_plot(path: Path) -> None:
    """Refuses in a sentence what `plot` cannot draw, before anything is measured."""
    if path.suffix not in PICTURES:
        raise ValueError(f"--plot {path} must end in one of {', '.join(PICTURES)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'jaxdiff[plot]'.") from error


def plot(path: Path, machine: dict[str, Any], results: Sequence[Result]) -> None:
    """Throughput against batch, with quartiles, ours and theirs, as an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, Spread]]] = {"jaxdiff": [(r.batch, r.seconds) for r in results]}
    for result in results:
        for rival in result.versus:
            lines.setdefault(rival.against, []).append((result.batch, rival.seconds))
    for name, points in lines.items():
        points = sorted(points, key=lambda point: point[0])
        batches = [batch for batch, _ in points]
        rates = [batch / times.median for batch, times in points]
        below = [batch / times.median - batch / times.q3 for batch, times in points]
        above = [batch / times.q1 - batch / times.median for batch, times in points]
        axes.errorbar(batches, rates, yerr=(below, above), marker="o", capsize=3, label=name)
    first = results[0]
    axes.set_xscale("log", base=2)
    axes.set_xticks([r.batch for r in results], [str(r.batch) for r in results])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch")
    axes.set_ylabel("images/s")
    axes.set_title(
        f"{first.target} {first.model}, {first.size} pixels, {first.dtype}\n{machine['device']}", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
