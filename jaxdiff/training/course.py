"""How a run is cut into calls of the compiled step, and when it ends."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jaxdiff.config import TrainConfig
from jaxdiff.runtime.mesh import place
from jaxdiff.training.log import WARM_UP, Log


def longest(config: TrainConfig) -> int:
    """Steps of the longest call that there can be."""
    return min(config.steps_per_call, config.log_every, config.eval_every, config.checkpoint_every)


def lengths(config: TrainConfig, start: int) -> Iterator[int]:
    """Steps of each call after step `start`: `steps_per_call`, or as many as there are until something is to be done.

    So everything that happens between steps (evaluations, checkpoints, lines of the log, a profile) happens at the same
    ones whatever `steps_per_call` is. In a run by the clock there is no end.
    """
    every = config.log_every, config.eval_every, config.checkpoint_every
    once = [start + WARM_UP, start + WARM_UP + config.profile] if config.profile else []
    once += [] if config.seconds else [config.steps]
    step = start
    while config.seconds or step < config.steps:
        marks = [step - step % n + n for n in every] + [mark for mark in once if mark > step]
        stop = min(step + longest(config), *marks)
        yield stop - step
        step = stop


class Clock:
    """The time that a run has trained, over all of its starts; process 0's counts in all of them.

    Attributes:
        seconds: the time when it was read last.
    """

    def __init__(self, limit: float, before: Any, everywhere: NamedSharding, log: Log) -> None:
        """Starts `before` seconds in, of `limit`. What `log` pauses for is no training."""
        self.seconds = float(before)
        self._limit, self._everywhere, self._log = limit, everywhere, log
        self._since = log.trained() - self.seconds

    def read(self) -> None:
        """Reads the clock; all processes do so together."""
        seconds = np.float32(self._log.trained() - self._since)
        self.seconds = float(seconds if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(seconds))

    @property
    def progress(self) -> float:
        """The share of the time that is over."""
        return min(1.0, self.seconds / self._limit)

    @property
    def is_over(self) -> bool:
        """Whether the run has had its time."""
        return self.seconds >= self._limit

    def array(self) -> jax.Array:
        """The time as the state holds it."""
        return place(np.float32(self.seconds), self._everywhere)
