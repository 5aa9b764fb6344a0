"""Score a CSV file of 50,000 images with the digits model while web traffic runs, and see what either costs the other.

Another number of images can be said: ``python examples/score_csv.py 5000``. The same from the command line, where
an instance serves `DigitsOfRecords`:

    penstock batch digit images.csv --output digits.jsonl --job nightly
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
from digits import Digits, digits

from penstock import serve


class DigitsOfRecords(Digits):
    """Takes an image as a list of pixels, as web clients send it, or as a record of a CSV file."""

    def images(self, requests: list[serve.Request]) -> list[list[float]]:
        return [list(data.values()) if isinstance(data := request.data, dict) else data for request in requests]


def write_csv(path: Path, rows: int) -> list[int]:
    """Write images to score, a pixel to a column; return which digits they show."""
    _, images, _, labels = digits()
    picked = np.random.default_rng(0).integers(len(images), size=rows)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([f"pixel{n}" for n in range(64)])
        table.writerows(images[picked].astype(int).tolist())
    return [int(label) for label in labels[picked]]


def read_csv(path: Path) -> Iterator[dict[str, int]]:
    with path.open(newline="") as file:
        for record in csv.DictReader(file):
            yield {name: int(pixel) for name, pixel in record.items()}


class WebTraffic:
    """A client that asks for a digit every few milliseconds, as long as its context lasts."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._image = digits()[1][0].tolist()
        self.took_ms: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> WebTraffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client() as http:
            while not self._ended.wait(0.005):
                asked_at = time.perf_counter()
                http.post(f"{self._url}/digit", json=self._image).raise_for_status()
                self.took_ms.append((time.perf_counter() - asked_at) * 1000)

    def report(self, when: str) -> None:
        took_ms, self.took_ms = self.took_ms, []
        p50, p99 = np.percentile(took_ms, [50, 99])
        print(f"web {when:<10} {len(took_ms):5} requests, p50 {p50:5.1f} ms, p99 {p99:5.1f} ms")


def score(client: serve.Client, rows: Path, output: Path) -> dict[int, int]:
    found: dict[int, int] = {}
    with output.open("w") as lines:
        for result in client.batch("digit").as_completed(read_csv(rows)):
            found[result.index] = result.get()["digit"]
            print(json.dumps({"index": result.index, "digit": found[result.index]}), file=lines)
    return found


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder, serve.start(http_options={"port": 0}) as client:
        rows, output = Path(folder, "images.csv"), Path(folder, "digits.jsonl")
        labels = write_csv(rows, count)
        client.create_backend("digits", DigitsOfRecords, config={"max_batch_size": 32})
        client.create_endpoint("digit", backend="digits", route="/digit", methods=["POST"])
        with WebTraffic(str(client.http_url)) as web:
            time.sleep(4)
            web.took_ms.clear()  # its first requests warm everything up
            time.sleep(4)
            web.report("alone")
            start = time.perf_counter()
            found = score(client, rows, output)
            took_s = time.perf_counter() - start
            web.report("meanwhile")
        accuracy = np.mean([found[row] == label for row, label in enumerate(labels)])
        print(f"csv {count} rows in {took_s:.1f} s ({count / took_s:.0f} rows/s), accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
