"""Models in float64 throughout, and a layout that a test chooses."""

import math

import pytest
import torch

from packed_examples import keep_float64, perturbed, tiny_model
from prefloop.models import forward


@pytest.fixture
def exact_model(monkeypatch):
    """A function that makes a small model of float64 in which nothing is rounded to float32."""

    def make(kind="qwen3", **settings):
        model = tiny_model(kind, torch.float64, **settings).eval()
        keep_float64(monkeypatch, model)
        return model, perturbed(model, 0.05)

    return make


@pytest.fixture
def use_layout(monkeypatch):
    """A function that says how tokens lie before the model: tiny models would always choose rows."""

    def use(layout):
        monkeypatch.setattr(forward, "SEGMENT_FLOPS", {"forest": -1.0, "rows": math.inf}[layout])

    return use
