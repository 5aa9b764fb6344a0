"""The model of the digits case, the same for every system: that of ``examples/digits.py``, trained when it is made."""

from __future__ import annotations

import os

# Read when numpy is imported. A batch is 64 x 64 numbers: threads would only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


class Model:
    """Tells which digits images of 8 x 8 pixels show."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        self._model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(images, labels)

    def answers(self, images: list[list[float]]) -> list[dict[str, int]]:
        return [{"digit": int(digit)} for digit in self._model.predict(np.array(images))]
