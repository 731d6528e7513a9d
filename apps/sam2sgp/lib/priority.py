"""Who gets the processor where there is not enough of it for all.

A thread that computes for seconds takes the processor from those that answer within milliseconds. Linux has a priority
for each thread: those that compute give way, to the threads of this process and to all others of the machine. Those
that are started by one that gives way do too, such as PyTorch's.

PyTorch's threads wait for each other many times in each pass of a network, by default awake, for milliseconds. Beside a
training they so wait for threads that they keep off the processor themselves, and a pass takes seconds. Asleep they
leave it to them; on a machine with nothing else to do that makes a pass a hundredth of a second longer.
"""

import os
import sys
import threading

# In steps of `nice`, of which each takes a fifth of the share that a thread gets beside busy ones.
STEPS_BACK = 5
# What a process has to be started with for PyTorch's threads to wait asleep: the library reads it when it is loaded.
ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}


def give_way() -> None:
    """Let the calling thread, for as long as it lives, get the processor after others that want it; on Linux only."""
    if sys.platform == "linux":
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), own + STEPS_BACK)
