"""`prefloop plan`, what it advises, and commands that refuse to start without the memory they need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fit_runs import tiny_model
from prefloop.cli import main
from prefloop.config import parse_settings, read_run_file
from prefloop.models.settings import InitialModelSettings
from prefloop.planning import budget, plan
from prefloop.planning.budget import Need, _limits, advise, with_value
from prefloop.planning.memory import largest
from prefloop.planning.shapes import initial_shape, shape_of_config
from prefloop.planning.workload import Lengths
from prefloop.stages.settings import RunSettings

GIB = 1 << 30
EXAMPLES = Path(__file__).parents[2] / "examples"
BIG = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
RUN = """
name = "planned"
iterations = 1
num_threads = 1
[environment]
name = "arithmetic"
[policy.initial]
hidden_size = 48
[sft]
num_demonstrations = 100
num_steps = 4
learning_rate = 6e-3
[rollout]
num_tasks = 4
samples_per_task = 4
sampling = { max_new_tokens = 24 }
[train]
learning_rate = 1e-4
[guard]
num_tasks = 4
[evaluation]
num_tasks = 4
"""
JUDGE = (
    'judge={kind="llm", llm={provider="openai", model="m", base_url="http://127.0.0.1:1/v1", input_price=2.0, '
    "output_price=8.0, budget_usd=0.01}}"
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    Path("run.toml").write_text(RUN)


def settings(**tables):
    data = {"name": "x", "policy": {"model": "m"}, "environment": {"name": "arithmetic"}, "train": {}}
    data = {key: {**data[key], **tables.pop(key, {})} if isinstance(data[key], dict) else data[key] for key in data}
    data["train"].setdefault("learning_rate", 1e-6)
    return parse_settings(RunSettings, data | tables, "test")


def need(prompt=200, new=256):
    return Need(shape_of_config(BIG, "big"), Lengths(prompt, new, new, 0, "a test"), (None, None))


@pytest.mark.parametrize(("example", "gib"), [("qwen3-0.6b-lora", 16), ("qwen3-4b-lora", 24)])
def test_the_examples_fit_the_gpus_that_they_name(example, gib):
    read = parse_settings(RunSettings, read_run_file(EXAMPLES / f"{example}.toml"), example)
    hidden, wide, layers, heads = (1024, 3072, 28, 16) if gib == 16 else (2560, 9728, 36, 32)
    config = {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True, "max_position_embeddings": 40960,
    }  # fmt: skip
    asked = Need(shape_of_config(config, example), Lengths(400, 1280, 896, 900, "a test"), (None, None))
    assert largest(asked.peaks(read)).total < 0.93 * gib * GIB  # what a card of that name leaves to programs


def test_a_plan_for_a_device_that_is_not_here(capsys):
    assert main(["plan", "run.toml", "--set", "policy.device=cuda"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "device 'cuda' cannot be used here" in line and line.endswith("give its GiB: --memory 24")
    assert not Path("runs").exists()  # a plan leaves nothing behind
    assert main(["run", "run.toml", "--set", "policy.device=cuda"]) == 1
    assert "device 'cuda' cannot be used here" in capsys.readouterr().err
    assert main(["plan", "run.toml", "--set", "policy.device=cuda", "--memory", "24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["available_bytes"] == 24 * GIB and found["fits"] and found["seconds"] is None
    for given in ("0", "-1", "nan", "inf", "1e300"):
        assert main(["plan", "run.toml", f"--memory={given}"]) == 1
        assert ": expected GiB, more than 0 and at most 1,048,576" in capsys.readouterr().err


def test_a_training_of_its_own_is_no_run(capsys):
    Path("pairs.toml").write_text('objective = "dpo"\nmodel = "m"\ndata = ["d.jsonl"]\n')
    for command in ("plan", "run", "rollout"):
        assert main([command, "pairs.toml"]) == 1
        assert "pairs.toml is a training of its own, not a run: `prefloop train pairs.toml`" in capsys.readouterr().err


# --- advice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [24, 14, 9, 6])
def test_advice_makes_a_run_fit_and_says_truly_what_each_step_gives(limit):
    start, asked = settings(), need()
    found = advise(asked, start, limit * GIB)
    assert found
    assert found[-1].peak <= limit * GIB
    assert all(one.peak > limit * GIB for one in found[:-1])
    changed = start
    for one in found:
        changed = with_value(changed, one.key, one.value)
        assert largest(asked.peaks(changed)).total == one.peak
    order = [lever.key for lever in budget.LEVERS]
    assert [order.index(one.key) for one in found] == sorted(order.index(one.key) for one in found)


def test_stages_that_tie_are_brought_down_together():
    """Rollout and guard need the same: no lever lowers the larger of them alone."""
    both = settings(
        policy={"dtype": "bfloat16", "lora": {"rank": 32}}, rollout={"tasks_per_unit": 64, "samples_per_task": 4},
        guard={"num_tasks": 256},
    )  # fmt: skip
    asked = need(prompt=400, new=1280)
    rollout, guard = (peak for peak in asked.peaks(both) if peak.stage in ("rollout", "guard"))
    limit = int(0.6 * min(rollout.total, guard.total))
    assert advise(asked, both, limit)[-1].peak <= limit


def test_imitation_is_made_smaller_too():
    large = settings(sft={"num_demonstrations": 1000, "batch_size": 64, "max_tokens": 16384, "learning_rate": 1e-5})
    asked = Need(shape_of_config(BIG, "big"), Lengths(20, 20, 20, 900, "a test"), (None, None))
    peaks = {peak.stage: peak.total for peak in asked.peaks(large)}
    assert largest(asked.peaks(large)).stage == "sft"
    assert "sft.max_tokens" in [one.key for one in advise(asked, large, int(0.8 * peaks["sft"]))]


def test_guards_are_sampled_here_where_vllm_samples_the_rollouts():
    served = settings(policy={"lora": {"rank": 8}, "vllm": {}})
    assert [peak.stage for peak in need().peaks(served)] == ["load", "guard", "KL", "train"]


@pytest.mark.parametrize(("algorithm", "num_tokens", "num_steps"), [
    ("dpo", 2 * 4 * 256 + 4 * 200, 4),  # 2 pairs of each of 8 tasks; 4 of 16 meet 4 tasks (3.5)
    ("grpo", 4 * (8 * 256 + 200), 2),
    ("ppo", 4 * (8 * 256 + 200), 2),
    ("sft", 4 * 256 + 4 * 200, 4),
    ("kto", 4 * 256 + 4 * 200, 8),  # as many undesirable
])  # fmt: skip
def test_a_step_has_all_trajectories_of_its_examples(algorithm, num_tokens, num_steps):
    rollout = {"num_tasks": 8, "samples_per_task": 8}
    asked = settings(rollout=rollout, curation={"fraction": 0.25}, train={"algorithm": algorithm, "batch_size": 4})
    update = need().workload(asked).update
    assert (update.num_tokens, update.num_steps) == (num_tokens, num_steps)


@pytest.mark.parametrize("lora", [None, {"rank": 8}])
def test_a_critic_is_trained_beside_the_policy(lora):
    found = {peak.stage: peak for peak in need().peaks(settings(policy={"lora": lora}, train={"algorithm": "ppo"}))}
    critic, train = found["critic"], found["train"]
    assert list(found)[-2:] == ["critic", "train"]
    for part in ("weights", "gradients", "optimizer", "reference"):
        assert critic.parts[part] == train.parts[part]
    assert critic.parts["judge"] - train.parts["judge"] == train.parts["weights"]  # the policy's
    assert critic.parts["logits"] < 0.2 * train.parts["logits"]


def test_a_reference_that_follows_has_weights_of_its_own():
    shared = settings(policy={"lora": {"rank": 8}})
    follows = settings(policy={"lora": {"rank": 8}}, train={"sync_reference_every": 10})
    last = [need().peaks(one)[-1].parts["reference"] for one in (shared, follows)]
    weights = 4 * shape_of_config(BIG, "big").num_parameters
    assert last[0] == 0 and weights <= last[1] <= 1.05 * weights


def test_a_run_that_fits_needs_no_advice():
    assert advise(need(), settings(), 1000 * GIB) == []


def test_what_cannot_fit_gets_all_the_advice_there_is():
    found = advise(need(), settings(), 1 * GIB)
    assert found[-1].peak > GIB
    assert {"policy.lora.rank", "policy.dtype"} <= {one.key for one in found}


def test_smaller_packs_come_before_an_adapter_where_they_are_enough():
    start = settings()
    packs = largest(need().peaks(with_value(start, "train.max_tokens", "1024"))).total
    assert {one.key for one in advise(need(), start, packs)} == {"train.max_tokens"}


def test_a_model_from_nothing_has_the_shape_of_its_table():
    made = initial_shape(InitialModelSettings(hidden_size=48, num_heads=6, num_kv_heads=2, num_embeddings=5000))
    assert (made.hidden, made.key_width, made.vocabulary) == (48, 16, 5000)


# --- agents -----------------------------------------------------------------------------------------------------

AGENT = {"name": "agent", "tasks": "tasks.jsonl", "command": ["agent"]}


def test_of_agents_as_many_conversations_are_held_as_run_at_once():
    def work(**tables):
        environment = AGENT | tables.pop("environment", {})
        return need().workload(settings(environment=environment, rollout={"num_tasks": 48}, **tables))

    found = work()
    assert [one.num_rows for one in (found.rollout, found.guard, found.evaluation)] == [8, 8, 8]
    assert found.rollout.num_tasks == 8  # each conversation has a prompt of its own
    assert found.num_trajectories == 48 * 8
    assert work(environment={"max_parallel": 3}).rollout.num_rows == 3
    assert work(gateway={"max_episodes": 2}).guard.num_rows == 2
    elsewhere = work(environment={"command": None}, gateway={"max_batch": 4, "cached_rows": 6})
    assert elsewhere.rollout.num_rows == 10
    assert work(gateway={"max_context": 300}).rollout.after == 100


def test_an_agents_turns_are_not_taken_to_be_all_that_it_might_have(capsys):
    Path("tasks.jsonl").write_text("".join(f'{{"id": "t{i}", "prompt": "How many {i}?"}}\n' for i in range(10)))
    changes = ["--set", 'environment={name="agent", tasks="tasks.jsonl", command=["agent"], grader=["grade"]}']
    Path("agent.toml").write_text(RUN.replace(RUN[RUN.index("[sft]") : RUN.index("[rollout]")], ""))
    with Path("agent.toml").open("a") as file:
        file.write("[policy.lora]\n")
    model = tiny_model(Path.cwd())
    changes += ["--set", f'policy={{model="{model}"}}', "--memory", "24", "--json"]
    assert main(["plan", "agent.toml", *changes]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert tokens["after"] == 8 * 12 + 7 * 64  # replies of half of max_new_tokens, answers between them
    assert "8 turns (an agent's own are not known)" in tokens["source"]
    assert main(["plan", "agent.toml", *changes, "--set", "gateway.max_turns=2"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["after"] == 2 * 12 + 64


def test_fewer_agents_at_once_are_advised_where_their_conversations_are_too_large():
    run = settings(
        policy={"dtype": "bfloat16", "lora": {"rank": 8}}, environment=AGENT | {"max_parallel": 64},
        train={"max_tokens": 1024, "gradient_checkpointing": True},
    )  # fmt: skip
    asked = need(prompt=20_000)
    limit = largest(asked.peaks(run)).total * 2 // 3
    (only,) = advise(asked, run, limit)
    assert only.key == "environment.max_parallel"


# --- what there is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sleep", "gib"), [(True, 77), (False, 12)])
def test_a_gpu_that_a_server_gives_back_counts_whole(sleep, gib, monkeypatch):
    """The server is awake before the run starts, and holds 85 % of the card."""
    import torch

    from prefloop.models import load

    monkeypatch.setattr(load, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * GIB, 80 * GIB))
    shared = settings(policy={"device": "cuda", "lora": {"rank": 8}, "vllm": {"sleep": sleep}})
    assert plan._available(shared) == gib * GIB


def test_limits_of_control_groups(tmp_path):
    member = tmp_path / "cgroup"
    member.write_text("4:memory:/box\n2:cpu:/box\n0::/new\n")
    for place, limit, usage in (
        ("memory/box", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("new", "memory.max", "memory.current"),
    ):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / limit).write_text("5000\n")
        (tmp_path / place / usage).write_text("3000\n")
    (tmp_path / "new" / "memory.stat").write_text("anon 2000\ninactive_file 600\nactive_file 300\n")
    assert sorted(_limits(tmp_path, member)) == [2000, 2900]
    (tmp_path / "new" / "memory.max").write_text("max\n")
    assert list(_limits(tmp_path, member)) == [2000]


# --- commands ---------------------------------------------------------------------------------------------------


def test_the_plan_is_one_table_with_its_grounds(capsys):
    assert main(["plan", "run.toml", "--set", "iterations=2", "--set", JUDGE]) == 0
    shown = capsys.readouterr().out
    for word in ("evaluate", "rollout", "guard", "train", "sft", "fits", "GFLOP/s", "16 calls an iteration"):
        assert word in shown
    assert "not enough" in shown  # the budget


def test_what_is_drawn_again_is_said_and_not_counted(capsys):
    changes = ["--set", 'train={algorithm="rloo", learning_rate=1e-4}', "--set", "curation={}", "--set", JUDGE]
    assert main(["plan", "run.toml", *changes, "--set", "rollout.redraws=2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "rollout.redraws may add up to 32 rollouts" in shown
    assert "16 calls an iteration" in shown


def test_the_plan_as_json_and_a_price_that_is_not_known(capsys):
    unpriced = 'judge={kind="llm", llm={provider="openai", model="m", base_url="http://127.0.0.1:1/v1"}}'
    assert main(["plan", "run.toml", "--json", "--set", unpriced]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["peak_bytes"] == max(stage["bytes"] for stage in found["stages"].values())
    assert found["judge"]["num_calls"] == 16
    assert found["judge"]["per_iteration"] is None
    assert found["seconds"]["stages"]["train"] > 0


def test_prompts_beyond_the_context_are_said(capsys):
    rows = [f"Number {i}?" for i in range(12)] + ["Why? " * 3000]
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    model = tiny_model(Path.cwd())
    Path("p.toml").write_text(
        f'name = "p"\n[environment]\nname = "prompts"\npath = "p.jsonl"\n[policy]\nmodel = "{model}"\n[train]\n'
    )
    assert main(["plan", "p.toml", "--memory", "24"]) == 0
    assert "tokens leaves no room in the" in " ".join(capsys.readouterr().out.split())


def test_a_judge_costs_calls_times_tokens_times_prices(capsys):
    assert main(["plan", "run.toml", "--json", "--set", JUDGE]) == 0
    judge = json.loads(capsys.readouterr().out)["judge"]
    each = (2.0 * judge["input_tokens"] + 8.0 * judge["output_tokens"]) / 1e6
    assert judge["per_iteration"] == pytest.approx(16 * each)


def test_a_judge_from_which_nothing_is_learned_costs_nothing(capsys):
    changes = ["--set", 'train={algorithm="rloo", learning_rate=1e-4}', "--set", "reward={judge=0.0, verified=1.0}"]
    assert main(["plan", "run.toml", *changes, "--set", JUDGE, "--json"]) == 0
    judge = json.loads(capsys.readouterr().out)["judge"]
    assert (judge["num_calls"], judge["per_iteration"]) == (0, 0.0)


def test_confirmations_and_evaluations_by_the_judge_cost_calls_too(capsys):
    confirm = ["--set", "curation={confirm=2, fraction=0.25}", "--set", JUDGE, "--json"]
    assert main(["plan", "run.toml", *confirm]) == 0
    judge = json.loads(capsys.readouterr().out)["judge"]
    assert judge["num_calls"] == 16 + 2 * 4 * 2 and judge["evaluation_calls"] == 0  # a pair of each of four tasks
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": f"Number {i}?"}) + "\n" for i in range(30)))
    model = tiny_model(Path.cwd())
    Path("p.toml").write_text(
        f'name = "p"\niterations = 3\n[environment]\nname = "prompts"\npath = "p.jsonl"\nheld_out = 0.3\n'
        f'[policy]\nmodel = "{model}"\n[rollout]\nnum_tasks = 4\nsamples_per_task = 4\n[train]\n'
        "[evaluation]\nnum_tasks = 3\n"
    )
    assert main(["plan", "p.toml", *confirm]) == 0
    judge = json.loads(capsys.readouterr().out)["judge"]
    assert judge["evaluation_calls"] == 2 * 2 * 3  # before and after, sampled and greedily
    assert judge["remaining"] == pytest.approx(judge["per_iteration"] / judge["num_calls"] * (3 * 32 + 12))


@pytest.mark.parametrize("command", ["run", "rollout", "train", "evaluate", "gateway"])
def test_a_run_without_the_memory_is_refused_with_advice(command, capsys, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda device, **_: 300 << 20)
    assert main([command, "run.toml", "--set", "rollout.num_tasks=400", "--set", "guard.num_tasks=2000"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: run planned needs about ")
    assert "300 MiB are free" in line
    assert "--set train.max_tokens=" in line
    assert "--ignore-memory" in line
    assert not Path("runs/planned/checkpoints").exists()


def test_one_may_go_on_anyway(capsys, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda device, **_: 300 << 20)
    assert main(["rollout", "run.toml", "--ignore-memory"]) == 0


def test_a_served_policy_needs_nothing_here(capsys):
    served = ["--set", 'policy={server={model="m", base_url="http://127.0.0.1:1/v1"}}']
    Path("served.toml").write_text(RUN.replace("[policy.initial]\nhidden_size = 48\n", "").split("[sft]")[0])
    rest = "[rollout]" + RUN.split("[rollout]")[1]
    with Path("served.toml").open("a") as file:
        file.write(rest)
    assert main(["plan", "served.toml", *served]) == 1
    assert "served elsewhere" in capsys.readouterr().err


def test_the_check_before_a_start_needs_no_torch():
    program = (
        "import sys; from pathlib import Path\n"
        "from prefloop.cli.plumbing import described_run\n"
        "from prefloop.planning import check_memory\n"
        "with described_run(Path('run.toml'), None, None) as run: check_memory(run)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["False", "False"], done.stderr
