"""The card of a trained model: its data, recipe, metrics and lineage, as the hub reads it. Free of torch.

Nothing in it depends on when or how fast the model was trained: the same training writes the same card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefloop.losses.registry import objective
from prefloop.records import JSONObject, counted
from prefloop.training.metrics import LAST_STEPS, mean_metrics

CARD = "README.md"
MAX_LISTED = 20
BEFORE_LOOP = -1  # the iteration of what a run does before its loop
RUN_TABLES = ("seed", "policy", "environment", "rollout", "judge", "curation", "guard")
ASKED, ANSWERED = ['{"role": "user", "content": "Hello!"}'], ['{"role": "assistant", "content": "Hello."}']
TRIES = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"
SCORES = "print(model(**inputs).logits)"
LOADERS = {
    "reward": ("AutoModelForSequenceClassification", "text-classification"),
    "process_reward": ("AutoModelForTokenClassification", "token-classification"),
}
NAMED = ("model", "reference")  # of a recipe: what names a model
POLICY = ("AutoModelForCausalLM", "text-generation")
COUNTS = {
    "num_rows": "rows",
    "num_examples": "of them trained on or evaluated",
    "num_dropped": "left out as too long",
    "num_cut": "cut at their end",
    "longest": "longest row before any cut, tokens",
    "num_tokens": "tokens",
    "num_own_tokens": "of them the assistant's",
}


CURATED = {
    "num_tasks": "tasks",
    "num_scored": "trajectories with a score",
    "num_pairs": "preference pairs",
    "num_human_pairs": "of them by people",
    "num_unconfirmed": "not confirmed, and left out",
}
MERGED = "{} LoRA adapter was merged into the model below it, in float32, and rounded to that model's own type."
COUNTED = ("num_", "skipped", "learning_rate")
"""What says how a step went, not how good the model is."""


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A checkpoint that a model comes of: its id, its directory or hub id, what made it, and from which rows.

    `run` names the run, or training, that made it; `judge` who judged its rows.
    """

    id: str
    where: str
    algorithm: str
    iteration: int = BEFORE_LOOP
    dataset_id: str = ""
    run: str = ""
    judge: str = ""

    def __str__(self) -> str:
        name = self.where if hub_base(self.where) else Path(self.where).name
        if self.algorithm == "load":
            return f"`{name}`, the model that it all began with"
        of_run = f", iteration {self.iteration + 1} of run `{self.run}`" if self.iteration > BEFORE_LOOP else ""
        rows = f", from dataset `{self.dataset_id}`" if self.dataset_id else ""
        judged = f", judged by {self.judge}" if self.judge else ""
        return f"`{name}` (checkpoint `{self.id}`): `{self.algorithm}`{of_run}{rows}{judged}"


def hub_base(where: str) -> str:
    """The repository of a hub's model that is named with its commit; empty for a path."""
    repo, _, commit = where.rpartition("@")
    return repo if re.fullmatch(r"[0-9a-f]{40}", commit) else ""


def model_card(
    called: str,
    recipe: JSONObject,
    start: JSONObject,
    data: JSONObject,
    outcome: JSONObject,
    parents: Sequence[Ancestor] = (),
    *,
    merged: bool = False,
) -> str:
    """The card of a model that was trained on stored rows.

    Args:
        called: what loads it: its directory, or its repository.
        recipe: every setting of the training, with its objective's knobs.
        start: the model and reference that it started from, with the hashes of their weights, device and versions.
        data: the ids of the datasets, where their rows come from, and what was done to them.
        outcome: the metrics of its steps and evaluations.
        parents: what it comes of, the nearest first.
        merged: an adapter that was merged into its model.
    """
    about = objective(recipe["objective"])
    form = _Form(recipe["objective"], recipe.get("lora") is not None and not merged, parents, start["model"])
    lines = [
        *form.front_matter(),
        f"# {Path(called).name}",
        "",
        f"`{_shown(start['model'])}` after {counted(outcome['steps'], 'step')} of `{recipe['objective']}` "
        f"({about.summary}), trained by prefloop {start['versions']['prefloop']} on "
        f"{counted(data['train']['num_examples'], 'row')}.",
        "",
        *_merged(merged),
        *form.use(called, recipe),
        *_data(data),
        *_recipe(recipe | {key: _given(recipe[key], start.get(key)) for key in NAMED if recipe.get(key)}),
        *_metrics(recipe, outcome),
        *_lineage(start, data, parents),
    ]
    return "\n".join(lines) + "\n"


def run_card(
    called: str, facts: JSONObject, start: JSONObject, parents: Sequence[Ancestor] = (), *, merged: bool = False
) -> str:
    """The card of a checkpoint of a run.

    Args:
        called: what loads it: its directory, or its repository.
        facts: the run's `name`, `settings` and `knobs` of its objective, the `iteration` of the checkpoint, and what
            the events of its iteration say: `sft` or `train`, `curate`, `judges`, and the evaluations `before` the loop
            and `after`.
        start: what the run started from, with seed, device and versions.
        parents: what it comes of, the nearest first.
        merged: an adapter that was merged into its model.
    """
    settings, loop = facts["settings"], facts["iteration"] > BEFORE_LOOP
    table = settings["train" if loop else "sft"]
    algorithm = settings["train"]["algorithm"] if loop else "sft"
    lora = settings["policy"].get("lora") is not None
    tables = {key: settings[key] for key in RUN_TABLES if key in settings}
    tables["policy"] = {**tables["policy"], "model": _shown(str(start.get("model", "")))}
    recipe = {"objective": algorithm, **tables, "": {**table, **(facts["knobs"] if loop else {})}}
    form = _Form(algorithm, lora and not merged, parents, str(start.get("model", "")))
    environment = settings["environment"].get("name", "")
    done = f"iteration {facts['iteration'] + 1}" if loop else "the demonstrations"
    lines = [
        *form.front_matter(),
        f"# {Path(called).name}",
        "",
        f"The policy of run `{facts['name']}` after {done}: `{algorithm}` ({objective(algorithm).summary}) on "
        f"the environment `{environment}`, by prefloop {start['versions']['prefloop']}.",
        "",
        *_merged(merged),
        *form.use(called, {}),
        *_run_data(facts),
        *_recipe(recipe),
        *_run_metrics(facts),
        *_origin(start, parents),
    ]
    return "\n".join(lines) + "\n"


def bare_card(called: str, base: str, *, merged: bool) -> str:
    """The card of a model of whose training nothing is known; `base` is the model that an adapter was merged into."""
    form = _Form("", False, (), base)
    said = [MERGED.format("A model whose"), ""] if merged else []
    known = f"- merged into `{_shown(base)}`" if base else "- nothing is known of how it was trained"
    lines = [*form.front_matter(), f"# {Path(called).name}", "", *said, *form.use(called, {})]
    return "\n".join([*lines, "## Lineage", "", known]) + "\n"


def _merged(merged: bool) -> list[str]:
    return [MERGED.format("Its"), ""] if merged else []


def _given(name: str, where: str | None) -> str:
    """A model as the recipe names it: in full where it was one of the hub, else by its directory alone."""
    return name if hub_base(where or "") else _shown(name)


def _shown(where: str) -> str:
    return where if hub_base(where) or not where else Path(where).name


@dataclass(frozen=True, slots=True)
class _Form:
    """In which form a model is there: which class opens it, and what the hub is told of it.

    `objective` is empty where nobody knows how it was trained.
    """

    objective: str
    adapter: bool
    parents: Sequence[Ancestor]
    start: str

    def front_matter(self) -> Iterator[str]:
        base = next((repo for repo in map(hub_base, (self.start, *(one.where for one in self.parents))) if repo), "")
        yield "---"
        if base:  # a path of somebody's machine means nothing to the hub
            yield f"base_model: {json.dumps(base)}"
        yield f"library_name: {'peft' if self.adapter else 'transformers'}"
        yield f"pipeline_tag: {LOADERS.get(self.objective, POLICY)[1]}"
        yield f"tags: {json.dumps(['prefloop', *filter(None, [self.objective]), *(['lora'] if self.adapter else [])])}"
        yield "---"
        yield ""

    def use(self, called: str, recipe: JSONObject) -> list[str]:
        """Lines of Python that open the model and try it."""
        loader, _ = LOADERS.get(self.objective, POLICY)
        name = json.dumps(called)
        if recipe.get("num_adapters", 1) > 1:
            lines = ["from prefloop.models.reward import load_reward_model", "", f"model = load_reward_model({name})"]
            return ["```python", *lines, "```", ""]
        lines = [f"from transformers import {loader}, AutoTokenizer", "", f"model = {loader}.from_pretrained({name})"]
        if self.adapter:
            peft = loader.replace("Auto", "AutoPeft", 1)
            # else peft makes a head of two labels
            labels = f", num_labels={recipe.get('num_heads', 1)}" if self.objective in LOADERS else ""
            lines[0] = f"from peft import {peft}\nfrom transformers import AutoTokenizer"
            lines[2] = f"model = {peft}.from_pretrained({name}{labels})"
        asks = "" if self.objective in LOADERS else "add_generation_prompt=True, "
        said = [*ASKED, *([] if asks else ANSWERED)]
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({name})",
            f"chat = [{', '.join(said)}]",
            f'inputs = tokenizer.apply_chat_template(chat, {asks}return_tensors="pt", return_dict=True)',
            TRIES if asks else SCORES,
        ]
        return ["```python", *lines, "```", ""]


def _data(data: JSONObject) -> Iterator[str]:
    yield "## Data"
    yield ""
    yield from _table(("", "training", "held out"), _counts(data))
    source = data["source"]
    for file in source.get("files", ()):
        yield f"- file `{file['name']}` ({file['format']}), SHA-256 `{file['sha256']}`"
    if "dataset" in source:
        yield f"- dataset `{source['dataset']}` of the store"
    if "rater" in source:
        yield f"- the {source['top_k']} best of each task by rater `{source['rater']}`, from a score of "
        yield f"  {source['min_score']} on"
    yield f"- longest row taken: {data['max_length'] or 'any number of'} tokens; longer ones: {data['truncate']}"
    yield f"- bad rows left out: {data['num_skipped']}"
    yield from (f"  - {row}" for row in _first(data["skipped"]))
    if data["unused"]:
        listed = ", ".join(f"`{column}` (of {counted(num, 'row')})" for column, num in data["unused"].items())
        yield f"- columns that the objective does not use: {listed}"
    for part in ("train", "held_out"):
        yield from (f"  - too long: {row}" for row in _first(data.get(part, {}).get("too_long", ())))
    if data.get("num_shared_prompts"):
        yield f"- held-out rows whose prompt is also trained on: {data['num_shared_prompts']}"
    yield ""


def _counts(data: JSONObject) -> Iterator[tuple[str, ...]]:
    for key, words in COUNTS.items():
        held_out = data.get("held_out")
        yield words, f"{data['train'][key]:,}", "–" if held_out is None else f"{held_out[key]:,}"


def _first(rows: Sequence[str]) -> list[str]:
    more = [f"and {len(rows) - MAX_LISTED} more"] if len(rows) > MAX_LISTED else []
    return [*rows[:MAX_LISTED], *more]


def _recipe(recipe: JSONObject) -> Iterator[str]:
    yield "## Recipe"
    yield ""
    shown = {key: value for key, value in _flat(recipe) if value not in (None, "", [], {})}
    yield from _table(("setting", "value"), ((f"`{key}`", f"`{_plain(value)}`") for key, value in shown.items()))


def _flat(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}." if key else prefix)
        else:
            yield f"{prefix}{key}", value


def _plain(value: object) -> str:
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, ensure_ascii=False)


def _metrics(recipe: JSONObject, outcome: JSONObject) -> Iterator[str]:
    yield "## Metrics"
    yield ""
    parts = list(outcome.get("parts", {"": outcome}).values())
    kept = [found for part in parts if (found := _kept_evaluation(part, recipe)) is not None]
    held_out = mean_metrics([found["metrics"] for found in kept])
    steps = " and ".join(sorted({str(found["step"]) for found in kept}, key=int))
    after = f"after step {steps}, whose weights these are" if kept else "(none were held out)"
    over = f", averaged over the {len(parts)} members" if len(parts) > 1 else ""
    yield f"Means of the last {min(LAST_STEPS, outcome['steps'])} steps, and of the held-out rows {after}{over}."
    yield ""
    names = sorted(name for name in {*outcome["metrics"], *held_out} if not name.startswith(COUNTED))
    cells = ((f"`{n}`", _number(outcome["metrics"].get(n)), _number(held_out.get(n))) for n in names)
    yield from _table(("metric", "training", "held out"), cells)
    if outcome["stopped_early"]:
        yield "Stopped early: the held-out metric no longer got better; the weights are the best ones."
        yield ""
    for warning in outcome["warnings"]:
        yield f"Warning: {warning}"
        yield ""
    if "reward_model" in outcome:
        yield from _reward_model(outcome["reward_model"])


def _kept_evaluation(part: JSONObject, recipe: JSONObject) -> JSONObject | None:
    """The evaluation of the weights that were kept: the best ones with patience, else the last."""
    evaluations: list[JSONObject] = part["evaluations"]
    kept = part["best_step"] if recipe.get("patience") else None
    return next((one for one in evaluations if one["step"] == kept), evaluations[-1] if evaluations else None)


def _reward_model(report: JSONObject) -> Iterator[str]:
    """How good a reward model is on held-out pairs, beside what is cheap."""
    reliability, length = report["reliability"], report["length"]
    yield f"On {report['num_pairs']} held-out pairs ({report['num_ties']} ties apart), with 95 % intervals:"
    yield ""
    rows = [
        ("accuracy", interval_text(report["accuracy"])),
        ("log-loss, nats", _number(report["log_loss"])),
        ("Brier score", _number(report["brier"])),
        ("calibration error", f"{_number(reliability['ece'])} ({_number(reliability['ece_by_chance'])} by chance)"),
        ("score gained by 100 tokens more", interval_text(length["slope"])),
        ("the same, given the label: length bias", interval_text(length["slope_given_label"])),
        ("spread of the members' gaps", _number(report["mean_spread"])),
    ]
    shortcuts = report["shortcuts"].items()
    rows += [(f"accuracy of a shortcut: {name}", interval_text(found["accuracy"])) for name, found in shortcuts]
    yield from _table(("", "value"), rows)


def interval_text(found: JSONObject | None) -> str:
    """A value with its interval."""
    return "–" if found is None else f"{found['value']:.3g} [{found['low']:.3g}, {found['high']:.3g}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _run_data(facts: JSONObject) -> Iterator[str]:
    """The rows of a run's last update, and who judged them."""
    yield "## Data"
    yield ""
    curated, learned = facts["curate"], facts["train"] or facts["sft"]
    rows = [(words, f"{curated[key]:,}") for key, words in CURATED.items() if key in curated]
    if rows:
        yield from _table(("last iteration", ""), rows)
    if "dataset_id" in learned:
        yield f"- dataset `{learned['dataset_id']}` of the store"
    for judge in facts["judges"]:
        yield f"- judged by {judge}"
    yield ""


def _run_metrics(facts: JSONObject) -> Iterator[str]:
    """What the last update logged, and success on held-out tasks before the loop and with this policy."""
    yield "## Metrics"
    yield ""
    learned = facts["train"] or facts["sft"]
    yield f"Means of the last {min(LAST_STEPS, learned.get('steps', 0))} steps of the last update."
    yield ""
    names = sorted(name for name in learned.get("metrics", {}) if not name.startswith(COUNTED))
    yield from _table(("metric", "training"), ((f"`{name}`", _number(learned["metrics"][name])) for name in names))
    before, after = facts["before"], facts["after"]
    if before and after:
        yield f"On {after['num_tasks']} held-out tasks, with 95 % intervals:"
        yield ""
        rows = [("success, sampled", *(interval_text(one["sampled"]["success"]) for one in (before, after)))]
        if before.get("greedy") and after.get("greedy"):
            rows += [("success, greedy", *(interval_text(one["greedy"]["success"]) for one in (before, after)))]
        key = "kl_per_trajectory"
        rows += [("KL to the start, nats a trajectory", *(_number(one["sampled"].get(key)) for one in (before, after)))]
        yield from _table(("", "before the loop", "this policy"), rows)
    elif after is None:
        yield "This policy was not evaluated on held-out tasks."
        yield ""


def _lineage(start: JSONObject, data: JSONObject, parents: Sequence[Ancestor]) -> Iterator[str]:
    yield "## Lineage"
    yield ""
    yield f"- base model `{_shown(start['model'])}`, weights `{start['weights']}`"
    if "reference" in start:
        yield f"- reference `{_shown(start['reference'])}`, weights `{start['reference_weights']}`"
    yield f"- training data: dataset `{data['dataset_id']}`"
    if "held_out_id" in data:
        yield f"- held-out data: dataset `{data['held_out_id']}`"
    yield from _circumstances(start, parents)


def _origin(start: JSONObject, parents: Sequence[Ancestor]) -> Iterator[str]:
    yield "## Lineage"
    yield ""
    if "weights" in start:
        yield f"- weights that the loop started from: `{start['weights']}`"
    yield from _circumstances(start, parents)


def _circumstances(start: JSONObject, parents: Sequence[Ancestor]) -> Iterator[str]:
    if parents:
        yield "- comes of"
        yield from (f"  - {one}" for one in parents)
    yield f"- device `{start['device']}`, {start['num_threads']} threads"
    yield "- " + ", ".join(f"{package} {version}" for package, version in start["versions"].items())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""
