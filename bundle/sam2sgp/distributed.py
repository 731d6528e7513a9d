"""One run by several processes that `torchrun` has started, on one machine or on many.

In a single process everything here is trivial: rank 0 of 1, and nothing to wait for. A process that dies takes the
others along: `torchrun` ends them all, or starts them all again.

`ignite.distributed` is no substitute: under Slurm it takes SLURM_LOCALID for a process's number on its machine, which
is 0 for all that one `torchrun` starts, and writes it over LOCAL_RANK; and its first question waits for all processes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed

Value = TypeVar("Value")


def is_active() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Number of this process among all."""
    return torch.distributed.get_rank() if is_active() else 0


def world_size() -> int:
    """Number of processes on all machines."""
    return torch.distributed.get_world_size() if is_active() else 1


def place_on_machine() -> tuple[int, int]:
    """Number of this process among those of its machine, and how many these are.

    `torchrun` numbers the processes machine by machine, so the ranks of a machine leave each remainder once.
    """
    if not is_active():
        return 0, 1
    count = int(os.environ["LOCAL_WORLD_SIZE"])
    return rank() % count, count


def barrier() -> None:
    """Wait until all processes are here."""
    if is_active():
        torch.distributed.barrier()


def gather(value: Value) -> list[Value]:
    """The values of all processes, in the order of their ranks; a value is anything that can be pickled."""
    if not is_active():
        return [value]
    values: list = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def rank_0_first() -> Iterator[None]:
    """The block runs in rank 0 first, and when it is through there in the others."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()
