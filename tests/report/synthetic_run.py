"""A finished run made up from a seed, recorded as the loop records one: every figure of a report has its rows."""

import json
import random
from collections import Counter

from prefloop.evaluation import compare_on_tasks, outcomes_by_task, success_summary
from prefloop.evaluation.kl import KLSummary
from prefloop.records import (
    AuthorKind,
    Checkpoint,
    Dataset,
    Ended,
    Judgement,
    Message,
    Pair,
    Rater,
    RaterKind,
    Role,
    Split,
    Status,
    Task,
    ToolCall,
    Trajectory,
    content_hash,
)
from prefloop.stats.intervals import proportion

RUN = "run-synthetic-0001"
VERIFIED = Rater(RaterKind.TEST, "booking:verified")
JUDGE = Rater(RaterKind.JUDGE, "rules", {"noise": 0.15})
EDGES = [round(0.1 * step, 1) for step in range(11)]
SETTINGS = {
    "name": "booking",
    "seed": 7,
    "store": None,
    "environment": {"kind": "booking", "max_turns": 7},
    "train": {"algorithm": "dpo", "beta": 0.1, "learning_rate": 3e-4, "guard": {"max_drop": 0.1}},
    "curate": {"fraction": 0.3, "notes": 'with "quotes"'},
}
CITIES = ("Tokyo", "Lima", "Oslo", "Paris", "Cairo")


class SyntheticRun:
    """Builds the run into a store; `stop_after` leaves it unfinished, `online` learns from its own rollouts."""

    def __init__(self, store, *, num_tasks=48, num_iterations=4, seed=0, payload="", online=False):
        self.online = online
        self.store, self.draw, self.payload = store, random.Random(seed), payload
        self.num_tasks, self.num_iterations = num_tasks, num_iterations
        self.tasks = [self._task(number, Split.HELD_OUT) for number in range(num_tasks)]
        self.train_tasks = [self._task(1000 + number, Split.TRAIN) for number in range(8)]
        self.checkpoints = [content_hash("checkpoint", number) for number in range(num_iterations + 1)]

    def _task(self, number, split):
        wanted = {"city": CITIES[number % 5], "max_price": 500 + 100 * (number % 7), "direct": number % 2 == 0}
        said = f"Book me a flight to {wanted['city']} under ${wanted['max_price']}, task {number}. {self.payload}"
        return Task("booking", wanted, number, (Message(Role.USER, said.strip()),), split=split)

    def skill(self, updates):
        return 0.3 + 0.65 * updates / self.num_iterations

    # --- rows -------------------------------------------------------------------------------------------

    def begin(self):
        self.store.add_run(RUN, "booking demo", "runs/demo", SETTINGS)
        self.store.add_tasks([*self.tasks, *self.train_tasks])
        self.store.add_raters([VERIFIED, JUDGE])
        versions = {"prefloop": "0.1.0", "torch": "2.13.0", "python": "3.11.9"}
        start = {"versions": versions, "num_threads": 2, "device": "cpu", "seed": 7, "name": "booking demo"}
        self.store.add_event(RUN, -1, "start", start)
        self.store.add_event(RUN, -1, "demonstrations", {"num": 400, "seconds": 1.2})
        loss = [3.2 * 0.96**step + 0.35 for step in range(90)]
        first = {"checkpoint_id": self.checkpoints[0], "steps": 90, "loss": loss, "seconds": 38.4}
        self.store.add_event(RUN, -1, "sft", first)
        self.store.add_checkpoint(Checkpoint(self.checkpoints[0], "sft", "a" * 64, "sft", run_id=RUN))
        return self

    def attempt(self, task, checkpoint, iteration, sample, stage, skill):
        """One trajectory with its verified judgement and the judge's."""
        success = self.draw.random() < skill
        city, identity = task.specification["city"], content_hash(RUN, stage, iteration, task.id, sample, checkpoint)
        flights = [{"id": f"{a}{17 + sample}", "price": 300 + 100 * i, "stops": i % 2} for i, a in enumerate("ABCD")]
        messages = [
            *task.messages,
            self._calls("search_flights", {"city": city}),
            Message(Role.TOOL, json.dumps(flights), tool_call_id="1"),
        ]
        if success:
            messages += [
                self._calls("filter_results", {"max_price": task.specification["max_price"], "direct": True}),
                Message(Role.TOOL, json.dumps(flights[:1]), tool_call_id="1"),
            ]
        invented = not success and self.draw.random() < 0.4
        chosen = "ZZ99" if invented else flights[0]["id"] if success else flights[3]["id"]
        answer = {"error": "no such flight"} if invented else {"booked": chosen}
        messages += [
            self._calls("book_flight", {"flight_id": chosen}),
            Message(Role.TOOL, json.dumps(answer), tool_call_id="1"),
            Message(Role.ASSISTANT, f"Your flight is booked. {self.payload}".strip()),
        ]
        trajectory = Trajectory(
            identity, task.id, tuple(messages), 1, Ended.DONE, AuthorKind.CHECKPOINT, checkpoint, RUN, iteration,
            sample, extra={"stage": stage},
        )  # fmt: skip
        metrics = {"invented_ids": float(invented), "ignored_constraints": float(not success and not invented)}
        value = float(success) - 0.3 * invented
        criteria = {**metrics, "success": int(success)}
        verified = Judgement(identity, VERIFIED.id, Status.OK, value, (value + 1) / 2, criteria=criteria)
        noisy = min(1.0, max(0.0, (value + 1) / 2 + self.draw.gauss(0, 0.15)))
        return trajectory, verified, Judgement(identity, JUDGE.id, Status.OK, noisy, noisy)

    def _calls(self, name, arguments):
        return Message(Role.ASSISTANT, tool_calls=(ToolCall(name, arguments, "1"),))

    def _add(self, tasks, checkpoint, iteration, stage, skill, num_samples=1, judged=False):
        made = [
            self.attempt(task, checkpoint, iteration, sample, stage, skill)
            for task in tasks
            for sample in range(num_samples)
        ]
        self.store.add_trajectories([trajectory for trajectory, _, _ in made])
        self.store.add_judgements([verified for _, verified, _ in made])
        if judged:
            self.store.add_judgements([judgement for _, _, judgement in made])
        return made

    # --- stages -----------------------------------------------------------------------------------------

    def evaluate(self, updates, *, guard):
        """Sampled and greedy evaluation of the policy after so many updates."""
        iteration, checkpoint = updates - 1, self.checkpoints[updates]
        tasks = self.tasks[:16] if guard else self.tasks
        found = {}
        for how, skill in (("sampled", self.skill(updates)), ("greedy", min(1.0, self.skill(updates) + 0.05))):
            made = self._add(tasks, checkpoint, iteration, f"evaluate_{how}", skill)
            kl = KLSummary(0.04 * updates, 0.002, 0.9 * updates, 0.05, len(tasks), 30 * len(tasks))
            found[how] = success_summary([t for t, _, _ in made], [v for _, v, _ in made], kl=kl if updates else None)
        detail = {"checkpoint_id": checkpoint, "num_tasks": len(tasks), **found, "guard": guard, "seconds": 4.5}
        self.store.add_event(RUN, iteration, "evaluate", detail)

    def rollout_to_curate(self, index):
        """The first three stages of an iteration; returns its dataset's id."""
        checkpoint = self.checkpoints[index]
        made = self._add(self.train_tasks, checkpoint, index, "rollout", self.skill(index), 8, judged=True)
        num = len(made)
        rollout = {
            "checkpoint_id": checkpoint, "num": num, "num_tokens": 70 * num, "ended": {"done": num}, "errors": 0,
            "mean_turns": 3.4, "seconds": 6.1,
        }  # fmt: skip
        self.store.add_event(RUN, index, "rollout", rollout)
        scores = [judgement.score for _, _, judgement in made]
        judge = {
            "judge": "rules", "rater_id": JUDGE.id, "num": num, "statuses": {"ok": num},
            "mean_score": sum(scores) / num, "mean_verified_score": sum(v.score for _, v, _ in made) / num,
            "success": proportion([bool(v.criteria["success"]) for _, v, _ in made]).to_dict(), "cost": 0.0,
            "seconds": 0.2,
        }  # fmt: skip
        self.store.add_event(RUN, index, "judge", judge)
        return self._curate(index, made)

    def _curate(self, index, made):
        ranked = sorted(made, key=lambda one: -one[2].score)
        kept, dropped = ranked[: len(made) // 3], ranked[len(made) // 3 :]
        pairs = tuple(
            Pair(good[0].task_id, good[0].id, bad[0].id, good[2].score - bad[2].score)
            for good, bad in zip(kept[:12], reversed(dropped), strict=False)
        )
        dataset = Dataset({"fraction": 0.3}, pairs, run_id=RUN, iteration=index)
        self.store.add_dataset(dataset)
        self.store.add_event(RUN, index, "curate", {
            "dataset_id": dataset.id, "num_scored": len(made), "num_kept": len(kept), "num_pairs": len(pairs),
            "num_tasks": 8, "num_tasks_without_pair": index % 3, "mean_gap": 0.42, "length_chosen": 180.0 + 4 * index,
            "pair_precision": proportion([True] * 11 + [index > 1]).to_dict(), "length_rejected": 150.0,
            "num_human_pairs": 2 if index == 1 else 0, "kept_scores": _histogram(kept),
            "dropped_scores": _histogram(dropped), "kept_share_by_task": {"min": 0.1, "median": 0.3, "max": 0.6},
            "num_duplicates": 3, "num_marked": 0, "seconds": 0.1,
        })  # fmt: skip
        return dataset.id

    def train(self, index, dataset_id):
        """One update; the second iteration needs a gentler attempt."""
        refused = {"learning_rate": 3e-4, "accepted": False, "kl": 2.5,
                   "reason": "success on the guard tasks 62.5 % → 43.8 %: a loss of 18.8 points"}  # fmt: skip
        accepted = {"learning_rate": 1e-4, "accepted": True, "kl": 0.9, "reason": "within 10.0 points"}
        checkpoint = self.checkpoints[index + 1]
        files = content_hash("manifest", index) * 2
        parent = self.checkpoints[index]
        self.store.add_checkpoint(Checkpoint(checkpoint, f"dpo-{index}", files, "dpo", parent, dataset_id, RUN, index))
        self.store.add_event(RUN, index, "train", {
            "checkpoint_id": checkpoint, "algorithm": "dpo", "steps": 24, "seconds": 9.3, "rolled_back": False,
            "loss": [0.69 * 0.97**step + 0.02 * self.draw.random() for step in range(24)],
            "metrics": {"rewards/accuracies": 0.9, "rewards/margins": 1.1},
            "attempts": [refused, accepted] if index == 1 else [accepted],
            "warnings": ["step 24: chosen completions have become 6.1 nats less likely"] if index == 0 else [],
            **({"credit": self._credit(index)} if self.online else {}),
        })  # fmt: skip

    @staticmethod
    def _credit(index):
        mismatch = {"mean": 2e-4, "largest": 0.03, "effective_share": 0.987}
        reward = 0.2 + 0.1 * index
        interval = {"value": reward, "low": reward - 0.2, "high": reward + 0.2, "n": 64}
        return {
            "num": 64, "reward": reward, "reward_sd": 0.4, "reward_interval": interval, "num_groups": 8,
            "kl_of_rollouts": 0.5 * index,
            "kl_coef": 0.02, "num_groups_without_spread": index, "explained_variance": 0.25 * index,
            "sampling_mismatch": mismatch,
        }  # fmt: skip

    def finish(self, agreement=None):
        """The last event: paired comparison over the rows of both full evaluations."""
        last = self.num_iterations
        paired = compare_on_tasks(self.outcomes(0), self.outcomes(last)).to_dict()
        stages = {"demonstrations": 1.2, "sft": 38.4, "rollout": 24.4, "judge": 0.8, "curate": 0.4, "train": 37.2,
                  "evaluate": 22.5}  # fmt: skip
        detail = {
            "start_checkpoint": self.checkpoints[0], "end_checkpoint": self.checkpoints[last], "paired": paired,
            "seconds_by_stage": stages, "wall_s": 127.9, "agreement_with_people": agreement,
        }  # fmt: skip
        self.store.add_event(RUN, last, "finish", detail)

    def outcomes(self, updates):
        """The verified sampled outcomes of a policy, from the rows."""
        found = self.store.trajectories(run_id=RUN, author=self.checkpoints[updates], iteration=updates - 1)
        found = [trajectory for trajectory in found if trajectory.extra["stage"] == "evaluate_sampled"]
        return outcomes_by_task(
            found, self.store.judgements(trajectory_ids=[t.id for t in found], rater_id=VERIFIED.id)
        )

    def build(self, agreement=None):
        """The whole run."""
        self.begin()
        self.evaluate(0, guard=False)
        for index in range(self.num_iterations):
            self.train(index, self.rollout_to_curate(index))
            self.evaluate(index + 1, guard=index + 1 < self.num_iterations)
        self.finish(agreement)
        return self


def _histogram(made):
    counts = Counter(min(9, int(10 * judgement.score)) for _, _, judgement in made)
    return {"edges": EDGES, "counts": [counts[b] for b in range(10)]}
