"""Which threads of the server come first where there is not enough processor for all.

A thread that computes for seconds takes the processor from those that answer within milliseconds. Linux has a priority
for each thread: those that compute give way, to the threads of this process and to all others of the machine. Those
that are started by one that gives way do too, such as PyTorch's.
"""

import os
import sys
import threading

# In steps of `nice`, of which each takes a fifth of the share that a thread gets beside busy ones.
STEPS_BACK = 5


def give_way() -> None:
    """Let the calling thread, for as long as it lives, get the processor after others that want it; on Linux only."""
    if sys.platform == "linux":
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), own + STEPS_BACK)
