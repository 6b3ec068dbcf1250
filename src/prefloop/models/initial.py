"""A tiny model and its tokenizer from nothing, for demonstrations and tests that need no download.

The tokenizer is a byte-level BPE trained on the conversations it will see, with a chat template with tools. Values
(numbers, ids, capitalised words) stand alone, while the text around them may merge across words: the structure of
a tool call becomes few tokens, and what has to be copied from a tool's result is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prefloop.models.settings import InitialModelSettings
from prefloop.records import JSONObject, Message, PrefloopError

Conversation = tuple[Sequence[Message], Sequence[JSONObject]]

END = "<|end|>"
PAD = "<|pad|>"
CONTROL = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<tool_call>", "</tool_call>")
VALUES = r"[A-Z]+[0-9]+|[0-9]+|[A-Z][a-z]+"

CHAT_TEMPLATE = """\
{%- if tools or messages[0].role == 'system' -%}
<|system|>{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif -%}
{%- if tools %}Tools: {{ tools | tojson }}{% endif -%}<|end|>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|user|>{{ message.content }}<|end|>
{%- elif message.role == 'tool' -%}
<|tool|>{{ message.content }}<|end|>
{%- elif message.role == 'assistant' -%}
<|assistant|>{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor -%}<|end|>
{%- elif not loop.first -%}
{{ raise_exception('a system message must come first') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""


def train_tokenizer(conversations: Iterable[Conversation], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens over the rendered conversations, with a chat template.

    Raises:
        PrefloopError: there are no conversations.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(VALUES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROL))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = _texts(_wrap(backend), conversations)
    if not texts:
        raise PrefloopError("there are no conversations to train a tokenizer on")
    backend.train_from_iterator(texts, trainer)
    return _wrap(backend)


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _texts(tokenizer: PreTrainedTokenizerFast, conversations: Iterable[Conversation]) -> list[str]:
    control = re.compile("|".join(re.escape(token) for token in CONTROL))
    return [
        text
        for messages, tools in conversations
        for text in control.split(
            tokenizer.apply_chat_template([m.to_dict() for m in messages], tools=list(tools) or None, tokenize=False)
        )
        if text
    ]


def initial_model(
    tokenizer: PreTrainedTokenizerFast, settings: InitialModelSettings, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model of this shape with random weights, drawn from the seed in `dtype`, so that a large one needs no copy."""
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[settings.architecture]
    config = config_class(
        vocab_size=settings.num_embeddings or len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads or settings.num_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Wide enough for sharp attention from the start: at the usual 0.02 a model this narrow learns to copy late.
    config.initializer_range = settings.hidden_size**-0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
        return model
