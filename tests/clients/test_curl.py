"""curl, by the script examples/requests.sh."""

from __future__ import annotations

import asyncio
from typing import Any

from penstock import serve
from tests.clients.proxies import behind_proxies, program, quick_start
from tests.clients.serving import EXAMPLES


async def run(*command: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode or 0, output.decode()


async def test_the_script_of_curl_asks_repeats_submits_and_fetches(redis_url: str) -> None:
    program("curl", "curl")
    runs: list[str] = []
    sentiment: Any = quick_start()({"good": 1, "bad": -1})

    def count(request: serve.Request) -> Any:
        runs.append(request.data["text"])
        return sentiment(request)

    async with behind_proxies(redis_url, count, name="sentiment") as [(_, address)]:
        code, output = await run("sh", str(EXAMPLES / "requests.sh"), f"http://{address}")
    assert code == 0, output
    *_, mistake = lines = output.splitlines()
    assert [line for line in lines if not line.endswith(":")][:-1] == [
        '{"score":1}',
        '{"score":1}',
        "true",
        '{"score":-1}',
    ]
    assert mistake.endswith(" 400")
    assert runs == ["a good day", "good", "a bad day"]


async def test_a_large_body_is_sent_once_curl_is_told_to_continue(redis_url: str) -> None:
    program("curl", "curl")

    def size_of(request: Any) -> str:
        return str(len(request.data))

    async with behind_proxies(redis_url, size_of, name="size") as [(_, address)]:
        size = 3_000_000
        send = "head -c $1 /dev/zero | curl --silent --include --data-binary @- -H 'Content-Type: a/b' $2"
        code, output = await run("sh", "-c", send, "sh", str(size), f"http://{address}/size")
    assert code == 0
    assert output.startswith("HTTP/1.1 100 Continue"), output
    assert output.endswith(f"\r\n\r\n{size}"), output
