import copy
import math
from dataclasses import replace

import pytest
import torch

from packed_examples import (
    branching_demonstrations,
    gradient,
    padded_logprobs,
    paths_of,
    perturbed,
    random_demonstrations,
    random_pairs,
    relative_error,
    tiny_model,
)
from prefloop.batch.examples import LabelledSample
from prefloop.models.forward import forward
from prefloop.records import PrefloopError
from prefloop.training import logprobs as logprobs_module
from prefloop.training import step as step_module
from prefloop.training.algorithms import make_algorithm
from prefloop.training.logprobs import with_reference
from prefloop.training.step import StepSettings, TrainingStep


def step_of(model, algorithm, reference=None, lr=1e-3, **settings):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return TrainingStep(model, reference, algorithm, optimizer, StepSettings(**settings))


def gradient_of(model, algorithm, examples, reference=None, **settings):
    model.zero_grad()
    metrics = step_of(model, algorithm, reference, **settings).gradient(examples)
    return metrics, gradient(model)


def padded_dpo_loss(model, reference, pairs, beta):
    """DPO from plain padded logits, written out once more."""
    paths = paths_of(pairs)
    sums = []
    for scorer in (model, reference):
        logprobs = padded_logprobs(scorer, paths)
        sums.append([x[torch.from_numpy(p.loss_mask[1:])].sum() for x, p in zip(logprobs, paths, strict=True)])
    ratio = [a - b.detach() for a, b in zip(*sums, strict=True)]
    margins = torch.stack(ratio[0::2]) - torch.stack(ratio[1::2])
    return torch.log1p(torch.exp(-beta * margins)).mean()


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
def test_dpo_loss_and_gradient_equal_plain_padded_sequences(kind):
    model = tiny_model(kind, num_key_value_heads=4)
    reference, pairs = perturbed(model), random_pairs(6)
    metrics, ours = gradient_of(model, make_algorithm("dpo", beta=0.3), pairs, reference)
    model.zero_grad()
    loss = padded_dpo_loss(model, reference, pairs, 0.3)
    loss.backward()
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert relative_error(ours, gradient(model)) < 1e-5


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
@pytest.mark.parametrize("algorithm", [make_algorithm("sft"), make_algorithm("dpo", nll_coef=0.2)], ids=["sft", "dpo"])
def test_micro_batches_change_neither_loss_nor_gradient(kind, algorithm):
    model = tiny_model(kind, torch.float64, num_key_value_heads=4)
    examples = random_demonstrations(11) if algorithm.name == "sft" else random_pairs(11)
    examples = [replace(e, weight=1.0 + i % 3) for i, e in enumerate(examples)]
    reference = perturbed(model)
    whole, expected = gradient_of(model, algorithm, examples, reference)
    for max_tokens in (1, 30, 60):
        metrics, split = gradient_of(model, algorithm, examples, reference, max_tokens=max_tokens)
        same = set(metrics) - {"num_tokens", "num_computed"}
        assert {k: metrics[k] for k in same} == pytest.approx({k: whole[k] for k in same}, rel=1e-6)
        assert relative_error(split, expected) < 1e-6


@pytest.mark.parametrize("lengths", [{"prompt": (20, 30), "completion": (2, 4)}, {"completion": (12, 20)}])
def test_kto_in_one_pass_or_in_two_is_the_same(lengths, monkeypatch):
    """The samples of its reference point go through the pass of the rows only where that costs less."""
    reference = tiny_model(dtype=torch.float64)
    model, pairs = perturbed(reference), random_pairs(6, **lengths)
    rows = [LabelledSample(pair.chosen, i % 2 == 0, name=str(i)) for i, pair in enumerate(pairs)]
    passes = []
    for module in (step_module, logprobs_module):
        monkeypatch.setattr(module, "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs))
    whole, expected = gradient_of(model, make_algorithm("kto"), rows, reference)
    num_joint = len(passes)  # the reference on all, and the policy on all
    monkeypatch.setattr(TrainingStep, "_joint", lambda *_: None)
    metrics, apart = gradient_of(model, make_algorithm("kto"), rows, reference)
    assert (num_joint, len(passes) - num_joint) == ((2, 3) if "prompt" in lengths else (3, 3))
    assert whole["kl"] > 0
    assert metrics == pytest.approx(whole, rel=1e-6)
    assert relative_error(apart, expected) < 1e-6


def test_sft_is_the_weighted_mean_over_loss_tokens():
    model, examples = tiny_model(), branching_demonstrations()
    examples = [replace(e, weight=w) for e, w in zip(examples, (1.0, 2.0, 0.5, 1.0, 3.0), strict=True)]
    metrics, ours = gradient_of(model, make_algorithm("sft"), examples)
    model.zero_grad()
    total, count = 0.0, 0.0
    for example in examples:
        for one, logprob in zip(example.paths, padded_logprobs(model, example.paths), strict=True):
            mask = torch.from_numpy(one.loss_mask[1:])
            total, count = total - example.weight * logprob[mask].sum(), count + example.weight * int(mask.sum())
    (total / count).backward()
    assert metrics["loss"] == pytest.approx(float(total / count), rel=1e-5)
    assert relative_error(ours, gradient(model)) < 1e-5


def test_a_reference_computed_once_gives_the_same_step():
    model = tiny_model()
    reference, pairs = perturbed(model), random_pairs(9)
    online, expected = gradient_of(model, make_algorithm("dpo"), pairs, reference)
    scored = with_reference(reference, pairs, max_tokens=50)
    assert [pair.name for pair in scored] == [pair.name for pair in pairs]
    stored, ours = gradient_of(model, make_algorithm("dpo"), scored)
    assert stored == pytest.approx(online, rel=1e-5)
    assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize("max_tokens", [40, 16384])
def test_the_same_step_twice_is_equal_bit_for_bit(max_tokens):
    model, pairs = tiny_model(), random_pairs(9)
    reference = perturbed(model)
    first, one = gradient_of(model, make_algorithm("dpo"), pairs, reference, max_tokens=max_tokens)
    second, two = gradient_of(model, make_algorithm("dpo"), pairs, reference, max_tokens=max_tokens)
    assert first == second
    assert torch.equal(one, two)


def test_steps_learn_the_preference():
    model, pairs = tiny_model(initializer_range=0.1), random_pairs(8, completion=(5, 9))
    step = step_of(model, make_algorithm("dpo"), copy.deepcopy(model))
    first = step(pairs)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    for _ in range(15):
        last = step(pairs)
    assert last["loss"] < 0.6
    assert last["rewards/accuracies"] == 1.0
    assert last["rewards/chosen"] - last["rewards/rejected"] == pytest.approx(last["rewards/margins"], abs=1e-9)


def test_gradients_are_clipped_to_the_norm():
    model, examples = tiny_model(), random_demonstrations(4)
    _, raw = gradient_of(model, make_algorithm("sft"), examples)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    step = TrainingStep(model, None, make_algorithm("sft"), optimizer, StepSettings(max_grad_norm=0.01))
    metrics = step(examples)
    moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    assert metrics["grad_norm"] == pytest.approx(float(raw.norm()), rel=1e-5)
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted():
    model, examples = tiny_model(), random_demonstrations(3)
    step = step_of(model, make_algorithm("sft"), max_skipped=2)
    step(examples)
    before = copy.deepcopy(model.state_dict())
    broken = [replace(examples[0], weight=math.inf), *examples[1:]]
    with pytest.raises(PrefloopError, match="weights of the examples sum to inf"):
        step(broken)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: out * math.nan)
    for _ in range(2):
        assert step(examples) == {"skipped": 1.0}
    with pytest.raises(PrefloopError, match="3 steps in a row were not finite"):
        step(examples)
    assert step.num_skipped_in_a_row == 3
    assert step.last_skipped.rows == ("demo-0", "demo-1", "demo-2")
    assert math.isnan(step.last_skipped.loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_lora_step_moves_only_the_adapter():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    TrainingStep(model, tiny_model(), make_algorithm("dpo"), optimizer)(random_pairs(4))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_wrong_examples_and_a_missing_reference_are_refused():
    model = tiny_model()
    with pytest.raises(PrefloopError, match="dpo learns from pairs, row demo-0 is none"):
        step_of(model, make_algorithm("dpo"), tiny_model())(random_demonstrations(1))
    with pytest.raises(PrefloopError, match="the reference must be another module"):
        step_of(model, make_algorithm("dpo"), model)
    with pytest.raises(PrefloopError, match="dpo needs a reference"):
        step_of(model, make_algorithm("dpo"))(random_pairs(1))
    with pytest.raises(PrefloopError, match="weights of the examples sum to 0"):
        step_of(model, make_algorithm("sft"))([replace(e, weight=0.0) for e in random_demonstrations(2)])


def test_gradient_checkpointing_gives_the_same_gradient():
    model, pairs = tiny_model(), random_pairs(5)
    reference = perturbed(model)
    _, expected = gradient_of(model, make_algorithm("dpo"), pairs, reference)
    model.train().gradient_checkpointing_enable()
    _, ours = gradient_of(model, make_algorithm("dpo"), pairs, reference)
    assert relative_error(ours, expected) < 1e-6


def test_a_policy_that_cannot_share_says_so(caplog):
    step_of(tiny_model("bloom"), make_algorithm("sft"))
    assert "computed once for each path: its attention is biased by the distance" in caplog.text
    caplog.clear()
    step_of(tiny_model(), make_algorithm("sft"))
    assert caplog.text == ""
