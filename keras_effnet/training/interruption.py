"""Ctrl-C between two steps, never within one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interruption:
    """Whether somebody asked the training to stop.

    Attributes:
        asked: Set by the first Ctrl-C (or SIGTERM, which clusters send before they kill).
    """

    asked = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second one interrupts at once.

    In the middle of a step, variables may be half-updated: the step is finished first. Outside
    the main thread, where signals cannot be caught, nothing is changed.

    Yields:
        The flag.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def ask(number: int, frame: object) -> None:
        if interruption.asked:
            raise KeyboardInterrupt
        interruption.asked = True

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
