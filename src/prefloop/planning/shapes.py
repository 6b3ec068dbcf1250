"""What a plan must know of a model, read from its files without loading it: free of torch."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefloop.hub import fetch_model, readable
from prefloop.models.settings import LORA_RANK, InitialModelSettings
from prefloop.records import JSONObject, PrefloopError

BYTES = {"float32": 4, "bfloat16": 2}
QK_NORMS = frozenset({"qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3"})
OUTER_NORMS = frozenset({"gemma2", "gemma3_text"})
"""Architectures that normalise the outputs of attention and feed-forward, too."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder's sizes. `stored_bytes` is what its weights take on disk, 0 where they are not there yet.

    `adapter_rank` is that of the LoRA adapter on it which the model is; None where it is a whole one.

    Q and K, the widths of queries and of keys over all heads, are `num_heads` and `num_kv_heads` times `head_dim`.
    """

    model_type: str
    num_layers: int
    hidden: int
    feed_forward: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    num_parameters: int
    max_context: int
    tied: bool = True
    stored_bytes: int = 0
    adapter_rank: int | None = None

    @property
    def query_width(self) -> int:
        """Numbers of all queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Numbers of all keys of a token, and of all values."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_body_parameters(self) -> int:
        """Parameters of the layers, which work on each token."""
        return max(0, self.num_parameters - self.vocabulary * self.hidden * (1 if self.tied else 2))

    def num_adapter_parameters(self, rank: int) -> int:
        """Of a LoRA adapter on all linear layers: rank times inputs and outputs of each."""
        hidden, query, key, wide = self.hidden, self.query_width, self.key_width, self.feed_forward
        of_layer = 2 * (hidden + query) + 2 * (hidden + key) + 3 * (hidden + wide)
        return rank * self.num_layers * of_layer


def initial_shape(settings: InitialModelSettings) -> ModelShape:
    """The shape of a model that is yet to be made from nothing; its tokenizer may have fewer tokens than planned."""
    config = {
        "model_type": settings.architecture,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads or settings.num_heads,
        "vocab_size": settings.num_embeddings or settings.vocab_size,
        "max_position_embeddings": settings.max_length,
        "tie_word_embeddings": True,
    }
    return shape_of_config(config, "policy.initial")


def shape_of(directory: Path) -> ModelShape:
    """The shape of the model in a directory; of an adapter, that of the model that it changes.

    Raises:
        PrefloopError: there is no configuration that can be read, or one of another kind of model.
    """
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        with readable(f"the adapter in {directory}"):
            said = _json(adapter)
            base, revision = str(said.get("base_model_name_or_path", "")), said.get("revision")
            named = f"{base}@{revision}" if revision and not Path(base).is_dir() else base
        return replace(shape_of(fetch_model(named, weights=False)), adapter_rank=int(said.get("r") or LORA_RANK))
    with readable(f"the model in {directory}"):
        sizes = [_stored(file) for file in sorted(directory.glob("*.safetensors"))]
        shape = shape_of_config(_json(directory / "config.json"), str(directory))
    if not sizes:
        return shape
    num, stored = (sum(one) for one in zip(*sizes, strict=True))
    return replace(shape, num_parameters=num, stored_bytes=stored)


def shape_of_config(config: JSONObject, where: str) -> ModelShape:
    """The shape that a configuration in Hugging Face's format describes; `where` it was found, for errors.

    Raises:
        PrefloopError: it lacks a size.
    """
    text: dict[str, Any] = {**config, **(config.get("text_config") or {})}
    names = {"hidden": ("hidden_size", "n_embd", "d_model"), "layers": ("num_hidden_layers", "n_layer", "num_layers")}
    found = {key: next((int(text[name]) for name in keys if text.get(name)), 0) for key, keys in names.items()}
    heads = int(text.get("num_attention_heads") or text.get("n_head") or 0)
    vocabulary = int(text.get("vocab_size") or 0)
    if not all((*found.values(), heads, vocabulary)):
        raise PrefloopError(f"{where}: its config.json does not say hidden size, layers, heads and vocabulary")
    hidden = found["hidden"]
    used = int(text.get("num_experts_per_tok") or 1)  # of all experts those that a token passes
    experts = int(text.get("num_experts") or text.get("num_local_experts") or used)
    wide = int(text.get("moe_intermediate_size") or text.get("intermediate_size") or 4 * hidden)
    shape = ModelShape(
        model_type=str(text.get("model_type", "")),
        num_layers=found["layers"],
        hidden=hidden,
        feed_forward=wide * used,
        num_heads=heads,
        num_kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        vocabulary=vocabulary,
        num_parameters=0,
        max_context=int(text.get("max_position_embeddings") or 1 << 30),
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
    )
    return replace(shape, num_parameters=_num_parameters(shape, wide * experts))


def _num_parameters(shape: ModelShape, feed_forward: int) -> int:
    """Embeddings, projections, feed-forwards of three products (of all experts together so wide), and norms."""
    hidden, query, key = shape.hidden, shape.query_width, shape.key_width
    bias = query + 2 * key if shape.model_type == "qwen2" else 0
    layer = 2 * hidden * query + 2 * hidden * key + 3 * hidden * feed_forward + 2 * hidden + bias
    if shape.model_type in QK_NORMS:
        layer += 2 * shape.head_dim
    return shape.num_layers * layer + hidden + shape.vocabulary * hidden * (1 if shape.tied else 2)


def _stored(file: Path) -> tuple[int, int]:
    """Numbers and bytes of a file of tensors, as its header says (https://github.com/huggingface/safetensors)."""
    with readable(f"the weights in {file}", "Restore the file"), file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > file.stat().st_size:
            raise ValueError(f"its header should have {length} bytes.")
        header = json.loads(opened.read(length))
        tensors = [value for name, value in header.items() if name != "__metadata__"]
        num = sum(math.prod(tensor["shape"]) for tensor in tensors)
        return num, sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors)


def _json(file: Path) -> JSONObject:
    try:
        found: JSONObject = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise PrefloopError(f"{file} cannot be read: expected the configuration of a model") from None
    return found
