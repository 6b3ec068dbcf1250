"""What the judge behind a server costs: calls, their tokens, and the prices of the run file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from prefloop.judges.llm import LLMJudgeSettings
from prefloop.judges.render import question, shipped_prompts
from prefloop.judges.rubric import load_rubric
from prefloop.planning.workload import Lengths, Workload
from prefloop.records import AuthorKind, Ended, Message, Role, Split, Trajectory
from prefloop.stages.context import Run
from prefloop.store import calls

CHARACTERS_PER_TOKEN = 4.0
"""Of English, to a tokenizer that is the server's own."""

VERDICT_TOKENS = 400
"""Of a verdict with its reasons, where no call was answered yet."""


@dataclass(frozen=True, slots=True)
class JudgeCost:
    """Calls of an iteration, tokens of a call, and US dollars; None where no price is known.

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

    @property
    def over_budget(self) -> bool:
        """Whether the run would pass its budget."""
        return self.budget is not None and self.remaining is not None and self.spent + self.remaining > self.budget


def judge_cost(run: Run, lengths: Lengths, work: Workload) -> JudgeCost | None:
    """The cost of the run's judge; None for one that costs nothing."""
    judge = run.settings.judge
    if judge.kind != "llm" or judge.llm is None:
        return None
    num = work.num_trajectories * judge.num_replicates * judge.llm.num_samples
    found = calls.mean_tokens(run.store)
    taken = found or (float(_asked(run, judge.llm, lengths)), float(min(VERDICT_TOKENS, judge.llm.max_tokens)))
    known = judge.llm.input_price is not None and judge.llm.output_price is not None
    tokens = math.ceil(taken[0]), math.ceil(taken[1])
    each = num * judge.llm.prices().cost(*tokens) if known else None
    left = max(0, run.settings.iterations - run.current_iteration())
    remaining = None if each is None else each * left
    spent = calls.total_cost(run.store)
    return JudgeCost(num, *tokens, found is not None, each, remaining, spent, judge.llm.budget_usd)


def _asked(run: Run, settings: LLMJudgeSettings, lengths: Lengths) -> int:
    """Tokens of the question about a trajectory of the run's mean length."""
    (task,) = run.environment.tasks(Split.TRAIN, 1)
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
