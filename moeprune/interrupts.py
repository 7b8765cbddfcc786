"""SIGINT and SIGTERM as an exception that leaves nothing half done. Imports nothing heavy."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The process was asked to end. Not an :class:`Exception`, so that nothing takes it for a failure of its own.

    Attributes:
        signum: The signal.
        note: What was kept and how to go on, for the person who reads the message.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum
        self.note = ""

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}. {self.note}".rstrip()

    @property
    def status(self) -> int:
        """Exit status, as a shell has it for a process that a signal ended."""
        return 128 + self.signum


class Signals:
    """What arrived so far; see :func:`interruptible`."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._held = False
        self._raised = False

    def handle(self, signum: int, frame: FrameType | None = None) -> None:
        """Note a signal and raise :class:`Interrupted`, once and not inside :meth:`held`."""
        self._received = self._received or signum
        self._raise()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no signal interrupt the block: one that arrives inside is raised at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self._raise()

    def _raise(self) -> None:
        # Launchers repeat the signal that a terminal already sent to everybody; saving must survive the second one.
        if self._received is not None and not self._held and not self._raised:
            self._raised = True
            raise Interrupted(self._received)


@contextmanager
def interruptible() -> Iterator[Signals]:
    """Turn SIGINT and SIGTERM into :class:`Interrupted` inside the block; elsewhere than in the main thread do nothing.

    Raises:
        Interrupted: Once, at the first signal; later ones are ignored until the block ends.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {signum: signal.signal(signum, signals.handle) for signum in SIGNALS}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
