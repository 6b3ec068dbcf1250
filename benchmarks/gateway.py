"""What the gateway adds to the latency of a call: 32 agents at once through it, against calling the sampler directly.

The agent is a tool loop: it asks, "runs a tool" for a while, and goes on with the reply and the tool's result. The
direct side is 32 threads of this process that render, submit to the batcher and parse by themselves; the other is 32
agents of another process on keep-alive connections, in OpenAI's format, before a gateway whose sampler has a process
of its own, as that of `prefloop gateway`. Model, batching, threads of torch (one), prompts, lengths of replies and tool
times are the same, both sides are run in turn, and a latency is from the agent's messages to the reply in its hands.
Every reply is as long as its budget, so that both sides sample the same number of tokens.

What is added is measured twice. *Beside the sampler* is a call's latency less the time between its submission to the
batcher and its result: what the wire, the reading, rendering, parsing and recording of this very call took, and its
waiting for those of others. *Difference* is the gateway's latencies less the direct ones, quantile by quantile over
all calls, with an interval over the rounds: whom a call meets in the batch is chance, which makes it far less certain.
The direct side's 32 threads take their time from the sampler, as any program's do that samples in its own process; the
gateway's do not, so that the difference may be below what is beside the sampler.

* tools: a tool takes half a second on average (exponential): agents come and go, and the sampler keeps up.
* streamed: the same with streaming; the latency is to the last piece.
* busy: a tool takes 50 ms, and the sampler is what all wait for: whatever the gateway takes from its CPU counts for
  every call in work.
* waves: no tool time at all, the worst there is: 32 calls are always in work and end together.

    python benchmarks/gateway.py [--json PATH] [--only PATTERN] [--quick] [--seed N]
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

NUM_AGENTS = 32
NUM_SAMPLED = 24  # tokens of a reply
TOOL_WORDS = 24  # of a tool's result
PROMPT_WORDS = 60
NUM_ROUNDS = 16
NUM_RESAMPLES = 1000
QUANTILES = {"median": 0.5, "p99": 0.99}
MEAN_TOOL_S = {"tools": 0.5, "streamed": 0.5, "busy": 0.05, "waves": 0.0}
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What the agents of a run do, the same on both sides."""

    regime: str
    num_turns: int
    seed: int

    def agent(self, number: int) -> tuple[str, list[str], list[float]]:
        """An agent's question, its tools' results and how long they take."""
        rng = np.random.default_rng([self.seed, number])
        words = [" ".join(map(str, rng.integers(0, 1000, n))) for n in (PROMPT_WORDS, *[TOOL_WORDS] * self.num_turns)]
        waits = rng.exponential(1.0, self.num_turns) * MEAN_TOOL_S[self.regime]
        return words[0], words[1:], waits.tolist()


def play(plan: Plan, number: int, ask: Callable[[Messages], dict[str, Any]]) -> list[float]:
    """An agent's whole run; the latency of each of its calls, in seconds."""
    question, results, waits = plan.agent(number)
    messages: Messages = [{"role": "user", "content": question}]
    latencies = []
    for result, wait in zip(results, waits, strict=True):
        started = time.perf_counter()
        reply = ask(messages)
        latencies.append(time.perf_counter() - started)
        messages = [*messages, reply, {"role": "user", "content": result}]
        time.sleep(wait)
    return latencies


def play_all(plan: Plan, asker: Callable[[int], Callable[[Messages], dict[str, Any]]]) -> list[list[float]]:
    """All agents at once, a thread each; the latencies of each one's calls."""
    found: list[list[float]] = [[] for _ in range(NUM_AGENTS)]

    def run(number: int, ask: Callable[[Messages], dict[str, Any]]) -> None:
        found[number] = play(plan, number, ask)

    threads = [threading.Thread(target=run, args=(number, asker(number))) for number in range(NUM_AGENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(len(one) != plan.num_turns for one in found):
        raise SystemExit(f"an agent failed: it did not make its {plan.num_turns} calls")
    return found


# --- the agents of the other process: they import nothing of prefloop or torch -------------------------------------


def over_http(port: int, run: str, stream: bool, number: int) -> Callable[[Messages], dict[str, Any]]:
    """An agent's connection to the gateway."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    headers = {"content-type": "application/json", "authorization": f"Bearer none/bench/{run}-{number}"}

    def ask(messages: Messages) -> dict[str, Any]:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps({"messages": messages, "stream": stream}), headers
        )
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise SystemExit(body.decode())
        if not stream:
            return json.loads(body)["choices"][0]["message"]
        events = [json.loads(line[6:]) for line in body.decode().split("\n\n") if line and not line.endswith("[DONE]")]
        return {"role": "assistant", "content": "".join(e["choices"][0]["delta"].get("content", "") for e in events)}

    return ask


def serve_plans() -> None:
    """Play the plans that come on standard input, a line each, and print the latencies of each."""
    for line in sys.stdin:
        port, run, stream, plan = json.loads(line)
        print(json.dumps(play_all(Plan(**plan), partial(over_http, port, run, stream))), flush=True)


# --- this process: the model, the gateway, and the agents that ask directly ----------------------------------------


class Timed:
    """A batcher that notes how long each of its jobs took, in seconds, by the job's key."""

    def __init__(self, batcher: Any) -> None:
        self._batcher = batcher
        self.took: dict[int, list[float]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batcher, name)

    def submit(self, job: Any) -> None:
        """Sample a reply."""
        started, on_done = time.perf_counter(), job.on_done
        took = self.took.setdefault(job.key, [])

        def done(result: Any) -> None:
            took.append(time.perf_counter() - started)
            on_done(result)

        job.on_done = done
        self._batcher.submit(job)

    def collect(self, keys: list[list[int]]) -> list[list[float]]:
        """What each agent's jobs took; forgets all."""
        took, self.took = self.took, {}
        return [took[key] for (key,) in keys]


class Bench:
    """A model sampled here, and a gateway that samples it in a process of its own."""

    def __init__(self, seed: int) -> None:
        from _gateway_model import load_sampler, tokenizer
        from prefloop.chat import ChatRenderer
        from prefloop.clients.sampling import SamplingSettings
        from prefloop.gateway import ContinuousBatcher, Gateway, GatewayServer, GatewaySettings, ProcessBatcher
        from prefloop.records import AuthorKind, Task
        from prefloop.rollout import Attempt, Provenance

        self.renderer = ChatRenderer(tokenizer())
        settings = GatewaySettings(max_turns=10_000, max_episodes=10_000)
        limits = (settings.max_batch, settings.chunk_tokens, settings.cached_rows)
        self.here = Timed(ContinuousBatcher(load_sampler(seed), *limits))
        self.there = Timed(ProcessBatcher(partial(load_sampler, seed), *limits))
        self.sampling = SamplingSettings(max_new_tokens=NUM_SAMPLED)
        provenance = Provenance(AuthorKind.CHECKPOINT, "bench", "bench", 0, "rollout")
        self.gateway = Gateway(
            self.renderer, self.there, provenance, 4096, self.sampling, settings,
            find=lambda name: Attempt(Task("agent", {"task": name}), 0, 0), record=lambda rollout, task: None,
        )  # fmt: skip
        self.server = GatewayServer(self.gateway, port=0)
        command = [sys.executable, str(Path(__file__).resolve()), "--agents"]
        self.agents = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.num_runs = 0

    def through_gateway(self, plan: Plan) -> np.ndarray:
        """The agents of the other process: latency and time in the sampler of each call, seconds [2, agents, turns]."""
        assert self.agents.stdin is not None and self.agents.stdout is not None
        self.num_runs += 1
        names = [("bench", f"{self.num_runs}-{number}") for number in range(NUM_AGENTS)]
        episodes = [self.gateway.open(name) for name in names]
        port = int(self.server.url.rsplit(":", 1)[1])
        order = [port, str(self.num_runs), plan.regime == "streamed", vars(plan)]
        print(json.dumps(order), file=self.agents.stdin, flush=True)
        latencies = json.loads(self.agents.stdout.readline())
        took = self.there.collect([episode.keys for episode in episodes])
        for name in names:
            self.gateway.close(name)
        return np.array([latencies, took])

    def directly(self, plan: Plan) -> np.ndarray:
        """The agents of this process: latency and time in the sampler of each call, seconds [2, agents, turns]."""
        from prefloop.chat import AssistantParser, PathBuilder
        from prefloop.gateway.batcher import Job
        from prefloop.records import Message, PrefloopError
        from prefloop.rollout import derived_seed

        parser = AssistantParser(self.renderer)
        self.num_runs += 1
        base = derived_seed(self.num_runs)

        def asker(number: int) -> Callable[[Messages], dict[str, Any]]:
            builders: list[PathBuilder] = []

            def ask(messages: Messages) -> dict[str, Any]:
                if builders:
                    builders[0].extend([Message.from_dict(messages[-1])])
                else:
                    builders.append(PathBuilder(self.renderer, [Message.from_dict(m) for m in messages]))
                context, done, results = builders[0].context, threading.Event(), []
                job = Job(
                    base + number, context, len(messages), self.sampling, lambda r: (results.append(r), done.set())
                )
                self.here.submit(job)
                done.wait()
                if isinstance(results[0], PrefloopError):
                    raise results[0]
                message = parser.parse_assistant(results[0].token.tolist(), context.tolist())
                builders[0].append_sampled(results[0].token, results[0].logprob, message)
                return {"role": "assistant", "content": message.content}

            return ask

        latencies = play_all(plan, asker)
        keys = [base + number for number in range(NUM_AGENTS)]
        self.here.release(keys)
        return np.array([latencies, self.here.collect([[key] for key in keys])])

    def close(self) -> None:
        """End the gateway and the other process."""
        assert self.agents.stdin is not None
        self.agents.stdin.close()
        self.agents.wait(10)
        self.server.close()
        self.here.close()
        self.there.close()


def measure(regime: str, options: Any) -> Any:
    """Both sides of one regime in turn."""
    from _common import Measured

    rounds, turns = (2, 4) if options.quick else (NUM_ROUNDS, 8)
    bench = Bench(options.seed)
    sides = {"direct": bench.directly, "gateway": bench.through_gateway}
    found: dict[str, list[np.ndarray]] = {side: [] for side in sides}
    try:
        for number in range(rounds + 1):
            order = list(sides.items())
            for side, run in order if number % 2 else order[::-1]:
                calls = run(Plan(regime, turns, options.seed + number)) * 1000
                if number:  # the first round warms up
                    found[side].append(calls)
    finally:
        bench.close()
    direct, gateway = (np.stack(found[side]) for side in sides)  # rounds x 2 x agents x turns, ms
    rows = [_row(side, calls[:, 0]) for side, calls in (("direct", direct), ("gateway", gateway))]
    rows += [_row(f"{side}, beside the sampler", calls[:, 0] - calls[:, 1]) for side, calls in
             (("direct", direct), ("gateway", gateway))]  # fmt: skip
    rows.append(_difference(gateway[:, 0], direct[:, 0]))
    figures = {}
    for name, quantile in QUANTILES.items():
        figures[f"{regime}_added_{name}_ms"] = float(np.quantile(gateway[:, 0] - gateway[:, 1], quantile))
        figures[f"{regime}_difference_{name}_ms"] = float(
            np.quantile(gateway[:, 0], quantile) - np.quantile(direct[:, 0], quantile)
        )
    return Measured(figures, [{"regime": regime, **row} for row in rows])


def _row(what: str, latencies: np.ndarray) -> dict[str, str]:
    """Quantiles over all calls of all rounds; `latencies` is rounds x agents x turns, in ms."""
    return {"latency of": what, "calls": str(latencies.size)} | {
        f"{name} ms": f"{np.quantile(latencies, quantile):.1f}" for name, quantile in QUANTILES.items()
    }


def _difference(gateway: np.ndarray, direct: np.ndarray) -> dict[str, str]:
    """Quantiles of one less those of the other, with the bootstrap's 95 % interval over rounds."""
    rng = np.random.default_rng(0)
    shown = {"latency of": "difference [95 %]", "calls": ""}
    for name, quantile in QUANTILES.items():
        drawn = []
        for _ in range(NUM_RESAMPLES):
            rounds = rng.integers(0, len(gateway), len(gateway))
            drawn.append(np.quantile(gateway[rounds], quantile) - np.quantile(direct[rounds], quantile))
        low, high = np.quantile(drawn, [0.025, 0.975])
        difference = np.quantile(gateway, quantile) - np.quantile(direct, quantile)
        shown[f"{name} ms"] = f"{difference:.1f} [{low:.1f}, {high:.1f}]"
    return shown


def main() -> None:
    from _common import parse_options, run_cells, versions

    options = parse_options(__doc__)
    caption = f"{versions('torch', 'uvicorn')}, {NUM_AGENTS} agents"
    run_cells("gateway", {name: partial(measure, name) for name in MEAN_TOOL_S}, options, caption)


if __name__ == "__main__":
    if "--agents" in sys.argv:
        serve_plans()
    else:
        main()
