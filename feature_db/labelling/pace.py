"""When the next request may start: requests and tokens a minute, and waits that a server asks for.

Starts are spread evenly instead of coming in bursts, so that no minute, wherever it begins, holds
more than the limit and one request.
"""

import asyncio
import time


class Pace:
    """Lets requests start one after the other, each when the ones before have made room for it.

    requests_per_minute, tokens_per_minute: None is no limit.
    """

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._s_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._s_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._turn = asyncio.Lock()
        self._next_start = 0.0

    async def wait(self, n_tokens: int) -> None:
        """Return when a request of so many tokens, answer included, may start."""
        async with self._turn:
            while (wait_s := self._next_start - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)  # `hold` may have put the start off meanwhile
            self._next_start = time.monotonic() + max(
                self._s_per_request, n_tokens * self._s_per_token
            )

    def hold(self, wait_s: float) -> None:
        """Start nothing for so long: the server has asked for it."""
        self._next_start = max(self._next_start, time.monotonic() + wait_s)
