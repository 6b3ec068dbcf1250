"""TRL loads what we export, unchanged, and reads prompts as we do."""

import copy
import json
from pathlib import Path

import pytest

from prefloop.formats import export_dataset, import_file
from prefloop.formats.trl import _shared_text
from prefloop.records import AuthorKind, Ended, Message, Pair, Role, Task, ToolCall, Trajectory, content_hash

pytestmark = pytest.mark.slow

TAU_BENCH = Path(__file__).parents[2] / "../shared/data/tau-bench/gpt-4o-airline.json"

# Names every field that a template may ask for, so that a null or a text in the wrong place would fail or be seen.
TEMPLATE = """\
{%- if tools %}<tools>{{ tools | tojson }}</tools>
{% endif %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{%- if message.tool_calls %}{% for call in message.tool_calls %}
{%- set arguments = call.function.arguments %}<call>{{ call.function.name }}
{{- arguments if arguments is string else arguments | tojson }}</call>{% endfor %}{% endif %}</s>
{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
TOOLS = (
    {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {"city": {}}}}},
    {"type": "function", "function": {"name": "book", "description": "Book.", "parameters": {"type": "object"}}},
)


def add_booking_pairs(store):
    """Pairs whose calls differ in the names and the types of their arguments: what Arrow cannot hold as objects."""
    pairs = []
    for i in range(4):
        ask = Message(Role.USER, f"Fly to Oslo, {i}.")
        task = Task("test", seed=i, messages=(ask,), tools=TOOLS)
        search = Message(Role.ASSISTANT, tool_calls=(ToolCall("search", {"city": "Oslo"}, "c1"),))
        found = Message(Role.TOOL, "2 flights", tool_call_id="c1", name="search")
        sides = [
            (search, found, Message(Role.ASSISTANT, tool_calls=(ToolCall("book", {"id": 7 if i % 2 else "x"}, "c2"),))),
            (search, found, Message(Role.ASSISTANT, "Sorry." if i else "No.")),
        ]
        made = [
            Trajectory(content_hash(i, n), task.id, (ask, *side), 1, Ended.DONE, AuthorKind.HUMAN, "h")
            for n, side in enumerate(sides)
        ]
        store.add_tasks([task])
        store.add_trajectories(made)
        pairs.append(Pair(task.id, made[0].id, made[1].id))
    return pairs


def add_tau_bench_pairs(store):
    if not TAU_BENCH.exists():
        pytest.skip("the shared tau-bench data is not there")
    import_file(store, TAU_BENCH)
    reward = {j.trajectory_id: j.value for j in store.judgements()}
    by_task = {}
    for trajectory in store.trajectories():
        by_task.setdefault(trajectory.task_id, {})[reward[trajectory.id]] = trajectory.id
    return [Pair(task, ids[1.0], ids[0.0]) for task, ids in by_task.items() if len(ids) == 2]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    base = tokenizers.Tokenizer(tokenizers.models.BPE())
    base.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>", "<pad>"],
    )
    text = TAU_BENCH.read_text(encoding="utf-8")[:500_000] if TAU_BENCH.exists() else "Fly to Oslo"
    base.train_from_iterator([text], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("make_pairs", [add_booking_pairs, add_tau_bench_pairs])
def test_dpo_trainer_loads_an_export_unchanged(store, tmp_path, tokenizer, suffix, make_pairs, monkeypatch):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers import LlamaConfig, LlamaForCausalLM

    pairs = make_pairs(store)
    path = tmp_path / f"pairs.{suffix}"
    export_dataset(store, pairs, path)
    kind = "json" if suffix == "jsonl" else "parquet"
    loaded = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == len(pairs)
    check_unchanged(store, pairs, loaded)

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=65536, **size))
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=1, max_length=None, bf16=False,
        use_cpu=True, report_to=[], save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    few = loaded.select(range(2))
    trainer = trl.DPOTrainer(model, copy.deepcopy(model), args=arguments, train_dataset=few, processing_class=tokenizer)
    result = trainer.train()
    # Before its first step the policy is the reference: the loss is log 2 whatever the data.
    assert result.training_loss == pytest.approx(0.6931, abs=1e-3)
    check_tokens(trainer.train_dataset[0], few[0], tokenizer)


def check_unchanged(store, pairs, loaded):
    """Every message and every argument of the loaded rows is the store's: nothing null-filled, nothing lost."""
    for pair, row in zip(pairs, loaded, strict=True):
        for trajectory_id, side in ((pair.chosen_id, "chosen"), (pair.rejected_id, "rejected")):
            (trajectory,) = store.trajectories([trajectory_id])
            back = tuple(Message.from_dict(message) for message in row["prompt"] + row[side])
            assert back == trajectory.messages


def check_tokens(tokenized, row, tokenizer):
    """TRL's prompt and completion tokens together spell the rendered conversation."""
    tools = json.loads(row["tools"]) if row.get("tools") else None
    for side in ("chosen", "rejected"):
        text = tokenizer.apply_chat_template(row["prompt"] + row[side], tools=tools, tokenize=False)
        assert tokenizer.decode(tokenized["prompt_ids"] + tokenized[f"{side}_ids"]) == text
        for message in row[side]:
            for call in message.get("tool_calls") or ():
                assert call["function"]["arguments"] in text


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("ab cd", "ab ce"), ("ab c", "ab d"), ("same x", "same y z"), ("a  b", "a  c")]
)
def test_implicit_prompts_are_those_of_trl(chosen, rejected):
    data_utils = pytest.importorskip("trl.data_utils")
    expected = data_utils.extract_prompt({"chosen": chosen, "rejected": rejected})
    start = _shared_text(chosen, rejected)
    found = {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}
    assert found == expected
