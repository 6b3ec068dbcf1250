"""Examples larger than the budget: cut, or in little memory, they give loss and gradients of the whole, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from parity_cases import CASES, Case

from packed_examples import thinking_runs
from prefloop.batch.pieces import pack_pieces
from prefloop.losses.registry import objective
from prefloop.models import sparing
from prefloop.training.logprobs import with_reference
from prefloop.training.step import StepSettings, TrainingStep

TOLERANCE = 1e-9
BUDGETS = {"every path fits": 60, "some paths do not": 30, "no path does": 1}
NUM_TURNS = 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(sparing, "CHUNK_TOKENS", 16)


def step_of(model, reference, case, max_tokens):
    return TrainingStep(
        model, reference, case.algorithm, torch.optim.AdamW(model.parameters()), StepSettings(max_tokens)
    )


def examples_of(case):
    """Runs of many paths; those of one where the objective takes no others."""
    return case.rows(4, 3) if case.rows and not objective(case.objective).couples else runs(case)


def runs(case, num=2):
    return thinking_runs(objective(case.objective).records, num, NUM_TURNS, seed=1)


def gradient_of(model, reference, case, max_tokens, examples):
    model.zero_grad()
    metrics = step_of(model, reference, case, max_tokens).gradient(examples)
    return metrics, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


COMPUTED = {"num_computed", "num_tokens"}


def assert_equal(ours, whole):
    found, expected = ({key: value for key, value in one[0].items() if key not in COMPUTED} for one in (ours, whole))
    assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    assert ours[1].keys() == whole[1].keys()
    norm = torch.stack([gradient.norm() for gradient in whole[1].values()]).norm()
    assert norm > 1e-4
    for name, gradient in whole[1].items():
        scale = max(float(gradient.norm()), 1e-3 * float(norm))
        assert float((ours[1][name] - gradient).norm()) < TOLERANCE * scale, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_objective_cut_equals_itself_whole(case, exact_model, use_layout):
    model, reference = exact_model(head=case.head)
    examples = examples_of(case)
    use_layout("forest")
    whole = gradient_of(model, reference, case, 100_000, examples)
    for budget in (60, 30):
        assert_equal(gradient_of(model, reference, case, budget, examples), whole)
    evaluated = step_of(model, reference, case, 30).evaluate(examples)
    assert evaluated["loss"] == pytest.approx(whole[0]["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2", "gemma3_text", "olmo2", "qwen3_moe"])
@pytest.mark.parametrize("case", [Case("dpo"), Case("sft")], ids=lambda case: case.id)
def test_rows_windows_and_experts_are_cut_alike(kind, case, exact_model, use_layout):
    settings = {"sliding_window": 9} if kind == "gemma2" else {}
    model, reference = exact_model(kind, **settings)
    use_layout("forest")
    whole = gradient_of(model, reference, case, 100_000, runs(case))
    for budget in BUDGETS.values():
        assert_equal(gradient_of(model, reference, case, budget, runs(case)), whole)


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_references_are_scored_in_pieces(budget, exact_model, use_layout):
    model, reference = exact_model()
    use_layout("forest")
    case = Case("dpo")
    for whole, cut in zip(
        with_reference(reference, runs(case)), with_reference(reference, runs(case), max_tokens=budget), strict=True
    ):
        for one, other in zip(whole.ref_logprob, cut.ref_logprob, strict=True):
            assert abs(one - other).max() < TOLERANCE
    scored = with_reference(reference, runs(case), max_tokens=budget)
    online = gradient_of(model, reference, case, budget, runs(case))
    assert_equal(gradient_of(model, None, case, budget, scored), online)


@pytest.mark.parametrize("case", [Case("sft"), Case("dpo"), Case("reward"), Case("aot")], ids=lambda case: case.id)
def test_no_forward_is_larger_than_the_budget_or_the_longest_path(case, exact_model, use_layout, monkeypatch):
    model, reference = exact_model(head=case.head)
    use_layout("forest")
    examples = runs(case, 4)
    longest = max(len(path.token) for example in examples for sample in example.samples for path in sample)
    sizes = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    reference.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    gradient_of(model, reference, case, 100_000, examples)
    assert max(sizes) > 100
    for budget in BUDGETS.values():
        sizes.clear()
        gradient_of(model, reference, case, budget, examples)
        assert max(sizes) <= max(budget, longest)
        assert len(sizes) > len(examples)


def test_where_only_the_end_is_read_only_its_path_is_computed(exact_model, use_layout):
    model, _ = exact_model(head="score")
    use_layout("forest")
    case, examples = Case("reward"), runs(Case("reward"), 4)
    whole, cut = (gradient_of(model, None, case, budget, examples)[0] for budget in (100_000, 40))
    assert cut["num_computed"] < 0.7 * whole["num_computed"]


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_a_model_that_recomputes_already_stays_as_it_was(checkpointing, exact_model, use_layout):
    model, reference = exact_model()
    use_layout("forest")
    case = Case("dpo")
    whole = gradient_of(model, reference, case, 100_000, runs(case))
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    before = [(getattr(m, "gradient_checkpointing", None), vars(m).get("forward")) for m in model.modules()]
    assert_equal(gradient_of(model, reference, case, 1, runs(case)), whole)
    assert before == [(getattr(m, "gradient_checkpointing", None), vars(m).get("forward")) for m in model.modules()]


def test_kl_samples_are_scored_in_pieces(exact_model, use_layout):
    model, reference = exact_model()
    use_layout("forest")
    case = Case("kto", {"beta": 0.3, "kl": "samples"})
    algorithm = replace(case.algorithm, samples=thinking_runs("demonstrations", 3, NUM_TURNS, seed=8))

    def kl(max_tokens):
        step = TrainingStep(
            model, reference, algorithm, torch.optim.AdamW(model.parameters()), StepSettings(max_tokens)
        )
        return step.gradient(runs(case))

    whole = kl(100_000)
    assert whole["kl"] > 0.1
    for budget in BUDGETS.values():
        assert {k: v for k, v in kl(budget).items() if k not in COMPUTED} == pytest.approx(
            {k: v for k, v in whole.items() if k not in COMPUTED}, rel=TOLERANCE
        )


def test_pieces_are_the_whole_paths_of_their_example():
    examples = runs(Case("dpo"))
    batch, pieces = pack_pieces(examples, [1], 60)
    assert len(pieces) > 2
    assert sorted(v for piece in pieces for v in piece.visits.tolist()) == list(range(len(batch.visit_token_V)))
    paths = [path.token.tolist() for sample in examples[1].samples for path in sample]
    for piece in pieces:
        tokens = piece.batch.token_T[piece.batch.visit_token_V].tolist()
        assert tokens == batch.token_T[batch.visit_token_V[piece.visits]].tolist()
        starts = [i for i, d in enumerate(piece.batch.depth_T[piece.batch.visit_token_V].tolist()) if d == 0]
        assert all(tokens[a:b] in paths for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True))
    assert math.isclose(sum(piece.batch.loss_mask_V.sum() for piece in pieces), batch.loss_mask_V.sum())
