"""Signals that end a run at a whole step, in every process at the same one."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

T = TypeVar("T")


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

    @property
    def received(self) -> signal.Signals | None:
        """The signal that this process received, where it is the only one."""
        return self._received[0] if self._received and not self._several else None

    def unless_stopped(self, work: Callable[[], T]) -> T | None:
        """What `work` returns, or None as soon as there is a signal: then `work` is left to itself, on its thread.

        A program that compiles or computes cannot be interrupted, but it can be left. Of several processes, where the
        others would not know, `work` is done to its end.
        """
        if self._several:
            return work()
        if self._received:
            return None
        done: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                done.append(work())
            except BaseException as error:  # it belongs to the thread that waits
                failed.append(error)

        thread = threading.Thread(target=run, name=_LEFT, daemon=True)
        thread.start()
        while thread.is_alive() and not self._received:
            thread.join(0.05)
        if self._received:
            return None
        if failed:
            raise failed[0]
        return done[0]

    def at(self, step: int) -> signal.Signals | None:
        """The signal that ends the run after `step`, the same in all processes; each asks once a step."""
        if self._several:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self._received[0] if self._received else None


_LEFT = "left by jaxdiff.training.stop"


def leave_threads(code: int) -> int:
    """`code`, to exit with; where work was left on its thread, the process ends here and now, and does not wait."""
    if any(thread.name == _LEFT for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
