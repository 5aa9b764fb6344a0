"""All commands that need a broker report at once that it refuses connections."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.serve.cli.conftest import Penstock

COMMANDS = [
    ["start"],
    ["deploy", "app.yaml"],
    ["shutdown", "--yes"],
    ["status"],
    ["status", "--watch"],
    ["call", "ask"],
    ["result", "0a"],
    ["cancel", "0a"],
    ["requests", "ask"],
    ["batch", "ask", "-", "--output", "-"],
    ["dead", "list", "model"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_refused_connection_is_reported_without_another_attempt(
    penstock: Penstock, tmp_path: Path, arguments: list[str]
) -> None:
    """`RedisConnection`, which tries again for 5 s, words the refusal in another way."""
    (tmp_path / "app.yaml").write_text("backends: {}\n")
    arguments = [str(tmp_path / one) if one == "app.yaml" else one for one in arguments]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        url = f"redis://user:secret@127.0.0.1:{closed.getsockname()[1]}"
        ran = penstock(*arguments, url=url)
    shown = url.replace("user:secret@", "")
    assert ran.err == f"Error: the broker at {shown} is unavailable: Connection refused\n"
    assert (ran.code, ran.out) == (3, "")
