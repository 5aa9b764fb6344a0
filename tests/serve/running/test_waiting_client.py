"""``client.wait()``: blocks a script until Ctrl-C or the end of the instance."""

from __future__ import annotations

import _thread
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock import serve
from tests.support.waiting import wait_until

PAGE = Path(__file__).parents[3] / "docs" / "deploying.md"


def is_waiting(thread: int | None) -> bool:
    """Return whether a thread is within ``Client.wait``."""
    frame = sys._current_frames().get(thread or 0)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if frame.f_code is serve.Client.wait.__code__:
            return True
        frame = frame.f_back
    return False


def test_the_script_of_the_page_serves_until_ctrl_c(
    cluster: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PENSTOCK_REDIS_URL", redis_url)
    [script] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert script.endswith("client.wait()\n")
    names: dict[str, Any] = {"__name__": "__main__"}
    answers = list[httpx.Response]()
    main = threading.get_ident()

    def call_and_interrupt() -> None:
        try:
            wait_until(lambda: is_waiting(main))
            answers.append(httpx.get(f"{names['client'].http_url}/hello/Ada", timeout=30))
        finally:
            if is_waiting(main):
                _thread.interrupt_main()

    calling = threading.Thread(target=call_and_interrupt)
    calling.start()
    exec(compile(script.replace("serve.start()", 'serve.start(http_options={"port": 0})'), PAGE, "exec"), names)
    calling.join()
    with names["client"] as client:  # which the end of a script closes
        assert client.list_backends().keys() == {"greeter"}, "Ctrl-C has ended more than the wait"
        assert [answer.json() for answer in answers] == [{"hello": "Ada"}]
        assert capsys.readouterr().out == f"{client.http_url}\n"


def test_wait_returns_when_the_client_is_shut_down(client: serve.Client) -> None:
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(client.wait)
        client.shutdown()
        waiting.result(timeout=60)


def test_wait_returns_when_another_client_shuts_the_instance_down(
    client: serve.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.serve.client.CONTROLLER_LOST_S", 1.0)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(client.wait)
        with serve.connect(client.redis_url) as other:
            other.shutdown()
        waiting.result(timeout=60)
