"""Runs one command of the demo in a process of its own; everything that it prints is logged."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fae_core.errors import UserError

from ..runtime.session import STATE_API
from .screen import Advance

LOOK_SECONDS = 0.1


class CommandFailed(UserError, RuntimeError):
    """A command that ended with another status than 0."""


def command_line(words: Sequence[str]) -> str:
    """What a user types for the command `words`."""
    return shlex.join(["fae", *words])


def run_command(
    words: Sequence[str],
    log: Path,
    ray_address: str,
    share: Callable[[], float],
    advance: Advance,
    kill_at: float | None = None,
) -> bool:
    """Run `fae WORDS…` on the cluster at `ray_address`; its output is appended to `log`.

    `share` says how much of the work is done, which `advance` is told. With `kill_at` the process
    gets SIGKILL once that share is reached. Returns whether it was killed. Raises CommandFailed.
    """
    environment = {**os.environ, "RAY_ADDRESS": ray_address, STATE_API: ray_address}
    with log.open("ab") as output:
        output.write(f"\n$ {command_line(words)}\n".encode())
        output.flush()
        before = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "fae", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                done = share()
                advance(done)
                if kill_at is not None and done >= kill_at:
                    process.kill()
                    process.wait()
                    output.write(b"\n(killed by the demo)\n")
                    return True
                time.sleep(LOOK_SECONDS)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        lines = log.read_bytes()[before:].decode(errors="replace").strip().splitlines()
        raise CommandFailed(
            f"{command_line(words)} ended with status {process.returncode}: "
            f"{lines[-1] if lines else 'it printed nothing'}\nAll of its output is in {log}. Run "
            "the demo again: it resumes."
        )
    return False
