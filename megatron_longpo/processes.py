"""How processes end: children with their parent, ranks with a message. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_RANK_0_SPEAKS_FIRST_S = 15.0
_CLEAN_UP_S = 10.0
"""Below the 30 s after which torchrun kills."""


def die_with_parent(how: signal.Signals = signal.SIGTERM) -> None:
    """Let the kernel end this process when its parent ends, also by ``kill -9``; on Linux, elsewhere nothing.

    Args:
        how: The signal that ends it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid != os.getppid():  # it has ended already
            signal.raise_signal(how)


def outlive_sigterm() -> None:
    """End with the parent and not before: schedulers such as Slurm send SIGTERM to every process of a job at once.

    For helpers that a rank still needs when it saves and leaves (``--exit-signal-handler``).
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)


def leave(code: int, say: Callable[[], None]) -> NoReturn:
    """End this rank with a message that all ranks have, said once.

    torchrun ends every rank as soon as one has left. So rank 0 speaks and leaves at once, and the others wait to be
    ended; a rank that is still there after a while was alone with its message, and says it.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_RANK_0_SPEAKS_FIRST_S)
    try:
        say()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    end(code)


def is_rank() -> bool:
    """Whether torchrun, or something like it, started this process."""
    return "RANK" in os.environ


def end(code: int) -> NoReturn:
    """End this process after a mistake or an interruption.

    A rank ends at once: on its way out, Python frees process groups, which may wait for other ranks for ever.
    """
    if is_rank():
        end_without_threads(code)
    sys.exit(code)


def end_without_threads(code: int) -> NoReturn:
    """End this process now, whatever its threads wait for.

    An interruption at the wrong moment leaves behind the thread of a library, such as aiosqlite's, whose connection
    nobody got to close; Python would wait for it for ever. What it holds must bear being killed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


class FirstInterrupt:
    """A signal handler that raises KeyboardInterrupt once, so that nothing interrupts what then cleans up.

    Second signals are common: schedulers and launchers pass on what a process has received already, and people press
    Ctrl-C twice. Where cleaning up takes longer than `_CLEAN_UP_S`, the next one ends the process. Processes that were
    forked from the one that made the handler end without a word.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.came_s: float | None = None
        self.said = False

    def __call__(self, number: int, frame: object) -> None:
        if os.getpid() != self.process:
            os._exit(130)
        if self.came_s is None:
            self.came_s = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self.came_s > _CLEAN_UP_S:
            end_without_threads(130)


def take_ctrl_c_once() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt once; where it is for others, in the background, it stays theirs."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, FirstInterrupt())


def take_sigterm_as_ctrl_c() -> None:
    """Let the scheduler's SIGTERM clean up like Ctrl-C does, and raise KeyboardInterrupt once for both."""
    handler = FirstInterrupt()
    signal.signal(signal.SIGTERM, handler)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Raise KeyboardInterrupt where it was raised before and somebody made another error of it.

    transformers, whose imports take seconds, says of a class that it could not be imported.
    """
    try:
        yield
    except Exception:
        handler = signal.getsignal(signal.SIGTERM)
        if isinstance(handler, FirstInterrupt) and handler.came_s is not None:
            raise KeyboardInterrupt from None
        raise


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off to the end of the block, and SIGTERM where it is handled.

    For short blocks between whose lines a result is neither the old one nor the new one.
    """
    held: dict[signal.Signals, Callable[..., object]] = {}
    came: list[int] = []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                held[number] = handler
    try:
        for number in held:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


class _InterruptedAndSaid(KeyboardInterrupt):
    """Rank 0 has said of Ctrl-C what there is to say."""


@contextlib.contextmanager
def one_voice_on_ctrl_c(say: Callable[[], None]) -> Iterator[None]:
    """While the block runs, Ctrl-C gets one message, of rank 0, and ends every rank.

    torchrun passes SIGINT on to all ranks. Python's KeyboardInterrupt waits until the main thread is back from a
    collective, minutes in a long step, or for ever once another rank has left. So a thread speaks at once, and ends the
    process with code 130 if KeyboardInterrupt has not within `_CLEAN_UP_S`. What else the block raises meanwhile,
    connections that ranks which left have closed, becomes KeyboardInterrupt too. Of nested blocks the innermost speaks,
    and the others do not, also if Ctrl-C comes again. Signals are handled by `FirstInterrupt`.

    Args:
        say: Prints the message; called on rank 0, in another thread.
    """
    outer_handler = signal.getsignal(signal.SIGINT)
    if outer_handler is signal.SIG_IGN:  # started in the background, where Ctrl-C is for others
        yield
        return
    interrupt = outer_handler if isinstance(outer_handler, FirstInterrupt) else FirstInterrupt()
    came, spoken = threading.Event(), threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        # The numbers of all signals that Python handles, and 0 at the end of the block.
        while (number := os.read(reader, 1)[0]) != signal.SIGINT:
            if number == 0:
                return
        came.set()
        if os.environ.get("RANK", "0") == "0" and not interrupt.said:
            interrupt.said = True
            say()
        spoken.set()
        time.sleep(_CLEAN_UP_S)
        end_without_threads(130)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    signal.signal(signal.SIGINT, interrupt)
    outer_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    except BaseException as error:
        if not (came.is_set() or interrupt.came_s is not None or isinstance(error, KeyboardInterrupt)):
            raise
        if not isinstance(error, _InterruptedAndSaid):
            spoken.wait(_CLEAN_UP_S)
        raise _InterruptedAndSaid from None
    finally:
        signal.set_wakeup_fd(outer_descriptor)
        signal.signal(signal.SIGINT, outer_handler)
        os.write(writer, b"\0")
        if not came.is_set() and interrupt.came_s is None:
            # It may hold the last reference to all that `say` is bound to, and must not free that while Python ends.
            watcher.join()


@contextlib.contextmanager
def plain_ending(program: str, result: str | Path | None = None) -> Iterator[None]:
    """End a program that writes all or nothing without a traceback: code 1 for what the user can mend, 130 for Ctrl-C.

    Args:
        program: Its name, for the messages.
        result: The file that it writes, the last one of several, to know whether Ctrl-C came too late.
    """
    take_sigterm_as_ctrl_c()
    before = _identity(result)
    try:
        with no_interrupt_lost():
            yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the summary has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: error: {error}")
    except KeyboardInterrupt:
        written = "nothing was written" if _identity(result) == before else f"{result} was written"
        print(f"{program}: stopped, {written}", file=sys.stderr)
        sys.exit(130)


def _identity(file: str | Path | None) -> tuple[int, ...] | None:
    """What changes when another file takes a name; None where there is none."""
    try:
        found = os.stat(file) if file is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_dev, found.st_ino, found.st_mtime_ns)
