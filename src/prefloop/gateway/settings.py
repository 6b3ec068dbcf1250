"""The knobs of the gateway; free of torch and of the server."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from prefloop.config import Settings

DONE = frozenset({
    "messages", "tools", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "logprobs", "stream",
    "stream_options",
})  # fmt: skip
"""Keys of a request that are read and done."""


class GatewaySettings(Settings):
    """How agents are served, and what they may ask for.

    `sampling` says who chooses temperature and top-p: the run file (its `rollout.sampling`), or the request where it
    names them. At most `max_batch` replies are sampled at once, `chunk_tokens` tokens at a time; the keys and values
    of `cached_rows` conversations are kept between their turns. `max_queue` bounds the requests in flight and
    `max_episodes` the open episodes. A request that takes longer than `request_deadline_s` is refused; an episode
    that has been open for `episode_deadline_s`, or asked for nothing during `idle_deadline_s`, ends. `max_turns`
    bounds an episode's assistant messages, `max_context` the tokens of a conversation (the model's own limit when
    left out). Requests may hold the keys that `ignore` names, such as `stop`, and what they ask for is not done.
    """

    port: int = Field(default=8420, ge=0, le=65535)
    sampling: Literal["run", "request"] = "run"
    max_batch: int = Field(default=32, ge=1)
    chunk_tokens: int = Field(default=8, ge=1)
    cached_rows: int = Field(default=64, ge=0)
    max_queue: int = Field(default=256, ge=1)
    max_episodes: int = Field(default=256, ge=1)
    max_turns: int = Field(default=200, ge=1)
    max_context: int | None = Field(default=None, ge=1)
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    request_deadline_s: float = Field(default=300.0, gt=0.0)
    idle_deadline_s: float = Field(default=900.0, gt=0.0)
    episode_deadline_s: float = Field(default=3600.0, gt=0.0)
    ignore: list[str] = Field(default_factory=list)

    @field_validator("ignore")
    @classmethod
    def _not_done_anyway(cls, keys: list[str]) -> list[str]:
        if done := sorted(DONE.intersection(keys)):
            raise ValueError(f"what a request asks for by {done[0]!r} is done here: leave it out of the list")
        return keys
