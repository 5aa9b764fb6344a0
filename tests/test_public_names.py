"""The names that users may import, so that one is added or removed on purpose only."""

import subprocess
import sys
from pathlib import Path

import penstock
from penstock import handles, serve

SERVE = [
    "ALL_METHODS",
    "AsyncObjectRefHandle",
    "AsyncResponseStream",
    "AsyncServeHandle",
    "AsyncStreamingHandle",
    "AutoscalingConfig",
    "BackendConfig",
    "Batch",
    "BatchItem",
    "BatchProducer",
    "BatchProgress",
    "BatchResult",
    "Client",
    "DeadLetter",
    "DeadLetters",
    "HTTPOptions",
    "ObjectRefHandle",
    "Request",
    "ResponseStream",
    "Retry",
    "RetryConfig",
    "ServeHandle",
    "Status",
    "StreamingHandle",
    "accept_batch",
    "asgi",
    "connect",
    "errors",
    "get_current_backend_tag",
    "get_current_replica_tag",
    "get_multiplexed_model_id",
    "multiplexed",
    "start",
]

HANDLES = [
    "AsyncObjectRefHandle",
    "AsyncResponseStream",
    "AsyncServeHandle",
    "AsyncStreamingHandle",
    "AsyncSubmitted",
    "Batch",
    "BatchItem",
    "BatchProducer",
    "BatchProgress",
    "BatchResult",
    "Connection",
    "DeadLetter",
    "DeadLetters",
    "ObjectRefHandle",
    "RequestStatus",
    "Response",
    "ResponseStream",
    "Rows",
    "ServeHandle",
    "StreamingHandle",
    "Submitted",
    "connect",
    "errors",
    "read",
]


def test_serve_exports_what_is_documented() -> None:
    assert serve.__all__ == SERVE == sorted(SERVE)


def test_handles_exports_what_is_documented() -> None:
    assert handles.__all__ == HANDLES == sorted(HANDLES)


def test_every_exported_name_is_there_and_has_a_docstring() -> None:
    for module in (serve, handles):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name


def test_what_both_export_is_the_same() -> None:
    for name in set(SERVE) & set(HANDLES) - {"connect"}:
        assert getattr(serve, name) is getattr(handles, name)


def test_the_package_has_its_version_and_imports_nothing() -> None:
    command = "import sys, penstock; print(penstock.__version__, [n for n in sys.modules if n.startswith('penstock.')])"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [penstock.__version__, "[]"]


def test_the_version_is_written_once() -> None:
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert 'version = { attr = "penstock.__version__" }' in pyproject
    assert penstock.__version__ not in pyproject
