"""Ends a job on Ctrl-C or SIGTERM with a line that says what is done and how to go on."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import typer

STDERR = 2


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let either signal interrupt the job inside; the exit status is then 130 or 143.

    `ray job stop` and Kubernetes send SIGTERM. The line is printed at once and not after the job
    has ended its actors: Ray kills a job 3 s later. A second signal ends the process as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from fae.pipelines.runtime.progress import Progress

    received = signal.SIGINT

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)
        words = [f"\nfae: stopped by {received.name}."]
        words += [Progress.running.written()] if Progress.running else []
        text = " ".join(filter(None, [*words, "Run the same command again: it resumes.\n"]))
        # It may have interrupted a print, and Python refuses another one inside.
        os.write(STDERR, text.encode())
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(128 + received) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
