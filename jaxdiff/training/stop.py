"""Signals that end a run at a whole step, in every process at the same one."""

import os
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stop:
    """While it is entered, SIGTERM, SIGINT and SIGHUP end the run at a whole step; a second one ends it at once.

    Where there are several processes, JAX's preemption service hears a SIGTERM to any of them and names a step that all
    can still reach; SIGINT is handed to it as one.
    """

    def __init__(self) -> None:
        self._received: list[signal.Signals] = []
        self._several = jax.process_count() > 1

    def __enter__(self) -> "Stop":
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._receive)}
        if not self._several:  # else SIGTERM is JAX's
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._receive)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a terminal that closes; nohup has it ignored
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received.append(signal.Signals(number))
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def at(self, step: int) -> signal.Signals | None:
        """The signal that ends the run after `step`, the same in all processes; each asks once a step."""
        if self._several:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self._received[0] if self._received else None
