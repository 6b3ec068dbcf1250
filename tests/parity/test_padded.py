"""Loss and every parameter's gradient against plain padded sequences, in float64."""

import pytest
import torch
import transformers
from parity_cases import CASES, Case
from plain_losses import plain_loss, reference_point

from packed_examples import HEADS
from prefloop.batch.packing import pack_group, split_examples
from prefloop.losses.registry import OBJECTIVES
from prefloop.models import attention
from prefloop.training.step import StepSettings, TrainingStep

TOLERANCE = 1e-9


def our_gradient(model, reference, algorithm, examples, **settings):
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters())
    step = TrainingStep(model, reference, algorithm, optimizer, StepSettings(**settings))
    metrics = step.gradient(examples)
    return metrics["loss"], gradients(model)


def gradients(model):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def plain_gradient(model, reference, case, examples):
    knobs = dict(case.knobs)
    if dealt := case.algorithm.kl_samples(examples, (0,)):
        knobs["dealt"] = dealt
        assert reference_point(model, reference, dealt) > 0.5
    model.zero_grad()
    loss = plain_loss(case.objective, model.eval(), reference, examples, **knobs)
    loss.backward()
    return loss.item(), gradients(model)


def assert_equal(ours, expected):
    """Losses, and the gradient of each parameter by its norm; one that is zero is held against the whole."""
    assert ours[0] == pytest.approx(expected[0], rel=TOLERANCE)
    whole = torch.stack([g.norm() for g in expected[1].values()]).norm()
    assert whole > 1e-4
    for name, gradient in expected[1].items():
        scale = max(float(gradient.norm()), 1e-3 * float(whole))
        assert float((ours[1][name] - gradient).norm()) < TOLERANCE * scale, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_objective_equals_plain_padded_sequences(case, exact_model, use_layout):
    model, reference = exact_model(head=case.head)
    examples = case.examples(8, seed=3)  # whose estimates of the KL are above 0, where it counts
    expected = plain_gradient(model, reference, case, examples)
    for layout, max_tokens in (("forest", 10_000), ("forest", 40), ("rows", 10_000)):
        use_layout(layout)
        assert_equal(our_gradient(model, reference, case.algorithm, examples, max_tokens=max_tokens), expected)


ARCHITECTURES = (
    *((kind, {}) for kind in sorted(attention.SHARING_MODEL_TYPES)),
    ("qwen3", {"attention_dropout": 0.1}),
    ("mistral", {"sliding_window": 6}),
    ("gpt_neox", {}),
)
EVERYWHERE = (
    (Case("dpo", {"beta": 0.3, "label_smoothing": 0.0, "nll_coef": 0.5, "nll_scope": "sequence"}), {}),
    (Case("reward", {"center_coef": 0.1}), {"num_labels": 3}),
    (Case("process_reward"), {"num_labels": 3}),
)


def has_head(kind, head):
    """Whether transformers has a model of this kind with the head that we read."""
    known = type(transformers.AutoConfig.for_model(kind)) in HEADS[head]._model_mapping
    return known and (kind, head) != ("gpt_neox", "scores")  # whose head has another name


@pytest.mark.parametrize(
    ("kind", "settings", "case"),
    [
        pytest.param(kind, settings | heads, case, id="-".join([kind, *settings, case.objective]))
        for kind, settings in ARCHITECTURES
        for case, heads in EVERYWHERE
        if has_head(kind, case.head)
    ],
)
def test_every_architecture_equals_plain_padded_sequences(kind, settings, case, exact_model, use_layout):
    model, reference = exact_model(kind, head=case.head, **settings)
    examples = case.examples(8, seed=3)
    expected = plain_gradient(model, reference, case, examples)
    use_layout("forest")
    assert_equal(our_gradient(model, reference, case.algorithm, examples, max_tokens=60), expected)


def test_every_objective_has_a_case():
    of_rows = {name for name, found in OBJECTIVES.items() if not found.fresh}
    assert {case.objective for case in CASES} == of_rows  # the others: test_policy_gradient.py


@pytest.mark.parametrize("max_tokens", [40, 10_000])
def test_the_examples_share_prefixes(max_tokens, exact_model, use_layout, monkeypatch):
    """What the other tests would not notice: that the forest is really used, and has branches."""
    seen = []
    cascade = attention.cascade_attention
    monkeypatch.setattr(attention, "cascade_attention", lambda *args: (seen.append(args[3]), cascade(*args))[1])
    model, reference = exact_model()
    use_layout("forest")
    examples = Case("dpo").examples(8)
    our_gradient(model, reference, Case("dpo").algorithm, examples, max_tokens=max_tokens)
    batches = [pack_group(examples, group) for group in split_examples(examples, max_tokens)]
    assert len(seen) == 2 * 2 * len(batches)  # two models of two layers
    assert sum(segment.end > segment.stop for segments in seen for segment in segments) > 20
    assert sum(len(b.visit_token_V) for b in batches) > 1.5 * sum(b.num_tokens for b in batches)
