"""Reward models as judges of a run, and the whole way from real preferences to judgements."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tiny_runs import tiny_run, tiny_settings

from fit_runs import pair_rows, train_rows
from prefloop.config import parse_settings
from prefloop.judges import JudgeItem, judge_all, judge_items
from prefloop.judges.reward_model import RewardJudgeSettings
from prefloop.loop import run_loop
from prefloop.models.reward import new_reward_model
from prefloop.models.settings import LoraSettings
from prefloop.records import PrefloopError, RaterKind
from prefloop.stages.fit_settings import FitSettings
from prefloop.stages.fitting import fit
from prefloop.stages.scorers import reward_judge
from prefloop.stages.settings import RunSettings
from prefloop.store import Store
from prefloop.training.checkpoint import save_atomically
from reward_examples import SMALL, conversations, padded_scores, rendered, saved_policy

LLMBAR = Path(__file__).parents[2] / "../shared/data/llmbar"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved_reward_model(directory, *, seed=1, **shape):
    """A random ensemble, centred on some conversations, saved whole."""
    model = new_reward_model(
        saved_policy(directory.with_name(f"{directory.name}-policy"), **shape), num_heads=2, seed=seed
    )
    model.calibrate([rendered(model.tokenizer, trajectory) for _, trajectory in conversations()])
    save_atomically(directory, model.save)
    return str(directory)


def judge_of(model, **settings):
    return reward_judge(RewardJudgeSettings(model=model, **settings), num_threads=torch.get_num_threads())


def test_the_judge_is_known_by_its_weights_wherever_they_lie(tmp_path):
    first = judge_of(saved_reward_model(tmp_path / "first"))
    assert first.rater.kind is RaterKind.REWARD_MODEL
    (tmp_path / "first").rename(tmp_path / "moved")
    moved = judge_of(str(tmp_path / "moved"))
    assert moved.rater.specification == first.rater.specification
    other = judge_of(saved_reward_model(tmp_path / "other", seed=2))
    assert other.rater.specification["scorer"] != first.rater.specification["scorer"]
    (tmp_path / "moved" / "MANIFEST.json").unlink()
    assert judge_of(str(tmp_path / "moved")).rater.specification == first.rater.specification


def test_a_damaged_model_does_not_judge(tmp_path):
    directory = Path(saved_reward_model(tmp_path / "model"))
    config = directory / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(PrefloopError, match=r"file config\.json is damaged"):
        judge_of(str(directory))


def test_its_table_is_needed():
    with pytest.raises(PrefloopError, match=r"kind 'reward' needs a table 'judge\.reward' with 'model'"):
        parse_settings(RunSettings, tiny_settings(judge={"kind": "reward"}), "test")


@pytest.mark.slow
def test_an_ensemble_of_adapters_judges_wherever_it_lies(tmp_path):
    policy = saved_policy(tmp_path / "policy")
    lora = LoraSettings(rank=2)
    model = new_reward_model(policy, lora=lora, num_adapters=2)
    model.calibrate([rendered(model.tokenizer, trajectory) for _, trajectory in conversations()])
    save_atomically(tmp_path / "first", model.save)
    first = judge_of(str(tmp_path / "first"), aggregate="lower_bound")
    (tmp_path / "first").rename(tmp_path / "moved")
    assert judge_of(str(tmp_path / "moved"), aggregate="lower_bound").rater.specification == first.rater.specification
    saved_policy(tmp_path / "policy", seed=5)  # other weights below the adapters
    changed = judge_of(str(tmp_path / "moved"), aggregate="lower_bound")
    assert changed.rater.specification != first.rater.specification


@pytest.mark.slow
def test_a_run_is_judged_by_a_reward_model(tmp_path):
    model = saved_reward_model(tmp_path / "model", max_length=4096)
    judge = {"kind": "reward", "reward": {"model": model, "aggregate": "lower_bound"}}
    with tiny_run(iterations=1, judge=judge) as run:
        run_loop(run)
        judged = run.found(0, "judge")
        assert judged["statuses"] == {"ok": 16}
        (rater,) = [r for r in run.store.raters().values() if r.kind is RaterKind.REWARD_MODEL]
        found = run.store.judgements(rater_id=rater.id)
        assert len({j.value for j in found}) > 4
        for one in found:
            mean, spread = one.criteria["mean"], one.criteria["spread"]
            assert one.value == pytest.approx(mean - spread)
            rule = rater.specification["rule"]
            assert one.score == pytest.approx(1 / (1 + math.exp(-(one.value - rule["centre"]) / rule["scale"])))
        assert run.found(0, "curate")["num_scored"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"num_heads": 3}, {"lora": {}}, {"lora": {}, "num_heads": 2}])
def test_the_card_says_how_transformers_opens_it(tmp_path, settings):
    """What it tells people to run gives the judge's scores."""
    train_rows(
        "reward", saved_policy(tmp_path / "policy"), tmp_path / "rm", pair_rows(12),
        held_out=0.25, learning_rate=1e-3, num_steps=2, num_threads=1, device="cpu", **settings,
    )  # fmt: skip
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "rm" / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)  # it names the directory as it is from here
    judge = judge_of(str(tmp_path / "rm"))
    items = [JudgeItem(task, trajectory) for task, trajectory in conversations()[:4]]
    paths = [rendered(names["tokenizer"], item.trajectory) for item in items]
    theirs = np.concatenate([padded_scores(names["model"].eval(), [path], 0) for path in paths])
    scores = judge.scorer.score([item.trajectory for item in items], [item.task for item in items])
    assert [one.members for one in scores] == [pytest.approx(tuple(row), abs=2e-6) for row in theirs]


def llmbar_rows(name):
    """TRL's preference format, conversational."""
    rows = json.loads((LLMBAR / f"{name}.json").read_text(encoding="utf-8"))
    for row in rows:
        better, worse = (row["output_1"], row["output_2"])[:: 1 if row["label"] == 1 else -1]
        yield {
            "prompt": [{"role": "user", "content": row["input"]}],
            "chosen": [{"role": "assistant", "content": better}],
            "rejected": [{"role": "assistant", "content": worse}],
        }


@pytest.mark.slow
@pytest.mark.skipif(not LLMBAR.exists(), reason="the real preferences (../shared/data/llmbar) are not here")
def test_from_real_preferences_to_judgements(tmp_path):
    """Import, train, evaluate, judge; a model this small learns little, but every number is there and fits."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in llmbar_rows("natural")))
    policy = saved_policy(tmp_path / "policy", settings=SMALL, max_length=4096)
    settings = FitSettings(
        objective="reward",
        model=policy,
        data=[str(tmp_path / "rows.jsonl")],
        held_out=0.3,
        learning_rate=2e-3,
        batch_size=16,
        num_steps=6,
        center_coef=0.01,
        num_threads=1,
        device="cpu",
    )
    with Store(str(tmp_path / "store.db")) as store:
        fitted = fit(settings, store, tmp_path / "rm")
        assert fitted.train["steps"] == 6
        report = fitted.train["reward_model"]
        assert report["num_pairs"] == fitted.data["held_out"]["num_rows"]
        assert set(report["shortcuts"]) == {"length", "words"}
        assert 0 < report["log_loss"] < 2
        plot = ElementTree.parse(tmp_path / "rm" / "reliability.svg").getroot()
        assert plot.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(--" not in ElementTree.tostring(plot, encoding="unicode")
        judge = judge_of(str(tmp_path / "rm"))
        pairs = store.dataset(fitted.data["held_out_id"]).pairs
        ids = [i for pair in pairs for i in (pair.chosen_id, pair.rejected_id)]
        items = judge_items(store, store.trajectories(ids))
        assert judge_all(judge, items, store).by_status == {"ok": len(ids)}
        value = {j.trajectory_id: j.value for j in store.judgements(rater_id=judge.rater.id)}
        right = [value[pair.chosen_id] > value[pair.rejected_id] for pair in pairs]
        assert sum(right) / len(right) == pytest.approx(report["accuracy"]["value"])
