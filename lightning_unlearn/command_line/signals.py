"""SIGINT and SIGTERM end a command soon, with "stopped." and 130 or 143; what is finished is on disk already.

The handler raises :class:`Stopped` wherever the command is, so that everything is closed on the way out. Where the main
thread can't be reached (it computes, or waits for another process), a second thread, which hears of the signal by the
interpreter's wakeup descriptor, ends the process after a grace of two seconds: files are written whole or not at all.
So it does where what was raised got lost, as in a finaliser or in a library that takes any exception for its own.

A training of the user's own, in ``fit``, is Lightning's: on SIGTERM it ends after the batch that it is in, with
the callbacks that a user has for it, and SLURM's signal for a requeue is not touched at all.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 2.0
# What a process of a command tells the processes that Lightning's launcher starts for it: who it is.
PARENT = "LIGHTNING_UNLEARN_PARENT"
_PARENT_DIED = 1  # PR_SET_PDEATHSIG


class Stopped(BaseException):
    """A signal asks the command to end. No ``Exception``, so that nobody takes it for a failure of a shard.

    Args:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stop:
    """Whether a signal has come, and what is done then.

    Args:
        program: Whether this process is there for the command alone, so that it may be ended at once.

    Attributes:
        signal: The first signal that came.
    """

    def __init__(self, program: bool) -> None:
        self.signal: int | None = None
        self._program = program
        self._process = os.getpid()
        self._tell: Callable[[int], None] | None = None
        self._of_lightning = False
        self._over = threading.Event()
        self._before: dict[int, Any] = {}
        self._ends: tuple[int, int] | None = None
        self._show_ignored = sys.unraisablehook

    @property
    def status(self) -> int:
        """The exit status. A process that another one of the command started leaves it to that one to say what came."""
        assert self.signal is not None
        return 0 if started_by_another() else 128 + self.signal

    def start(self) -> None:
        """Take the signals, but one that whoever started the process had it ignore, as ``nohup`` does."""
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._handle)
        sys.unraisablehook = self._ignored
        if self._program:
            self._ends = os.pipe()
            os.set_blocking(self._ends[1], False)
            signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def finish(self) -> None:
        """Give the signals back; a program that was asked to end stays watched until it has."""
        if self.signal is not None and self._program:
            return
        self._over.set()
        sys.unraisablehook = self._show_ignored
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._ends is not None:
            signal.set_wakeup_fd(-1)
            os.write(self._ends[1], b"\0")

    def take_back(self) -> None:
        """Come before Lightning's own handler of SIGTERM, which would wait for the other ranks."""
        if signal.SIGTERM in self._before and not self._of_lightning:
            signal.signal(signal.SIGTERM, self._handle)

    def leave_to_lightning(self) -> None:
        """From now on SIGTERM ends a fit the way Lightning does, and nobody ends the process while it cleans up."""
        self._of_lightning = True

    def tell_others(self, kill: Callable[[int], None]) -> None:
        """Processes that are to end with this one.

        Args:
            kill: Sends them a signal.
        """
        self._tell = kill

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, self.signal or number
        if again and number == signal.SIGTERM:
            return
        if self._tell is not None:
            self._tell(number)
        if self._of_lightning and number == signal.SIGTERM and signal.getsignal(number) != self._handle:
            return  # Lightning has composed this handler with its own
        raise Stopped(number)

    def _ignored(self, lost: sys.UnraisableHookArgs) -> None:
        """Say what Python says of an exception that nobody can take, but not of a signal that came in a finaliser."""
        if lost.exc_type is not Stopped:
            self._show_ignored(lost)

    def _watch(self) -> None:
        assert self._ends is not None
        while not self._over.is_set():
            for number in os.read(self._ends[0], 64):
                if number in SIGNALS and not self._of_lightning:
                    self.signal = self.signal or number
                    if not self._over.wait(GRACE):
                        self.say()
                        os._exit(self.status)
        for end in self._ends:
            os.close(end)

    def say(self) -> None:
        """Tell the person, once for all processes of the command, and the process that started this one."""
        ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
        if not any(rank != "0" for rank in ranks):
            print("lightning-unlearn: stopped.", file=sys.stderr, flush=True)
        if self.signal is not None and started_by_another():
            # Whoever stops one process of a run stops the run: the others would wait for it.
            os.kill(os.getppid(), self.signal)


_current: Stop | None = None


def started_by_another() -> bool:
    """Whether Lightning's launcher started this process for one of the same command.

    Returns:
        Whether it did, and that one lives.
    """
    return os.environ.get(PARENT) == str(os.getppid())


@contextmanager
def stoppable(*, program: bool) -> Iterator[Stop]:
    """While it lasts, SIGINT and SIGTERM end what runs.

    Args:
        program: Whether this process is there for the command alone.

    Yields:
        What came.
    """
    global _current
    stop = Stop(program)
    if threading.current_thread() is not threading.main_thread():  # only that one may take signals
        yield stop
        return
    if program:
        os.register_at_fork(after_in_child=_in_a_fork)
    if started_by_another() and sys.platform == "linux":
        # However the first process ends, the others don't stay behind.
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGTERM)
    stop.start()
    _current = stop
    try:
        yield stop
    finally:
        _current = None
        stop.finish()


def _in_a_fork() -> None:
    """A worker of a loader ends when its parent says so, and must not wake that one up."""
    if _current is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def current_stop() -> Stop | None:
    """What ends the command that runs.

    Returns:
        It; ``None`` where no command runs, as in a script that uses the classes.
    """
    return _current
