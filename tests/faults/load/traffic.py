"""Requests at a steady rate over HTTP and handles, and the outcome of each."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from penstock import serve
from penstock.handles import connect
from tests.faults.load.web import Web
from tests.support.loop_thread import running_beside

DEADLINE_S = 30.0
_TICK_S = 0.005
_AGAIN_S = 0.05
"""How long a client waits before it repeats a request whose connection broke."""
_HANG_S = 90.0
"""Far beyond every deadline: what has no outcome by then never gets one."""

Call = Callable[[str], Awaitable[str]]


@dataclass
class Outcomes:
    """The outcomes of the requests of one load. Each is in exactly one of these."""

    answered: dict[str, float] = field(default_factory=dict[str, float])
    """Its name, and how long it took in seconds."""
    refused: Counter[str] = field(default_factory=Counter[str])
    """By the name of the error."""
    cut: set[str] = field(default_factory=set[str])
    """The HTTP connection broke: whoever had it is dead, and cannot say anything."""
    wrong: list[str] = field(default_factory=list[str])
    """Answered with something else, or in no way that is promised."""
    names: set[str] = field(default_factory=set[str])
    """All that were sent."""

    @property
    def sent(self) -> int:
        return len(self.names)

    @property
    def lost(self) -> int:
        return self.sent - len(self.answered) - self.refused.total() - len(self.cut) - len(self.wrong)

    def quantile_s(self, share: float) -> float:
        """Return how long this share of what was answered took at most."""
        took = sorted(self.answered.values())
        return took[min(len(took) - 1, int(share * len(took)))] if took else 0.0


class Refused(Exception):
    """An HTTP answer that names its error."""


class Broken(Exception):
    """The HTTP connection broke before an answer came."""


class Traffic:
    """Requests that leave at ``rate`` a second for ``for_s`` seconds, whatever becomes of them: an open loop."""

    def __init__(self, ways: list[Call], rate: float, for_s: float, prefix: str) -> None:
        self._ways, self._rate, self._for_s, self._prefix = ways, rate, for_s, prefix
        self.outcomes = Outcomes()
        self.sent_ms: dict[str, float] = {}
        """The Unix time at which each was sent."""
        self.sending = True

    @property
    def sent(self) -> int:
        return self.outcomes.sent

    async def run(self) -> None:
        began_s, pending = time.monotonic(), set[asyncio.Task[None]]()
        number = 0
        while (now_s := time.monotonic() - began_s) < self._for_s:
            while number < now_s * self._rate:
                task = asyncio.ensure_future(self._one(f"{self._prefix}{number}", self._ways[number % len(self._ways)]))
                pending.add(task)
                task.add_done_callback(pending.discard)
                number += 1
            await asyncio.sleep(_TICK_S)
        self.sending = False
        if pending:
            _, hanging = await asyncio.wait(set(pending), timeout=_HANG_S)
            for task in hanging:
                task.cancel()

    async def _one(self, name: str, call: Call) -> None:
        outcomes, began_s = self.outcomes, time.monotonic()
        outcomes.names.add(name)
        self.sent_ms[name] = time.time() * 1000
        try:
            answer = await call(name)
        except serve.errors.PenstockError as e:
            outcomes.refused[type(e).__name__] += 1
        except Refused as e:
            outcomes.refused[str(e)] += 1
        except Broken:
            outcomes.cut.add(name)
        except asyncio.CancelledError:
            raise
        except Exception as e:
            outcomes.wrong.append(f"{name}: {e!r}")
        else:
            if answer == name:
                outcomes.answered[name] = time.monotonic() - began_s
            else:
                outcomes.wrong.append(f"{name}: {answer!r}")


@contextmanager
def traffic(
    client: serve.Client,
    *,
    rate: float,
    for_s: float,
    ways: tuple[str, ...] = ("handle", "http"),
    method: str = "__call__",
    timeout_s: float = DEADLINE_S,
    prefix: str = "r",
) -> Generator[Traffic]:
    """Send to the endpoint ``work``, by turns through a handle and over HTTP (to ``/job``). Wait for all outcomes."""
    web = Web(client.http_url or "")
    handles: list[serve.AsyncServeHandle] = []

    async def by_handle(name: str) -> str:
        return str(await (await handles[0].remote(name)))

    async def by_http(name: str) -> str:
        return await _post(web, name, method)

    async def with_key(name: str) -> str:
        return await _post_until_answered(web, name, method)

    calls = {"handle": by_handle, "http": by_http, "key": with_key}
    sending = Traffic([calls[way] for way in ways], rate, for_s, prefix)

    async def main() -> None:
        handle = connect(client.redis_url).get_handle("work", sync=False)
        handles.append(handle.options(timeout_s=timeout_s, method_name=method))
        try:
            await sending.run()
        finally:
            web.close()

    with running_beside(main, "traffic", end=_nothing):
        yield sending


def _nothing() -> None:
    """End nothing: the traffic ends by itself."""


async def _post_until_answered(web: Web, name: str, method: str) -> str:
    """Repeat a request with one idempotency key until it is answered; some are sent once more, for an equal answer.

    The code answers with the name and something that no other run of it makes. Returns the name.
    """
    headers = f"idempotency-key: {name}\r\n"
    answers: list[str] = []
    wanted = 2 if name.endswith(("0", "4", "8")) else 1
    while len(answers) < wanted:
        try:
            status, body = await web.post("/job", name, method, headers)
        except (OSError, asyncio.IncompleteReadError):
            await asyncio.sleep(_AGAIN_S)  # a proxy died: the client repeats
            continue
        if status == 200:
            answers.append(body)
        elif status == 503:
            await asyncio.sleep(_AGAIN_S)
        elif status == 504:
            raise Refused(json.loads(body)["error"]["type"])
        else:
            raise AssertionError(f"status {status}: {body[:200]}")
    assert len(set(answers)) == 1, f"two answers to one key: {answers}"
    return answers[0].partition(" ")[0]


async def _post(web: Web, name: str, method: str) -> str:
    try:
        status, body = await web.post("/job", name, method)
    except (OSError, asyncio.IncompleteReadError) as e:
        raise Broken from e
    if status == 200:
        return body
    if status in (503, 504):
        raise Refused(json.loads(body)["error"]["type"])
    raise AssertionError(f"status {status}: {body[:200]}")
