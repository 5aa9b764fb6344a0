from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

BUCKET = "bucket"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    # Not above: the imports take a second, and `make check` runs no test that needs them.
    server = import_module("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The file system of an empty bucket, which this process and those that it starts find by their environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs: Any = import_module("s3fs")
    bucket: Any = import_module("boto3").resource("s3").Bucket(BUCKET)
    bucket.create()
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3fs.S3FileSystem()
    bucket.objects.all().delete()
    bucket.delete()
    s3fs.S3FileSystem.clear_instance_cache()
