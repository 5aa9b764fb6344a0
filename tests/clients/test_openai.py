"""OpenAI's Python client against examples/openai_chat.py."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from tests.clients.serving import example, serving

ASKED: Any = [{"role": "user", "content": "What is a penstock ?"}]
ANSWER = "is closed when the turbines rest ."


@pytest.fixture(scope="module")
def openai() -> Any:
    """The package. Its import takes half a second, which each process of a run that collects this would need."""
    return import_module("openai")


@pytest.fixture(scope="module")
def client(openai: Any) -> Iterator[Any]:
    with (
        serving(example("openai_chat").Chat, route="/v1/{path:path}") as address,
        openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["bigrams"]


def test_a_chat_is_completed(client: Any) -> None:
    answer = client.chat.completions.create(model="bigrams", messages=ASKED)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 12
    short = client.chat.completions.create(model="bigrams", messages=ASKED, max_tokens=2)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("is closed", "length")


def test_a_chat_is_streamed_token_by_token(client: Any) -> None:
    chunks = list(client.chat.completions.create(model="bigrams", messages=ASKED, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert len(chunks) == len(ANSWER.split()) + 1
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_client_that_leaves_a_stream_can_go_on(client: Any) -> None:
    with client.chat.completions.create(model="bigrams", messages=ASKED, stream=True) as stream:
        next(iter(stream))
    assert client.chat.completions.create(model="bigrams", messages=ASKED).choices[0].message.content == ANSWER


def test_errors_have_the_classes_of_the_client(client: Any, openai: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9'; there is 'bigrams'"):
        client.chat.completions.create(model="gpt-9", messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="at least one message"):
        client.chat.completions.create(model="bigrams", messages=[])
