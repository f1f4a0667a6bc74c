"""What a run tells: a progress bar, `metrics.jsonl`, TensorBoard if wanted, and a profile of some of its steps."""

import json
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from jaxdiff.io.storage import copy_into, is_remote, write_text
from jaxdiff.runtime.distributed import leads
from jaxdiff.training.state import Metrics

WARM_UP = 3  # steps before a profile: the first compiles


class Log:
    """Gathers the metrics of each step and writes their means, with images/s and the share of time spent on data.

    Metrics stay on the devices until the next step has begun, so that no step waits for a number. Lines of
    `metrics.jsonl` after `start`, which a killed run may have left, are dropped. Only process 0 writes and talks; all
    of them count. Use it as a context manager.

    Attributes:
        skipped: updates skipped so far, because their loss or gradient was not finite.
        in_a_row: how many of them since the last that was not.
    """

    def __init__(
        self,
        workdir: epath.Path,
        start: int,
        steps: int | None,
        batch_size: int,
        tensorboard: bool = False,
        skipped: Any = (0, 0),
    ) -> None:
        self.in_a_row, self.skipped = map(int, np.asarray(skipped))
        self._batch_size = batch_size
        self._bar = tqdm(
            initial=start, total=steps, unit="step", dynamic_ncols=True, mininterval=1.0, disable=not leads()
        )
        self._path = workdir / "metrics.jsonl"
        self._lines: list[str] = []
        self._file = self._board = None
        if leads():
            self._lines = _lines_until(self._path, start)
            write_text(self._path, "".join(self._lines))
            if not is_remote(self._path):
                self._file = self._path.open("a", encoding="utf-8")
            self._board = _summary_writer(workdir / "tensorboard") if tensorboard else None
        self._paused = 0.0
        self._restart()

    def _restart(self) -> None:
        self._window: list[tuple[Metrics, int]] = []
        self._uncounted: tuple[Any, int] | None = None
        self._waited = 0.0
        self._since = self.trained()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for file in (self._file, self._board):
            if file is not None:
                file.close()

    def step(self, metrics: Metrics, waited: float, n: int = 1) -> None:
        """Takes the metrics of a call of `n` steps, and the seconds that its batches kept the loop waiting.

        Of several steps, metrics have a first axis, of which the first `n` count.
        """
        self.settle()  # which waits for the call before: at most two in flight, honest times, little memory
        self._window.append((metrics, n))
        self._uncounted = metrics["skipped"], n
        self._waited += waited
        self._bar.update(n)

    def settle(self) -> None:
        """Waits for the last call, and counts the updates that were skipped."""
        if self._uncounted is None:
            return
        (skipped, n), self._uncounted = self._uncounted, None
        for one in np.atleast_1d(jax.device_get(skipped))[:n]:
            self.in_a_row = self.in_a_row + 1 if one else 0
            self.skipped += int(one)

    def pause(self, seconds: float) -> None:
        """Leaves time spent on evaluation and saving out of images/s, and out of a run by the clock."""
        self._paused += seconds

    def trained(self) -> float:
        """A clock that stands still in pauses, in seconds from no particular time."""
        return time.perf_counter() - self._paused

    def flush(self, step: int, **values: float) -> dict[str, Any]:
        """Writes the means over the updates made since the last flush, and `values`; returns them."""
        self.settle()
        calls = [(jax.tree.map(np.atleast_1d, metrics), n) for metrics, n in jax.device_get(self._window)]
        window = [{name: values[i] for name, values in metrics.items()} for metrics, n in calls for i in range(n)]
        seconds = max(self.trained() - self._since, 1e-9)
        made = [m for m in window if not m["skipped"]]
        means = {name: float(np.mean([m[name] for m in made])) if made else math.nan for name in (window or [{}])[0]}
        line = {
            "step": step,
            **means,
            **values,
            "skipped": self.skipped,
            "images_per_s": len(window) * self._batch_size / seconds,
            "data_wait_share": self._waited / seconds,
        }
        self._bar.set_postfix_str(f"loss {means.get('loss', float('nan')):.4f}, {line['images_per_s']:.1f} images/s")
        self.write(line)
        self._restart()
        return line

    def write(self, line: dict[str, Any]) -> None:
        """One line of `metrics.jsonl`; `step` is among its values. JSON has no NaN: null takes its place."""
        if not leads():
            return
        text = json.dumps({name: value if math.isfinite(value) else None for name, value in line.items()}) + "\n"
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
        else:  # nothing can be appended to a file in a bucket
            self._lines.append(text)
            write_text(self._path, "".join(self._lines))
        if self._board is not None:
            for name, value in line.items():
                self._board.add_scalar(name, value, line["step"])

    def lines(self) -> list[dict[str, Any]]:
        """The lines written so far, in process 0."""
        text = self._lines if self._file is None else self._path.read_text().splitlines()
        return [json.loads(line) for line in text]

    def say(self, text: str) -> None:
        """A line above the bar."""
        if leads():
            self._bar.write(text)


class Profile:
    """Traces `steps` steps of process 0, from a few after `start` on, into `folder`. Use it as a context manager."""

    def __init__(self, folder: epath.Path, start: int, steps: int) -> None:
        self._folder = folder
        self._first, self._last = start + WARM_UP + 1, start + WARM_UP + steps
        self._on = steps > 0 and leads()
        self._trace = ExitStack()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._trace.close()

    def before(self, step: int) -> None:
        """To be called before each call, of which `step` is the first step."""
        if self._on and step == self._first:
            local = Path(self._folder)
            if is_remote(self._folder):
                local = Path(self._trace.enter_context(tempfile.TemporaryDirectory()))
                self._trace.callback(copy_into, local, self._folder)
            self._trace.enter_context(jax.profiler.trace(str(local)))

    def after(self, step: int, metrics: Metrics, say: Callable[[str], None]) -> None:
        """To be called after each call, of which `step` is the last; says where the trace lies once it is there."""
        if self._on and step == self._last:
            jax.block_until_ready(metrics)
            self._trace.close()
            say(f"Steps {self._first} to {self._last} are traced: pip install xprof; xprof --port 8791 {self._folder}")


def _lines_until(path: epath.Path, step: int) -> list[str]:
    """The whole lines of a metrics file up to and with `step`; what is no line of metrics is left out."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            if line.endswith(b"\n") and json.loads(line.decode())["step"] <= step:
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return kept


def _summary_writer(folder: epath.Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard is on, but tensorboardX is not there: pip install 'jaxdiff[tensorboard]'."
        ) from error
    return SummaryWriter(str(folder))
