"""Where the tokens of a run's policies come from: the models in memory here, or a vLLM server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloop.chat import ChatRenderer, stop_ids
from prefloop.clients.vllm import Adapter, BaseModel, VLLMSampler, VLLMServer, VLLMSettings
from prefloop.hub import ADAPTER_CONFIG, fetch_model, model_name, readable
from prefloop.records import PrefloopError

if TYPE_CHECKING:
    from prefloop.models.sampler import LocalSampler

PROBE = 'How many grey geese fly to Zürich at 07:45?\n\n\t{"seats": [12, 3]} 東京'
MAX_CONTROL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Voice:
    """What it takes to let a policy speak: where its tokens come from, and how messages become tokens."""

    sampler: LocalSampler | VLLMSampler
    renderer: ChatRenderer


class ServedVoices:
    """The policies of a run as a vLLM server samples them: its model, and a checkpoint's adapter under its own id.

    Args:
        model: the run's model, by path or hub id.
        checkpoints: the run's directory of checkpoints, here.
        before_wake: called before the server takes the GPU's memory back.
        renderer: makes a tokenizer's renderer.
    """

    def __init__(
        self,
        settings: VLLMSettings,
        model: str,
        checkpoints: Path,
        before_wake: Callable[[], None] = lambda: None,
        renderer: Callable[[Any], ChatRenderer] = ChatRenderer,
    ) -> None:
        self._settings, self._model = settings, model
        self._here = checkpoints.resolve()
        self._there = settings.checkpoints or str(self._here)
        self._before_wake = before_wake
        self._renderer = renderer
        self._used = False

    @cached_property
    def server(self) -> VLLMServer:
        """The server; nothing is asked of it yet."""
        return VLLMServer(self._settings, describe(self._base), self._there, self._before_wake)

    @cached_property
    def _base(self) -> str:
        from prefloop.models.load import adapter_base

        directory = fetch_model(self._model)
        return adapter_base(directory) if (directory / ADAPTER_CONFIG).is_file() else self._model

    def voice(self, checkpoint_id: str, path: str) -> Voice:
        """The voice of a checkpoint, which lies at `path`.

        Raises:
            PrefloopError: it is neither the run's model nor an adapter.
        """
        self._used = True
        renderer = self._renderer(load_tokenizer(path))
        return Voice(self.server.sampler(stop_ids(renderer), self.adapter(checkpoint_id, path)), renderer)

    def check(self, checkpoint_id: str, path: str) -> None:
        """See that the server can sample a checkpoint, and let it sleep again.

        Raises:
            PrefloopError: as `voice` and `VLLMServer.check`.
        """
        self._used = True
        self.server.check(self.adapter(checkpoint_id, path))
        self.rest()

    def adapter(self, checkpoint_id: str, path: str) -> Adapter | None:
        """The adapter that a checkpoint is on the run's model; None where it is that model."""
        directory = fetch_model(path).resolve()
        if (directory / ADAPTER_CONFIG).is_file():
            inside = directory.is_relative_to(self._here)
            seen = f"{self._there}/{directory.relative_to(self._here).as_posix()}" if inside else str(directory)
            return Adapter(checkpoint_id, seen)
        if directory != fetch_model(self._base).resolve():
            raise PrefloopError(
                f"checkpoint {path} holds whole weights, which a running vLLM server cannot take: "
                "train an adapter (policy.lora), or leave out policy.vllm"
            )
        return None

    def rest(self) -> None:
        """Let the server sleep, if this process let it sample and the run file says so."""
        if self._used:
            self.make_room()

    def make_room(self) -> None:
        """Have the server give its memory back before a model is loaded here, if the run file says so."""
        if self._settings.sleep:
            self.server.sleep()


def describe(base: str) -> BaseModel:
    """What a server must serve that serves this model; the probe holds the control tokens of its tokenizer."""
    directory = fetch_model(base)
    tokenizer = load_tokenizer(base)
    text = PROBE + "".join(sorted(tokenizer.get_added_vocab())[:MAX_CONTROL_TOKENS])
    hub = None if Path(base).is_dir() else model_name(base)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return BaseModel(hub.repo if hub is not None else str(directory.resolve()), directory, text, tuple(ids))


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a directory or hub id.

    Raises:
        PrefloopError: it cannot be read; as `fetch_model`.
    """
    from transformers import AutoTokenizer

    directory = fetch_model(name)
    with readable(f"the tokenizer in {directory}"):
        return AutoTokenizer.from_pretrained(directory)
