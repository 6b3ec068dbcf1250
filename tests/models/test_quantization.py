"""Base weights of 8 and 4 bits under an adapter; bitsandbytes computes them on a CPU, too."""

import builtins
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fit_runs import pair_rows, tiny_model, train_rows
from prefloop.chat import ChatRenderer, stop_ids
from prefloop.cli import main
from prefloop.clients.sampling import SamplingSettings
from prefloop.models.load import load_policy
from prefloop.models.sampler import LocalSampler
from prefloop.models.settings import LoraSettings, PolicySettings
from prefloop.records import PrefloopError

LORA = LoraSettings(rank=2)
BITS = {"8bit": 8, "4bit": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are wide enough for blocks of 64 weights."""
    return tiny_model(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128)


def linear_bytes(policy):
    weights = [p for n, p in policy.model.named_parameters() if "proj" in n and "lora_" not in n]
    return sum(weight.untyped_storage().nbytes() for weight in weights)


def logits(policy, ids):
    with torch.no_grad():
        return policy.model(ids).logits.float()


@pytest.mark.parametrize("quantization", BITS)
def test_weights_have_as_many_bits_and_say_nearly_the_same(quantization: str, model: Path):
    pytest.importorskip("bitsandbytes")
    whole, small = load_policy(str(model), lora=LORA), load_policy(str(model), lora=LORA, quantization=quantization)
    assert linear_bytes(small) == linear_bytes(whole) * BITS[quantization] // 32
    ids = torch.arange(20, 60)[None]
    difference = (logits(whole, ids) - logits(small, ids)).abs().mean() / logits(whole, ids).abs().mean()
    assert 0 < difference < {"8bit": 0.05, "4bit": 0.5}[quantization]  # random weights are the hardest to round
    trained = {p.dtype for p in small.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}


@pytest.mark.parametrize("quantization", BITS)
def test_a_reference_shares_quantised_weights(quantization: str, model: Path):
    pytest.importorskip("bitsandbytes")
    options = {"quantization": quantization, "dtype": "bfloat16"}
    trained = load_policy(str(model), lora=LORA, **options)
    apart = load_policy(str(model), frozen=True, **options)
    ids = torch.arange(20, 60)[None]
    logits(trained, ids)  # 8-bit layers keep what they need from the first time on
    shared = load_policy(str(model), frozen=True, beside=[trained], **options)
    assert torch.equal(logits(shared, ids), logits(apart, ids))
    owned = {t.data_ptr() for t in (*trained.model.parameters(), *trained.model.buffers())}
    assert all(t.data_ptr() in owned for t in (*shared.model.parameters(), *shared.model.buffers()))
    other = load_policy(str(model), frozen=True, beside=[trained], dtype="bfloat16")
    assert not any(t.data_ptr() in owned for t in other.model.parameters())


def loud(model: Path, place: Path) -> Path:
    """A model with inputs to its layers that bitsandbytes takes for outliers, as large models have them."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if "norm" in name:
                weight[::7] *= 9
    whole.save_pretrained(place)
    for file in model.glob("*token*"):
        (place / file.name).write_bytes(file.read_bytes())
    return place


@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_says_the_same_alone_in_a_batch_and_in_training(quantization, dtype, model: Path, tmp_path: Path):
    """Else policy and reference would differ before the first step, and packing would change results."""
    pytest.importorskip("bitsandbytes")
    policy = load_policy(str(loud(model, tmp_path)), lora=LORA, quantization=quantization, dtype=dtype)
    states = (getattr(module, "state", None) for module in policy.model.modules())
    assert not any(getattr(state, "threshold", 0) for state in states)  # a GPU would look for outliers among all rows
    ids = torch.randint(5, 120, (6, 30), generator=torch.Generator().manual_seed(0))
    together = logits(policy, ids)
    assert together.isfinite().all()
    alone = torch.cat([logits(policy, row[None]) for row in ids])
    policy.model.train()
    trained = policy.model(ids).logits.float().detach()
    policy.model.eval()
    again = logits(policy, ids)
    close = {"rtol": 0, "atol": 1e-4} if dtype == "float32" else {"rtol": 0, "atol": 0.05}
    torch.testing.assert_close(trained, together, rtol=0, atol=0)
    torch.testing.assert_close(again, together, rtol=0, atol=0)
    torch.testing.assert_close(alone, together, **close)


@pytest.mark.parametrize("quantization", BITS)
def test_gradients_of_the_adapter_are_those_over_the_rounded_weights(quantization: str, model: Path):
    """The oracle: plain matrices of the rounded weights. Activations are rounded, too: to 8 bits, or to bfloat16."""
    bits = pytest.importorskip("bitsandbytes")
    small = load_policy(str(model), lora=LORA, quantization=quantization)
    plain = load_policy(str(model), lora=LORA)
    rounded = {name: module for name, module in small.model.named_modules() if isinstance(module, torch.nn.Linear)}
    with torch.no_grad():
        for name, module in plain.model.named_modules():
            one = rounded.get(name)
            if isinstance(one, bits.nn.Linear4bit):
                module.weight.copy_(bits.functional.dequantize_4bit(one.weight.data, one.weight.quant_state))
            elif isinstance(one, bits.nn.Linear8bitLt):
                module.weight.copy_(one.weight.data.float() * one.weight.SCB[:, None] / 127)
        for a, b in zip(small.model.parameters(), plain.model.parameters(), strict=True):
            if b.requires_grad:
                b.add_(torch.randn(b.shape, generator=torch.Generator().manual_seed(b.numel())) * 0.1)
                a.copy_(b)
    ids = torch.arange(20, 60)[None]
    logits(small, ids)  # as rollouts do before an update
    grads = []
    for policy in (small, plain):
        policy.model(ids, labels=ids).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.requires_grad]))
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[1].norm()


@pytest.mark.parametrize("quantization", BITS)
def test_an_adapter_learns_preferences_on_quantised_weights(quantization: str, model: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    options = {"lora": {"rank": 4}, "num_epochs": 6, "quantization": quantization, "learning_rate": 2e-2}
    fitted = train_rows("dpo", model, tmp_path / "out", pair_rows(), **options)
    loss = fitted.train["loss"]
    assert loss[0] == pytest.approx(math.log(2), abs=1e-6) and loss[-1] < 0.3
    assert f"| `quantization` | `{quantization}` |" in (tmp_path / "out" / "README.md").read_text()
    policy = load_policy(str(tmp_path / "out"), quantization=quantization)
    renderer = ChatRenderer(policy.tokenizer)
    sampler = LocalSampler(policy.model, stop_ids(renderer))
    prompt = policy.tokenizer.apply_chat_template([{"role": "user", "content": "Say"}], add_generation_prompt=True)
    (sampled,) = sampler.session().generate([prompt["input_ids"]], [0], SamplingSettings(max_new_tokens=4), seed=0)
    assert len(sampled.token)


def test_what_quantised_weights_cannot_do(model: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PrefloopError, match="weights of a few bits cannot be trained themselves; train an adapter"):
        load_policy(str(model), quantization="4bit")
    with pytest.raises(ValueError, match="quantization needs a table 'lora'"):
        PolicySettings(model="m", quantization="4bit")
    lines = {
        ("reward", "--lora-rank", "2"): "--quantization: reward trains a reward model",
        ("dpo", "--lora-rank", "2", "--sync-reference-every", "2"): "weights of a few bits cannot follow",
    }
    for options, message in lines.items():
        given = ["--model", "m", "--data", "x", "--quantization", "8bit"]
        assert main(["train", *options, *given]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (
            {"hidden_size": 96},
            r"the width in of its layer model\.layers\.0\.self_attn\.q_proj is 96, .* of 64 alone",
        ),
        (
            {"hidden_size": 64, "intermediate_size": 80},
            r"width out of its layer \S*gate_proj is 80, .* of 32 alone",
        ),
    ],
)
def test_widths_that_4_bits_cannot_have_on_a_cpu(shape: dict, said: str, tmp_path: Path):
    """On some CPUs alone, and when it computes: it is said on all of them, and before."""
    pytest.importorskip("bitsandbytes")
    odd = tiny_model(tmp_path, **shape)
    with pytest.raises(PrefloopError, match=said) as raised:
        load_policy(str(odd), lora=LORA, quantization="4bit")
    assert "give quantization 8bit" in str(raised.value)
    policy = load_policy(str(odd), lora=LORA, quantization="8bit")
    assert logits(policy, torch.arange(20, 60)[None]).isfinite().all()


def test_a_package_that_is_not_used_says_nothing(model: Path):
    pytest.importorskip("bitsandbytes")
    code = f"from prefloop.models.load import *; load_policy({str(model)!r}, lora=LoraSettings(rank=2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gemm_4bit_forward" not in done.stderr


def test_without_the_package_the_error_says_what_installs_it(model: Path, monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **options):
        if name == "bitsandbytes":
            raise ImportError(name)
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PrefloopError, match=r"need bitsandbytes: pip install 'prefloop\[bitsandbytes\]'$"):
        load_policy(str(model), lora=LORA, quantization="4bit")
