"""Pictures of a run's numbers, by matplotlib."""

import io
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any


def can_plot() -> bool:
    """Whether matplotlib is installed: `pip install 'jaxdiff[plot]'`."""
    return find_spec("matplotlib") is not None


def plot_metrics(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """A PNG of what `metrics.jsonl` holds: the loss, and where they were measured the errors of the guess, by noise
    level with full captions, and at the highest level by what captions tell.
    """
    from matplotlib.figure import Figure

    found = list(lines)
    names = sorted({name for line in found for name in line if re.fullmatch(r"error_[a-z]+_[\d.]+", name)})
    levels = sorted({float(name.rpartition("_")[2]) for name in names})
    kinds = list(dict.fromkeys(name.split("_")[1] for name in names))
    figure = Figure(figsize=(15 if levels else 5, 4), layout="constrained")
    axes = figure.subplots(1, 3 if levels else 1, squeeze=False)[0]

    def curve(axis: Any, name: str, label: str) -> None:
        points = [(line["step"], line[name]) for line in found if line.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=label)

    curve(axes[0], "loss", "loss")
    axes[0].set(title="loss", yscale="log")
    if levels:
        for level in levels:
            curve(axes[1], f"error_full_{level:g}", f"sigma {level:g}")
        axes[1].set(title="error of the guess, full captions", yscale="log")
        for kind in kinds:
            curve(axes[2], f"error_{kind}_{levels[-1]:g}", kind)
        axes[2].set(title=f"error of the guess at sigma {levels[-1]:g}, by caption")
    for axis in axes:
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()
