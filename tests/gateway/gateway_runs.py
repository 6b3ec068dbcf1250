"""A tiny policy that has learned to call tools, and gateways in front of it: shared by the tests of the gateway."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import httpx2
import numpy as np
import openai
import torch

from prefloop.chat import ChatRenderer, render_demonstration, stop_ids
from prefloop.clients.sampling import Sampled, SamplingSettings
from prefloop.environments.booking import TOOLS, Booking, BookingSettings
from prefloop.gateway import ContinuousBatcher, Gateway, GatewayServer, GatewaySettings
from prefloop.gateway.batcher import Job
from prefloop.gateway.episodes import Voice
from prefloop.models.initial import initial_model, train_tokenizer
from prefloop.models.sampler import LocalSampler
from prefloop.models.settings import InitialModelSettings
from prefloop.records import AuthorKind, Message, PrefloopError, Split, Task, Trajectory
from prefloop.rollout import Attempt, Provenance, Rollout

FROM = Provenance(AuthorKind.CHECKPOINT, "checkpoint", "run", 0, "rollout")
SAMPLING = SamplingSettings(max_new_tokens=48)
SYSTEM = "You book flights."
REQUEST = "Book me a flight to Tokyo under $900, any stops."
NUM_STEPS = 60


@functools.cache
def policy() -> tuple[torch.nn.Module, ChatRenderer]:
    """A model that has seen enough demonstrations of booking to write tool calls, and its renderer."""
    torch.set_num_threads(1)
    environment = Booking(BookingSettings())
    shown = [environment.demonstrate(task, 0)[0] for task in environment.tasks(Split.TRAIN, 64)]
    tokenizer = train_tokenizer([(messages, TOOLS) for messages in shown], 600)
    shape = InitialModelSettings(hidden_size=48, intermediate_size=96, num_heads=3, max_length=1024)
    model, renderer = initial_model(tokenizer, shape), ChatRenderer(tokenizer)
    paths = [path for m in shown for path in render_demonstration(renderer, m, TOOLS, 1)]
    longest = max(len(path.token) for path in paths)
    ids, labels = np.zeros((len(paths), longest), np.int64), np.full((len(paths), longest), -100)
    for row, path in enumerate(paths):
        ids[row, : len(path.token)] = path.token
        labels[row, : len(path.token)] = np.where(path.loss_mask, path.token, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(NUM_STEPS):
        rows = np.arange(8 * step, 8 * step + 8) % len(paths)
        model(torch.from_numpy(ids[rows]), labels=torch.from_numpy(labels[rows])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), renderer


@dataclass
class Served:
    """A gateway on a free port, and what it recorded of the episodes that agents opened."""

    gateway: Gateway
    server: GatewayServer
    recorded: list[Rollout] = field(default_factory=list)

    def client(self, episode: str = "e", task: str = "t", **options) -> openai.OpenAI:
        """The SDK as an agent uses it that can only set its address and its key."""
        found = self.server.environment((task, episode))
        return openai.OpenAI(
            base_url=found["OPENAI_BASE_URL"], api_key=found["OPENAI_API_KEY"], **{"max_retries": 0, **options}
        )

    def close(self, episode: str = "e", task: str = "t", **said) -> Trajectory:
        """Post an outcome as a grader would; the trajectory that was recorded."""
        answer = self.post("/outcome", {"task": task, "episode": episode, **said})
        assert answer.status_code == 200, answer.text
        return next(r.trajectory for r in self.recorded if r.trajectory.id == answer.json()["trajectory"])

    def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        """A request to a route of the gateway's own."""
        return httpx2.post(self.server.url + path, json=body, headers=headers, timeout=30)


def attempts() -> Callable[[str], Attempt]:
    """Tasks of any name but "unknown", and the number of the next attempt at each."""
    counts: Counter[str] = Counter()

    def find(name: str) -> Attempt:
        if name == "unknown":
            raise PrefloopError("there is no task 'unknown'; near ones: known")
        counts[name] += 1
        return Attempt(Task("agent", {"task": name}), counts[name] - 1, 7)

    return find


@contextmanager
def served(
    *,
    sampling: SamplingSettings = SAMPLING,
    token: str = "",
    batcher=None,
    grace_s: float = 5.0,
    chooser: str = "run",
    **settings,
) -> Iterator[Served]:
    """The tiny policy behind a gateway."""
    model, renderer = policy()
    limits = GatewaySettings(sampling=chooser, **settings)
    with closing(batcher or local_batcher(limits)) as used:
        recorded: list[Rollout] = []
        gateway = Gateway(
            renderer, used, FROM, model.config.max_position_embeddings, sampling, limits, find=attempts(),
            record=lambda rollout, _: recorded.append(rollout),
        )  # fmt: skip
        with GatewayServer(gateway, port=0, token=token, grace_s=grace_s) as server:
            yield Served(gateway, server, recorded)


def local_batcher(limits: GatewaySettings | None = None) -> ContinuousBatcher:
    """A batcher of the tiny policy."""
    limits = limits or GatewaySettings()
    model, renderer = policy()
    sampler = LocalSampler(model, stop_ids(renderer))
    return ContinuousBatcher(sampler, limits.max_batch, limits.chunk_tokens, limits.cached_rows)


class ToolLoop:
    """The usual agent: asks, runs the tools that are called, asks again, until the policy only speaks."""

    def __init__(self, client: openai.OpenAI, task: Task, *, seed: int = 0, max_turns: int = 8, **options) -> None:
        self.client, self.options, self.max_turns = client, options, max_turns
        self.episode = Booking(BookingSettings()).reset(task, seed)
        self.messages = [message.to_dict() for message in self.episode.messages]

    def run(self) -> list[dict]:
        """The conversation as the agent holds it in the end."""
        for _ in range(self.max_turns):
            reply = self.client.chat.completions.create(
                model="policy", messages=self.messages, tools=list(TOOLS), **self.options
            )
            message = reply.choices[0].message
            self.messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                break
            step = self.episode.step(Message.from_dict(self.messages[-1]))
            self.messages += [answer.to_dict() for answer in step.messages]
        return self.messages


def tasks(num: int) -> list[Task]:
    """Booking tasks."""
    return list(Booking(BookingSettings()).tasks(Split.TRAIN, num))


def assert_exact(trajectory: Trajectory, temperature: float = 1.0) -> int:
    """Every sampled token has the log-prob of a forward pass over its path, and the masks are right; their number.

    The mask is right where the sampled tokens of each own turn say the recorded message, in one path and no other.
    """
    model, renderer = policy()
    seen: Counter[int] = Counter()
    total = 0
    for path in trajectory.token_paths:
        ids = torch.from_numpy(path.token.astype(np.int64))[None]
        with torch.no_grad():
            logprobs = (model(ids).logits[0] / temperature).log_softmax(-1)
        own = np.flatnonzero(path.loss_mask)
        np.testing.assert_allclose(path.logprob[own], logprobs[own - 1, ids[0, own]].numpy(), atol=1e-4)
        assert np.isnan(path.logprob[~path.loss_mask]).all()
        assert path.loss_mask[-1]
        for index in np.unique(path.message[own]):
            seen[int(index)] += 1
            tokens = path.token[own[path.message[own] == index]]
            thread = next(thread for thread in trajectory.threads if thread.start <= index < thread.stop)
            said = Voice(renderer).read(tokens, path.token[: own[0]], thread.tools)
            recorded = trajectory.messages[index]
            assert (said.content, said.reasoning_content) == (recorded.content, recorded.reasoning_content)
            assert [(c.name, c.arguments) for c in said.tool_calls] == [
                (c.name, c.arguments) for c in recorded.tool_calls
            ]
        total += len(own)
    assert sorted(seen) == sorted(trajectory.own_turns)
    assert set(seen.values()) <= {1}
    return total


def sampler(stops: bool = True, **options) -> LocalSampler:
    """The tiny policy; without stops, replies are as long as their budget."""
    model, renderer = policy()
    return LocalSampler(model, stop_ids(renderer) if stops else [renderer.tokenizer.pad_token_id], **options)


class Waiting:
    """What becomes of a job."""

    def __init__(self, key=1, context=(5, 6, 7), seed=3, stream=False, **settings):
        self.done, self.started = threading.Event(), threading.Event()
        self.tokens: list[int] = []
        self.results: list[Sampled | PrefloopError] = []
        tell = self._hear if stream else None
        wanted = SamplingSettings(**{"max_new_tokens": 40, **settings})
        self.job = Job(key, np.array(context, np.int32), seed, wanted, self._end, tell)

    def _hear(self, tokens):
        self.tokens += tokens.tolist()
        self.started.set()

    def _end(self, result):
        self.results.append(result)
        self.done.set()

    def result(self) -> Sampled:
        assert self.done.wait(30)
        (found,) = self.results
        if isinstance(found, PrefloopError):
            raise found
        return found


def alone(of: LocalSampler, job: Job) -> Sampled:
    return of.session().generate([job.context], [job.key], job.settings, job.seed)[0]


def assert_equal(found: Sampled, expected: Sampled) -> None:
    np.testing.assert_array_equal(found.token, expected.token)
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)
    assert found.stopped == expected.stopped
