"""What a run tells: a progress bar, `metrics.jsonl`, and TensorBoard if wanted."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxdiff.training.state import Metrics


class Log:
    """Gathers the metrics of each step and writes their means, with images/s and the share of time spent on data.

    Metrics stay on the devices until `flush`, so that no step waits for a number. Lines of `metrics.jsonl` after
    `start`, which a killed run may have left, are dropped. Use it as a context manager.
    """

    def __init__(self, workdir: Path, start: int, steps: int, batch_size: int, tensorboard: bool = False) -> None:
        path = workdir / "metrics.jsonl"
        partial = path.with_name("metrics.jsonl.partial")
        partial.write_bytes(b"".join(_lines_until(path, start)))
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")
        self._board = _summary_writer(workdir / "tensorboard") if tensorboard else None
        self._bar = tqdm(initial=start, total=steps, unit="step", dynamic_ncols=True, mininterval=1.0)
        self._batch_size = batch_size
        self._restart()

    def _restart(self) -> None:
        self._window: list[Metrics] = []
        self._waited = 0.0
        self._paused = 0.0
        self._since = time.perf_counter()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def step(self, metrics: Metrics, waited: float) -> None:
        """Takes the metrics of a step and the seconds that its batch kept the loop waiting."""
        if self._window:
            jax.block_until_ready(self._window[-1]["loss"])  # at most two steps in flight: honest times, little memory
        self._window.append(metrics)
        self._waited += waited
        self._bar.update()

    def pause(self, seconds: float) -> None:
        """Leaves time spent on evaluation and saving out of images/s."""
        self._paused += seconds

    def flush(self, step: int, **values: float) -> dict[str, Any]:
        """Writes the means since the last flush, and `values`; returns them."""
        window = jax.device_get(self._window)
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        means = {name: float(np.mean([m[name] for m in window])) for name in (window[0] if window else ())}
        line = {
            "step": step,
            **means,
            **values,
            "images_per_s": len(window) * self._batch_size / seconds,
            "data_wait_share": self._waited / seconds,
        }
        self._bar.set_postfix_str(f"loss {means.get('loss', float('nan')):.4f}, {line['images_per_s']:.1f} images/s")
        self.write(line)
        self._restart()
        return line

    def write(self, line: dict[str, Any]) -> None:
        """One line of `metrics.jsonl`; `step` is among its values. JSON has no NaN: null takes its place."""
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                self._board.add_scalar(name, value, line["step"])

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text)


def _lines_until(path: Path, step: int) -> list[bytes]:
    """The whole lines of a metrics file up to and with `step`; what is no line of metrics is left out."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            if line.endswith(b"\n") and json.loads(line.decode())["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return kept


def _summary_writer(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard is on, but tensorboardX is not there: pip install 'jaxdiff[tensorboard]'."
        ) from error
    return SummaryWriter(str(folder))
