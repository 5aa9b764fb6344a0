"""Triton's HTTP client against examples/open_inference.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.clients.serving import example, serving

triton: Any = pytest.importorskip("tritonclient.http")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with serving(example("open_inference").OpenInference, 3.0, route="/v2/{path:path}") as address:
        client = triton.InferenceServerClient(address)
        yield client
        client.close()


def test_the_server_and_the_model_are_ready(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scale")
    assert not client.is_model_ready("other")


def test_the_model_describes_itself(client: Any) -> None:
    about = client.get_model_metadata("scale")
    assert (about["name"], about["versions"]) == ("scale", ["1"])
    assert about["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1]}]


@pytest.mark.parametrize("kind", ["FP32", "FP64", "INT64"])
@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False])
def test_tensors_travel_as_json_and_as_bytes(client: Any, kind: str, binary_input: bool, binary_output: bool) -> None:
    values = np.arange(6, dtype={"FP32": np.float32, "FP64": np.float64, "INT64": np.int64}[kind]).reshape(2, 3)
    tensor = triton.InferInput("x", [2, 3], kind)
    tensor.set_data_from_numpy(values, binary_data=binary_input)
    wanted = triton.InferRequestedOutput("y", binary_data=binary_output)
    answer = client.infer("scale", [tensor], outputs=[wanted])
    found = answer.as_numpy("y")
    assert found.dtype == values.dtype
    assert found.tolist() == (3 * values).tolist()


def test_a_large_binary_tensor_arrives_whole(client: Any) -> None:
    values = np.arange(500_000, dtype=np.float32)
    tensor = triton.InferInput("x", list(values.shape), "FP32")
    tensor.set_data_from_numpy(values)
    assert np.array_equal(client.infer("scale", [tensor]).as_numpy("y"), 3 * values)


def test_an_error_is_one_of_the_client(client: Any) -> None:
    with pytest.raises(triton.InferenceServerException, match="the model is 'scale'"):
        client.get_model_metadata("other")
