"""A tiny policy that has learned to call tools, and gateways in front of it: shared by the tests of the gateway."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import openai
import torch

from prefloop.chat import ChatRenderer, render_demonstration, stop_ids
from prefloop.clients.sampling import SamplingSettings
from prefloop.environments.booking import TOOLS, Booking, BookingSettings
from prefloop.gateway import ContinuousBatcher, Gateway, GatewayServer, GatewaySettings
from prefloop.models.initial import initial_model, train_tokenizer
from prefloop.models.sampler import LocalSampler
from prefloop.models.settings import InitialModelSettings
from prefloop.records import AuthorKind, PrefloopError, Split, Task, Trajectory
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
