"""What is trained on, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefloop.records.base import JSONObject, content_hash


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference between two trajectories of one task, with where it comes from.

    `gap` is the difference of scores that made it; `probability` the belief that chosen really is better, a tie
    counting half; `tied` says that neither is; `margin` is by how much, in the unit of a reward model's score;
    `evidence` the ids of the judgements or comparisons behind it.
    """

    task_id: str
    chosen_id: str
    rejected_id: str
    gap: float = 0.0
    probability: float = 1.0
    weight: float = 1.0
    evidence: tuple[str, ...] = ()
    margin: float = 0.0
    tied: bool = False


@dataclass(frozen=True, slots=True)
class Labelled:
    """What was said of one trajectory, or of its steps.

    `desirable` says whether it is good; None where its steps were labelled, each on its own: `evidence` then holds
    the ids of their labels, else those of the judgements behind it.
    """

    trajectory_id: str
    desirable: bool | None
    weight: float = 1.0
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Valued:
    """What an attempt of a policy is worth: its reward, and the ids of the judgements that it was made of."""

    trajectory_id: str
    value: float
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dataset:
    """A frozen selection: what was chosen, and the recipe that chose it.

    Holds pairs (preferences), trajectory ids (demonstrations), labelled trajectories or rollouts with their values, in
    training order.
    """

    recipe: JSONObject
    pairs: tuple[Pair, ...] = ()
    trajectory_ids: tuple[str, ...] = ()
    run_id: str = ""
    iteration: int = -1
    labelled: tuple[Labelled, ...] = ()
    valued: tuple[Valued, ...] = ()

    @property
    def num_members(self) -> int:
        """How many pairs, demonstrations, labelled trajectories and rollouts it holds."""
        return len(self.pairs) + len(self.trajectory_ids) + len(self.labelled) + len(self.valued)

    @property
    def id(self) -> str:
        """The hash of the recipe and of every member."""
        members = [
            (p.task_id, p.chosen_id, p.rejected_id, p.gap, p.probability, p.weight, p.evidence,
             *((p.margin, p.tied) if p.margin or p.tied else ()))
            for p in self.pairs
        ]  # fmt: skip
        labelled = [(each.trajectory_id, each.desirable, each.weight, each.evidence) for each in self.labelled]
        # What a dataset does not hold is left out of its hash: older ones keep theirs.
        valued = [("value", each.trajectory_id, each.value, each.evidence) for each in self.valued]
        others = [found for found in (labelled, valued) if found]
        return content_hash("dataset", self.recipe, members, self.trajectory_ids, *others)

    @property
    def all_trajectory_ids(self) -> list[str]:
        """The ids of all trajectories that members name, each once, in order."""
        of_pairs = [i for pair in self.pairs for i in (pair.chosen_id, pair.rejected_id)]
        others = [*(each.trajectory_id for each in self.labelled), *(each.trajectory_id for each in self.valued)]
        return list(dict.fromkeys([*self.trajectory_ids, *of_pairs, *others]))


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
