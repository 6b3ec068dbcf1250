"""Gradient checkpointing, bfloat16, LoRA, dropout and experts, each through the step over trees against padded rows."""

import copy
import math

import pytest
import torch

from packed_examples import padded_logprobs, paths_of, perturbed, random_pairs, relative_error, tiny_model
from prefloop.models import forward
from prefloop.training.algorithms import make_algorithm
from prefloop.training.step import StepSettings, TrainingStep

PAIRS = random_pairs(8)
BETA = 0.3


@pytest.fixture(autouse=True)
def forests(monkeypatch):
    """Tiny models would choose rows."""
    monkeypatch.setattr(forward, "SEGMENT_FLOPS", -1.0)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradient(model):
    return torch.cat([p.grad.flatten() for p in trained(model)]).float()


def tree_gradient(model, reference, **settings):
    model.zero_grad()
    optimizer = torch.optim.AdamW(trained(model))
    step = TrainingStep(model, reference, make_algorithm("dpo", beta=BETA), optimizer, StepSettings(**settings))
    step.gradient(PAIRS)
    return gradient(model)


def padded_gradient(model, reference):
    """DPO from plain padded logits, without dropout."""
    model.zero_grad()
    paths, sums = paths_of(PAIRS), []
    for scorer in (model, reference):
        logprobs = padded_logprobs(scorer.eval(), paths)
        sums.append([x[torch.from_numpy(p.loss_mask[1:])].sum() for x, p in zip(logprobs, paths, strict=True)])
    ratio = [a - b.detach() for a, b in zip(*sums, strict=True)]
    margins = torch.stack(ratio[0::2]) - torch.stack(ratio[1::2])
    torch.log1p(torch.exp(-BETA * margins)).mean().backward()
    return gradient(model)


def adapted(model, **settings):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(1)
    return peft.get_peft_model(model, lora)


WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
KINDS = [("qwen3", {}), ("gemma2", WINDOWED), ("gpt_neox", {"num_key_value_heads": 4}), ("qwen3_moe", {})]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=[kind for kind, _ in KINDS])
def test_gradient_checkpointing(kind, settings, reentrant):
    model = tiny_model(kind, **settings)
    reference = perturbed(model)
    expected = padded_gradient(model, reference)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert relative_error(tree_gradient(model, reference, max_tokens=60), expected) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=[kind for kind, _ in KINDS])
def test_lora(kind, settings, checkpointing):
    base = tiny_model(kind, **settings)
    dropout = 0.0 if kind == "qwen3_moe" else 0.3  # peft has none for experts
    reference, model = perturbed(base), adapted(base, lora_dropout=dropout)
    expected = padded_gradient(model, reference)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    ours = tree_gradient(model, reference)
    assert relative_error(ours, expected) < 1e-5
    assert len(ours) < 0.5 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("mode", ["weights", "autocast", "autocast with LoRA"])
@pytest.mark.parametrize(("kind", "settings"), KINDS[:2], ids=["qwen3", "gemma2"])
def test_bfloat16_is_as_near_to_float32_as_padded_rows_are(kind, settings, mode):
    """The truth is the float32 gradient at the same weights, which bfloat16 can hold."""
    torch.manual_seed(0)
    truth = tiny_model(kind, initializer_range=0.15, **settings).to(torch.bfloat16).float()
    truth = adapted(truth) if "LoRA" in mode else truth
    reference = perturbed(truth, 0.05).to(torch.bfloat16).float()
    expected = padded_gradient(truth, reference)
    if mode == "weights":
        model, other = copy.deepcopy(truth).to(torch.bfloat16), copy.deepcopy(reference).to(torch.bfloat16)
        padded, tree = padded_gradient(model, other), tree_gradient(model, other)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            padded = padded_gradient(truth, reference)
        tree = tree_gradient(truth, reference, autocast=True)
    errors = relative_error(tree, expected), relative_error(padded, expected)
    assert 1e-4 < errors[0] < 1.3 * errors[1] < 0.2


NOISY = [
    ("qwen3", {"attention_dropout": 0.3}, "attention_dropout"),
    ("mixtral", {"router_jitter_noise": 0.3}, "jitter_noise"),
    ("gpt2", {}, "dropout"),
]


@pytest.mark.parametrize(("kind", "settings", "name"), NOISY, ids=[kind for kind, *_ in NOISY])
def test_dropout_is_switched_off_with_one_notice(kind, settings, name, caplog):
    model = tiny_model(kind, **settings)
    reference = perturbed(model)
    expected = padded_gradient(model, reference)
    assert relative_error(tree_gradient(model, reference), expected) < 1e-5
    assert [m for m in caplog.messages if m.startswith("switched off") and name in m] == caplog.messages[:1]
    tree_gradient(model, reference)
    assert sum(m.startswith("switched off") for m in caplog.messages) == 1


def test_the_balancing_loss_of_routers_is_no_part_of_the_objective_and_that_is_said(caplog):
    model = tiny_model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=10.0)
    reference = perturbed(model)
    expected = padded_gradient(model, reference)
    assert relative_error(tree_gradient(model, reference), expected) < 1e-5
    assert "the balancing loss of routers is no part of the objective" in caplog.text


def test_a_head_that_keeps_its_logits_gives_the_gradient_of_one_that_computes_them_again():
    for kind in ("qwen3", "gemma2"):
        model = tiny_model(kind)
        reference = perturbed(model)
        kept, again = (tree_gradient(model, reference, logit_budget=budget) for budget in (1 << 30, 0))
        assert math.isclose(relative_error(kept, again), 0, abs_tol=1e-6)
