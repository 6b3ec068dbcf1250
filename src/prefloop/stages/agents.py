"""Roll out an agent that runs by itself: a gateway in front of the policy, and a process for each attempt."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

from prefloop.chat import ChatRenderer
from prefloop.clients.sampling import SamplingSettings
from prefloop.environments.agent import Access, Agent
from prefloop.environments.commands import Ran
from prefloop.environments.graders import GraderFailedError
from prefloop.gateway import Batcher, Gateway, GatewayServer, GatewaySettings
from prefloop.records import Ended, PrefloopError
from prefloop.rollout import Attempt, Provenance, Rollout
from prefloop.stages.context import AGENT_LOGS

MAX_KEPT = 20_000  # characters of an agent's output that are kept with its trajectory
NEVER_ASKED = "it ended without asking the policy: does it take its address from OPENAI_BASE_URL and OPENAI_API_KEY?"
# Ends that the policy brought about, or may have: one that loops until its deadline must look worse for it.
GRADED = (Ended.DONE, Ended.LENGTH, Ended.MAX_TURNS, Ended.DEADLINE)
MANY = 8  # attempts that all end in errors: no policy does that to an agent that works

Keep = Callable[[Rollout], None]
Made = tuple[Rollout, bool]  # and whether agent or grader was broken, whatever the policy did


@dataclass
class AgentRunner:
    """Runs an agent on attempts, `max_parallel` at once, each against its own episode of one gateway.

    `directory` is the run's: what an agent or grader that failed had printed is kept there, in a file of its episode's
    name. `proven`: the agent has worked before in this run, so that what it stumbles over may be the policy's doing.
    """

    agent: Agent
    settings: GatewaySettings
    directory: Path
    proven: bool = False
    _stop: Event = field(default_factory=Event, init=False)

    def roll_out(
        self,
        renderer: ChatRenderer,
        batcher: Batcher,
        max_context: int,
        attempts: Sequence[Attempt],
        sampling: SamplingSettings,
        provenance: Provenance,
        keep: Keep = lambda _: None,
    ) -> list[Rollout]:
        """One rollout for each attempt, in order; `max_context` is the most tokens that the policy can read.

        `keep` is told of each that did not end in an error, as soon as it is over: what comes after may never end.

        Raises:
            PrefloopError: a command cannot be started, or every single attempt failed.
        """
        gateway = Gateway(
            renderer, batcher, provenance, max_context, sampling, self.settings, group_seeded=self.agent.group_seeded
        )
        # A key that nobody else on this machine knows: what is recorded here is trained on.
        with GatewayServer(gateway, port=0, token=secrets.token_urlsafe(24)) as server:
            made = self._all(gateway, server, attempts, keep)
        if self._all_broken(made):
            first = made[0][0].trajectory.extra["error"]
            raise PrefloopError(
                f"agent or grader of {len(made)} attempts failed before the policy could succeed or fail; the first: "
                f"{first}; what was printed is in {self.directory / AGENT_LOGS}"
            )
        return [rollout for rollout, _ in made]

    def _all_broken(self, made: Sequence[Made]) -> bool:
        """Whether what failed in every attempt is the agent or its grader, of which nothing is to be kept."""
        if any(not broken and rollout.trajectory.ended is not Ended.ERROR for rollout, broken in made):
            return False
        return not self.proven or len(made) >= MANY or all(broken for _, broken in made)

    def _all(self, gateway: Gateway, server: GatewayServer, attempts: Sequence[Attempt], keep: Keep) -> list[Made]:
        workers = min(self.agent.settings.max_parallel, self.settings.max_episodes, len(attempts))
        self._stop.clear()
        with ThreadPoolExecutor(workers, thread_name_prefix="prefloop-agent") as pool:
            futures = [pool.submit(self._attempt, gateway, server, attempt) for attempt in attempts]
            try:
                for future in as_completed(futures):
                    rollout, broken = future.result()
                    if not broken and rollout.trajectory.ended is not Ended.ERROR:
                        keep(rollout)
                return [future.result() for future in futures]
            finally:  # after an error, or an interruption: no agent goes on alone
                self._stop.set()
                pool.shutdown(cancel_futures=True)

    def _attempt(self, gateway: Gateway, server: GatewayServer, attempt: Attempt) -> Made:
        task = attempt.task
        name = (str(task.specification["id"]), gateway.provenance.trajectory_id(attempt))
        episode = gateway.open(name, attempt)
        try:
            given = server.environment(name)
            access = Access(given["OPENAI_BASE_URL"], given["OPENAI_API_KEY"], name[1])
            ran = self.agent.act(task, attempt.seed, access, self.settings.episode_deadline_s, self._stop)
            failure = ran.failure or ("" if episode.num_turns else NEVER_ASKED)
            if failure and episode.ended is None:
                episode.stop(Ended.DEADLINE if ran.limit == "deadline" else Ended.ERROR)
        finally:
            rollout = gateway.close(name)
        if failure:
            self._keep_log(name[1], failure, ran)
        return self._graded(attempt, _noted(rollout, output=_kept(ran.output), error=failure), ran.output)

    def _graded(self, attempt: Attempt, rollout: Rollout, output: str) -> Made:
        """The rollout with what the grader says of it; what the agent itself had posted counts without a grader."""
        trajectory = rollout.trajectory
        unheard = trajectory.ended is Ended.DEADLINE and not trajectory.num_turns
        if trajectory.ended not in GRADED or unheard:
            return Rollout(trajectory, None), not trajectory.num_turns
        if self.agent.settings.grader is None:
            return rollout, False
        try:
            outcome = self.agent.grade(attempt.task, trajectory.messages, output, trajectory.ended.value, self._stop)
        except GraderFailedError as error:
            self._keep_log(trajectory.id, str(error), error.ran)
            failed = replace(trajectory, ended=Ended.ERROR)
            return _noted(Rollout(failed, None), error=str(error)), True
        return Rollout(trajectory, outcome), False

    def _keep_log(self, episode: str, failure: str, ran: Ran) -> None:
        """Add what an agent or a grader had printed to the file of its episode."""
        path = self.directory / AGENT_LOGS / f"{episode}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{failure}\n--- output ---\n{ran.output}\n--- errors ---\n{ran.errors}\n")


def _kept(text: str) -> str:
    """Text, the end of it where it is long, which is said."""
    left_out = len(text) - MAX_KEPT
    return text if left_out <= 0 else f"[{left_out} characters before]\n{text[left_out:]}"


def _noted(rollout: Rollout, **notes: str) -> Rollout:
    """The rollout with these notes in its trajectory's extra, where they are not empty."""
    given = {key: text for key, text in notes.items() if text}
    trajectory = rollout.trajectory
    return Rollout(replace(trajectory, extra={**trajectory.extra, **given}), rollout.outcome)
