"""Where the metrics of a training go."""

from __future__ import annotations

from typing import Protocol

from prefloop.training.metrics import Metrics


class MetricsWriter(Protocol):
    """Takes the metrics of a training, in the order of steps from 1 on."""

    def write(self, step: int, metrics: Metrics) -> None:
        """The metrics after a step; those of held-out rows among them begin with `eval/`."""

    def close(self) -> None:
        """No more will come: bring what is left to where it goes."""
