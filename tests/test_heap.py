"""Memory that is not used goes back to the system."""

import subprocess
import sys

CODE = """
import torch
from sam2sgp.heap import give_back

def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20

torch.set_num_threads(1)
# 200 MiB in pieces small enough for the heap, and after each mebibyte something that stays: the end of the heap
# is never free, so that nothing goes back by itself.
gone, kept = [], []
for _ in range(200):
    gone += [torch.ones(2**14) for _ in range(16)]
    kept.append(torch.ones(2**8))
del gone
held = resident()
give_back()
print(held - resident())
"""


def test_what_was_freed_in_pieces_is_not_kept():
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    assert float(done.stdout) > 100
