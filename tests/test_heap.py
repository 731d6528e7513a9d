"""Memory that is not used goes back to the system."""

import subprocess
import sys

CODE = """
import torch
from sam2sgp.heap import give_back

def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20

torch.set_num_threads(1)
kept, before = [], resident()
for _ in range(40):
    # What is freed last of these is not at the end of the heap, where it would go back by itself.
    large = [torch.ones(2**20) for _ in range(8)]
    kept.append(torch.ones(2**10))
    del large
many = [torch.ones(2**18) for _ in range(200)]
last = torch.ones(2**10)
del many
held = resident()
give_back()
print(held - resident())
"""


def test_what_was_freed_in_pieces_is_not_kept():
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    assert float(done.stdout) > 100
