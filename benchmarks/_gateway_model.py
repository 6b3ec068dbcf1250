"""The small model of `gateway.py`, for the process of the benchmark and that of the gateway's sampler."""

from __future__ import annotations

from typing import Any

import torch

from prefloop.models.initial import initial_model, train_tokenizer
from prefloop.models.sampler import LocalSampler
from prefloop.models.settings import InitialModelSettings
from prefloop.records import Message, Role

CONTROL_TOKENS = 8


def tokenizer() -> Any:
    """One that knows numbers."""
    text = [Message(Role.USER, " ".join(map(str, range(1000)))), Message(Role.ASSISTANT, "Yes.")]
    return train_tokenizer([(text, ())], 600)


def load_sampler(seed: int) -> LocalSampler:
    """A model under which no token that ends a turn is ever drawn, and no control token; on one thread."""
    torch.set_num_threads(1)
    words = tokenizer()
    model = initial_model(words, InitialModelSettings(max_length=4096, seed=seed)).eval()
    stop = len(words) - 1
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[[*range(CONTROL_TOKENS), stop]] = -1e4
    return LocalSampler(model, [stop])
