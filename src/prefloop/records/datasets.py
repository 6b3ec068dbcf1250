"""What is trained on, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefloop.records.base import JSONObject, content_hash


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference between two trajectories of one task, with where it comes from.

    `gap` is the difference of scores that made it; `probability` the belief that chosen really is better;
    `evidence` the ids of the judgements or comparisons behind it.
    """

    task_id: str
    chosen_id: str
    rejected_id: str
    gap: float = 0.0
    probability: float = 1.0
    weight: float = 1.0
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dataset:
    """A frozen selection: what was chosen, and the recipe that chose it.

    Holds pairs (preferences) or trajectory ids (demonstrations), in training order.
    """

    recipe: JSONObject
    pairs: tuple[Pair, ...] = ()
    trajectory_ids: tuple[str, ...] = ()
    run_id: str = ""
    iteration: int = -1

    @property
    def id(self) -> str:
        """The hash of the recipe and of every member."""
        members = [
            (p.task_id, p.chosen_id, p.rejected_id, p.gap, p.probability, p.weight, p.evidence) for p in self.pairs
        ]
        return content_hash("dataset", self.recipe, members, self.trajectory_ids)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved policy: where it lies, what it came from and how it was trained.

    `manifest_hash` is the SHA-256 of the manifest that lists every file with its size and hash.
    """

    id: str
    path: str
    manifest_hash: str
    algorithm: str
    parent_id: str = ""
    dataset_id: str = ""
    run_id: str = ""
    iteration: int = -1
    metrics: JSONObject = field(default_factory=dict)
