"""What routes have in common: the work for a client that goes away is told so."""

import asyncio
import os
import sys
import threading

import pytest
from starlette.requests import Request

from lib.http.routing import client_gone, in_threads


def test_a_client_that_goes_away_before_its_answer_is_told_to_whoever_works_for_it():
    async def run() -> None:
        messages: asyncio.Queue = asyncio.Queue()
        watched = client_gone(Request({"type": "http"}, messages.get))
        gone = await anext(watched)
        await messages.put({"type": "http.request", "body": b"", "more_body": False})
        await asyncio.sleep(0)
        assert not gone.is_set()
        await messages.put({"type": "http.disconnect"})
        while not gone.is_set():
            await asyncio.sleep(0)
        await watched.aclose()

    asyncio.run(asyncio.wait_for(run(), 20))


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
