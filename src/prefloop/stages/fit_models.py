"""The model of one training: loaded, given its reference, trained, saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from prefloop.hub import is_adapter
from prefloop.losses.registry import needs_reference, resolve_knobs
from prefloop.records import JSONObject, PrefloopError
from prefloop.stages.context import versions
from prefloop.stages.fit_data import FitData
from prefloop.stages.fit_settings import FitProgress, FitSettings
from prefloop.store import Store
from prefloop.training.metrics import mean_metrics
from prefloop.training.settings import count_steps

if TYPE_CHECKING:
    from torch import nn

    from prefloop.batch.examples import Example, PreferencePair
    from prefloop.chat import ChatRenderer
    from prefloop.models.load import Policy
    from prefloop.models.reward import Kind, RewardModel
    from prefloop.training.ensemble import OpenWriters
    from prefloop.training.state import TrainingResult
    from prefloop.training.writers import MetricsWriter

SCORED: Mapping[str, Kind] = {"reward": "sequence", "process_reward": "token"}
"""What the objectives give scores to that train a reward model in place of a policy."""

PACKAGES = ("prefloop", "torch", "transformers", "peft", "numpy")


@dataclass
class Learner:
    """A policy or reward model that is to be trained."""

    trained: Policy | RewardModel

    @property
    def model(self) -> Any:
        """The module."""
        return self.trained.model

    def notes(self) -> Iterator[str]:
        """What the type of the trained weights means for the training, in words."""
        import torch

        if any(weight.dtype == torch.bfloat16 for weight in self.model.parameters() if weight.requires_grad):
            yield (
                "--dtype bfloat16: weights in bfloat16 lose small updates to rounding; --precision bfloat16 in its "
                "place computes in bfloat16 and keeps them in float32"
            )

    @cached_property
    def renderer(self) -> ChatRenderer:
        """The renderer of its chat template."""
        from prefloop.chat import ChatRenderer

        return ChatRenderer(self.trained.tokenizer)

    @cached_property
    def context(self) -> int | None:
        """How many tokens it can read; None where its configuration does not say."""
        from prefloop.models.attention import causal_model

        config: Any = causal_model(self.model).config
        found = getattr(config.get_text_config(), "max_position_embeddings", None)
        return None if found is None else int(found)


def settle(settings: FitSettings) -> None:
    """Set torch up: its threads, and that results repeat.

    Raises:
        PrefloopError: torch cannot use the device.
    """
    import torch

    from prefloop.models.load import check_device

    check_device(device_of(settings))
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    torch.use_deterministic_algorithms(True, warn_only=device_of(settings) != "cpu")


def origins(settings: FitSettings) -> JSONObject:
    """The model and the reference that a training starts from, with the hashes of their weights.

    Raises:
        PrefloopError: one of them is not there.
    """
    found: JSONObject = {"model": settings.model, "weights": _weights(settings.model, settings)}
    if needs_reference(settings.objective, settings):
        name = settings.reference or settings.model
        found |= {"reference": name, "reference_weights": _weights(name, settings)}
    return found


def circumstances(settings: FitSettings) -> JSONObject:
    """What the bits of a training depend on besides its settings and rows: weights, device, threads, versions.

    Raises:
        PrefloopError: as `origins`.
    """
    import torch

    threads = torch.get_num_threads()
    device = {"device": device_of(settings), "num_threads": threads, "versions": versions(*PACKAGES)}
    return {**origins(settings), **device}


def _weights(name: str, settings: FitSettings) -> str:
    from prefloop.models.load import load_policy
    from prefloop.training.weights import weights_hash

    try:
        return weights_hash(located(name))
    except PrefloopError:
        load_policy(located(name), dtype=settings.dtype)  # says what is wrong
        raise


def device_of(settings: FitSettings) -> str:
    """The device to train on."""
    import torch

    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def located(name: str) -> str:
    """A directory by its whole path, so that what names it opens from anywhere; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def load_learner(settings: FitSettings) -> Learner:
    """The model as it is before the training.

    Raises:
        PrefloopError: it cannot be loaded, its files are not those of its manifest, or `lora` is given for a model
            that is an adapter already.
    """
    from prefloop.models.load import load_policy
    from prefloop.models.reward import new_reward_model

    _check_whole(settings.model)
    name, options = located(settings.model), _options(settings)
    kind = SCORED.get(settings.objective)
    if kind is not None:
        del options["quantization"]
        sizes: dict[str, Any] = {"num_heads": settings.num_heads, "num_adapters": settings.num_adapters}
        reward = new_reward_model(name, kind=kind, lora=settings.lora, seed=settings.seed, **sizes, **options)
        return _with_template(Learner(reward), settings)
    if settings.lora is not None and is_adapter(name):
        raise PrefloopError(f"--lora-rank: {settings.model} is an adapter already, which is trained on: leave it out")
    return _with_template(Learner(load_policy(name, lora=settings.lora, **options)), settings)


def _check_whole(name: str) -> None:
    """What a manifest lists is taken for what is there: it must be."""
    from prefloop.training.checkpoint import MANIFEST, verify

    if (Path(name) / MANIFEST).is_file():
        try:
            verify(Path(name))
        except PrefloopError as error:
            raise PrefloopError(f"{error}; if you changed it yourself, remove its {MANIFEST}") from None


def _with_template(learner: Learner, settings: FitSettings) -> Learner:
    """Give the tokenizer the chat template of the settings, which is saved with it."""
    if settings.chat_template:
        learner.trained.tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    return learner


def _options(settings: FitSettings) -> dict[str, Any]:
    return {"dtype": settings.dtype, "device": device_of(settings), "quantization": settings.quantization}


@dataclass(slots=True)
class Outcome:
    """What a training came to: the results of its parts by name (one, but for ensembles of adapters, the members').

    `reward_model` says how good a reward model is on held-out pairs.
    """

    results: dict[str, TrainingResult]
    reward_model: JSONObject | None = None

    def to_dict(self) -> JSONObject:
        """The metrics at the end and on the way, for the event and the model card."""
        parts = {name: result.summary() for name, result in self.results.items()}
        first, *others = parts.values()
        found = first if self.reward_model is None else {**first, "reward_model": self.reward_model}
        if not others:
            return found
        metrics = mean_metrics([part["metrics"] for part in parts.values()])
        warnings = [f"{name}: {warning}" for name, part in parts.items() for warning in part["warnings"]]
        shared = {
            "metrics": metrics,
            "warnings": warnings,
            "loss": _mean_losses(part["loss"] for part in parts.values()),
        }
        return {**found, **shared, "steps": max(part["steps"] for part in parts.values()), "parts": parts}


def _mean_losses(losses: Iterable[Sequence[float | None]]) -> list[float | None]:
    """The mean over members of the loss of each step, of those that took it."""
    taken = [[loss for loss in step if loss is not None] for step in zip_longest(*losses)]
    return [fmean(step) if step else None for step in taken]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a training keeps what it is at: its run and its metrics in the store, its state in `states`."""

    store: Store
    run_id: str
    run_name: str
    iteration: int
    directory: Path
    states: Path


def train_learner(
    learner: Learner,
    data: FitData,
    settings: FitSettings,
    start: JSONObject,
    place: Place,
    *,
    identity: str,
    progress: FitProgress,
    on_begin: Callable[[], None],
) -> Outcome:
    """Train a model in place on its data; `identity` names model, rows and recipe.

    `on_begin` is called when all is ready, before the first step.

    Raises:
        PrefloopError: as `train`, and as the reference.
    """
    from prefloop.batch.examples import PreferencePair
    from prefloop.models.reward import RewardModel
    from prefloop.training.algorithms import make_algorithm
    from prefloop.training.ensemble import train_reward_model
    from prefloop.training.trainer import train

    if isinstance(learner.trained, RewardModel) and data.step is not None:
        learner.trained.step, learner.trained.separator = data.step, settings.separator
    algorithm = make_algorithm(settings.objective, settings)
    examples, held_out = data.examples, data.held_out
    reference = None
    if algorithm.needs_reference:
        progress.begin("log-probs of the reference")
        reference, examples, held_out = _with_reference(learner, data, settings, place.store, start)
    _advise_kto(examples, settings, progress)
    on_begin()
    opened = _opener(settings, place, len(examples), progress)
    options: dict[str, Any] = {
        "seed": settings.seed,
        "identity": identity,
        "state_directory": place.states,
        "held_out": held_out,
        "on_step": lambda step, _, metrics: progress.advance(step, metrics),
        "on_evaluation": progress.evaluated,
    }
    trained = learner.trained
    if isinstance(trained, RewardModel) and trained.kind == "sequence":
        pairs = [example for example in examples if isinstance(example, PreferencePair)]
        others = [example for example in held_out if isinstance(example, PreferencePair)]
        results = train_reward_model(trained, algorithm, pairs, settings, open_writers=opened, **options)
        return Outcome(results, _evaluated(trained, others, pairs, settings) if others else None)
    with opened("all", 0) as writers:
        result = train(learner.model, reference, algorithm, examples, settings, writers=writers, **options)
    return Outcome({"all": result})


def _advise_kto(examples: Sequence[Example], settings: FitSettings, progress: FitProgress) -> None:
    """Say how KTO's weights fit its labels."""
    from prefloop.batch.examples import LabelledSample
    from prefloop.losses.kto import weight_advice

    if settings.objective != "kto":
        return
    knobs = resolve_knobs("kto", settings)
    labelled = [example for example in examples if isinstance(example, LabelledSample)]
    good, bad = (math.fsum(e.weight for e in labelled if e.desirable is side) for side in (True, False))
    weights = {key: knobs[key] for key in ("desirable_weight", "undesirable_weight")}
    progress.note(weight_advice(good, bad, **weights).sentence)


def _opener(settings: FitSettings, place: Place, num_examples: int, progress: FitProgress) -> OpenWriters:
    """What opens the writers of the metrics of each part of a training, and says that it begins."""
    from prefloop.store.metrics import Training
    from prefloop.training.writers import metrics_writers

    @contextmanager
    def opened(name: str, index: int) -> Iterator[Sequence[MetricsWriter]]:
        progress.begin("train" if name == "all" else f"train {name}", count_steps(settings, num_examples))
        training = Training(place.run_id, place.iteration, "train", index)
        with metrics_writers(
            place.store,
            training,
            settings.report_to,
            run_name=place.run_name,
            directory=place.directory,
            config=settings.model_dump(mode="json"),
        ) as writers:
            yield writers

    return opened


def _evaluated(
    model: RewardModel, held_out: Sequence[PreferencePair], training: Sequence[PreferencePair], settings: FitSettings
) -> JSONObject | None:
    """How good a reward model is on held-out pairs, beside shortcuts; None where all of them are ties."""
    from prefloop.evaluation.reward_model import evaluate_reward_model

    if all(pair.probability == 0.5 for pair in held_out) or all(pair.probability == 0.5 for pair in training):
        return None
    return evaluate_reward_model(model, held_out, training, max_tokens=settings.max_tokens).to_dict()


def _with_reference(
    learner: Learner, data: FitData, settings: FitSettings, store: Store, start: JSONObject
) -> tuple[nn.Module | None, list[Example], list[Example]]:
    """The reference model where it must be at hand, else its log-probs with the examples.

    Raises:
        PrefloopError: the reference has another tokenizer or chat template than the model.
    """
    from prefloop.models.load import Policy, load_policy
    from prefloop.training.reference import following, precision_of, stored_reference
    from prefloop.training.weights import loaded_hash

    def load() -> nn.Module:
        """The reference as a model of its own."""
        name = settings.reference or settings.model
        _check_whole(name)
        trained = learner.trained
        beside = [trained] if isinstance(trained, Policy) else []
        policy = load_policy(located(name), frozen=True, beside=beside, **_options(settings))
        theirs, ours = _with_template(Learner(policy), settings).renderer, learner.renderer
        if (theirs.tokenizer_hash, theirs.template_hash) != (ours.tokenizer_hash, ours.template_hash):
            raise PrefloopError(
                f"--reference {name} has another tokenizer or chat template than {settings.model}: its log-probs would "
                "be of other tokens"
            )
        module: nn.Module = policy.model
        return module

    def first() -> nn.Module:
        """The reference while nothing was trained yet: the model itself where none is named."""
        own: nn.Module = learner.model
        return load() if settings.reference else own

    if settings.sync_reference_every is not None:
        return following(load()), data.examples, data.held_out
    precision = precision_of(settings.dtype, settings.precision)

    def scored(examples: list[Example]) -> list[Example]:
        if not examples:
            return []
        weights = loaded_hash(str(start["reference_weights"]), settings.quantization)
        own_kind: Any = examples
        return stored_reference(store, first, weights, own_kind, precision=precision, max_tokens=settings.max_tokens)

    examples, held_out = scored(data.examples), scored(data.held_out)
    live = resolve_knobs(settings.objective, settings).get("kl", "none") != "none"
    return load() if live else None, examples, held_out
