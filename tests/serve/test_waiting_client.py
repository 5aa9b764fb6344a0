"""``client.wait()``: blocks a script until Ctrl-C or the end of the instance."""

from __future__ import annotations

import _thread
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from penstock import serve
from tests.waiting import wait_until


def is_waiting(thread: int | None) -> bool:
    """Return whether a thread is within ``Client.wait``."""
    frame = sys._current_frames().get(thread or 0)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if frame.f_code is serve.Client.wait.__code__:
            return True
        frame = frame.f_back
    return False


def test_wait_returns_at_ctrl_c_and_leaves_the_instance_running(client: serve.Client) -> None:
    main = threading.get_ident()

    def interrupt() -> None:
        wait_until(lambda: is_waiting(main))
        _thread.interrupt_main()

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    client.wait()
    interrupting.join()
    assert client.list_backends() == {}


def test_wait_returns_when_the_client_is_shut_down(client: serve.Client) -> None:
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(client.wait)
        client.shutdown()
        waiting.result(timeout=60)


def test_wait_returns_when_another_client_shuts_the_instance_down(client: serve.Client) -> None:
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(client.wait)
        with serve.connect(client.redis_url) as other:
            other.shutdown()
        waiting.result(timeout=60)
