"""An optimizer step of a 1.5-billion-parameter model in bfloat16 on a GPU, against TRL at its best setting.

    python benchmarks/speed_gpu.py [--json PATH] [--only PATTERN] [--quick] [--seed N] [--fresh]

The model has Qwen2.5-1.5B's shape and random weights. Flash attention and Liger kernels serve every engine where they
are installed (`flash_attn`, `liger_kernel`); prefloop's own attention over shared prefixes is FlexAttention. TRL's head
is compact on CUDA. Trajectories of 8,400 and 32,000 tokens run with gradient checkpointing, all engines alike. Times
are wall clock between synchronisations, engines in turns; the share is of the rate of a large bfloat16 product measured
in the same run. The cell `parity` compares FlexAttention with padded rows in float32. It wants a GPU of 140 GB.

Without CUDA the same code runs on the CPU at a tiny size: its table says "not measured on a GPU", and no figure is
written. Needs `pip install 'prefloop[oracle]'`.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from _common import Cell, Measured, Options, Timing, interleaved, parse_options, run_cells, versions
from _memory import with_peak
from _offline_engines import OBJECTIVES, Ours, Padded, Rows, mean_loss
from _offline_models import SMALL, Shape, Work, needed_work, new_model, noisy_copy
from _offline_rows import as_records, random_pairs
from _offline_trl import Theirs, quieten
from prefloop.batch.packed import pack
from prefloop.models.attention import sharing
from prefloop.models.forward import forward

QWEN = Shape(
    hidden=1536,
    layers=28,
    intermediate=8960,
    heads=12,
    kv_heads=2,
    vocab=151_936,
    family="qwen2",
    head_size=128,
    max_length=32_768,
)
TINY = replace(SMALL, hidden=64, layers=2, intermediate=128, heads=2, kv_heads=1, vocab=512, family="qwen2")
TINY_LENGTHS = 32  # how many times shorter rows are without a GPU
PEAK_SIDE, TINY_PEAK_SIDE = 8192, 256  # of the square product
REPETITIONS = 5
LOSS_TOLERANCE = 2e-2  # of losses in bfloat16
PARITY_TOLERANCE = 1e-4  # of log-probs and gradients in float32
MISSING = "not measured on a GPU: there is none here; the same code on the CPU at tiny size"


@dataclass(frozen=True)
class Case:
    """An objective on `num` pairs of these lengths, or one side of each where it does not learn from pairs."""

    objective: str
    prompt: int
    completion: int
    num: int
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return f"{self.objective}_{self.prompt}_{self.completion}"

    def figure(self, what: str) -> str:
        return f"gpu_{self.objective}_{what}_{self.prompt}_{self.completion}"


CASES = (
    Case("dpo", 64, 64, 32),
    *(Case(objective, 512, 128, 8) for objective in ("dpo", "sft", "reward", "simpo", "orpo", "kto")),
    Case("dpo", 1024, 64, 8),
    Case("dpo", 128, 512, 8),
    Case("dpo", 8000, 400, 4, checkpointing=True),
    Case("dpo", 30_000, 2000, 1, checkpointing=True),
)


def measure(case: Case, options: Options) -> Measured:
    on_gpu = torch.cuda.is_available()
    shape, scale = (QWEN, 1) if on_gpu else (TINY, TINY_LENGTHS)
    num = 2 if options.quick or not on_gpu else case.num
    lengths = (max(2, case.prompt // scale), *[max(2, case.completion // scale)] * 2)
    objective = OBJECTIVES[case.objective]
    examples = as_records(random_pairs([lengths] * num, shape.vocab, options.seed), objective.records)
    model, reference = new_models(shape, options.seed, scores=objective.scores, checkpointing=case.checkpointing)
    engines = {
        "ours": Ours(objective, model, reference, examples),
        "trl": Theirs(objective, model, reference if objective.has_reference else None, examples, use_cpu=not on_gpu),
        "padded": Padded(objective, model, reference, examples),
    }
    first = {name: peak_of(step) for name, step in engines.items()}
    losses = {name: loss for name, (loss, _) in first.items()}
    for name, loss in losses.items():
        assert abs(loss / losses["ours"] - 1) < LOSS_TOLERANCE, f"{case.name}: loss {losses['ours']}, {name} {loss}"
    repetitions = 1 if options.quick or not on_gpu else REPETITIONS
    timings = interleaved({name: synchronised(step) for name, step in engines.items()}, repetitions, warm=True)
    needed = needed_work(objective, model, examples)
    del engines, model, reference
    release()
    return summarise(case, timings, {name: peak for name, (_, peak) in first.items()}, needed)


def summarise(
    case: Case,
    timings: Mapping[str, Timing],
    memory: Mapping[str, float | None],
    needed: tuple[Work, float, int],
) -> Measured:
    work, flops, num_visits = needed
    peak = matmul_peak(PEAK_SIDE if torch.cuda.is_available() else TINY_PEAK_SIDE)
    seconds = {name: timing.median_wall for name, timing in timings.items()}
    figures, rows = {}, []
    for name, timing in timings.items():
        found = {
            name: seconds[name] / seconds["ours"],
            f"{name}_share": flops / seconds[name] / peak,
            f"{name}_tokens_per_s": num_visits / seconds[name],
            **({f"{name}_mb": memory[name] / 1e6} if memory[name] is not None else {}),
        }
        rows.append(
            {
                "engine": name,
                "wall s": Timing.text(timing.wall),
                "× ours": f"{found[name]:.2f}",
                "tokens/s": f"{found[f'{name}_tokens_per_s']:,.0f}",
                "of peak": f"{found[f'{name}_share']:.0%} of {peak / 1e12:.3g} TFLOP/s",
                "peak MB": f"{found[f'{name}_mb']:,.0f}" if f"{name}_mb" in found else "",
                "distinct": f"{work.tokens:,} of {num_visits:,}",
            }
        )
        figures |= {case.figure(what): value for what, value in found.items()}
    return reported(figures, rows)


def measure_parity(options: Options) -> Measured:
    """Log-probs and gradient of a branching forest against the same paths as padded rows, in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(replace(SMALL, family="qwen2"), options.seed).to(device)
    lengths = [(200, 60, 90), (130, 40, 33), (64, 1, 5)]
    pairs = random_pairs(lengths, SMALL.vocab, options.seed)
    algorithm = OBJECTIVES["simpo"].make()
    batch = pack(pairs).to(device)
    rows = Rows.of(pairs, algorithm, torch.device(device))
    with sharing(model):
        shared_V = forward(model, batch).logprob_T[batch.visit_token_V]
        shared = gradient(model, mean_loss(algorithm, batch, shared_V))
    plain_V = rows.read(model, algorithm, bf16=False)
    plain = gradient(model, mean_loss(algorithm, rows.batch, plain_V))
    read_V = batch.loss_mask_V
    difference_V = (shared_V - plain_V).detach()[read_V]
    of_logprob = float(difference_V.abs().max() / plain_V.detach()[read_V].abs().max())
    of_gradient = float((shared - plain).norm() / plain.norm())
    assert max(of_logprob, of_gradient) < PARITY_TOLERANCE, f"log-probs {of_logprob}, gradient {of_gradient}"
    figures = {"gpu_flex_logprob_rel_diff": of_logprob, "gpu_flex_gradient_rel_diff": of_gradient}
    found = f"log-probs {of_logprob:.1e}, gradient {of_gradient:.1e} relative to padded rows"
    return reported(figures, [{"engine": "ours", "distinct": found}])


def gradient(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def new_models(shape: Shape, seed: int, *, scores: bool, checkpointing: bool) -> tuple[Any, Any]:
    """Policy and reference in bfloat16; all engines share them, as their weights move less than bfloat16 shows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(shape, seed, scores=scores)
    reference = noisy_copy(model, seed)
    for one in (model, reference):
        one.to(device, torch.bfloat16)
        if device == "cuda" and installed("flash_attn"):
            one.set_attn_implementation("flash_attention_2")
        if device == "cuda" and installed("liger_kernel"):
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=one, fused_linear_cross_entropy=False, cross_entropy=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, reference


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def peak_of(step: Callable[[], float]) -> tuple[float, float | None]:
    """What a step gives, and by how many bytes memory rose in it at its peak."""
    if not torch.cuda.is_available():
        return with_peak(step)
    release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = synchronised(step)()
    return loss, float(torch.cuda.max_memory_allocated() - before)


def synchronised(step: Callable[[], float]) -> Callable[[], float]:
    if not torch.cuda.is_available():
        return step

    def run() -> float:
        torch.cuda.synchronize()
        loss = step()
        torch.cuda.synchronize()
        return loss

    return run


def matmul_peak(side: int) -> float:
    """FLOP/s of a square bfloat16 product, the best of ten."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    timing = interleaved({"product": synchronised(lambda: torch.mm(x, y))}, 10)["product"]
    return 2 * side**3 / min(timing.wall)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reported(figures: dict[str, float], rows: list[dict[str, str]]) -> Measured:
    """Figures of a GPU alone are figures."""
    return Measured(figures if torch.cuda.is_available() else {}, rows)


def main(options: Options) -> None:
    quieten()
    cells: dict[str, Cell] = {case.name: partial(measure, case) for case in CASES}
    cells["parity"] = measure_parity
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else MISSING
    found = [name for name in ("flash_attn", "liger_kernel") if installed(name)]
    caption = f"{where}; installed: {', '.join(found) or 'neither flash attention nor Liger kernels'}; "
    caption += versions("prefloop", "trl", "torch", "transformers")
    run_cells("speed_gpu", cells, options, caption)


if __name__ == "__main__":
    main(parse_options(__doc__))
