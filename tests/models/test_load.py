"""Policies that share their base weights, and those that must not."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from prefloop.batch.examples import Demonstration
from prefloop.models.load import load_policy
from prefloop.models.settings import LoraSettings
from prefloop.records import PrefloopError
from prefloop.training.logprobs import with_reference
from reward_examples import conversations, rendered, saved_policy

LORA = LoraSettings(rank=2, alpha=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return saved_policy(tmp_path_factory.mktemp("policy") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> str:
    """An adapter that does something."""
    policy, directory = load_policy(base, lora=LORA), tmp_path_factory.mktemp("policy") / "adapter"
    move(policy)
    policy.save(directory)
    return str(directory)


def move(policy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def logprobs(policy):
    examples = [Demonstration((rendered(policy.tokenizer, one),)) for _, one in conversations()]
    scored = with_reference(policy.model, examples, max_tokens=4096)
    return torch.cat([torch.tensor(one) for example in scored for one in example.ref_logprob])


def storages(*policies):
    """The number of bytes of all weights and buffers, shared ones once."""
    tensors = [t for one in policies for t in (*one.model.parameters(), *one.model.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reference", ["base", "adapter"])
@pytest.mark.parametrize("policy", ["base", "adapter"])
def test_an_adapter_and_its_reference_share_the_base_and_give_what_they_give_apart(request, policy, reference, dtype):
    places = {name: request.getfixturevalue(name) for name in ("base", "adapter")}
    trained = load_policy(places[policy], lora=LORA, dtype=dtype)
    move(trained, seed=1)
    own = logprobs(trained)
    apart = load_policy(places[reference], frozen=True, dtype=dtype)
    shared = load_policy(places[reference], frozen=True, dtype=dtype, beside=[trained])
    assert torch.equal(logprobs(shared), logprobs(apart))
    assert torch.equal(logprobs(trained), own)  # it is what it was
    assert not torch.equal(own, logprobs(apart))
    alone, adapter_bytes = (
        storages(apart),
        storages(load_policy(places["adapter"], dtype=dtype)) - storages(load_policy(places["base"], dtype=dtype)),
    )
    assert storages(trained, shared) <= storages(trained) + adapter_bytes
    assert storages(trained, apart) == storages(trained) + alone
    assert not any(parameter.requires_grad for parameter in shared.model.parameters())
    assert any(parameter.requires_grad for parameter in trained.model.parameters())


def test_training_moves_neither_the_reference_nor_the_base(base, adapter):
    trained = load_policy(base, lora=LORA)
    shared = load_policy(adapter, frozen=True, beside=[trained])
    before = logprobs(shared)
    move(trained, seed=2)
    assert torch.equal(logprobs(shared), before)
    again = load_policy(adapter, lora=LORA, beside=[shared])  # to be trained on, over a frozen one's base
    assert torch.equal(logprobs(again), before)
    move(again, seed=3)
    assert torch.equal(logprobs(shared), before)


def test_an_adapter_that_is_loaded_beside_another_is_trained_the_same(base, adapter):
    first = load_policy(adapter, lora=LORA)
    beside, apart = (load_policy(adapter, lora=LORA, beside=others) for others in ([first], []))
    names = [[n for n, p in one.model.named_parameters() if p.requires_grad] for one in (beside, apart)]
    assert names[0] == names[1] and names[0]
    assert all(a.equal(b) for a, b in zip(beside.model.parameters(), apart.model.parameters(), strict=True))


def test_what_is_trained_in_full_shares_nothing(base, tmp_path: Path):
    trained = load_policy(base)
    for other in (load_policy(base, frozen=True, beside=[trained]), load_policy(base, lora=LORA, beside=[trained])):
        assert storages(trained, other) >= 2 * storages(trained)
    frozen = load_policy(base, frozen=True)
    assert storages(frozen, load_policy(base, beside=[frozen])) == 2 * storages(frozen)  # it may be trained
    assert storages(frozen, load_policy(base, frozen=True, beside=[frozen])) == storages(frozen)
    other = load_policy(saved_policy(tmp_path / "other"), frozen=True, beside=[frozen])
    assert storages(frozen, other) == 2 * storages(frozen)
    half = load_policy(base, frozen=True, dtype="bfloat16", beside=[frozen])
    assert storages(frozen, half) > storages(frozen)


def test_another_rank_than_that_of_the_adapter_is_said(adapter):
    assert load_policy(adapter, lora=LORA).model.peft_config["default"].r == 2
    for other in (LoraSettings(rank=8), LoraSettings(rank=2, alpha=2)):
        with pytest.raises(PrefloopError, match=r"is an adapter of rank 2 and alpha 4 already.*\[policy\.lora\] out"):
            load_policy(adapter, lora=other)


# --- damaged files ----------------------------------------------------------------------------------------------


def change(file: str, **keys: object):
    def damage(directory: Path) -> None:
        path = directory / file
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return damage


def cut_short(file: str):
    return lambda directory: (directory / file).write_bytes((directory / file).read_bytes()[:100])


@pytest.mark.parametrize(
    ("which", "damage", "said"),
    [
        ("base", cut_short("model.safetensors"), "SafetensorError"),
        ("base", change("config.json", hidden_size="32"), "hidden_size"),
        ("base", change("config.json", hidden_size=48), "size mismatch|cannot be loaded"),
        ("base", lambda at: (at / "tokenizer.json").write_text("{}"), "KeyError: 'added_tokens'"),
        ("adapter", cut_short("adapter_model.safetensors"), "SafetensorError"),
        ("adapter", change("adapter_config.json", r=3), "size mismatch"),
        ("adapter", lambda at: (at / "adapter_config.json").write_text("[1]"), "damaged"),
    ],
)
def test_a_damaged_file_is_one_line(request, tmp_path, which, damage, said):
    directory = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(which), directory)
    damage(directory)
    with pytest.raises(PrefloopError, match=said) as caught:
        load_policy(str(directory))
    line = str(caught.value)
    assert line.startswith(f"model '{directory}' cannot be loaded: ") and "\n" not in line
