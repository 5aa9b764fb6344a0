"""Appends replies and their parts to callers' reply streams; stores large bodies of replies.

A caller that is gone has no stream, and its replies are dropped (``NOMKSTREAM``). Replies are patient: they wait for a
broker that is away or refuses writes. A broker that is out of memory refuses none of them, as scripts with the flag
``allow-oom`` append them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import BrokerFull, StringTooLong
from ...transport.commands import COPIED_BYTES, Arg, Script
from ...transport.connection import RedisConnection
from ...wire.keys import Keys
from .member import HISTORY_S, log_refusal

log = logging.getLogger(__name__)

_FULL_S = 1.0
"""How long replies go by way of the script after the broker was out of memory."""

# Appends a reply. KEYS: the reply stream. ARGV: the fields.
_APPEND = Script("""#!lua flags=allow-oom
return redis.call('XADD', KEYS[1], 'NOMKSTREAM', '*', unpack(ARGV))
""")

# Appends a reply if its body is stored. KEYS: the reply stream, the body. ARGV: the fields. Returns 0 if there is no
# body.
_APPEND_IF_STORED = Script("""#!lua flags=allow-oom
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
return redis.call('XADD', KEYS[1], 'NOMKSTREAM', '*', unpack(ARGV))
""")

# Stores a body and appends its reply: a refusal refuses both. KEYS: the reply stream, the body. ARGV: the body,
# milliseconds until it expires, the fields.
_PUT_AND_APPEND = Script("""#!lua flags=allow-oom
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return redis.call('XADD', KEYS[1], 'NOMKSTREAM', '*', unpack(ARGV, 3))
""")

# Sets an empty key. KEYS: the key. ARGV: milliseconds until it expires.
_MARK = Script("""#!lua flags=allow-oom
return redis.call('SET', KEYS[1], '', 'PX', ARGV[1])
""")


class ReplySender:
    """Sends the replies of one backend's requests to their callers."""

    def __init__(self, commands: RedisConnection, keys: Keys, backend: str) -> None:
        self._commands, self._keys = commands, keys
        self._streamed_prefix = keys.streamed(backend, "")
        self._full_until_s = 0.0
        """Until when the broker counts as out of memory."""

    def send(self, caller: str, fields: Sequence[bytes]) -> None:
        """Append a reply to a caller's stream, if the caller still has one."""
        key = self._keys.replies(caller)
        if self._full_until_s and time.monotonic() < self._full_until_s:
            self._append(key, fields)
            return

        def retry_without_memory(result: Any) -> None:
            if isinstance(result, BrokerFull):
                # The script is slower, so it is used for a while only. Until the broker has answered this command, the
                # entry may be settled and its reply not yet written.
                self._full_until_s = time.monotonic() + _FULL_S
                self._append(key, fields)
            elif isinstance(result, Exception):
                log_refusal(result)

        bulky = len(fields[-1]) > COPIED_BYTES  # the body comes last
        self._commands.post(
            retry_without_memory,
            "XADD",
            key,
            "NOMKSTREAM",
            "*",
            *fields,
            repeat=True,
            patient=True,
            needs_memory=True,
            bulky=bulky,
        )

    def send_part(self, caller: str, fields: Sequence[bytes], on_gone: Callable[[], None]) -> None:
        """Append a part of a streamed reply, in order. ``on_gone`` is called if the caller has no stream any more."""

        def check(result: Any) -> None:
            if result is None:
                on_gone()
            elif isinstance(result, Exception):
                log_refusal(result)

        # Always by the script, which a full memory does not refuse: a part that was sent again would come too late.
        key = self._keys.replies(caller)
        self._commands.post_script(check, _APPEND, [key], fields, repeat=True, patient=True)

    def mark_streamed(self, ref: bytes) -> None:
        """Record that the reply to an entry begins to stream: it must not run again. Call it before `send_part`."""
        record, args = self._streamed_prefix + ref.decode(), [HISTORY_S * 1000]
        self._commands.post_script(log_refusal, _MARK, [record], args, repeat=True, patient=True)

    def forget_streamed(self, ref: bytes) -> None:
        """Delete the record of `mark_streamed`, when the entry is settled."""
        self._commands.post(log_refusal, "UNLINK", self._streamed_prefix + ref.decode(), repeat=True, patient=True)

    def send_large(
        self,
        caller: str,
        request: str,
        body: bytes,
        ttl_ms: int,
        fields: Sequence[bytes],
        too_long: Callable[[], Sequence[bytes]],
    ) -> None:
        """Store ``body`` in a key of its own, then append a reply that refers to it.

        Args:
            caller: id of the caller.
            request: id of the request.
            body: too large for a stream.
            ttl_ms: expiry of the body.
            fields: of the reply.
            too_long: returns the fields of another reply, which is appended if the broker accepts no string of this
                length.
        """
        stored, stream = self._keys.reply_body(caller, request), self._keys.replies(caller)
        is_stored = False
        """Whether the broker has accepted the body."""
        was_early = False
        """Whether the reply was not appended because the body was not there yet."""

        def after_body(result: Any) -> None:
            nonlocal is_stored
            if isinstance(result, StringTooLong):
                self.send(caller, too_long())
            elif isinstance(result, BrokerFull):
                args: list[Arg] = [body, ttl_ms, *fields]
                bulky = len(body) > COPIED_BYTES
                self._commands.post_script(
                    after_both, _PUT_AND_APPEND, [stream, stored], args, repeat=True, patient=True, bulky=bulky
                )
            elif isinstance(result, Exception):
                log_refusal(result)
                self._append(stream, fields)
            else:
                is_stored = True
                if was_early:
                    self._append(stream, fields)

        def after_both(result: Any) -> None:
            if isinstance(result, Exception):
                after_body(result)

        def after_reply(result: Any) -> None:
            nonlocal was_early
            if isinstance(result, Exception):
                log_refusal(result)
            elif result == 0:
                if is_stored:
                    log.error("the body of the reply to request %s has expired before the reply was sent", request)
                was_early = True  # the body was refused, and is sent again

        # Not by the script: Lua would copy and hash the body first, which took 8 ms of 10 MiB.
        wait = {"repeat": True, "patient": True, "needs_memory": True}
        self._commands.post(after_body, "SET", stored, body, "PX", ttl_ms, bulky=True, **wait)
        self._commands.post_script(after_reply, _APPEND_IF_STORED, [stream, stored], fields, repeat=True, patient=True)

    def _append(self, stream: str, fields: Sequence[bytes]) -> None:
        self._commands.post_script(log_refusal, _APPEND, [stream], fields, repeat=True, patient=True)
