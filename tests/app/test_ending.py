"""A server that is told to stop: work gets a while, is told to stop, and then the process ends whatever it does."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, threading, time
from lib.ending import end_soon
signal.signal(signal.SIGTERM, lambda *given: os.write(1, b"told\\n"))
ending = threading.Event()
end_soon(ending, patience=0.05, last={last})
print("ready", flush=True)
ending.wait()
print("ending", flush=True)
while True:
    time.sleep({pause})
    if {obeys}:
        break
"""


@pytest.mark.parametrize(("obeys", "last", "code"), [(True, 60, 0), (False, 0.05, 1)])
def test_the_process_ends_after_it_is_told_to_stop(obeys, last, code):
    program = PROGRAM.format(obeys=obeys, last=last, pause=0.01)
    path = ":".join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": path}
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "told\nending\n"
    assert process.returncode == code
