"""Reward models: a language model with a score head in place of its vocabulary head.

One score for a sequence (an outcome reward model, trained on preferences) or one for each token (a process reward
model, read at the ends of steps). Several members make an ensemble: n heads on one trunk, or n adapters, each with a
head of its own. What is saved opens in transformers and peft and gives the same scores there.

Shape suffixes: N paths, K tokens that are read, H members.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from prefloop.batch.examples import Demonstration
from prefloop.batch.packing import pack_group, split_examples
from prefloop.chat import ChatRenderer, StepKind, stop_ids
from prefloop.chat.steps import SEPARATOR
from prefloop.hub import ADAPTER_CONFIG, fetch_model, readable
from prefloop.models.attention import causal_model, why_not_shared
from prefloop.models.forward import forward, score_head
from prefloop.models.load import (
    REWARD_CONFIG,
    Policy,
    adapter_base,
    check_device,
    load_peft,
    load_policy,
    lora_config,
)
from prefloop.models.settings import Dtype, LoraSettings
from prefloop.records import JSONObject, PrefloopError, TokenPath

Kind = Literal["sequence", "token"]

CLASSES: dict[Kind, tuple[Any, str]] = {
    "sequence": (AutoModelForSequenceClassification, "SEQ_CLS"),
    "token": (AutoModelForTokenClassification, "TOKEN_CLS"),
}
BASE = "base"
"""The folder of the model below the adapters, where that is nowhere else."""

HEAD_SCALE = 0.1
"""First scores have about this standard deviation: small beside 1 nat, and different for each head."""

NEW_PAD = "<|pad|>"
NEVER_SAID = re.compile(r"right_pad|reserved|unused|extra_id")
"""Control tokens that models leave free."""


@dataclass(slots=True)
class RewardModel:
    """A model of transformers with a score head (`score`), or a peft model with one or more adapters on one.

    `adapters` are the names of its adapters. `centres` are the mean scores of the members over the trajectories that
    the model was trained on, and `scale` the standard deviation of the members' mean there: preferences say nothing
    of where a score's zero lies. Both are empty where they are not known. `own_base`: the model below the adapters
    is nowhere else, so that it is saved with them. `whole_template`: scores are read where the chat template ends, as
    with models of others, and not where the last turn does. `step` and `separator` say which steps a model of kind
    "token" was trained on (`prefloop.chat.steps`).
    """

    model: Any
    tokenizer: PreTrainedTokenizerFast
    kind: Kind = "sequence"
    adapters: tuple[str, ...] = ()
    centres: tuple[float, ...] = ()
    scale: float | None = None
    own_base: bool = False
    whole_template: bool = False
    step: StepKind = "separator"
    separator: str = SEPARATOR

    @property
    def num_members(self) -> int:
        """H, the size of the ensemble; 1 where there is none."""
        return int(_config(self.model).num_labels) * max(1, len(self.adapters))

    def select(self, adapter: int) -> None:
        """Make one adapter the one that computes and is trained."""
        self.model.set_adapter(self.adapters[adapter])

    def scores(
        self, paths: Sequence[TokenPath], tokens: Sequence[Sequence[int]], max_tokens: int = 16384
    ) -> list[NDArray[np.float64]]:
        """The scores of the members at these tokens of each path, [K, H]; without gradient.

        What paths share is computed once, `max_tokens` computed tokens at a time.

        Raises:
            PrefloopError: as `forward` and `pack`.
        """
        self.model.eval()
        if not self.adapters:
            return _scores(self.model, paths, tokens, max_tokens)
        members = []
        for adapter in range(len(self.adapters)):
            self.select(adapter)
            members.append(_scores(self.model, paths, tokens, max_tokens))
        return [np.concatenate(found, axis=1) for found in zip(*members, strict=True)]

    def sequence_scores(self, paths: Sequence[TokenPath], max_tokens: int = 16384) -> NDArray[np.float64]:
        """The scores of whole paths [N, H], read where transformers reads them: at the last token that is no padding.

        Raises:
            PrefloopError: as `scores`.
        """
        pad = _config(self.model).get_text_config().pad_token_id
        ends = [[int(np.flatnonzero(path.token != pad)[-1])] for path in paths]
        found = self.scores(paths, ends, max_tokens)
        return np.concatenate(found) if found else np.empty((0, self.num_members))

    def calibrate(self, paths: Sequence[TokenPath], max_tokens: int = 16384) -> None:
        """Set `centres` and `scale` from the scores of these paths, those that the model was trained on.

        Raises:
            PrefloopError: no paths; and as `scores`.
        """
        if not paths:
            raise PrefloopError("a reward model is centred on the trajectories it was trained on: there are none")
        score_NH = self.sequence_scores(paths, max_tokens)
        self.centres = tuple(score_NH.mean(0).tolist())
        self.scale = float(score_NH.mean(1).std()) or 1.0

    def save(self, directory: Path) -> None:
        """Write it as transformers and peft open it.

        A model without adapters is a directory for `from_pretrained` of its class. One adapter lies in the directory
        itself, several in a folder each; the model below them in the folder `base` where it is nowhere else.
        """
        Policy(self.model, self.tokenizer).save(directory)
        if self.own_base:
            _save_base(self.model, directory / BASE)
        saved = {
            "kind": self.kind,
            "adapters": list(self.adapters),
            "num_heads": _config(self.model).num_labels,
            "centres": list(self.centres),
            "scale": self.scale,
            "whole_template": self.whole_template,
            "step": self.step,
            "separator": self.separator,
        }
        (directory / REWARD_CONFIG).write_text(json.dumps(saved, indent=1) + "\n")


def new_reward_model(
    name: str,
    *,
    kind: Kind = "sequence",
    num_heads: int = 1,
    lora: LoraSettings | None = None,
    num_adapters: int = 1,
    seed: int = 0,
    dtype: Dtype = "float32",
    device: str = "cpu",
) -> RewardModel:
    """A reward model that starts from a causal language model: a directory, a hub id, or a LoRA adapter's directory.

    An adapter that is there already is merged into its model. Heads are drawn from `seed`, each one different;
    adapters from `lora.seed`. With `num_heads` or `num_adapters` above 1 it is an ensemble. Padding is a token that
    never ends a sequence (`choose_pad_token`): transformers reads the score at the last token that is no padding.

    Raises:
        PrefloopError: as `load_policy`; several adapters without `lora`, or several of both; an architecture that
            transformers has no such class for.
    """
    check_device(device)
    if num_heads < 1 or num_adapters < 1 or (num_heads > 1 and num_adapters > 1):
        raise PrefloopError(f"an ensemble is of heads or of adapters, not of {num_heads} and {num_adapters}")
    if num_adapters > 1 and lora is None:
        raise PrefloopError(f"an ensemble of {num_adapters} adapters needs the rank of each: give --lora-rank, too")
    policy = load_policy(name, dtype=dtype)
    merged = hasattr(policy.model, "merge_and_unload")
    causal = policy.model.merge_and_unload() if merged else policy.model
    resized = _set_padding(causal, policy.tokenizer)
    model = _with_head(causal, kind, num_heads, policy.tokenizer, name)
    _draw(score_head(model), [seed])
    adapters: tuple[str, ...] = ()
    if lora is not None:
        model, adapters = _with_adapters(model, CLASSES[kind][1], lora, num_adapters, seed)
    own_base = bool(adapters) and (merged or resized)
    for adapter in adapters if own_base else ():
        # Relative to the adapter's folder, so that the whole may be moved.
        model.peft_config[adapter].base_model_name_or_path = BASE if len(adapters) == 1 else f"../{BASE}"
    return RewardModel(model.to(device).eval(), policy.tokenizer, kind, adapters, own_base=own_base)


def load_reward_model(
    name: str, *, kind: Kind = "sequence", dtype: Dtype = "float32", device: str = "cpu", frozen: bool = True
) -> RewardModel:
    """Load a reward model from a directory or a hub id, to give scores, or (not `frozen`) to be trained further.

    Beside those that were saved here, any model that transformers opens as a sequence (or token) classification
    model, and an adapter of such a model; their `centres` and `scale` are not known. One of two classes for each token,
    as TRL trains them, gives the difference of its two scores: the logistic function of it is the softmax of both.

    Raises:
        PrefloopError: nothing is there, or it is not such a model; peft is missing.
    """
    check_device(device)
    directory = fetch_model(name)
    saved: JSONObject = (
        json.loads((directory / REWARD_CONFIG).read_text()) if (directory / REWARD_CONFIG).is_file() else {}
    )
    if saved and saved["kind"] != kind:
        raise PrefloopError(f"model {name!r} scores each {saved['kind']}, not each {kind}")
    alone = (directory / ADAPTER_CONFIG).is_file()
    adapters = tuple(saved.get("adapters", ("default",) if alone else ()))
    tokenizer, model = _open(name, kind, adapters, saved.get("num_heads", 1), dtype, frozen)
    if kind == "token" and not saved and _config(model).num_labels == 2:
        _fold_two_classes(model, name)
    if kind == "sequence" and not saved and _config(model).num_labels != 1:
        raise PrefloopError(f"model {name!r} has {_config(model).num_labels} labels: a reward model gives one score")
    model = model.to(device).eval()
    return RewardModel(
        model.requires_grad_(False) if frozen else model,
        tokenizer,
        kind,
        adapters,
        tuple(saved.get("centres", ())),
        saved.get("scale"),
        (directory / BASE).is_dir(),
        bool(saved.get("whole_template", True)),
        saved.get("step", "separator"),
        saved.get("separator", SEPARATOR),
    )


def choose_pad_token(tokenizer: Any, ends: frozenset[int], num_embeddings: int) -> str:
    """A token for padding that never ends a sequence; it may be one that the tokenizer does not have yet.

    The tokenizer's own unless it is among `ends`; else a new one if the model has a free embedding; else a control
    token that the model leaves free; else a new one, for which the embeddings have to grow.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return str(tokenizer.pad_token)
    if len(tokenizer) < num_embeddings:
        return NEW_PAD
    controls = sorted(tokenizer.added_tokens_decoder.items())
    free = [str(token) for i, token in controls if i not in ends and NEVER_SAID.search(str(token))]
    return free[0] if free else NEW_PAD


def ending_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a turn or a sequence, by the model, the tokenizer and its chat template."""
    generation = getattr(model, "generation_config", None)
    said = [tokenizer.eos_token_id, model.config.eos_token_id, getattr(generation, "eos_token_id", None)]
    ids = {i for one in said for i in (one if isinstance(one, list) else [one]) if i is not None}
    return frozenset(ids) | (stop_ids(ChatRenderer(tokenizer)) if tokenizer.chat_template else frozenset())


def _config(model: nn.Module) -> Any:
    return causal_model(model).config


def _set_padding(model: Any, tokenizer: Any) -> bool:
    """Give tokenizer and model a token for padding; returns whether the embeddings had to grow."""
    num_embeddings = model.get_input_embeddings().num_embeddings
    pad = choose_pad_token(tokenizer, ending_tokens(model, tokenizer), num_embeddings)
    tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.padding_side = "right"
    grows = len(tokenizer) > num_embeddings
    if grows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():  # else drawn at random, differently each time
            model.get_input_embeddings().weight[num_embeddings:].zero_()
    return bool(grows)


def _with_head(causal: Any, kind: Kind, num_heads: int, tokenizer: Any, name: str) -> Any:
    """The trunk of a causal model under a score head without weights yet."""
    config = causal.config
    config.num_labels, config.pad_token_id, config.classifier_dropout = num_heads, tokenizer.pad_token_id, 0.0
    try:
        with torch.device("meta"):
            model = CLASSES[kind][0].from_config(config)
    except ValueError:
        raise PrefloopError(f"transformers has no {kind} classification for {config.model_type!r}: {name}") from None
    if type(model.base_model) is not type(causal.base_model):
        raise PrefloopError(f"model {name!r}: {kind} classification of {config.model_type!r} has another trunk")
    setattr(model, model.base_model_prefix, causal.base_model)
    model.config = config  # the trunk's own: attention over forests is switched on there
    head = score_head(model)
    weight = causal.get_input_embeddings().weight
    model.score = nn.Linear(head.in_features, num_heads, head.bias is not None, dtype=weight.dtype)  # type: ignore[arg-type]
    return model


def _draw(head: nn.Module, seed: Sequence[int]) -> None:
    """Draw the weights of a head: normal, with scores of a standard deviation of about `HEAD_SCALE`."""
    weight = head.get_parameter("weight")
    drawn = np.random.default_rng(seed).standard_normal(tuple(weight.shape)) * HEAD_SCALE / weight.shape[1] ** 0.5
    with torch.no_grad():
        weight.copy_(torch.from_numpy(drawn))
        if head.bias is not None:
            head.get_parameter("bias").zero_()


def _with_adapters(model: Any, task: str, lora: LoraSettings, number: int, seed: int) -> tuple[Any, tuple[str, ...]]:
    """The model with adapters that have a head each, all drawn from the seeds; the first is selected."""
    names = ("default",) if number == 1 else tuple(f"member_{i}" for i in range(number))
    peft = load_peft()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        wrapped = peft.get_peft_model(model, lora_config(lora, model, task), adapter_name=names[0])
        for name in names[1:]:
            wrapped.add_adapter(name, lora_config(lora, model, task))
    heads: Any = score_head(wrapped)
    for i, name in enumerate(names):
        _draw(heads.modules_to_save[name], [seed, i])
    wrapped.set_adapter(names[0])
    return wrapped, names


def _save_base(model: Any, directory: Path) -> None:
    """The model below the adapters, with the head that it had before them."""
    bare = copy.deepcopy(model).unload()
    bare.save_pretrained(directory)


def _open(
    name: str, kind: Kind, adapters: Sequence[str], num_heads: int, dtype: Dtype, frozen: bool
) -> tuple[Any, Any]:
    """Tokenizer and model of a directory or a hub id."""
    directory = fetch_model(name)
    places = {one: directory if one == "default" else directory / one for one in adapters}
    expected = f"Expected what `prefloop train reward` saved, or a {kind} classification model of transformers"
    with readable(f"reward model {name!r}", expected):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        base, options = name, {}
        if adapters:
            own = directory / BASE
            base = str(own) if own.is_dir() else adapter_base(places[adapters[0]])
            options = {"num_labels": num_heads, "pad_token_id": tokenizer.pad_token_id}
        with _quiet(bool(adapters)):  # that the base has no head: the adapter brings it
            model = CLASSES[kind][0].from_pretrained(fetch_model(base), dtype=getattr(torch, dtype), **options)
        for i, (adapter, place) in enumerate(places.items()):
            if i == 0:
                opened = load_peft().PeftModel.from_pretrained
                model = opened(model, str(place), adapter_name=adapter, is_trainable=not frozen)
            else:
                model.load_adapter(str(place), adapter_name=adapter, is_trainable=not frozen)
    score_head(model)
    return tokenizer, model


def _fold_two_classes(model: Any, name: str) -> None:
    """Put the difference of two scores in place of both."""
    bare: Any = causal_model(model)
    head = bare.score
    if not isinstance(head, nn.Linear):
        raise PrefloopError(f"reward model {name!r} has two classes in an adapter: merge it into its model first")
    bare.score = nn.Linear(head.in_features, 1, head.bias is not None, dtype=head.weight.dtype)
    bare.config.num_labels = 1
    with torch.no_grad():
        bare.score.weight.copy_(head.weight[1:] - head.weight[:1])
        if head.bias is not None:
            bare.score.bias.copy_(head.bias[1:] - head.bias[:1])


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    if quiet:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@torch.no_grad()
def _scores(
    model: nn.Module, paths: Sequence[TokenPath], tokens: Sequence[Sequence[int]], max_tokens: int
) -> list[NDArray[np.float64]]:
    examples = [Demonstration((path,)) for path in paths]
    device = next(model.parameters()).device
    found: list[Any] = [None] * len(paths)
    for group in split_examples(examples, max_tokens, shares=not why_not_shared(model)) if paths else ():
        batch = pack_group(examples, group).to(device)
        starts = np.cumsum([0, *(len(paths[i].token) for i in group)])
        counts = [len(tokens[i]) for i in group]
        visits = [int(start) + token for start, i in zip(starts, group, strict=False) for token in tokens[i]]
        visit_K = torch.tensor(visits, dtype=torch.long, device=device)
        read_V = torch.zeros_like(batch.loss_mask_V).index_fill(0, visit_K, True)
        score_TH = forward(model, batch, {"score"}, read_V=read_V).score_TH
        assert score_TH is not None
        score_KH = score_TH[batch.visit_token_V[visit_K]].double().cpu().numpy()
        for i, scores in zip(group, np.split(score_KH, np.cumsum(counts)[:-1]), strict=True):
            found[i] = scores
    return found
