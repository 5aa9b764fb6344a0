"""The actors that ``serve.start`` starts, without the rest of it."""

from __future__ import annotations

import asyncio

import pytest

from penstock.handles.errors import BackendError, PenstockError
from penstock.serve.first_actors import start_controller, wait_until_ready
from penstock.serve.ray_nodes import own_node
from penstock.serve.settings import ProcessArguments


@pytest.mark.usefixtures("cluster")
async def test_a_controller_that_cannot_run_says_why(redis_url: str) -> None:
    arguments = ProcessArguments("nobody", redis_url, redis_url, redis_url, {})
    controller = start_controller(arguments, node=own_node(), detached=False)
    with pytest.raises(PenstockError, match="there is no instance 'nobody' on unix:") as raised:
        await asyncio.wait_for(wait_until_ready(controller), 60)
    assert not isinstance(raised.value, BackendError)
