import copy
import json

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefloop.batch.examples import PreferencePair
from prefloop.batch.layout import forest_layout, rows_layout
from prefloop.models.attention import why_not_shared
from prefloop.models.load import load_policy
from prefloop.models.reward import NEW_PAD, choose_pad_token, ending_tokens, load_reward_model, new_reward_model
from prefloop.models.settings import LoraSettings
from prefloop.records import PrefloopError
from prefloop.training.algorithms import make_algorithm
from prefloop.training.step import TrainingStep
from reward_examples import conversations, padded_scores, rendered, saved_policy

LORA = LoraSettings(rank=2, alpha=4)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return saved_policy(tmp_path_factory.mktemp("policy") / "sft")


def paths_for(model):
    return [rendered(model.tokenizer, trajectory) for _, trajectory in conversations()]


def moved(model, seed=0):
    """Weights as after training: away from where adapters do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def saved(model, directory):
    directory.mkdir()
    model.save(directory)
    return directory


@pytest.mark.parametrize(("architecture", "num_heads"), [("llama", 1), ("qwen3", 3)])
def test_transformers_gives_the_same_scores(tmp_path, architecture, num_heads):
    """In a right-padded batch and row by row; the sequences end with the tokenizer's end token."""
    policy = saved_policy(tmp_path / "policy", architecture=architecture)
    model = moved(new_reward_model(policy, num_heads=num_heads, seed=1))
    paths = paths_for(model)
    ours = model.sequence_scores(paths)
    directory = saved(model, tmp_path / "saved")
    theirs = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    pad = AutoTokenizer.from_pretrained(directory).pad_token_id
    assert ours.shape == (len(paths), num_heads)
    assert ours.std(0).min() > 0.01
    assert padded_scores(theirs, paths, pad) == pytest.approx(ours, abs=2e-6)
    single = np.concatenate([padded_scores(theirs, [path], pad) for path in paths])
    assert single == pytest.approx(ours, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("num_adapters", [1, 2])
def test_peft_opens_each_adapter_with_the_same_scores(policy, tmp_path, num_adapters):
    model = moved_adapters(new_reward_model(policy, lora=LORA, num_adapters=num_adapters, seed=1))
    paths = paths_for(model)
    ours = model.sequence_scores(paths)
    directory = saved(model, tmp_path / "saved")
    pad = AutoTokenizer.from_pretrained(directory).pad_token_id
    places = [directory] if num_adapters == 1 else [directory / name for name in model.adapters]
    for member, place in enumerate(places):
        base = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, pad_token_id=pad)
        theirs = PeftModel.from_pretrained(base, place).eval()
        assert padded_scores(theirs, paths, pad)[:, 0] == pytest.approx(ours[:, member], abs=2e-6)
    if num_adapters == 2:
        assert abs(ours[:, 0] - ours[:, 1]).min() > 1e-4
    assert load_reward_model(str(directory)).sequence_scores(paths) == pytest.approx(ours, abs=2e-6)


@pytest.mark.slow
def test_adapters_on_a_policy_with_an_adapter_keep_their_base(policy, tmp_path):
    """The SFT policy was an adapter: what lies below the reward model is nowhere else, and is saved with it."""
    start = load_policy(policy, lora=LORA)
    with torch.no_grad():
        for name, parameter in start.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    start.save(tmp_path / "adapter")
    model = moved_adapters(new_reward_model(str(tmp_path / "adapter"), lora=LORA, num_adapters=2, seed=1))
    plain = new_reward_model(policy, lora=LORA, num_adapters=2, seed=1)
    paths = paths_for(model)
    ours = model.sequence_scores(paths)
    assert abs(plain.sequence_scores(paths) - ours).max() > 0.01
    directory = saved(model, tmp_path / "saved")
    loaded = load_reward_model(str(directory))
    assert loaded.sequence_scores(paths) == pytest.approx(ours, abs=2e-6)
    base = AutoModelForSequenceClassification.from_pretrained(directory / "base")
    theirs = PeftModel.from_pretrained(base, directory / "member_1").eval()
    assert padded_scores(theirs, paths, base.config.pad_token_id)[:, 0] == pytest.approx(ours[:, 1], abs=2e-6)


def moved_adapters(model):
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.slow
def test_an_adapter_opens_by_its_own_name_too(policy, tmp_path):
    directory = saved(moved_adapters(new_reward_model(policy, lora=LORA)), tmp_path / "saved")
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(directory, num_labels=1)
    model = load_reward_model(str(directory))
    (path, *_) = paths_for(model)
    assert padded_scores(theirs.eval(), [path], 0)[0] == pytest.approx(model.sequence_scores([path])[0], abs=2e-6)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_what_paths_share_is_computed_once_and_changes_nothing(tmp_path, monkeypatch, architecture, loaded):
    """Over a forest, which the layout would not choose for so few short paths."""
    model = moved(new_reward_model(saved_policy(tmp_path / "policy", architecture=architecture), num_heads=2))
    if loaded:
        model = load_reward_model(str(saved(model, tmp_path / "saved")))
    paths = paths_for(model)
    alone = np.concatenate([model.sequence_scores([path]) for path in paths])
    assert model.sequence_scores(paths) == pytest.approx(alone, abs=2e-6)
    monkeypatch.setattr("prefloop.models.forward.layout_for", lambda model, batch: forest_layout(batch))
    assert model.sequence_scores(paths) == pytest.approx(alone, abs=2e-6)
    assert model.sequence_scores(paths, max_tokens=30) == pytest.approx(alone, abs=2e-6)
    assert model.sequence_scores([]).shape == (0, 2)


def test_it_learns_the_same_over_a_forest_and_over_rows(policy, monkeypatch):
    """The gradient of a model that was just made, by each layout."""
    paths = paths_for(new_reward_model(policy))
    pairs = [PreferencePair((paths[i],), (paths[i + 1],)) for i in range(0, len(paths), 2)]
    gradients = []
    for layout in (forest_layout, rows_layout):
        monkeypatch.setattr("prefloop.training.step.layout_for", lambda model, batch, layout=layout: layout(batch))
        model = moved(new_reward_model(policy, num_heads=2))
        TrainingStep(model.model, None, make_algorithm("reward"), torch.optim.SGD(model.model.parameters())).gradient(
            pairs
        )
        gradients.append(torch.cat([p.grad.flatten() for p in model.model.parameters()]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-5


def test_scores_are_read_at_the_tokens_asked_for(policy):
    """A causal model's score at a token is that of the path that ends there."""
    model = moved(new_reward_model(policy, kind="token", num_heads=2, seed=4))
    first, second, *_ = paths_for(model)
    found = model.scores([first, second], [[3, 5], [4]])
    with torch.no_grad():
        ids = torch.from_numpy(first.token)[None].long()
        assert found[0] == pytest.approx(model.model(input_ids=ids).logits[0, [3, 5]].numpy(), abs=2e-6)
    assert found[1].shape == (1, 2)


def test_it_starts_from_the_policys_weights_with_small_heads_that_differ(policy):
    model = new_reward_model(policy, num_heads=4, seed=1)
    trunk = load_policy(policy).model.model.state_dict()
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in model.model.model.state_dict().items())
    weight = model.model.score.weight
    assert torch.pdist(weight).min() > 0.01
    assert float(weight.detach().norm(dim=1).max()) < 0.3
    assert torch.equal(weight, new_reward_model(policy, num_heads=4, seed=1).model.score.weight)
    assert not torch.equal(weight, new_reward_model(policy, num_heads=4, seed=2).model.score.weight)


def test_adapters_are_on_every_linear_layer_but_the_head(policy):
    model = new_reward_model(policy, lora=LORA, num_adapters=2)
    names = [name for name, _ in model.model.named_parameters()]
    assert not [name for name in names if "score" in name and "lora" in name]
    for member in range(2):
        model.select(member)
        trained = [name for name, p in model.model.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * 7 * 2 + 1  # A and B of seven layers in each of two blocks, and the head
        assert all(f"member_{member}" in name for name in trained)


def test_centres_and_scale_are_saved(policy, tmp_path):
    model = moved(new_reward_model(policy, num_heads=2))
    paths = paths_for(model)
    model.calibrate(paths)
    scores = model.sequence_scores(paths)
    assert model.centres == pytest.approx(tuple(scores.mean(0)))
    assert model.scale == pytest.approx(scores.mean(1).std())
    loaded = load_reward_model(str(saved(model, tmp_path / "saved")))
    assert (loaded.centres, loaded.scale, loaded.num_members) == (model.centres, model.scale, 2)


def test_layers_with_a_configuration_of_their_own_do_not_share(policy):
    """Attention over forests is switched on in the model's configuration: layers that do not see it would be wrong."""
    model = new_reward_model(policy).model
    assert not why_not_shared(model)
    model.config = copy.deepcopy(model.config)
    assert "configuration of their own" in why_not_shared(model)


# --- padding ------------------------------------------------------------------------------------------------


class Tokens:
    """The parts of a tokenizer that the choice looks at."""

    def __init__(self, pad=None, controls=(), size=100):
        self.added_tokens_decoder = dict(controls)
        self.pad_token_id = pad
        self.pad_token = self.added_tokens_decoder.get(pad)
        self.size = size

    def __len__(self):
        return self.size


ENDS = frozenset({2, 3})
RESERVED = {1: "<s>", 2: "</s>", 7: "<|reserved_special_token_0|>"}


@pytest.mark.parametrize(
    ("tokenizer", "num_embeddings", "expected"),
    [
        (Tokens(5, {5: "<pad>"}), 100, "<pad>"),  # its own
        (Tokens(2, {2: "</s>"}), 128, NEW_PAD),  # ends sequences, and there is a free embedding
        (Tokens(2, RESERVED), 100, "<|reserved_special_token_0|>"),
        (Tokens(None, RESERVED), 100, "<|reserved_special_token_0|>"),
        (Tokens(2, {1: "<s>", 2: "</s>", 3: "<|reserved_end|>"}), 100, NEW_PAD),  # the embeddings grow
    ],
)
def test_padding_is_a_token_that_never_ends_a_sequence(tokenizer, num_embeddings, expected):
    assert choose_pad_token(tokenizer, ENDS, num_embeddings) == expected


@pytest.mark.parametrize("lora", [None, pytest.param(LORA, marks=pytest.mark.slow)])
@pytest.mark.parametrize("free", [True, False])
def test_a_tokenizer_that_pads_with_its_end_token_gets_another(tmp_path, monkeypatch, lora, free):
    """Else transformers would read the score before the end token. With and without a free embedding for it."""
    monkeypatch.setattr("prefloop.models.reward.NEW_PAD", "<|new|>")  # the small tokenizer has a <|pad|>
    saved_policy(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "policy")
    if free:
        grown = load_policy(str(tmp_path / "policy")).model
        grown.resize_token_embeddings(len(tokenizer) + 8)
        grown.save_pretrained(tmp_path / "policy")
    model = moved_adapters(new_reward_model(str(tmp_path / "policy"), lora=lora, seed=2))
    assert tokenizer.eos_token_id in ending_tokens(model.model, tokenizer)
    assert model.tokenizer.pad_token == "<|new|>"
    assert model.own_base == (lora is not None and not free)
    paths = paths_for(model)
    ours = model.sequence_scores(paths)
    directory = saved(model, tmp_path / "saved")
    pad = AutoTokenizer.from_pretrained(directory).pad_token_id
    base = directory if lora is None else directory / "base" if model.own_base else tmp_path / "policy"
    theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=pad)
    theirs = theirs if lora is None else PeftModel.from_pretrained(theirs, directory)
    assert padded_scores(theirs.eval(), paths, pad) == pytest.approx(ours, abs=2e-6)
    assert load_reward_model(str(directory)).sequence_scores(paths) == pytest.approx(ours, abs=2e-6)
    again = new_reward_model(str(tmp_path / "policy"), lora=lora, seed=2).model.state_dict()
    fresh = new_reward_model(str(tmp_path / "policy"), lora=lora, seed=2).model.state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in again.items())


# --- models of others, and errors ----------------------------------------------------------------------------


def test_a_model_of_others_scores_as_in_transformers(policy, tmp_path):
    """Padded with the end token, it is read before that, as transformers reads it."""
    model = moved(new_reward_model(policy))
    model.model.config.pad_token_id = model.tokenizer.eos_token_id
    model.model.save_pretrained(tmp_path / "other")
    model.tokenizer.pad_token = model.tokenizer.eos_token
    model.tokenizer.save_pretrained(tmp_path / "other")
    model.tokenizer.pad_token = "<|pad|>"
    loaded = load_reward_model(str(tmp_path / "other"))
    paths = paths_for(loaded)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other")
    found = loaded.sequence_scores(paths)
    assert found == pytest.approx(padded_scores(theirs, paths, loaded.tokenizer.pad_token_id), abs=2e-6)
    assert (loaded.centres, loaded.scale, loaded.whole_template) == ((), None, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 2, "num_adapters": 2, "lora": LORA}, "heads or of adapters"),
        ({"num_heads": 0}, "heads or of adapters"),
        ({"num_adapters": 3}, "3 adapters needs the rank of each: give --lora-rank"),
    ],
)
def test_an_ensemble_is_of_one_kind(policy, settings, message):
    with pytest.raises(PrefloopError, match=message):
        new_reward_model(policy, **settings)


def test_what_is_no_reward_model_is_refused(policy, tmp_path):
    with pytest.raises(PrefloopError, match="cannot be loaded"):
        load_reward_model(str(tmp_path / "nothing"))
    directory = saved(new_reward_model(policy), tmp_path / "saved")
    with pytest.raises(PrefloopError, match="scores each sequence, not each token"):
        load_reward_model(str(directory), kind="token")
    assert json.loads((directory / "reward_model.json").read_text())["kind"] == "sequence"
    (saved(new_reward_model(policy, num_heads=2), tmp_path / "two") / "reward_model.json").unlink()
    with pytest.raises(PrefloopError, match="has 2 labels: a reward model gives one score"):
        load_reward_model(str(tmp_path / "two"))
    with pytest.raises(PrefloopError, match="there are none"):
        new_reward_model(policy).calibrate([])
