"""The card of a trained model: its data, recipe, metrics and lineage, as the hub reads it. Free of torch.

Nothing in it depends on when or how fast the model was trained: the same training writes the same card.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prefloop.losses.registry import objective
from prefloop.records import JSONObject

CARD = "README.md"
MAX_LISTED = 20
LOADERS = {
    "reward": "AutoModelForSequenceClassification",
    "process_reward": "AutoModelForTokenClassification",
}
COUNTS = {
    "num_rows": "rows",
    "num_examples": "of them trained on or evaluated",
    "num_dropped": "left out as too long",
    "num_cut": "cut at their end",
    "longest": "longest row before any cut, tokens",
    "num_tokens": "tokens",
    "num_own_tokens": "of them in the loss",
}


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
        f"`{start['model']}` after {outcome['steps']} steps of `{recipe['objective']}` ({about.summary}), trained by "
        f"prefloop {start['versions']['prefloop']} on {data['train']['num_examples']:,} rows.",
        "",
        *_use(name, recipe),
        *_data(data),
        *_recipe(recipe),
        *_metrics(outcome),
        *_lineage(start, data),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(recipe: JSONObject) -> Iterator[str]:
    lora = recipe.get("lora") is not None
    yield "---"
    yield f"base_model: {json.dumps(recipe['model'])}"
    yield f"library_name: {'peft' if lora else 'transformers'}"
    yield f"pipeline_tag: {'text-classification' if recipe['objective'] in LOADERS else 'text-generation'}"
    yield f"tags: {json.dumps(['prefloop', recipe['objective'], *(['lora'] if lora else [])])}"
    yield "---"
    yield ""


def _use(name: str, recipe: JSONObject) -> list[str]:
    loader = LOADERS.get(recipe["objective"], "AutoModelForCausalLM")
    return [
        "```python",
        f"from transformers import {loader}, AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
        "",
    ]


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
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _metrics(outcome: JSONObject) -> Iterator[str]:
    yield "## Metrics"
    yield ""
    evaluations = outcome["evaluations"]
    best = next((one for one in evaluations if one["step"] == outcome["best_step"]), None)
    shown = best or (evaluations[-1] if evaluations else {"step": 0, "metrics": {}})
    held_out = shown["metrics"]
    yield "Means of the last steps, and of the held-out rows" + (
        f" after step {shown['step']}{', the best' if best else ''}." if evaluations else " (none were held out)."
    )
    yield ""
    names = sorted({*outcome["metrics"], *held_out} - {"skipped"})
    cells = ((f"`{n}`", _number(outcome["metrics"].get(n)), _number(held_out.get(n))) for n in names)
    yield from _table(("metric", "training", "held out"), cells)
    if outcome["stopped_early"]:
        yield "Stopped early: the held-out metric no longer got better; the weights are the best ones."
        yield ""
    for warning in outcome["warnings"]:
        yield f"Warning: {warning}"
        yield ""


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
