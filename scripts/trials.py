"""Draws docs/training-trials.png from docs/training-trials.json: the error of the guess against images seen and time.

`python scripts/trials.py`, with `pip install -e '.[plot]'`.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Draws."""
    trials = json.loads((DOCS / "training-trials.json").read_text())
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for trial in trials:
        points = trial["points"]
        for axis, key in ((left, "images"), (right, "cpu_seconds")):
            known = [(point[key], point["error"]["30"]) for point in points if point.get(key)]
            if known:
                axis.plot(*zip(*known, strict=True), marker="o", label=trial["name"])
    left.set(xlabel="images seen", ylabel="error of the guess at sigma 30", xscale="log", yscale="log")
    right.set(xlabel="CPU-seconds (two quiet cores give two a second)", xscale="log")
    ticks = 0.2, 0.3, 0.4, 0.6, 0.8
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    right.set_xticks([160, 1100, 5400], ["160", "1,100", "5,400"])
    for axis in (left, right):
        axis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
    left.legend(fontsize=7)
    figure.savefig(DOCS / "training-trials.png", dpi=90)


if __name__ == "__main__":
    main()
