"""Dying with one's parent; without torch, for the sake of what starts quickly."""

import ctypes
import os
import signal
import sys


def die_with_parent(parent: int) -> None:
    """Have Linux kill this process when `parent`, which started it, dies, even by kill -9: no orphans."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
