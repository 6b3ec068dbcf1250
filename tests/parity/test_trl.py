"""Loss and gradient against TRL's own trainers, on the same weights and on rows that TRL tokenizes and collates itself.

Models are in float64. TRL's CPO and reward trainers stay there. Its DPO, KTO and SFT trainers compute log-probs in a
head that rounds to float32 whatever the model's type, and ORPO casts them; their gradients agree to that rounding.
"""

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from packed_examples import VOCAB, gradient, keep_float64, of_sources, perturbed, relative_error, tiny_model
from prefloop.batch.examples import Demonstration, LabelledSample, PreferencePair, Step, SteppedSample
from prefloop.losses.registry import OBJECTIVES
from prefloop.records import Source
from prefloop.training.algorithms import make_algorithm
from prefloop.training.step import StepSettings, TrainingStep

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="the oracle is not installed (pip install 'prefloop[oracle]')")
datasets = pytest.importorskip("datasets")
cpo = pytest.importorskip("trl.experimental.cpo")
orpo = pytest.importorskip("trl.experimental.orpo")

EOS = 2
NUM_ROWS = 6
FLOAT64, FLOAT32_HEAD = 1e-9, 5e-6


def tokenizer():
    import tokenizers
    import transformers

    words = {"<pad>": 0, "<bos>": 1, "<eos>": EOS, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def random_rows():
    """Prompt, chosen and rejected as token ids: two pairs a prompt, completions that begin alike."""
    rng = np.random.default_rng(4)

    def words(low, high):
        return rng.integers(4, VOCAB, rng.integers(low, high)).tolist()

    rows = []
    for i in range(NUM_ROWS):
        prompt = rows[-1][0] if i % 2 else words(3, 8)
        begun = words(0, 3)
        rows.append((prompt, [*begun, *words(1, 6), EOS], [*begun, *words(1, 9), EOS]))
    return rows


ROWS = random_rows()
MARGINS = [0.0, 0.25, -0.5, 1.0, 0.75, 0.125]
"""Numbers that float32 holds, in which TRL keeps them."""


def text(ids):
    return "".join(f" w{i}" if i != EOS else " <eos>" for i in ids)


def pair_rows():
    columns = zip(*ROWS, strict=True)
    return {key: list(map(text, ids)) for key, ids in zip(("prompt", "chosen", "rejected"), columns, strict=True)}


def label_rows():
    """One side of each pair, good or bad."""
    pairs = pair_rows()
    labels = [i % 3 != 0 for i in range(NUM_ROWS)]
    completion = [pairs["chosen" if good else "rejected"][i] for i, good in enumerate(labels)]
    return {"prompt": pairs["prompt"], "completion": completion, "label": labels}


def own_path(prompt, completion):
    return (of_sources(prompt + completion, [Source.PROMPT] * len(prompt) + [Source.SAMPLED] * len(completion)),)


PAIRS = [PreferencePair(own_path(p, c), own_path(p, r), margin=m) for (p, c, r), m in zip(ROWS, MARGINS, strict=True)]
DEMONSTRATIONS = [Demonstration(pair.chosen) for pair in PAIRS]
LABELS = [
    LabelledSample(pair.chosen if good else pair.rejected, good)
    for pair, good in zip(PAIRS, label_rows()["label"], strict=True)
]
EXAMPLES = {"demonstrations": DEMONSTRATIONS, "pairs": PAIRS, "labelled samples": LABELS}

TRAINERS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, pair_rows),
    "kto": (trl.KTOTrainer, trl.KTOConfig, label_rows),
    "cpo": (cpo.CPOTrainer, cpo.CPOConfig, pair_rows),
    "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, pair_rows),
    "reward": (trl.RewardTrainer, trl.RewardConfig, lambda: pair_rows() | {"margin": MARGINS}),
    "sft": (
        trl.SFTTrainer,
        trl.SFTConfig,
        lambda: {"prompt": pair_rows()["prompt"], "completion": pair_rows()["chosen"]},
    ),
}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """A function that gives a trainer of TRL with its batch; each is built once, for that is slow."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = build(name, tmp_path_factory.mktemp(name))
        return built[name]

    with pytest.MonkeyPatch.context() as patch:

        def build(name, folder):
            trainer_class, config_class, rows = TRAINERS[name]
            head = "score" if name == "reward" else "logits"
            model = tiny_model("qwen3", torch.float64, head=head, **({"num_labels": 1} if head == "score" else {}))
            keep_float64(patch, model)
            reference = perturbed(model, 0.05)
            arguments = config_class(
                output_dir=str(folder),
                **({"loss_type": "simpo"} if name == "cpo" else {}),  # else it keeps no gamma
                max_length=64,
                per_device_train_batch_size=NUM_ROWS,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
            )
            trainer = trainer_class(
                model,
                args=arguments,
                train_dataset=datasets.Dataset.from_dict(rows()),
                processing_class=tokenizer(),
                **({"ref_model": reference} if name in ("dpo", "kto") else {}),
            )
            trainer.current_gradient_accumulation_steps = 1
            return SimpleNamespace(
                trainer=trainer,
                model=model,
                reference=reference,
                batch=trainer.data_collator(list(trainer.train_dataset)),
                settings={key: value for key, value in vars(trainer).items() if isinstance(value, PLAIN)},
            )

        yield get


PLAIN = (str, int, float, list, type(None))


@dataclass(frozen=True)
class Match:
    """An objective of ours with its knobs, and the trainer of TRL that has it, with its attributes and arguments.

    `logged`: both log the same. Not so where the reward that a loss implies is a mean over tokens, of which TRL logs
    the sum, or where TRL logs log-probs as it weighs them.
    """

    ours: str
    trainer: str
    theirs: Mapping[str, Any] = field(default_factory=dict)
    knobs: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = FLOAT32_HEAD
    logged: bool = True

    @property
    def id(self) -> str:
        return "-".join([self.trainer, self.ours, *(f"{k}={v}" for k, v in self.knobs.items())]).replace(" ", "")


def dpo(ours, *loss_types, weights=(1.0,), arguments=None, beta=0.3, theirs=None, logged=True, **knobs):
    attributes = {"loss_types": list(loss_types), "loss_weights": list(weights), "beta": beta, **(theirs or {})}
    if "label_smoothing" in knobs:
        attributes["label_smoothing"] = knobs["label_smoothing"]
    return Match(ours, "dpo", attributes, {"beta": beta, **knobs}, arguments or {}, logged=logged)


def f_divergence(kind, **theirs):
    return {"f_divergence_type": kind, "f_alpha_divergence_coef": 0.5, **theirs}


MATCHES = (
    dpo("dpo", "sigmoid"),
    dpo("hinge", "hinge"),
    dpo("ipo", "ipo", reduction="mean", logged=False),
    dpo("exo", "exo_pair", label_smoothing=0.1),
    dpo("nca", "nca_pair"),
    dpo("robust", "robust", label_smoothing=0.2),
    dpo("bco", "bco_pair"),
    dpo("sppo", "sppo_hard"),
    dpo("aot", "aot"),
    dpo("aot", "aot", label_smoothing=0.2),
    dpo("aot_unpaired", "aot_unpaired"),
    dpo("aot_unpaired", "aot_unpaired", label_smoothing=0.2),
    dpo("apo_zero", "apo_zero"),
    dpo("apo_down", "apo_down"),
    dpo("discopop", "discopop", tau=0.7, arguments={"discopop_tau": 0.7}),
    dpo("dpo_norm", "sigmoid_norm", logged=False),
    dpo("f_dpo", "sigmoid", divergence="reverse_kl"),
    dpo("f_dpo", "sigmoid", divergence="forward_kl", theirs=f_divergence("forward_kl")),
    dpo("f_dpo", "sigmoid", divergence="js", theirs=f_divergence("js_divergence")),
    dpo(
        "f_dpo",
        "sigmoid",
        divergence="alpha",
        divergence_alpha=0.3,
        theirs=f_divergence("alpha_divergence", f_alpha_divergence_coef=0.7),
    ),
    dpo("ld_dpo", "sigmoid", ld_alpha=0.4, theirs={"ld_alpha": 0.4}, logged=False),
    dpo("dpo", "sigmoid", "sft", weights=(1.0, 0.3), nll_coef=0.3, nll_reduction="token"),
    dpo("dpo", "sigmoid", "apo_zero", "sppo_hard", weights=(1.0, 0.4, 0.1), mixture={"apo_zero": 0.4, "sppo": 0.1}),
    Match("kto", "kto", {"beta": 0.3}, {"beta": 0.3, "kl": "rotation"}),
    Match(
        "kto",
        "kto",
        {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8},
        {"beta": 0.3, "kl": "rotation", "desirable_weight": 1.3, "undesirable_weight": 0.8},
    ),
    Match(
        "kto",
        "kto",
        {"loss_type": "apo_zero_unpaired", "calculate_KL": False, "beta": 0.3},
        {"beta": 0.3, "kl": "none"},
    ),
    Match(
        "cpo", "cpo", {"loss_type": "sigmoid", "beta": 0.3}, {"beta": 0.3, "nll_reduction": "token"}, tolerance=FLOAT64
    ),
    Match(
        "cpo",
        "cpo",
        {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.1, "cpo_alpha": 0.0},
        {"beta": 0.3, "label_smoothing": 0.1, "nll_coef": 0.0},
        tolerance=FLOAT64,
    ),
    Match(
        "simpo",
        "cpo",
        {"beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.0},
        {"beta": 2.0, "gamma": 0.8},
        tolerance=FLOAT64,
    ),
    Match(
        "simpo",
        "cpo",
        {"beta": 2.0, "simpo_gamma": 0.8, "label_smoothing": 0.1},
        {"beta": 2.0, "gamma": 0.8, "label_smoothing": 0.1, "nll_coef": 1.0, "nll_reduction": "token"},
        tolerance=FLOAT64,
    ),
    Match("orpo", "orpo", {"beta": 0.4}, {"beta": 0.4, "nll_scope": "sequence", "nll_reduction": "token"}),
    Match("reward", "reward", tolerance=FLOAT64),
    Match(
        "reward",
        "reward",
        knobs={"center_coef": 0.05},
        arguments={"center_rewards_coefficient": 0.05},
        tolerance=FLOAT64,
    ),
    Match("sft", "sft"),
    Match("sft", "sft", knobs={"dft": True}, arguments={"loss_type": "dft"}),
)


def their_gradient(oracle, match, monkeypatch):
    """Loss, gradient and metrics of TRL's training step."""
    trainer, model = oracle.trainer, oracle.model
    for owner, values in ((trainer, oracle.settings | dict(match.theirs)), (trainer.args, match.arguments)):
        for name, value in values.items():
            monkeypatch.setattr(owner, name, value)
    if hasattr(trainer, "_metrics"):
        trainer._metrics["train"].clear()
    model.zero_grad()
    loss = trainer.training_step(model, dict(oracle.batch))
    metrics = getattr(trainer, "_metrics", {}).get("train", {})
    return float(loss), gradient(model), {name: values[0] for name, values in metrics.items()}


def our_gradient(oracle, match):
    model = oracle.model
    model.zero_grad()
    algorithm = make_algorithm(match.ours, **match.knobs)
    step = TrainingStep(
        model, oracle.reference, algorithm, torch.optim.AdamW(model.parameters()), StepSettings(max_tokens=64)
    )
    metrics = step.gradient(EXAMPLES[algorithm.records])
    return metrics["loss"], gradient(model), metrics


@pytest.mark.parametrize("match", MATCHES, ids=lambda match: match.id)
def test_loss_and_gradient_equal_those_of_trl(match, oracle, use_layout, monkeypatch):
    use_layout("forest")
    found = oracle(match.trainer)
    loss, theirs, their_metrics = their_gradient(found, match, monkeypatch)
    our_loss, ours, our_metrics = our_gradient(found, match)
    assert our_loss == pytest.approx(loss, rel=1e-6)
    assert float(theirs.norm()) > 1e-3
    assert their_metrics.get("kl", 1.0) > 0.1 or match.knobs["kl"] == "none"
    assert relative_error(ours, theirs) < match.tolerance
    for name in set(their_metrics) & set(our_metrics) - {"num_tokens"} if match.logged else ():
        assert our_metrics[name] == pytest.approx(their_metrics[name], rel=1e-4, abs=1e-5), name


def test_process_reward_equals_the_formula_of_trl_1_13(monkeypatch):
    """TRL classified tokens in two classes: cross-entropy at the separator that ends each step, unshifted, averaged
    over all steps of the batch. Our score is the difference of the two logits."""
    separator = 5
    two = tiny_model("qwen3", torch.float64, head="scores", num_labels=2).eval()
    keep_float64(monkeypatch, two)
    one = tiny_model("qwen3", torch.float64, head="scores", num_labels=1).eval()
    one.model.load_state_dict(two.model.state_dict())
    with torch.no_grad():
        one.score.weight.copy_(two.score.weight[1:] - two.score.weight[:1])
        one.score.bias.copy_(two.score.bias[1:] - two.score.bias[:1])

    rng, examples = np.random.default_rng(1), []
    ids = torch.zeros(4, 40, dtype=torch.long)
    mask, classes = torch.zeros_like(ids), torch.full_like(ids, -100)
    prompt = rng.integers(6, VOCAB, 4).tolist()
    for row in range(4):
        tokens, steps = list(prompt), []
        for _ in range(row + 1):
            tokens += [*rng.integers(6, VOCAB, rng.integers(1, 5)).tolist(), separator]
            steps.append(Step(0, len(tokens) - 1, float(rng.random() < 0.5)))
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        for step in steps:
            classes[row, step.token] = int(step.label)
        sources = [Source.PROMPT] * len(prompt) + [Source.SAMPLED] * (len(tokens) - len(prompt))
        examples.append(SteppedSample((of_sources(tokens, sources),), tuple(steps)))

    logits = two(input_ids=ids, attention_mask=mask).logits  # with labels, transformers would cast them to float32
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten(), ignore_index=-100)
    loss.backward()
    step = TrainingStep(one, None, make_algorithm("process_reward"), torch.optim.AdamW(one.parameters()))
    assert step.gradient(examples)["loss"] == pytest.approx(loss.item(), rel=FLOAT64)
    assert relative_error(gradient(one.model), gradient(two.model)) < FLOAT64
    assert relative_error(one.score.weight.grad[0], two.score.weight.grad[1]) < FLOAT64
    assert relative_error(-one.score.bias.grad, two.score.bias.grad[:1]) < FLOAT64


def test_every_objective_is_held_against_trl():
    of_rows = {name for name, found in OBJECTIVES.items() if not found.fresh}
    assert {match.ours for match in MATCHES} | {"process_reward"} == of_rows  # the others: test_policy_gradients.py


def test_every_loss_of_trl_s_dpo_trainer_has_a_match():
    theirs = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(trl.DPOTrainer._compute_loss)))
    assert theirs == {name for match in MATCHES for name in match.theirs.get("loss_types", ())}
