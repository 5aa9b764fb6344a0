"""Two models and a combiner: a backend that asks two other backends, in parallel, and weighs their answers.

The combiner finds the instance that it runs in by ``serve.connect()``, as any process could.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from penstock import serve


def digits() -> Any:
    """Return (images to train on, images to test with, labels to train on, labels to test with)."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(images, labels, test_size=0.5, random_state=0, stratify=labels)


class Model:
    """Tells how likely each digit is."""

    def __init__(self, model: Any) -> None:
        images, _, labels, _ = digits()
        self.model = model.fit(images, labels)

    def __call__(self, request: serve.Request) -> Any:
        return self.model.predict_proba([request.data])[0]


class Combiner:
    """Asks both models at once and adds up their answers."""

    def __init__(self) -> None:
        client = serve.connect()
        self.handles = [client.get_handle(model, sync=False) for model in ("linear", "forest")]

    async def __call__(self, request: serve.Request) -> dict[str, int]:
        futures = await asyncio.gather(*(handle.remote(request.data) for handle in self.handles))
        likely = np.sum(await asyncio.gather(*futures), axis=0)
        return {"digit": int(likely.argmax())}


def main() -> None:
    _, images, _, labels = digits()
    few = {"num_cpus": 0.5}  # three replicas on two cores
    with serve.start(http_options={"port": 0}) as client:
        models = {
            "linear": LogisticRegression(max_iter=2000),
            "forest": RandomForestClassifier(n_estimators=20, random_state=0),
        }
        for name, model in models.items():
            client.create_backend(name, Model, model, ray_actor_options=few)
            client.create_endpoint(name, backend=name)
        client.create_backend("combiner", Combiner, ray_actor_options=few)
        client.create_endpoint("digit", backend="combiner", route="/digit", methods=["POST"])

        for name in models:
            handle = client.get_handle(name)
            futures = [handle.remote(image.tolist()) for image in images[:200]]
            right = [np.argmax(future.result(timeout=60)) for future in futures] == labels[:200]
            print(f"{name:>8}: accuracy {right.mean():.3f}")
        with httpx.Client() as http:
            answers = [http.post(f"{client.http_url}/digit", json=image.tolist()).json() for image in images[:200]]
        right = np.array([answer["digit"] for answer in answers]) == labels[:200]
        print(f"ensemble: accuracy {right.mean():.3f}")


if __name__ == "__main__":
    main()
