"""What a training came to so far, and the state from which it goes on bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefloop.records import PrefloopError
from prefloop.training.checkpoint import newest_whole, save_atomically, verify
from prefloop.training.metrics import LAST_STEPS, Metrics, mean_metrics

KEPT_STATES = 2
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
CARRIED = "moments.safetensors"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The metrics of the held-out rows after so many steps."""

    step: int
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class SkippedStep:
    """A step whose loss or gradient was not finite, which changed no weight; `rows` names the rows that it saw.

    `loss` and `grad_norm` in words, for they are no numbers.
    """

    step: int
    loss: str
    grad_norm: str
    rows: tuple[str, ...]


@dataclass(slots=True)
class TrainingResult:
    """What a training came to.

    `history` holds the metrics of each step, `evaluations` those of the held-out rows, of which the one after
    `best_step` steps was the best (None: nothing was held out). With patience the weights are those of `best_step`,
    else the last ones; `stopped_early` says that patience ended, `stopped` how far the policy had moved where that
    ended the training (empty: it did not). `skipped` are the steps that were not taken, `warnings` what to look at,
    `chosen_fell` whether one of them is of chosen completions that become unlikely.
    """

    history: list[Metrics] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    best_step: int | None = None
    stopped_early: bool = False
    stopped: str = ""
    skipped: list[SkippedStep] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    chosen_fell: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """What an event tells of it: the loss of each step, and of the other metrics the mean over the last steps."""
        return {
            "steps": len(self.history),
            "loss": [metrics.get("loss") for metrics in self.history],
            "metrics": mean_metrics(self.history[-LAST_STEPS:]),
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "best_step": self.best_step,
            "stopped_early": self.stopped_early,
            "stopped": self.stopped,
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "warnings": list(self.warnings),
        }

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> TrainingResult:
        """The result that `to_dict` gave."""
        evaluations = [Evaluation(**one) for one in saved["evaluations"]]
        skipped = [SkippedStep(**{**one, "rows": tuple(one["rows"])}) for one in saved["skipped"]]
        return TrainingResult(**{**saved, "evaluations": evaluations, "skipped": skipped})


class Carried(NamedTuple):
    """Folders of an optimizer's moments: those a training begins with (None: none), and where it leaves its own."""

    begin: Path | None = None
    end: Path | None = None


class SavedState:
    """The state of a training on disk: weights, the optimizer's moments, the best weights, and the result so far.

    `reference` are the weights of a reference that changes with the policy, empty for one that is fixed. `best` are the
    best weights so far, where those are kept. `carried` says with which moments it begins.
    """

    def __init__(
        self,
        directory: Path,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.AdamW,
        reference: Mapping[str, Tensor],
        carried: Carried | None = None,
    ) -> None:
        self.directory = directory
        self.parameters = parameters
        self.optimizer = optimizer
        self.reference = reference
        self.carried = carried or Carried()
        self.best: dict[str, Tensor] = {}

    def keep_best(self) -> None:
        """Take the weights as they are for the best."""
        self.best = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.parameters.items()}

    def restore_best(self) -> None:
        """Go back to the best weights, if any were kept."""
        _copy(self.best, self.parameters)

    def save(self, result: TrainingResult) -> None:
        """Save the state after the last step of the result; only the newest are kept."""
        tensors = {f"weight.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= self._moments()
        tensors |= {f"reference.{name}": weight for name, weight in self.reference.items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best.items()}

        def write(target: Path) -> None:
            _write(tensors, target / "state.safetensors")
            (target / "state.json").write_text(json.dumps(result.to_dict()))

        save_atomically(self.directory / f"step-{len(result.history):08d}", write)
        for old in sorted(self.directory.glob("step-*"))[:-KEPT_STATES]:
            shutil.rmtree(old)

    def load(self) -> TrainingResult:
        """Go back to the newest state that is whole, if there is any, else to the beginning; returns the result so far.

        Where the moments to begin with are damaged the optimizer begins anew, and the result warns of it.
        """
        newest = newest_whole(self.directory)
        if newest is None:
            return TrainingResult(warnings=self._begin())
        tensors = load_file(newest / "state.safetensors")
        _copy(_within(tensors, "weight."), self.parameters)
        _copy(_within(tensors, "reference."), self.reference)
        self.best = _within(tensors, "best.")
        self._take_moments(tensors)
        return TrainingResult.from_dict(json.loads((newest / "state.json").read_text()))

    def _begin(self) -> list[str]:
        """Take the moments to begin with, if any; returns why not, where they are damaged."""
        if self.carried.begin is None:
            return []
        try:
            verify(self.carried.begin)
        except PrefloopError as error:
            return [f"the optimizer begins anew, without the moments of the training before: {error}"]
        self._take_moments(load_file(self.carried.begin / CARRIED))
        return []

    def leave_moments(self) -> None:
        """Leave the optimizer's moments to another training, where that is asked for."""
        if self.carried.end is not None:
            moments = self._moments()
            shutil.rmtree(self.carried.end, ignore_errors=True)  # of a training that was killed
            save_atomically(self.carried.end, lambda target: _write(moments, target / CARRIED))

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{moment}.{name}": value
            for name, parameter in self.parameters.items()
            for moment, value in self.optimizer.state[parameter].items()
        }

    def _take_moments(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            keys = {moment: f"{moment}.{name}" for moment in MOMENTS}
            if keys["step"] in tensors:  # no moments where no step was taken yet, all being skipped
                self.optimizer.state[parameter] = {m: tensors[k].to(parameter.device) for m, k in keys.items()}


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
