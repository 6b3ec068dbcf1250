"""What `prefloop train OBJECTIVE` may be told, and how it tells how it goes; free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from prefloop.chat.steps import SEPARATOR
from prefloop.config import BY_RECIPE
from prefloop.losses.registry import OBJECTIVES, needs_reference, objective, resolve_knobs
from prefloop.losses.settings import LossSettings
from prefloop.models.settings import Dtype, LoraSettings, Quantization, is_gpu, trains_adapter, weights_dtype
from prefloop.records import PrefloopError
from prefloop.training.metrics import telling_metrics
from prefloop.training.recipes import filled
from prefloop.training.settings import TrainingSettings

MIN_SCORE = 0.5  # what a row scores that is neither labelled as good nor as bad
WORK_SUFFIX = ".run"
WHOLE = "all"  # the name of a training that is not of one member of an ensemble
OF_REFERENCE = ("reference", "sync_reference_every", "sync_reference_mixup")
OF_THE_BEST = ("top_k", "rater", "min_score")
OF_ONE = {"num_heads": "reward", "num_adapters": "reward", "separator": "process_reward"}


class FitSettings(TrainingSettings, LossSettings):
    """One training on stored data: an objective with its knobs, a model, rows, and what is done about bad ones."""

    objective: str
    model: str = Field(min_length=1, description="a directory in Hugging Face's layout, or a hub id: org/name@revision")
    reference: str = Field(default="", description="the reference model, else the model itself as it starts")
    chat_template: str = Field(default="", description="a file with a chat template, else the tokenizer's own")
    data: list[str] = Field(
        default_factory=list,
        description="files of rows, in any format that `import` reads, or of a hub: org/name@revision:split",
    )
    dataset: str = Field(default="", description="in place of files: id of a frozen dataset of the store")
    top_k: int | None = Field(default=None, ge=1, description="in place of files: the store's K best of each task")
    rater: str = Field(default="", description="whose scores those are: a rater's id or name")
    min_score: float = Field(default=MIN_SCORE, ge=0, le=1, description="the least score of those")
    eval_data: list[str] = Field(default_factory=list, description="files of held-out rows, in place of a share")
    on_error: Literal["stop", "skip"] = Field(default="stop", description="what to do with a bad row")
    max_length: int | None = Field(default=None, ge=2, description="longest row in tokens, else the model's context")
    truncate: Literal["stop", "drop", "keep_start"] = Field(
        default="stop", description="a longer row is an error, is left out, or has its end cut off"
    )
    lora: LoraSettings | None = None
    num_heads: int = Field(default=1, ge=1, description="an ensemble of this many heads on one trunk")
    num_adapters: int = Field(default=1, ge=1, description="an ensemble of this many LoRA adapters")
    separator: str = Field(default=SEPARATOR, min_length=1, description="what ends a step of text")
    dtype: Dtype = Field(default="float32", description="of the weights", json_schema_extra=BY_RECIPE)
    quantization: Quantization | None = Field(
        default=None, description="of the weights below an adapter, by bitsandbytes: 8bit or 4bit"
    )
    device: str = Field(default="auto", description="of torch; auto: a GPU if there is one")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of every random draw")
    num_threads: int | None = Field(default=None, ge=1, description="of torch, else its own choice")

    @model_validator(mode="before")
    @classmethod
    def _follows_its_recipe(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("objective") not in OBJECTIVES:
            return given
        of_policy = objective(given["objective"]).of_policy  # a reward model is made of the whole, the adapter merged
        lora = trains_adapter(given) if of_policy else given.get("lora") is not None
        how = {"lora": lora, "gpu": is_gpu(str(given.get("device", "auto")))}
        return filled({"dtype": weights_dtype(**how), **given}, given["objective"], **how)

    # An error that is no ValueError leaves pydantic as it is: these speak of options, not of tables.

    @model_validator(mode="after")
    def _has_rows(self) -> FitSettings:
        if objective(self.objective).fresh:
            raise PrefloopError(
                f"{self.objective} learns from fresh rollouts, not from rows: set algorithm = {self.objective!r} in "
                "the table [train] of a run file, and `prefloop run` it"
            )
        return self

    @model_validator(mode="after")
    def _knobs_fit(self) -> FitSettings:
        resolve_knobs(self.objective, self)
        return self

    @model_validator(mode="after")
    def _logs_what_stops_it(self) -> FitSettings:
        name, has = self.early_stopping_metric, telling_metrics(self.objective, self)
        if name not in has:
            raise PrefloopError(
                f"--early-stopping-metric {name}: {self.objective} does not log it; give one of {', '.join(has)}"
            )
        return self

    @model_validator(mode="after")
    def _has_a_reference(self) -> FitSettings:
        given = [key for key in OF_REFERENCE if getattr(self, key) != FitSettings.model_fields[key].default]
        if given and not needs_reference(self.objective, self):
            raise PrefloopError(f"--{given[0].replace('_', '-')}: {self.objective} has no reference; leave it out")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> FitSettings:
        given = [name for name in ("data", "dataset", "top_k") if getattr(self, name)]
        if len(given) != 1:
            found = " and ".join(f"--{name.replace('_', '-')}" for name in given) or "nothing"
            raise PrefloopError(f"rows: give one of --data FILE, --dataset ID and --top-k K; given was {found}")
        return self

    @model_validator(mode="after")
    def _best_are_demonstrations(self) -> FitSettings:
        records = objective(self.objective).records
        if self.top_k is not None and records != "demonstrations":
            raise PrefloopError(f"--top-k: {self.objective} learns from {records}, and the best are demonstrations")
        if self.top_k is None and (self.rater or self.min_score != MIN_SCORE):
            raise PrefloopError("--rater and --min-score say which are the best: they go with --top-k")
        return self

    @model_validator(mode="after")
    def _ensembles_are_of_reward_models(self) -> FitSettings:
        if self.objective != "reward" and (self.num_heads > 1 or self.num_adapters > 1):
            raise PrefloopError(
                f"--num-heads and --num-adapters: ensembles are of reward models, not of {self.objective}; each "
                "of their members sees a bootstrap sample of the pairs"
            )
        return self

    @model_validator(mode="after")
    def _quantised_weights_stay(self) -> FitSettings:
        if self.quantization is None:
            return self
        if not objective(self.objective).of_policy:
            raise PrefloopError(f"--quantization: {self.objective} trains a reward model, whose weights it takes whole")
        if self.sync_reference_every is not None:
            raise PrefloopError("--sync-reference-every: weights of a few bits cannot follow; leave --quantization out")
        return self

    @model_validator(mode="after")
    def _separator_ends_steps(self) -> FitSettings:
        if self.objective != "process_reward" and self.separator != SEPARATOR:
            raise PrefloopError(f"--separator ends the steps of process_reward; {self.objective} has none")
        return self

    @model_validator(mode="after")
    def _no_samples_are_stored(self) -> FitSettings:
        if self.kl == "samples":
            raise PrefloopError(
                "--kl samples: stored rows hold no fresh samples of the policy; for rows of several turns use --kl none"
            )
        return self

    @model_validator(mode="after")
    def _held_out_one_way(self) -> FitSettings:
        if self.held_out and self.eval_data:
            raise PrefloopError("which rows are held out: give --held-out SHARE or --eval-data FILE, not both")
        if self.evaluate_every is not None and not (self.held_out or self.eval_data):
            raise PrefloopError("--evaluate-every: no rows are held out; give --held-out SHARE or --eval-data FILE")
        return self


def reads(name: str, key: str, *, has_reference: bool) -> bool:
    """Whether a training of an objective reads a setting that is none of its knobs."""
    return (
        (has_reference or key not in OF_REFERENCE)
        and (objective(name).records == "demonstrations" or key not in OF_THE_BEST)
        and OF_ONE.get(key, name) == name
    )


def work_directory(output: Path) -> Path:
    """Where a training's store, lock and state lie: beside its output, which is there whole or not at all."""
    return output.with_name(output.name + WORK_SUFFIX)


class FitProgress:
    """Told how a training goes; this one keeps quiet."""

    def note(self, text: str) -> None:
        """Something that whoever watches should know."""

    def begin(self, what: str, total: int | None = None) -> None:
        """A part of `total` units of work begins (None: nobody knows how many)."""

    def advance(self, done: int, metrics: Mapping[str, float]) -> None:
        """`done` units are done; the metrics of the last."""

    def evaluated(self, step: int, metrics: Mapping[str, float], name: str = WHOLE) -> None:
        """The held-out rows were evaluated by the model, or by the member of an ensemble of this name."""
