"""An optimizer step of every offline objective against TRL: same model, rows, threads, machine and run.

    python benchmarks/speed_offline.py [--json PATH] [--only PATTERN] [--quick] [--seed N] [--fresh]

A step is the policy's forward, the reference's forward where the objective has one, backward, clipping and fused AdamW,
on one thread. The engines take turns; ratios are of medians of process CPU time. Three peers: TRL as installed; TRL
compact, its head on the scored positions only as on CUDA, which is the honest one on a CPU; and a lean padded loop, TRL
without its overhead. For sft and dpo TRL compact also runs one row or pair at a time (`compact_by_one`), which pads
least and is the faster on long rows of one length, too.

Every cell first compares the losses of all engines, and takes the peak of memory in that first step: what the process
grew by, gradients and the optimizer's state included. `matmul_share` is the work that no implementation can do without
(every distinct token once) over the time, as a share of `torch.mm`'s rate (`_offline_models.py`).

Rows of `llmbar` and `tau_bench` are read from PREFLOOP_DATA, by default `../shared/data` beside the checkout; without
them these cells are skipped. Needs `pip install 'prefloop[oracle]'`.
"""

from __future__ import annotations

from functools import partial

import torch

from _common import Cell, Options, parse_options, run_cells, versions
from _offline_engines import OBJECTIVES
from _offline_head import measure_head
from _offline_measure import Case, measure, measure_packed
from _offline_trl import quieten

NUM_PAIRS = {"64_64": 8, "512_128": 8, "1024_64": 4, "128_512": 8}
"""Pairs of a step of DPO."""

FEWER_PAIRS = {"64_64": 4, "512_128": 2, "1024_64": 1, "128_512": 1, "llmbar": 4}
"""Those of the other objectives: fewer, so that the whole takes about an hour."""

OTHERS = ("dpo_precomputed", "ipo", "simpo", "cpo", "orpo", "reward", "sft")
SIBLINGS = ("robust", "dpo_norm", "apo_zero", "apo_down")
"""They read what DPO reads: one regime tells."""

LEAN = frozenset({"padded"})
"""The peer where TRL has no such loss."""

CASES = (
    *(Case("dpo", rows, num) for rows, num in NUM_PAIRS.items()),
    Case("dpo", "256_128", 8, varied=True),
    Case("dpo", "512_128", 4, bf16=True),
    Case("dpo", "512_128", 4, wide=True),
    Case("dpo", "64_64", 2, wide=True),
    Case("dpo", "llmbar", 8),
    *(Case(objective, rows, num) for objective in OTHERS for rows, num in FEWER_PAIRS.items()),
    *(Case(objective, "512_128", 2) for objective in SIBLINGS),
    Case("smoothed", "512_128", 2, peers=LEAN),  # TRL ignores DPO's label smoothing
    Case("orpo_own", "512_128", 2, peers=LEAN),  # TRL's likelihood counts prompts, too
    *(Case("kto", rows, 2 * num) for rows, num in FEWER_PAIRS.items()),
    Case("kto_grouped", "512_128", 2),
    Case("sft", "tau_bench", 4),
    Case("sft", "tau_bench", 4, wide=True, peers=frozenset({"compact_by_one", "plain"})),  # the others take minutes
)
QUICK = frozenset({"dpo_llmbar", "sft_tau_bench", *(f"{objective}_64_64" for objective in OBJECTIVES)})


def all_cells(*, quick: bool) -> dict[str, Cell]:
    cases = [case for case in CASES if not quick or case.name in QUICK]
    return {
        **{case.name: partial(measure, case) for case in cases},
        "sft_packed": measure_packed,
        "head": measure_head,
    }


def main(options: Options) -> None:
    torch.set_num_threads(1)
    quieten()
    caption = "an optimizer step in seconds, median [min-max], one thread; rows are prompt_completion tokens; "
    caption += versions("prefloop", "trl", "torch", "transformers")
    run_cells("speed_offline", all_cells(quick=options.quick), options, caption)


if __name__ == "__main__":
    main(parse_options(__doc__))
