"""The model of images in a loop, without a server: the rate of the device. A line of JSON for each workload."""

from __future__ import annotations

import argparse
import json
import time

from image_model import BATCH_SIZE, DEVICES, WORKLOADS, Model, body


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=DEVICES, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    asked = parser.parse_args()
    model = Model(asked.device)
    for workload in WORKLOADS:
        bodies = [body(workload, seed) for seed in range(BATCH_SIZE)]
        staged_per_s = model.repeat(workload, bodies, asked.seconds)
        began_s, calls = time.perf_counter(), 0
        while (took_s := time.perf_counter() - began_s) < asked.seconds:
            model.answers(bodies)
            calls += 1
        seen = {
            "workload": workload.name,
            "device": model.shown_device,
            "staged_per_s": staged_per_s,
            "from_bytes_per_s": calls * BATCH_SIZE / took_s,
        }
        print("\n@@" + json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
