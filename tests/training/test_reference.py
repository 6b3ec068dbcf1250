"""The reference's log-probs kept in the store, and a reference that follows the policy."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from packed_examples import paths_of, random_demonstrations, random_pairs, tiny_model
from prefloop.models.load import Policy
from prefloop.models.logits import PROBE
from prefloop.records import PrefloopError
from prefloop.store import Store
from prefloop.training.checkpoint import save_atomically
from prefloop.training.logprobs import with_reference
from prefloop.training.reference import follow, following, stored_reference
from prefloop.training.weights import weights_hash


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store.db")) as opened:
        yield opened


def never():
    raise AssertionError("the reference was loaded although nothing was missing")


def score(store, examples, load=tiny_model, model_hash="reference", **options):
    return stored_reference(store, load, model_hash, examples, **{"precision": "float32", **options})


def same(one, other):
    return all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x.ref_logprob, y.ref_logprob, strict=True)
    )


# --- log-probs in the store ---------------------------------------------------------------------------------------


def test_what_is_kept_is_what_the_reference_gives_and_comes_back_bit_for_bit(store):
    pairs = random_pairs(7)
    first = score(store, pairs)
    assert same(first, with_reference(tiny_model(), pairs))
    assert [pair.name for pair in first] == [pair.name for pair in pairs]
    assert same(score(store, pairs, never), first)
    assert same(score(store, pairs, never, max_tokens=1), first)  # whatever the micro-batches are now
    assert score(store, first, never) == first  # those that have theirs are left as they are


def test_only_what_is_missing_is_computed(store):
    pairs = random_pairs(9)
    score(store, pairs[:6])
    asked = []

    def load():
        model = tiny_model()
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: asked.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        return model

    all_of_them = score(store, pairs, load)
    lengths = [len(path.token) for path in paths_of(pairs[6:])]
    assert 0 < sum(asked) <= len(lengths) * max(lengths) + PROBE  # the head of a new model is tried once
    kept = store.counts()["logprob"]
    assert kept == len({(tuple(p.token.tolist()), tuple(p.loss_mask.tolist())) for p in paths_of(pairs)})
    assert same(all_of_them[:6], score(store, pairs[:6], never))


def test_other_weights_tokens_masks_and_precisions_are_not_taken_for_these(store):
    (demonstration,) = random_demonstrations(1)
    (path,) = demonstration.paths
    first = score(store, [demonstration])
    source = path.source.copy()
    source[-1] = 1
    assert path.loss_mask.sum() > 1
    for changed, options in (
        (demonstration, {"model_hash": "another"}),
        (demonstration, {"precision": "float32 in bfloat16"}),
        (replace(demonstration, paths=(replace(path, token=path.token[::-1].copy()),)), {}),
        (replace(demonstration, paths=(replace(path, source=source),)), {}),
    ):
        with pytest.raises(AssertionError, match="was loaded"):
            score(store, [changed], never, **options)
    narrow = score(store, [demonstration], precision="float32 in bfloat16")
    assert not same(narrow, first)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(narrow, with_reference(tiny_model(), [demonstration]))
    wide = score(store, [demonstration], lambda: tiny_model(dtype=torch.float64), precision="float64")
    assert wide[0].ref_logprob[0].dtype == np.float64
    assert same(score(store, [demonstration], never, precision="float64"), wide)


def test_log_probs_of_another_reference_or_of_other_tokens_are_refused_by_row(store):
    pairs = score(store, random_pairs(8))
    with pytest.raises(
        PrefloopError, match=r"^row pair-0, pair-1, pair-2, pair-3, pair-4 and 3 more: the reference log-"
    ):
        score(store, pairs, model_hash="another")
    swapped = replace(pairs[3], chosen=pairs[3].rejected, rejected=pairs[3].chosen)
    with pytest.raises(
        PrefloopError, match=r"^row pair-3: the reference log-probs are not of this reference and these"
    ):
        score(store, [*pairs[:3], swapped])
    unknown = with_reference(tiny_model(), random_pairs(1))  # nobody says of which model
    with pytest.raises(PrefloopError, match=r"^row pair-0: "):
        score(store, unknown)


def test_a_damaged_row_of_the_store_is_not_taken(store):
    score(store, random_demonstrations(1))
    with store.transaction() as connection:
        connection.exec_driver_sql("UPDATE logprob SET logprob = x'00'")
    with pytest.raises(PrefloopError, match="row demo-0: the store keeps 1 bytes of log-probs"):
        score(store, random_demonstrations(1), never)


# --- which weights ------------------------------------------------------------------------------------------------


class Tokenizer:
    def save_pretrained(self, directory):
        (directory / "tokenizer.json").write_text("{}")


def test_the_hash_of_weights_is_that_of_what_was_saved_with_or_without_a_manifest(tmp_path):
    policy = Policy(tiny_model(), Tokenizer())
    policy.save(tmp_path / "plain")
    save_atomically(tmp_path / "checkpoint", policy.save)
    found = weights_hash(str(tmp_path / "plain"))
    assert weights_hash(str(tmp_path / "checkpoint")) == found
    with torch.no_grad():
        policy.model.model.norm.weight[0] += 1e-3
    policy.save(tmp_path / "plain")
    assert weights_hash(str(tmp_path / "plain")) != found
    with pytest.raises(PrefloopError, match="holds no weights"):
        weights_hash(str(tmp_path))
    with pytest.raises(PrefloopError, match=r"model 'nobody/nothing' cannot be loaded: .*the hub cannot be reached"):
        weights_hash("nobody/nothing")


def test_an_adapter_counts_with_the_model_that_it_changes(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    tiny_model().save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(tiny_model(), config)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    found = weights_hash(str(tmp_path / "adapter"))
    assert found != weights_hash(str(tmp_path / "base"))
    changed = tiny_model()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-3
    changed.save_pretrained(tmp_path / "base")
    assert weights_hash(str(tmp_path / "adapter")) != found


# --- following the policy -----------------------------------------------------------------------------------------


def moved(model, scale=0.1):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def test_a_reference_follows_by_the_mixture_of_all_weights():
    reference, policy = tiny_model(), moved(tiny_model())
    own = following(reference)
    follow(own, policy, 0.6)
    for new, old, now in zip(own.parameters(), reference.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(new, 0.6 * now.detach() + 0.4 * old.detach())
        assert not new.requires_grad
    follow(own, policy, 1.0)
    for new, now in zip(own.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(new, now.detach())
    assert torch.equal(next(reference.parameters()), next(tiny_model().parameters()))  # the one given stays


def test_the_mixture_is_trls():
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    policy, theirs = moved(tiny_model()), tiny_model()
    ours = following(theirs)
    callbacks.SyncRefModelCallback._sync_target_model(policy, theirs, 0.3)
    follow(ours, policy, 0.3)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-6, atol=1e-7)


def test_an_adapter_is_followed_as_the_weights_that_it_makes():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    policy = peft.get_peft_model(tiny_model(), config)
    for start in (tiny_model(), copy.deepcopy(policy)):
        reference = following(start)
        follow(reference, policy, 1.0)
        ids = torch.arange(12)[None]
        torch.testing.assert_close(reference(ids).logits, policy.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_reference_of_another_shape_cannot_follow():
    with pytest.raises(PrefloopError, match=r"they differ in model\.layers\.1"):
        follow(tiny_model(num_hidden_layers=1), tiny_model(), 0.5)
    with pytest.raises(PrefloopError, match=r"they differ in lm_head"):
        follow(tiny_model(vocab_size=70), tiny_model(), 0.5)
