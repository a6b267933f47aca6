"""What the five scripts share.

Scripts import this before PyTorch, which takes seconds: a Ctrl-C meanwhile ends them without a traceback.
"""

import sys


def hook(kind, error, trace):
    if kind is KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = hook
