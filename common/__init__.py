"""What the five scripts share.

Scripts import this before PyTorch, which takes seconds: a Ctrl-C meanwhile, and until training begins, ends them at
once. As an exception in the middle of an import it would be a traceback, and in some libraries a crash.
"""

import signal
import sys
from pathlib import Path

started = sys.argv[:1] == ["-m"] or Path(*sys.argv[:1]).resolve().parent == Path(__file__).resolve().parents[1]
if started and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where others import this
    signal.signal(signal.SIGINT, signal.SIG_DFL)
