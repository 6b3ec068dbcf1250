"""`prefloop chat`: talk to a policy, which may use the tools of its environment."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from prefloop.clients.sampling import SamplingSettings
from prefloop.config import parse_settings
from prefloop.environments import make_environment
from prefloop.environments.base import Environment
from prefloop.environments.guarded import EpisodeFailedError, GuardedEpisode, sound_tasks
from prefloop.records import JSONObject, Message, PrefloopError, Role, Split
from prefloop.stages.looking import find_checkpoint
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import SERVED
from prefloop.store import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prefloop.chat import ChatRenderer
    from prefloop.models.load import Policy

MAX_TOOL_TURNS = 8

OpenEpisode = Callable[[], GuardedEpisode | None]
_LIKE_AN_ID = re.compile(r"[0-9a-f]+")  # no model on a hub is named so


def talk(store: Store, name: str, temperature: float, console: Console) -> None:
    """Read lines from standard input and answer them, until it ends.

    An environment that fails is said, and the conversation begun anew; one that cannot begin gives no tools.

    Raises:
        PrefloopError: there is no such checkpoint or model, it is damaged or behind a server, or it has no chat
            template; a temperature below 0.
    """
    from prefloop.models.load import load_policy
    from prefloop.training.checkpoint import verify

    settings = parse_settings(SamplingSettings, {"temperature": temperature}, "chat")
    checkpoint = None if Path(name).exists() else find_checkpoint(store, name)
    if checkpoint is None and not Path(name).exists() and _LIKE_AN_ID.fullmatch(name):
        raise PrefloopError(f"there is no checkpoint {name} in {store.location}: see `prefloop status`")
    if checkpoint is not None and checkpoint.algorithm == SERVED:
        raise PrefloopError(f"checkpoint {name} is {checkpoint.path} behind a server: its weights are not here")
    if checkpoint is not None and checkpoint.manifest_hash:
        verify(Path(checkpoint.path))

    def open_episode() -> GuardedEpisode | None:
        """A new episode of the checkpoint's environment; a model of its own has none."""
        episode = None if checkpoint is None else _episode(store, checkpoint.run_id)
        if episode is None or episode.failure is None:
            return episode
        console.print(f"no tools: {episode.failure}", markup=False, style="dim", highlight=False)
        return None

    policy = load_policy(name if checkpoint is None else checkpoint.path)
    renderer = _renderer(policy, None if checkpoint is None else _settings(store, checkpoint.run_id))
    with closing(_Conversation(policy, renderer, open_episode, settings, console)) as conversation:
        conversation.introduce()
        while True:
            try:
                line = console.input("[bold]you:[/bold] ")
            except EOFError:
                console.print()
                return
            if line.strip():
                conversation.say(line)
            else:
                conversation.clear()


def _episode(store: Store, run_id: str) -> GuardedEpisode | None:
    """An episode whose tools the policy may use; None where its environment has none, or its agent has them."""
    settings = _settings(store, run_id)
    if settings is None:
        return None
    environment = make_environment(settings.environment)
    if not isinstance(environment, Environment):
        return None
    task = sound_tasks(environment, Split.HELD_OUT, 1)[0]
    return GuardedEpisode(environment, task, settings.seed) if task.tools else None


def _settings(store: Store, run_id: str) -> RunSettings | None:
    """The settings of a run of the loop; None for a training of stored data."""
    run = store.run(run_id)
    if run is None or "environment" not in run["settings"]:
        return None
    return parse_settings(RunSettings, run["settings"], f"run {run['name']}")


def _renderer(policy: Policy, settings: RunSettings | None) -> ChatRenderer:
    from prefloop.chat import ChatRenderer

    return ChatRenderer(policy.tokenizer) if settings is None else settings.policy.renderer(policy.tokenizer)


class _Conversation:
    """A conversation between a person and a policy."""

    def __init__(
        self,
        policy: Policy,
        renderer: ChatRenderer,
        open_episode: OpenEpisode,
        settings: SamplingSettings,
        console: Console,
    ) -> None:
        from prefloop.chat import AssistantParser, stop_ids
        from prefloop.models.sampler import LocalSampler

        self._renderer = renderer
        self._parser = AssistantParser(self._renderer)
        self._sampler = LocalSampler(policy.model, stop_ids(self._renderer))
        self._open_episode, self._console = open_episode, console
        self._settings = settings
        self._messages: list[Message] = []
        self._episode = open_episode()

    def introduce(self) -> None:
        """Say which tools there are, and how to end."""
        if self._episode is not None:
            names = ", ".join(tool["function"]["name"] for tool in self._episode.tools)
            example = self._episode.messages[-1].content
            self._console.print(f"tools: {names}; e.g. “{example}”", markup=False, style="dim", highlight=False)
        self._console.print("[dim]an empty line begins anew, Ctrl-D ends[/dim]")

    def clear(self) -> None:
        """Forget what was said and done."""
        self.close()
        self._messages.clear()
        self._episode = self._open_episode()
        self._console.print("[dim]— begun anew —[/dim]")

    def close(self) -> None:
        """Let go of the episode."""
        if self._episode is not None:
            with suppress(EpisodeFailedError):
                self._episode.close()

    def say(self, text: str) -> None:
        """Answer what the person said, tools in between; what the environment cannot answer ends the conversation."""
        try:
            self._say(text)
        except EpisodeFailedError as error:
            self._console.print(f"  ← {error}", markup=False, style="red", highlight=False)
            self.clear()

    def _say(self, text: str) -> None:
        self._messages.append(Message(Role.USER, text))
        for _ in range(MAX_TOOL_TURNS):
            answer = self._answer()
            self._messages.append(answer)
            if answer.content or not answer.tool_calls:
                self._console.print(f"assistant: {answer.content or self._silence()}", markup=False, highlight=False)
            for call in answer.tool_calls:
                self._console.print(f"  → {call.name} {call.arguments}", markup=False, style="cyan", highlight=False)
            if not answer.tool_calls or self._episode is None:
                return
            for result in self._episode.step(answer).messages:
                self._messages.append(result)
                self._console.print(f"  ← {result.content}", markup=False, style="dim", highlight=False)
        self._console.print(f"[dim]it called tools {MAX_TOOL_TURNS} times in a row: say something, or begin anew[/dim]")

    def _silence(self) -> str:
        full = len(self._prompt()) >= self._sampler.max_context
        return "(the conversation is as long as the model can read: begin anew)" if full else "(nothing)"

    def _prompt(self) -> NDArray[np.int32]:
        return self._renderer.render_prompt(self._messages, self._tools()).token

    def _tools(self) -> tuple[JSONObject, ...]:
        return self._episode.tools if self._episode is not None else ()

    def _answer(self) -> Message:
        prompt = self._prompt()
        session = self._sampler.session()
        (sampled,) = session.generate([prompt], [0], self._settings, seed=len(self._messages))
        return self._parser.parse_assistant(sampled.token.tolist(), prompt.tolist(), self._tools())
