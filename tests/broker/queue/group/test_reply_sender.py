from penstock.broker.embedded.server import EmbeddedServer
from penstock.broker.transport.connection import RedisConnection
from penstock.broker.wire.keys import Keys
from penstock.broker.wire.replies import Reply
from tests.broker.conftest import Connect
from tests.broker.queue.replica import Joining, Replica
from tests.support.waiting import wait_until_async


async def test_a_reply_goes_only_to_a_caller_with_a_stream(
    join: Joining, commands: RedisConnection, keys: Keys
) -> None:
    replica = await join("a")
    replica.group.replies.send("gone", Reply("1").fields())
    await commands.send("XADD", keys.replies("here"), "*", "", "")
    replica.group.replies.send("here", Reply("1", body=b"x").fields())
    assert await commands.send("EXISTS", keys.replies("gone")) == 0
    *_, (_, fields) = await commands.send("XRANGE", keys.replies("here"), "-", "+")
    assert Reply.of(fields) == Reply("1", body=b"x")


async def test_a_reply_and_its_settlement_wait_together_for_the_broker(
    server: EmbeddedServer, connect: Connect, keys: Keys
) -> None:
    """If the reply timed out and the settlement did not, a request would be lost."""
    commands = await connect(server.url)
    commands.patience_s = 0.0
    replica = Replica(commands, await connect(server.url), keys, "a")
    await commands.send("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    other = await connect(server.url)
    await other.send("XADD", keys.replies("me"), "*", "", "")
    other.post(lambda reply: None, "CLIENT", "KILL", "ID", await commands.send("CLIENT", "ID"))
    await wait_until_async(lambda: not commands.connected)
    replica.group.replies.send("me", Reply("1").fields())
    replica.group.acknowledger.settle([b"1-1"])
    await wait_until_async(lambda: commands.connected)
    assert await other.send("XLEN", keys.replies("me")) == 2
