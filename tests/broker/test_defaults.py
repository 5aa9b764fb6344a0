"""Defaults of the broker's URL and of the instance."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from penstock import handles
from penstock.broker.defaults import default_instance, default_url
from penstock.handles.errors import ConfigError
from tests.handles.site import Site, echo

URLS = ("PENSTOCK_REDIS_URL", "PENSTOCK_REPLICA_REDIS_URL", "PENSTOCK_PROXY_REDIS_URL")
SECRETS = (*URLS, "PENSTOCK_ADMIN_TOKEN")

# Prints the defaults of a process of an instance, and the environment of its child processes.
BELONGING = """
import json, subprocess, sys
from penstock.broker.defaults import belong_to, default_instance, default_url

belong_to("redis://replica:hunter2@broker:6379", "blue")
child = subprocess.run(
    [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"],
    capture_output=True, text=True, check=True,
)
print(json.dumps({"url": default_url(), "instance": default_instance(), "child": json.loads(child.stdout)}))
"""


def test_child_processes_do_not_inherit_the_secrets_of_an_instance() -> None:
    owner = dict.fromkeys(SECRETS, "redis://owner:hunter2@broker:6379")
    ran = subprocess.run(
        [sys.executable, "-c", BELONGING],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, **owner, "PENSTOCK_INSTANCE": "green"},
    )
    said: dict[str, Any] = json.loads(ran.stdout)
    assert said["url"] == "redis://replica:hunter2@broker:6379"
    assert said["instance"] == said["child"]["PENSTOCK_INSTANCE"] == "blue"
    assert not [name for name, value in said["child"].items() if name in SECRETS or "hunter2" in value]


def test_the_environment_names_the_broker_and_the_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*URLS, "PENSTOCK_INSTANCE"):
        monkeypatch.delenv(name, raising=False)
    assert (default_url(), default_instance()) == (None, "default")
    monkeypatch.setenv("PENSTOCK_REDIS_URL", "redis://broker")
    monkeypatch.setenv("PENSTOCK_INSTANCE", "blue")
    assert (default_url(), default_instance()) == ("redis://broker", "blue")
    monkeypatch.setenv("PENSTOCK_REDIS_URL", "")
    monkeypatch.setenv("PENSTOCK_INSTANCE", "")
    assert (default_url(), default_instance()) == (None, "default")
    with pytest.raises(ConfigError, match="connect needs a redis_url, or PENSTOCK_REDIS_URL in the environment"):
        handles.connect()


def test_handles_and_batches_use_the_instance_of_the_environment(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(redis_url)
    site.serve(echo)
    monkeypatch.setenv("PENSTOCK_REDIS_URL", redis_url)
    with handles.connect() as connected:
        assert connected.get_handle("ask").remote(1).result(timeout=20) == 1
    monkeypatch.setenv("PENSTOCK_INSTANCE", "blue")
    with handles.connect() as connected:
        assert connected.instance == "blue"
        assert connected.list_endpoints() == {}
    assert repr(handles.BatchProducer(redis_url, "ask")) == "BatchProducer('ask', instance='blue')"
    with handles.connect(instance="default") as connected:
        assert list(connected.list_endpoints()) == ["ask"]
    site.close()


def test_an_empty_name_of_an_instance_is_refused(redis_url: str) -> None:
    with pytest.raises(ConfigError, match="an instance '' must be 1 to 128 letters"):
        handles.connect(redis_url, "")
