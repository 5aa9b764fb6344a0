"""A broker with TLS, passwords and the users of ``docs/security.md``."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from redis import Redis
from redis.exceptions import RedisError

from penstock.broker.embedded.server import _find_binary  # pyright: ignore[reportPrivateUsage]
from tests.support.brokers import close_clients
from tests.support.waiting import wait_until

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"

ADMIN = "user admin on >secret ~* &* +@all"
NOBODY = "user default off"


def documented_rules() -> dict[str, str]:
    """Return the rules of each user in the document, each as one line of an ACL file."""
    rules = [" ".join(block.split()) for block in re.findall(r"```acl\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)]
    return {rule.split()[1]: rule for rule in rules}


class Guarded:
    """A broker that lets nobody in without a password."""

    def __init__(self, port: int, ca: Path) -> None:
        self.port, self.ca = port, ca

    def url(self, user: str, password: str = "secret") -> str:
        return f"rediss://{user}:{password}@localhost:{self.port}/0?ssl_ca_certs={quote(str(self.ca))}"

    def cut(self, *users: str) -> None:
        """Cut every connection of these users."""
        with Redis.from_url(self.url("admin")) as redis:
            for client in redis.client_list():
                if client["user"] in users:
                    with suppress(RedisError):  # it has ended by itself
                        redis.client_kill_filter(_id=client["id"])

    def empty(self) -> None:
        for user in ("owner", "alice", "bob"):
            close_clients(self.url(user))
        with Redis.from_url(self.url("admin")) as redis:
            redis.flushall()

    def denied(self) -> list[str]:
        """Return what has been denied to whom since the last call; no rule was wrong if there is nothing."""
        with Redis.from_url(self.url("admin")) as redis:
            log = redis.acl_log()
            redis.acl_log_reset()
        said = {f"{entry['username']}: {entry['reason']} {entry['object']}" for entry in log}
        # redis-py names itself to every server, and does not mind a refusal. Redis 7.0 does not know the command.
        return sorted(line for line in said if "client|setinfo" not in line)


def redis_program() -> str | None:
    """Return where this machine has Redis. A package of tools has the same program, which goes by how it is called."""
    return shutil.which("redis-server") or shutil.which("redis-check-rdb")


@contextmanager
def guarded(directory: Path, *, tls_by_server: bool) -> Generator[Guarded]:
    """Start one: this machine's Redis, which speaks TLS; or the embedded Valkey, which does not, behind a relay."""
    rules = directory / "users.acl"
    documented = documented_rules()
    bob = documented["alice"].replace("alice", "bob")
    rules.write_text("\n".join((NOBODY, ADMIN, *documented.values(), bob)) + "\n")
    certificate, key = make_certificate(directory)
    with ExitStack() as running:
        port = free_port()
        if tls_by_server:
            binary = redis_program()
            assert binary is not None
            listening = ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"]
            listening += ["--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
            listening += ["--tls-ca-cert-file", str(certificate)]
        else:
            binary = str(_find_binary())
            listening = ["--port", str(free_port()), "--bind", "127.0.0.1"]
        settings = ["--aclfile", str(rules), "--save", "", "--dir", str(directory), "--loglevel", "warning"]
        command = ["redis-server", *listening, *settings]
        server = subprocess.Popen(command, executable=binary, stdout=subprocess.DEVNULL)
        running.callback(server.wait)
        running.callback(server.terminate)
        if not tls_by_server:
            running.enter_context(tls_relay(port, int(listening[1]), certificate, key))
        broker = Guarded(port, certificate)
        wait_until(lambda: _answers(broker.url("admin")), timeout_s=10)
        yield broker


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """Make a certificate of ``localhost`` that is its own authority."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def tls_relay(port: int, to_port: int, certificate: Path, key: Path) -> Generator[None]:
    """Speak TLS on ``port`` for a server that does not, in a thread."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    ending = loop.create_future()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    open_ends = set[asyncio.StreamWriter]()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", to_port)
        ends = {writer, back}
        open_ends.update(ends)
        await asyncio.gather(pass_on(reader, back), pass_on(there, writer))
        open_ends.difference_update(ends)

    async def main() -> None:
        server = await asyncio.start_server(relay, "localhost", port, ssl=context)
        ready.set()
        await ending
        server.close()
        while open_ends:
            for end in open_ends:
                end.transport.abort()
            await asyncio.sleep(0.01)

    def run() -> None:
        loop.run_until_complete(main())
        loop.close()

    thread = threading.Thread(target=run, name="tls relay")
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        loop.call_soon_threadsafe(ending.set_result, None)
        thread.join()


def _answers(url: str) -> bool:
    try:
        with Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1) as redis:
            return bool(redis.ping())
    except RedisError:
        return False
