"""What the judge behind a server costs: calls, their tokens, and the prices of the run file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from prefloop.environments.agent import Agent
from prefloop.environments.guarded import sound_tasks
from prefloop.environments.prompts import Prompts
from prefloop.judges.llm import LLMJudgeSettings
from prefloop.judges.render import question, shipped_prompts
from prefloop.judges.rubric import load_rubric
from prefloop.planning.workload import Lengths, Workload, pairs_of_a_task
from prefloop.records import AuthorKind, Ended, Message, Role, Split, Trajectory
from prefloop.stages.context import BEFORE, Run
from prefloop.store import calls

CHARACTERS_PER_TOKEN = 4.0
"""Of English, to a tokenizer that is the server's own."""

VERDICT_TOKENS = 400
"""Of a verdict with its reasons, where no call was answered yet."""


@dataclass(frozen=True, slots=True)
class JudgeCost:
    """Calls of an iteration (at most), tokens of a call, and US dollars; None where no price is known.

    `evaluation_calls` are those of all evaluations that are still to come, where the judge alone can tell of success.
    `counted`: the tokens are those of calls that were answered. `spent` was paid already, of `budget`, if there is one.
    """

    num_calls: int
    input_tokens: int
    output_tokens: int
    counted: bool
    per_iteration: float | None
    remaining: float | None
    spent: float
    budget: float | None
    evaluation_calls: int = 0

    @property
    def over_budget(self) -> bool:
        """Whether the run would pass its budget."""
        return self.budget is not None and self.remaining is not None and self.spent + self.remaining > self.budget


def judge_cost(run: Run, lengths: Lengths, work: Workload) -> JudgeCost | None:
    """The cost of the run's judge; None for one that costs nothing."""
    judge = run.settings.judge
    if judge.kind != "llm" or judge.llm is None:
        return None
    each_asked = judge.num_replicates if run.settings.judge_is_read else 0
    num = judge.llm.num_samples * (work.num_trajectories * each_asked + _confirmations(run, work))
    evaluations = judge.llm.num_samples * _evaluations(run)
    found = calls.mean_tokens(run.store)
    taken = found or (float(_asked(run, judge.llm, lengths)), float(min(VERDICT_TOKENS, judge.llm.max_tokens)))
    known = judge.llm.input_price is not None and judge.llm.output_price is not None
    tokens = math.ceil(taken[0]), math.ceil(taken[1])
    price = judge.llm.prices().cost(*tokens) if known else None
    left = max(0, run.settings.iterations - run.current_iteration())
    each, remaining = (None, None) if price is None else (num * price, (num * left + evaluations) * price)
    spent, budget = calls.total_cost(run.store), judge.llm.budget_usd
    return JudgeCost(num, *tokens, found is not None, each, remaining, spent, budget, evaluations)


def _confirmations(run: Run, work: Workload) -> int:
    """Fresh judgements of the members of selected pairs; a trajectory of several pairs is judged for one."""
    settings = run.settings
    num_tasks = work.num_trajectories // settings.rollout.samples_per_task
    members = 2 * num_tasks * pairs_of_a_task(settings)
    return settings.curation.confirm * min(members, work.num_trajectories)


def _evaluations(run: Run) -> int:
    """Judgements of start and end on held-out tasks: where outcomes are verified, only of the attempts to pick from."""
    environment, settings = run.environment, run.settings.evaluation
    unverified = isinstance(environment, Prompts) or (
        isinstance(environment, Agent) and environment.settings.command is not None and not environment.settings.grader
    )
    there_are = environment.num_tasks(Split.HELD_OUT)
    num_tasks = settings.num_tasks if there_are is None else min(settings.num_tasks, there_are)
    left = sum(run.found(iteration, "evaluate") is None for iteration in {BEFORE, run.settings.iterations})
    return left * num_tasks * (unverified * (1 + settings.greedy) + (settings.best_of or 0))


def _asked(run: Run, settings: LLMJudgeSettings, lengths: Lengths) -> int:
    """Tokens of the question about a trajectory of the run's mean length."""
    (task,) = sound_tasks(run.environment, Split.TRAIN, 1)
    messages = (*task.messages, Message(Role.ASSISTANT, "…"))
    trajectory = Trajectory(
        id="planned",
        task_id=task.id,
        messages=messages,
        num_prompt_messages=len(task.messages),
        ended=Ended.DONE,
        author_kind=AuthorKind.CHECKPOINT,
        author="",
    )
    asked, _ = question(shipped_prompts(), load_rubric(settings.rubric), trajectory, task.tools)
    characters = len(asked.system) + len(asked.user) + len(json.dumps(asked.schema))
    return math.ceil(characters / CHARACTERS_PER_TOKEN) + lengths.after
