"""The card of a trained model: its data, recipe, metrics and lineage, as the hub reads it. Free of torch.

Nothing in it depends on when or how fast the model was trained: the same training writes the same card.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prefloop.losses.registry import objective
from prefloop.records import JSONObject, counted
from prefloop.training.metrics import LAST_STEPS, mean_metrics

CARD = "README.md"
MAX_LISTED = 20
LOADERS = {
    "reward": ("AutoModelForSequenceClassification", "text-classification"),
    "process_reward": ("AutoModelForTokenClassification", "token-classification"),
}
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


COUNTED = ("num_", "skipped", "learning_rate")
"""What says how a step went, not how good the model is."""


def model_card(name: str, recipe: JSONObject, start: JSONObject, data: JSONObject, outcome: JSONObject) -> str:
    """The card of the model `name`.

    Args:
        name: of the model's directory.
        recipe: every setting of the training, with its objective's knobs.
        start: the model and reference that it started from, with the hashes of their weights, device and versions.
        data: the ids of the datasets, where their rows come from, and what was done to them.
        outcome: the metrics of its steps and evaluations.
    """
    about = objective(recipe["objective"])
    lines = [
        *_front_matter(recipe),
        f"# {name}",
        "",
        f"`{start['model']}` after {counted(outcome['steps'], 'step')} of `{recipe['objective']}` ({about.summary}), "
        f"trained by prefloop {start['versions']['prefloop']} on {counted(data['train']['num_examples'], 'row')}.",
        "",
        *_use(name, recipe),
        *_data(data),
        *_recipe(recipe),
        *_metrics(recipe, outcome),
        *_lineage(start, data),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(recipe: JSONObject) -> Iterator[str]:
    lora = recipe.get("lora") is not None
    yield "---"
    yield f"base_model: {json.dumps(recipe['model'])}"
    yield f"library_name: {'peft' if lora else 'transformers'}"
    yield f"pipeline_tag: {LOADERS.get(recipe['objective'], POLICY)[1]}"
    yield f"tags: {json.dumps(['prefloop', recipe['objective'], *(['lora'] if lora else [])])}"
    yield "---"
    yield ""


def _use(name: str, recipe: JSONObject) -> list[str]:
    loader, _ = LOADERS.get(recipe["objective"], POLICY)
    lines = [f"from transformers import {loader}, AutoTokenizer", "", f'model = {loader}.from_pretrained("{name}")']
    if recipe.get("num_adapters", 1) > 1:
        lines = ["from prefloop.models.reward import load_reward_model", "", f'model = load_reward_model("{name}")']
        return ["```python", *lines, "```", ""]
    if recipe.get("lora") is not None:
        lines[0] = f"from peft import {loader.replace('Auto', 'AutoPeft', 1)}\nfrom transformers import AutoTokenizer"
        lines[2] = lines[2].replace(loader, loader.replace("Auto", "AutoPeft", 1))
        if recipe["objective"] in LOADERS:  # else peft makes a head of two labels
            lines[2] = lines[2].replace('")', f'", num_labels={recipe.get("num_heads", 1)})')
    return ["```python", *lines, f'tokenizer = AutoTokenizer.from_pretrained("{name}")', "```", ""]


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
            yield from _flat(value, f"{prefix}{key}.")
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


def _lineage(start: JSONObject, data: JSONObject) -> Iterator[str]:
    yield "## Lineage"
    yield ""
    yield f"- base model `{start['model']}`, weights `{start['weights']}`"
    if "reference" in start:
        yield f"- reference `{start['reference']}`, weights `{start['reference_weights']}`"
    yield f"- training data: dataset `{data['dataset_id']}`"
    if "held_out_id" in data:
        yield f"- held-out data: dataset `{data['held_out_id']}`"
    yield f"- device `{start['device']}`, {start['num_threads']} threads"
    yield "- " + ", ".join(f"{package} {version}" for package, version in start["versions"].items())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""
