"""What routes have in common: the work for a client that goes away is told so."""

import asyncio

from starlette.requests import Request

from lib.http.routing import client_gone


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
