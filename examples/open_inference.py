"""The Open Inference Protocol (V2) of Triton and KServe, with JSON and binary tensors, for a NumPy model.

    python examples/open_inference.py

``tritonclient.http.InferenceServerClient`` and other clients of that protocol work with its address.
"""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import orjson
from starlette.responses import JSONResponse, Response

from penstock import serve

Array = np.ndarray[Any, np.dtype[Any]]

MODEL = "scale"
TYPES = {"BOOL": "?", "INT32": "<i4", "INT64": "<i8", "FP32": "<f4", "FP64": "<f8"}
"""NumPy's types by those of the protocol."""
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
HEADER_LENGTH = "inference-header-content-length"


class OpenInference:
    """The pages below ``/v2/`` for one model, which multiplies its input by a factor."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def predict(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return {"y": (inputs["x"] * self.factor).astype(inputs["x"].dtype)}

    def __call__(self, request: serve.Request) -> Response:
        path = request.path_params["path"].strip("/")
        if path in ("health/live", "health/ready"):
            return Response()
        if not (path + "/").startswith(f"models/{MODEL}/"):
            return failure(404, f"there is no /v2/{path}; the model is {MODEL!r}")
        match path.removeprefix(f"models/{MODEL}").strip("/"):
            case "":
                tensor = {"datatype": "FP32", "shape": [-1]}
                about = {"inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}]}
                return JSONResponse({"name": MODEL, "versions": ["1"], "platform": "numpy", **about})
            case "ready":
                return Response()
            case "infer" if request.method == "POST":
                try:
                    head, inputs = read(request)
                    outputs = self.predict(inputs)
                except (KeyError, TypeError, ValueError) as e:
                    return failure(400, f"the request cannot be read: {e}")
                return write(head, outputs)
            case other:
                return failure(404, f"{MODEL} has no {request.method} {other!r}")


def read(request: serve.Request) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the JSON of a request, and its tensors: those of JSON, and those that follow it as bytes."""
    raw = request.data
    if isinstance(raw, bytes):  # the content type is that of bytes if tensors follow
        length = int(request.headers.get(HEADER_LENGTH, len(raw)))
        head, rest = orjson.loads(raw[:length]), raw[length:]
    else:
        head, rest = raw, b""
    inputs: dict[str, Array] = {}
    for tensor in head["inputs"]:
        kind, shape = np.dtype(TYPES[tensor["datatype"]]), tensor["shape"]
        if (size := tensor.get("parameters", {}).get("binary_data_size")) is None:
            inputs[tensor["name"]] = np.array(tensor["data"], kind).reshape(shape)
        else:
            inputs[tensor["name"]] = np.frombuffer(rest[:size], kind).reshape(shape)
            rest = rest[size:]
    return head, inputs


def write(head: dict[str, Any], outputs: dict[str, Array]) -> Response:
    """Return the response: each tensor as bytes if the request asks for that, else in JSON."""
    wanted = {output["name"]: output.get("parameters", {}) for output in head.get("outputs", ())}
    all_binary = head.get("parameters", {}).get("binary_data_output", False)
    described, tail = list[dict[str, Any]](), b""
    for name, array in outputs.items():
        tensor: dict[str, Any] = {"name": name, "datatype": NAMES[array.dtype], "shape": list(array.shape)}
        if wanted.get(name, {}).get("binary_data", all_binary):
            raw = array.tobytes()
            tail += raw
            described.append({**tensor, "parameters": {"binary_data_size": len(raw)}})
        else:
            described.append({**tensor, "data": array.ravel().tolist()})
    body = orjson.dumps({"model_name": MODEL, "model_version": "1", "id": head.get("id", ""), "outputs": described})
    if not tail:
        return Response(body, media_type="application/json")
    return Response(body + tail, media_type="application/octet-stream", headers={HEADER_LENGTH: str(len(body))})


def failure(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)


def main() -> None:
    with serve.start(http_options={"port": 0}) as client:
        client.create_backend("inference", OpenInference, 3.0)
        client.create_endpoint("inference", backend="inference", route="/v2/{path:path}", methods=["GET", "POST"])
        tensor = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1.0, 2.0]}
        answer = httpx.post(f"{client.http_url}/v2/models/{MODEL}/infer", json={"inputs": [tensor]})
        print(answer.json()["outputs"][0]["data"])


if __name__ == "__main__":
    main()
