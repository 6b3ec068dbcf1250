"""How many tokens the stages of a run go through: from its tasks' own prompts, and its rollouts if there are some."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefloop.environments.agent import Agent, AgentSettings
from prefloop.environments.base import Demonstrator, TaskSource
from prefloop.environments.guarded import sound_demonstration, sound_tasks
from prefloop.losses.registry import objective
from prefloop.planning.memory import Sampling, Update
from prefloop.records import JSONObject, Message, PrefloopError, Split
from prefloop.stages.context import Run
from prefloop.stages.rollouts import STAGE as ROLLOUT
from prefloop.stages.settings import RunSettings
from prefloop.training.settings import TrainingSettings

if TYPE_CHECKING:
    from prefloop.chat import ChatRenderer

NUM_TASKS = 16
"""Tasks whose prompts are measured."""

NUM_TRAJECTORIES = 64
CHARACTERS_PER_TOKEN = 3.5
"""Of prompts where there is no tokenizer to ask: English has four, tools in JSON have three."""

ANSWER_TOKENS = 64
"""Of what a tool or user says between two turns, where no rollout tells."""

AGENT_TURNS = 8
"""Of an agent whose turns nobody knows before its first episode; `gateway.max_turns` is there to stop it."""

Count = Callable[[Sequence[Message], Sequence[JSONObject]], int]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of a trajectory: of its prompt, after it, and those among them that the policy samples.

    `demonstration` is the same of a whole demonstration, 0 where there are none; `source` says where they are from.
    `longest_prompt` is that of the tasks that were looked at, those of evaluations too.
    """

    prompt: int
    after: int
    sampled: int
    demonstration: int
    source: str
    longest_prompt: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """What the stages of an iteration go through.

    `num_redrawn` is how many rollouts `rollout.redraws` may add at most, which nothing else here counts.
    """

    rollout: Sampling
    guard: Sampling
    evaluation: Sampling
    update: Update
    sft: Update | None
    num_trajectories: int
    num_guards: int
    num_redrawn: int


def lengths_of(run: Run, renderer: ChatRenderer | None) -> Lengths:
    """Tokens of the run's trajectories; `renderer` None: prompts are counted by their characters.

    Raises:
        PrefloopError: the environment cannot give tasks, or the chat template cannot show them.
    """
    settings, environment = run.settings, run.environment
    if environment.num_tasks(Split.TRAIN) == 0:
        raise PrefloopError(f"environment {environment.name} has no training tasks: there is nothing to plan")
    tasks = sound_tasks(environment, Split.TRAIN, min(NUM_TASKS, environment.num_tasks(Split.TRAIN) or NUM_TASKS))
    count = characters if renderer is None else _rendered(renderer)
    prompts = [count(task.messages, task.tools) for task in tasks]
    prompt, longest = _mean(prompts), max([*prompts, *_held_out_prompts(environment, count)])
    shown = 0
    if settings.sft is not None and isinstance(environment, Demonstrator):
        spoken = [sound_demonstration(environment, task, settings.seed)[0] for task in tasks]
        shown = _mean([count(messages, task.tools) for messages, task in zip(spoken, tasks, strict=True)])
    recorded = _recorded(run)
    if recorded is not None:
        return Lengths(*recorded, shown, "the run's own rollouts", longest)
    new = settings.rollout.sampling.max_new_tokens
    agent = isinstance(environment, Agent)
    turns = min(settings.gateway.max_turns, AGENT_TURNS) if agent else int(getattr(environment, "max_turns", 1))
    by = "the chat template" if renderer is not None else f"{CHARACTERS_PER_TOKEN} characters a token"
    if turns == 1:
        return Lengths(prompt, new, new, shown, f"prompts by {by}, each reply max_new_tokens long", longest)
    bound = f"{turns} turns (an agent's own are not known)" if agent else "max_turns turns"
    said = f"prompts by {by}, {bound} of half of max_new_tokens, answers of {ANSWER_TOKENS} tokens"
    turn = max(1, new // 2)
    return Lengths(prompt, turns * turn + (turns - 1) * ANSWER_TOKENS, turns * turn, shown, said, longest)


def _held_out_prompts(environment: TaskSource, count: Count) -> list[int]:
    num = environment.num_tasks(Split.HELD_OUT)
    tasks = sound_tasks(environment, Split.HELD_OUT, NUM_TASKS if num is None else min(NUM_TASKS, num))
    return [count(task.messages, task.tools) for task in tasks]


def workload(
    settings: RunSettings, lengths: Lengths, max_context: int, tasks: tuple[int | None, int | None]
) -> Workload:
    """The stages' tokens; `tasks` are how many tasks there are to train on and held out, None without end."""
    rollout, there_are, held_out = settings.rollout, *tasks
    agents = _agents_at_once(settings)
    if agents is not None:
        max_context = min(max_context, settings.gateway.max_context or max_context)
    prompt = min(lengths.prompt, max_context)
    after = min(lengths.after, max_context - prompt)
    num_tasks = min(rollout.num_tasks, there_are or rollout.num_tasks)
    unit = min(rollout.tasks_per_unit, num_tasks)
    guards = min(settings.guard.num_tasks, there_are or settings.guard.num_tasks)
    evaluated = min(settings.evaluation.num_tasks, held_out or settings.evaluation.num_tasks)

    def alone(rows: int) -> Sampling:
        rows = min(rows, agents or rows)
        return Sampling(rows, rows, prompt, after)

    attempts = unit * rollout.samples_per_task
    return Workload(
        Sampling(attempts, unit, prompt, after) if agents is None else alone(attempts),
        alone(min(guards, rollout.rows_per_unit)),
        alone(min(rollout.tasks_per_unit, evaluated)),
        _update(settings, num_tasks, prompt, after, lengths),
        None if settings.sft is None else _imitation(settings.sft, settings.sft.num_demonstrations, lengths),
        num_tasks * rollout.samples_per_task,
        guards,
        rollout.redraws * num_tasks * rollout.samples_per_task,
    )


def _agents_at_once(settings: RunSettings) -> int | None:
    """How many conversations of agents the gateway holds at once; None where the environment steps all rows itself.

    Each has a row of its own, as its agent comes when it comes; of agents elsewhere nobody knows how many there are.
    """
    environment, gateway = settings.environment, settings.gateway
    if not isinstance(environment, AgentSettings):
        return None
    if environment.command is None:
        return min(gateway.max_episodes, gateway.max_batch + gateway.cached_rows)
    return min(gateway.max_episodes, environment.max_parallel)


def pairs_of_a_task(settings: RunSettings) -> int:
    """How many there are at most: of each kept trajectory with another."""
    each = settings.rollout.samples_per_task
    return min(each // 2 or 1, math.ceil(each * settings.curation.fraction))


def examples_of_a_task(settings: RunSettings) -> tuple[int, int]:
    """How many examples of the objective a task gives at most, and how many trajectories an example has.

    A group of rollouts has all attempts at its task; pairs, labels and demonstrations are of the kept ones.
    """
    each = settings.rollout.samples_per_task
    kept = math.ceil(each * settings.curation.fraction)
    match objective(settings.train.algorithm).records:
        case "rollouts":
            return 1, each
        case "pairs":
            return pairs_of_a_task(settings), 2
        case "labelled samples":
            return min(each, 2 * kept), 1
        case _:
            return kept, 1


def _update(settings: RunSettings, num_tasks: int, prompt: int, after: int, lengths: Lengths) -> Update:
    """A step on the examples of an iteration: it shares its tasks' prompts."""
    train = settings.train
    of_task, size = examples_of_a_task(settings)
    num = max(1, num_tasks * of_task)
    batch = min(train.batch_size, num)
    own = lengths.sampled / max(1, lengths.after)
    tasks = num_tasks * (1 - (1 - batch / num) ** (num / num_tasks))  # that a batch meets
    tokens = size * batch * after + math.ceil(tasks) * prompt
    steps = train.num_steps or train.num_epochs * math.ceil(num / batch)
    return Update(tokens, int(size * batch * after * own), steps, prompt + after)


def _imitation(settings: TrainingSettings, num: int, lengths: Lengths) -> Update:
    batch = min(settings.batch_size, num)
    tokens = batch * lengths.demonstration
    steps = settings.num_steps or settings.num_epochs * math.ceil(num / batch)
    return Update(tokens, max(0, tokens - batch * lengths.prompt), steps, lengths.demonstration)


def _recorded(run: Run) -> tuple[int, int, int] | None:
    """Prompt, what follows, and what was sampled, of the newest rollouts."""
    done = run.current_iteration()
    found = next((event for number in range(done, -1, -1) if (event := run.found(number, ROLLOUT))), None)
    if found is None or not found.get("num_tokens"):
        return None
    ids = [row.id for row in run.store.trajectories(run_id=run.id, iteration=done) if row.extra.get("stage") == ROLLOUT]
    ids = ids or [row.id for row in run.store.trajectories(run_id=run.id, iteration=max(0, done - 1))]
    rows = run.store.trajectories(ids[:NUM_TRAJECTORIES], with_paths=True)
    rows = [row for row in rows if row.token_paths]
    if not rows:
        return None
    sampled = [sum(int(path.loss_mask.sum()) for path in row.token_paths) for row in rows]
    prompt = [int(row.token_paths[0].loss_mask.argmax()) for row in rows]
    # Of several contexts one at a time is in the cache: the longest tells what a row needs.
    longest = [max(len(path.token) for path in row.token_paths) for row in rows]
    return (
        _mean(prompt),
        _mean([max(0, whole - begin) for whole, begin in zip(longest, prompt, strict=True)]),
        _mean(sampled),
    )


def _rendered(renderer: ChatRenderer) -> Count:
    return lambda messages, tools: len(renderer.render_prompt(messages, tools).token)


def characters(messages: Sequence[Message], tools: Sequence[JSONObject]) -> int:
    """Tokens of messages and tools as far as their characters tell."""
    text = sum(len(message.content) + 8 for message in messages) + sum(len(json.dumps(tool)) for tool in tools)
    called = sum(len(json.dumps(call.to_dict())) for message in messages for call in message.tool_calls)
    return math.ceil((text + called) / CHARACTERS_PER_TOKEN)


def _mean(numbers: Sequence[int]) -> int:
    return math.ceil(sum(numbers) / max(1, len(numbers)))


def tasks_there_are(run: Run) -> tuple[int | None, int | None]:
    """How many tasks there are to train on and held out; None without end."""
    environment = run.environment
    return environment.num_tasks(Split.TRAIN), environment.num_tasks(Split.HELD_OUT)
