"""The text format of Prometheus.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]
Sample = tuple[Labels, float]


class Buckets(NamedTuple):
    """The counts of a histogram."""

    counts: Sequence[int]
    """The number of values in each bucket; the last has those beyond all bounds."""
    total: float
    """The sum of all values."""


class Exposition:
    """A page of metrics. Each method adds the metric of one name, with its help and type."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, kind: Literal["counter", "gauge"], name: str, help_text: str, samples: Iterable[Sample]) -> None:
        self._head(kind, name, help_text)
        for labels, value in samples:
            self._lines.append(f"{name}{_labels(labels)} {value:.16g}")

    def add_histogram(
        self, name: str, help_text: str, bounds: Sequence[float], samples: Iterable[tuple[Labels, Buckets]]
    ) -> None:
        """Add a histogram; ``bounds`` are the upper bounds of all buckets but the last."""
        self._head("histogram", name, help_text)
        for labels, (counts, total) in samples:
            cumulated = list(accumulate(counts))
            for bound, count in zip((*map(str, bounds), "+Inf"), cumulated, strict=True):
                self._lines.append(f"{name}_bucket{_labels({**labels, 'le': bound})} {count}")
            self._lines.append(f"{name}_sum{_labels(labels)} {total:.16g}")
            self._lines.append(f"{name}_count{_labels(labels)} {cumulated[-1]}")

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)

    def _head(self, kind: str, name: str, help_text: str) -> None:
        self._lines += (f"# HELP {name} {help_text}", f"# TYPE {name} {kind}")


def _labels(labels: Labels) -> str:
    inner = ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())
    return f"{{{inner}}}" if inner else ""


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
