"""The knobs of policies; free of torch, so that a run file can be checked without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic import Field, model_validator

from prefloop.chat import ChatRenderer
from prefloop.chat.calls import ToolFormat
from prefloop.clients.openai_sampler import ServerSettings
from prefloop.clients.vllm import VLLMSettings
from prefloop.config import BY_RECIPE, Settings
from prefloop.hub import is_adapter

Dtype: TypeAlias = Literal["float32", "bfloat16"]

Quantization: TypeAlias = Literal["8bit", "4bit"]

LORA_RANK = 32


def trains_adapter(given: Mapping[str, Any]) -> bool:
    """Whether settings of a policy (`model`, `lora`) train an adapter: a fresh one, or one that the model is itself."""
    model = given.get("model")
    return given.get("lora") is not None or (isinstance(model, str) and is_adapter(model))


def weights_dtype(*, lora: bool, gpu: bool) -> Dtype:
    """The usual type of weights: those below an adapter stay as they are, so bfloat16 loses nothing of an update."""
    return "bfloat16" if lora and gpu else "float32"


def is_gpu(device: str) -> bool:
    """Whether a device of torch, by its name, is no CPU; `auto` is a GPU where there is one."""
    if device != "auto":
        return not device.startswith("cpu")
    import torch

    return bool(torch.cuda.is_available())


class InitialModelSettings(Settings):
    """The shape of a model made from nothing (see `prefloop.models.initial`), and the seed of its weights.

    `num_kv_heads` None: as many as `num_heads`. `num_embeddings` rows of the embedding stand for a larger vocabulary
    than the tokenizer's, whose `vocab_size` bounds it alone; None: one row for each of its tokens.
    """

    architecture: Literal["llama", "qwen2", "qwen3"] = "llama"
    hidden_size: int = Field(default=96, ge=8, le=8192)
    intermediate_size: int = Field(default=256, ge=8, le=32768)
    num_layers: int = Field(default=2, ge=1, le=128)
    num_heads: int = Field(default=6, ge=1)
    num_kv_heads: int | None = Field(default=None, ge=1)
    max_length: int = Field(default=1024, ge=16)
    vocab_size: int = Field(default=1024, ge=300)
    num_embeddings: int | None = Field(default=None, ge=300)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _divisible(self) -> InitialModelSettings:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) should be a multiple of num_heads ({self.num_heads})")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) should be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.num_embeddings is not None and self.num_embeddings < self.vocab_size:
            raise ValueError(
                f"num_embeddings ({self.num_embeddings}) should be at least vocab_size ({self.vocab_size})"
            )
        return self


class LoraSettings(Settings):
    """A LoRA adapter on all linear layers (Hu et al. 2021, arXiv:2106.09685), without dropout.

    Updates are scaled by `alpha / rank`; left out, `alpha` is twice the rank. `seed` draws its first weights.
    """

    rank: int = Field(default=LORA_RANK, ge=1)
    alpha: int = Field(default=2 * LORA_RANK, ge=1, json_schema_extra=BY_RECIPE)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _twice_the_rank(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not isinstance(rank := given.get("rank", LORA_RANK), int):
            return given
        return {"alpha": 2 * max(rank, 1), **{key: value for key, value in given.items() if value is not None}}


class PolicySettings(Settings):
    """Who acts: a model by path or hub id, a tiny one made from nothing, or one behind a server.

    A served model has no weights here: it can be rolled out, judged, curated and exported, not trained. With `vllm`
    a LoRA adapter on `model` is trained here and sampled by a vLLM server. `quantization` keeps the weights below an
    adapter in 8 or 4 bits (bitsandbytes).
    """

    model: str | None = Field(default=None, min_length=1)
    initial: InitialModelSettings | None = None
    server: ServerSettings | None = None
    lora: LoraSettings | None = None
    vllm: VLLMSettings | None = None
    dtype: Dtype = Field(default="float32", json_schema_extra=BY_RECIPE)
    quantization: Quantization | None = None
    device: str = "cpu"
    tool_format: ToolFormat = "auto"
    template_variables: dict[str, bool | int | float | str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _usual_dtype(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("dtype") is not None:
            return given
        gpu = is_gpu(str(given.get("device", "cpu")))
        return {**given, "dtype": weights_dtype(lora=trains_adapter(given), gpu=gpu)}

    def renderer(self, tokenizer: Any) -> ChatRenderer:
        """How this policy speaks with its tokenizer: chat template, its variables, and the format of tool calls.

        Raises:
            PrefloopError: as `ChatRenderer`.
        """
        return ChatRenderer(tokenizer, variables=self.template_variables, tool_format=self.tool_format)

    @model_validator(mode="after")
    def _exactly_one(self) -> PolicySettings:
        if sum(source is not None for source in (self.model, self.initial, self.server)) != 1:
            raise ValueError("give exactly one of 'model' (a path or hub id) and the tables 'initial' and 'server'")
        if self.server is not None and (self.template_variables or self.tool_format != "auto"):
            raise ValueError("a server has its own chat template: leave out 'tool_format' and 'template_variables'")
        return self

    @model_validator(mode="after")
    def _only_frozen_weights_are_rounded(self) -> PolicySettings:
        if self.quantization is not None and not trains_adapter({"model": self.model, "lora": self.lora}):
            raise ValueError("quantization needs a table 'lora': weights of a few bits cannot be trained themselves")
        return self

    @model_validator(mode="after")
    def _vllm_can_follow(self) -> PolicySettings:
        if self.vllm is not None and (self.model is None or self.lora is None):
            raise ValueError(
                "the table 'vllm' needs 'model' and a table 'lora': a running server takes adapters, no other weights; "
                "to train all weights, leave 'vllm' out and sample here"
            )
        return self
