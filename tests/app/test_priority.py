"""Threads that compute give way."""

import asyncio
import os
import sys
import threading

import pytest

from lib.http.routing import in_threads


@pytest.mark.skipif(sys.platform != "linux", reason="Priorities of threads are Linux's")
def test_threads_of_long_work_give_way_to_all_others_and_so_do_those_that_they_start():
    def priorities() -> list[int]:
        own = [os.getpriority(os.PRIO_PROCESS, threading.get_native_id())]
        started = threading.Thread(target=lambda: own.append(os.getpriority(os.PRIO_PROCESS, 0)))
        started.start()
        started.join()
        return own

    async def run() -> tuple[list[int], list[int]]:
        return await in_threads(2, last=True)(priorities)(), await in_threads(2)(priorities)()

    last, others = asyncio.run(run())
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    assert others == [usual] * 2 and last == [min(usual + 5, 19)] * 2
