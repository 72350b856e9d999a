"""Progress of a translation on standard error: a line that is updated on a terminal, otherwise a line at intervals."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

EVERY = 30.0  # seconds between two lines
EVERY_ON_A_TERMINAL = 0.5  # seconds between two updates


class Progress:
    """Reports the speed of this process, and the time that is left for all sentences.

    Args:
        total: number of sentences, of which other processes may translate some.
        finished: returns the number of sentences that any process has translated and written.
    """

    def __init__(self, total: int, finished: Callable[[], int]):
        self.total, self.finished = total, finished
        self.terminal = os.isatty(2)
        self.sentences = self.limits = self.unwritten = 0  # of this process; unwritten: in the current shard
        self.seconds, self.busy = 0.0, 0.0
        self.first = finished()
        self.started = self.shown = time.monotonic()

    def begin(self) -> None:
        """Start a shard."""
        self.unwritten, self.busy = 0, time.monotonic()

    def add(self, sentences: int, limits: int) -> None:
        """Count a batch and report progress if it is time.

        Args:
            sentences: number of sentences.
            limits: number of sentences whose best translation reached the maximum length.
        """
        now = time.monotonic()
        self.seconds, self.busy = self.seconds + now - self.busy, now
        self.sentences, self.limits, self.unwritten = (
            self.sentences + sentences,
            self.limits + limits,
            self.unwritten + sentences,
        )
        if now - self.shown > (EVERY_ON_A_TERMINAL if self.terminal else EVERY):
            self.shown = now
            self.show(now)

    def show(self, now: float) -> None:
        done = self.finished() + self.unwritten
        left = (self.total - done) * (now - self.started) / max(done - self.first, 1)
        text = f"hgkd: {done:,} of {self.total:,} sentences, {self}, {duration(left)} left"
        print(
            *(("\r" + text + "\x1b[K",) if self.terminal else (text,)),
            end="" if self.terminal else "\n",
            file=sys.stderr,
        )
        sys.stderr.flush()

    def __str__(self) -> str:
        speed = self.sentences / self.seconds if self.seconds else 0.0
        return f"{speed:.1f} sentences/s, {self.limits / max(self.sentences, 1):.2%} at the length limit"

    def end(self) -> str:
        """Return a summary: the sentences that are finished, and those of this process with their speed."""
        if self.terminal and self.shown > self.started:
            print(file=sys.stderr)
        done = f"{self.finished():,} of {self.total:,} sentences"
        return f"{done}; {self.sentences:,} now, {self}" if self.sentences else f"{done}; none now"


def duration(seconds: float) -> str:
    """Format a duration as seconds, minutes or hours."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
