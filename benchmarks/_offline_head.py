"""The log-prob head alone, at a vocabulary of 151,936: prefloop's against logits that are all in memory.

Both run through a model of one narrow layer, whose own share is a few per cent; its embeddings are frozen and not those
of the head, so that what is measured is the head, its weights' gradient included. The materialised form is what one
writes first: logits of all scored positions, log-softmax, gather. prefloop runs with a budget that keeps the logits for
the backward pass, and with one that makes it compute them again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from _common import Measured, Options, interleaved
from _memory import with_peak
from _offline_measure import REPETITIONS, times
from _offline_models import Shape, new_model
from _offline_rows import random_pairs
from prefloop.batch.examples import Demonstration
from prefloop.batch.packed import PackedBatch, pack
from prefloop.models.forward import forward

VOCAB, QUICK_VOCAB = 151_936, 8192
NUM_SCORED, QUICK_NUM_SCORED = 1024, 128
KEEP, RECOMPUTE = 1 << 40, 0


def measure_head(options: Options) -> Measured:
    vocab, num = (QUICK_VOCAB, QUICK_NUM_SCORED) if options.quick else (VOCAB, NUM_SCORED)
    shape = Shape(hidden=256, layers=1, intermediate=256, heads=4, kv_heads=2, vocab=vocab, tied=False)
    model = new_model(shape, options.seed)
    model.get_input_embeddings().requires_grad_(False)
    (pair,) = random_pairs([(2, num, 1)], vocab, options.seed)
    batch = pack([Demonstration(pair.chosen)])
    runs = {
        "materialised": materialised(copy.deepcopy(model), batch),
        "kept": ours(copy.deepcopy(model), batch, KEEP),
        "recomputed": ours(copy.deepcopy(model), batch, RECOMPUTE),
    }
    first = {name: with_peak(run) for name, run in runs.items()}
    totals = {name: total for name, (total, _) in first.items()}
    assert max(totals.values()) - min(totals.values()) < 1e-5 * abs(totals["materialised"]), totals
    timings = interleaved(runs, 1 if options.quick else REPETITIONS, warm=True)
    figures = {}
    for name in ("kept", "recomputed"):
        figures[f"head_{name}_time"] = timings[name].median_cpu / timings["materialised"].median_cpu
        if first[name][1] is not None:
            figures[f"head_{name}_memory"] = first[name][1] / first["materialised"][1]
    rows = [{"engine": name, **times(timing)} for name, timing in timings.items()]
    for row in rows:
        peak = first[row["engine"]][1]
        row["peak MB"] = "" if peak is None else f"{peak / 1e6:.0f}"
    return Measured(figures, rows)


def ours(model: nn.Module, batch: PackedBatch, budget: int) -> Callable[[], float]:
    def run() -> float:
        model.zero_grad(set_to_none=True)
        logprob_T = forward(model, batch, logit_budget=budget).logprob_T
        assert logprob_T is not None
        total = logprob_T.sum()
        total.backward()
        return float(total.detach())

    return run


def materialised(model: Any, batch: PackedBatch) -> Callable[[], float]:
    token_U = batch.visit_token_V[batch.loss_mask_V]
    place_U, target_U = batch.parent_T[token_U], batch.token_T[token_U]

    def run() -> float:
        model.zero_grad(set_to_none=True)
        hidden_LD = model.base_model(batch.token_T[None], use_cache=False).last_hidden_state[0]
        logprob_UW = torch.log_softmax(model.lm_head(hidden_LD[place_U]), dim=-1)
        total = logprob_UW.gather(1, target_U[:, None]).sum()
        total.backward()
        return float(total.detach())

    return run
