"""The terminal, and signals: neither ends a run before its time."""

import os
import signal
import sys
from contextlib import suppress


class Terminal:
    """A stream whose writes never fail: closed, on a full disk, or with a reader that left."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, call, *args):
        try:
            call(*args)
        except BrokenPipeError:  # nobody will read on: what is in the buffer goes nowhere, now and at the exit
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except (OSError, ValueError):
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def guard_terminal():
    """Output to the terminal never ends a run. Descriptors 0 to 2 that are closed are opened, on nothing: or the next
    file, metrics.csv say, would get their number and what libraries write there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr)


def catch_signals(signals):
    """The first SIGINT, SIGTERM or SIGHUP is noted in `signals`, a second one ends the process; what is ignored (under
    nohup) stays ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda n, _: os._exit(128 + n) if signals else signals.append(n))
