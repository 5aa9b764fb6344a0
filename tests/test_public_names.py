"""What users may import, so that nothing is added or lost without anybody deciding it."""

from penstock import handles, serve

SERVE = [
    "AsyncServeHandle",
    "AutoscalingConfig",
    "BackendConfig",
    "Client",
    "HTTPOptions",
    "Request",
    "ServeHandle",
    "accept_batch",
    "connect",
    "errors",
    "get_current_backend_tag",
    "get_current_replica_tag",
    "start",
]

HANDLES = [
    "AsyncServeHandle",
    "Batch",
    "BatchItem",
    "BatchProducer",
    "BatchResult",
    "Rows",
    "ServeHandle",
    "connect",
    "errors",
    "read",
]


def test_serve_exports_what_is_documented() -> None:
    assert serve.__all__ == SERVE == sorted(SERVE)


def test_handles_exports_what_is_documented() -> None:
    assert handles.__all__ == HANDLES == sorted(HANDLES)


def test_every_exported_name_is_there() -> None:
    for module in (serve, handles):
        for name in module.__all__:
            assert getattr(module, name) is not None


def test_the_errors_of_both_are_the_same() -> None:
    assert serve.errors is handles.errors
