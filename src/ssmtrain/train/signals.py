"""Signals: a handler only sets a flag; the step boundary reads it on all ranks and saves there."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from ssmtrain.config import launched
from ssmtrain.config.errors import FINISHED, INTERRUPTED, UNFINISHED

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """Whether this process was asked to stop; a second Ctrl-C ends it at once with exit code 130."""

    def __init__(self) -> None:
        self.asked: str | None = None
        """Name of the first signal that asked, such as SIGTERM."""
        self.training = False
        """Whether there is a step to finish; before that a signal ends the process: nothing is lost."""
        self.at_once: Callable[[], None] = lambda: None
        """Called before a signal ends the process: ends the ranks that it started."""
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the signals; called again after Lightning has set its own handlers, which it replaces.

        Lightning's SIGTERM handler would broadcast inside the handler and end the process with code 0.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOPPING:
            before = signal.signal(number, self._handle)
            self._before.setdefault(number, before)

    def ignore(self) -> None:
        """Let no signal disturb the end of a process that has saved: srun ends the ranks after the first."""
        if self._before:
            for number in STOPPING:
                signal.signal(number, signal.SIG_IGN)
            self._before.clear()

    def restore(self) -> None:
        """Put back the handlers that were there before the first install."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.training:
            _say(f"{name} before the first step: nothing is lost, the same command starts again")
            self.at_once()
            # Rank 0 speaks for the run. The others may be ended because it failed: that is no planned stop.
            os._exit(FINISHED if launched.rank() else UNFINISHED)
        elif self.asked is None:
            self.asked = name
            _say(
                f"{name}: finishing this step, then saving"
                + (" (again to stop at once)" if number == signal.SIGINT else "")
            )
        elif number == signal.SIGINT:
            _say("stopping at once; the last saved checkpoint stays good")
            self.at_once()
            os._exit(INTERRUPTED)


def _say(text: str) -> None:
    # print() may be in the middle of a line of its own: a handler writes to the descriptor.
    if launched.rank() == 0:
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"\nssmtrain: {text}\n".encode())
