"""What stops an update early, what stops a run, and how old the rollouts are that an update learns from."""

from __future__ import annotations

import shutil

import httpx2
import openai
import pytest
from tiny_runs import curate_first_iteration, tiny_settings

from fault_runs import toml
from prefloop.cli import main
from prefloop.config import parse_settings
from prefloop.records import DivergedError
from prefloop.stages.ages import Fresh
from prefloop.stages.context import Run
from prefloop.stages.curating import curate_stage
from prefloop.stages.gateway import served
from prefloop.stages.judging import judge_stage
from prefloop.stages.rollouts import rollout_stage
from prefloop.stages.selecting import Rows
from prefloop.stages.settings import RunSettings
from prefloop.stages.updating import _max_update_kl, check_progress, train_stage
from prefloop.store import Store
from prefloop.store.ages import read_ages
from prefloop.store.metrics import read_metrics
from prefloop.training.settings import MAX_UPDATE_KL

RULES = {"lowest": -2.0, "noise_sd": 0.3}


def given(**changes):
    beta = {"train__beta": None} if changes.get("train__algorithm", "dpo") == "grpo" else {}
    return tiny_settings(**{"iterations": 2, "judge__rules": RULES, "guard__max_kl": 1e3, **beta, **changes})


def settings_of(**changes):
    return parse_settings(RunSettings, given(**changes), "test")


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """A folder with a run whose first iteration is curated."""
    folder = tmp_path_factory.mktemp("curated")
    curate_first_iteration(folder, settings_of())
    return folder


@pytest.fixture
def going_on(curated, tmp_path, monkeypatch):
    """The curated run under changed settings; called again, anew."""
    monkeypatch.chdir(tmp_path)
    stores = []

    def anew(**changes):
        shutil.rmtree("runs", ignore_errors=True)
        shutil.copytree(curated / "runs", "runs")
        stores.append(Store("runs/prefloop.db"))
        return Run(settings_of(**changes), stores[-1])

    yield anew
    for store in stores:
        store.close()


# --- the early warning ------------------------------------------------------------------------------------------


def distances(run):
    return [one.metrics["update_kl"] for one in read_metrics(run.store, run.id, iteration=0, stage="train")]


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_an_update_ends_before_the_step_that_finds_it_too_far(going_on, algorithm):
    changes = {"train__algorithm": algorithm, "train__learning_rate": 3e-3, "train__batch_size": 2}
    run = going_on(**changes, train__num_epochs=4, guard__max_update_kl=1e9)
    train_stage(run, 0)
    all_of_it = distances(run)
    assert all_of_it[0] == pytest.approx(0.0, abs=1e-6) and run.found(0, "train")["stopped"] == ""
    limit = max(all_of_it[:-1]) / 2
    first = next(i for i, moved in enumerate(all_of_it) if moved > limit)
    assert 0 < first < len(all_of_it)

    run = going_on(**changes, train__num_epochs=4, guard__max_update_kl=limit)
    train_stage(run, 0)
    trained = run.found(0, "train")
    assert distances(run) == all_of_it[:first] and trained["steps"] == first
    (attempt,) = trained["attempts"]
    assert attempt["accepted"] and attempt["steps"] == first  # what there was until then is guarded, and kept
    assert trained["stopped"] == attempt["stopped"]
    assert f"more than guard.max_update_kl ({limit:g})" in trained["stopped"]
    assert trained["warnings"] == [f"step {first}: {trained['stopped']}"]


def test_only_log_probs_of_the_policy_itself_tell_how_far_it_moved(tmp_path):
    def limit(ages=(0, 0), **changes):
        settings = settings_of(**{"guard__max_update_kl": 0.1, **changes})
        with Store(str(tmp_path / "s.db")) as store:
            return _max_update_kl(Run(settings, store), Fresh(Rows({}), dict(enumerate(ages)), 0), settings.train)

    assert limit() == 0.1
    left_out = {"guard__max_update_kl": None}
    assert limit(**left_out) is None and limit(**left_out, train__algorithm="grpo") == MAX_UPDATE_KL
    for colder in ({"temperature": 0.7}, {"top_p": 0.9}):
        assert limit(rollout__sampling=colder) is None
    assert limit(ages=(0, 1)) is None and limit(ages=(0, None)) is None
    assert limit(ages=(0, 1), train__algorithm="grpo", rollout__sampling={"temperature": 0.7}) == 0.1


# --- divergence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learning_rate", "batch_size", "reason"),
    [
        pytest.param(1e4, 1, "steps in a row were not finite", marks=pytest.mark.slow),
        (0.3, 100, "beyond the bound of 3"),
    ],
)
def test_a_run_that_diverges_stops_and_keeps_the_last_good_policy(
    learning_rate, batch_size, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rate = {"train__learning_rate": learning_rate, "train__batch_size": batch_size, "train__decay": "none"}
    guard = {"guard__max_kl": 3.0, "guard__max_retries": 1, "guard__max_rolled_back": 2}
    settings = given(iterations=3, **rate, **guard)
    (tmp_path / "run.toml").write_text(toml(settings))
    assert main(["run", "run.toml"]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    with Store("runs/prefloop.db") as store:
        run = Run(settings_of(**{**rate, **guard, "iterations": 3}), store)
        start = store.checkpoint(run.checkpoint_before(0))
        assert [run.found(i, "train")["checkpoint_id"] for i in range(2)] == [start.id] * 2
        assert run.found(2, "rollout") is None and run.found(3, "finish") is None
    assert "run mini stops: the updates of its last 2 iterations were all taken back" in said
    assert reason in said and start.path in said and start.id[:12] in said and "guard.max_rolled_back" in said

    assert main(["run", "run.toml"]) == 1  # it is as it was, and nothing is done again
    assert main(["train", "run.toml"]) == 1
    assert capsys.readouterr().err.count(said) == 2
    assert main(["run", "run.toml", "--set", "guard.max_rolled_back=4"]) == 0  # it is let go on
    with Store("runs/prefloop.db") as store:
        assert Run(settings_of(), store).found(3, "finish")["end_checkpoint"] == start.id


def test_an_update_that_was_kept_begins_the_count_anew(going_on):
    run = going_on(guard__max_rolled_back=2)
    start = run.checkpoint_before(0)
    refused = {"rolled_back": True, "checkpoint_id": start, "attempts": [{"learning_rate": 1.0, "reason": "far"}]}
    for number, rolled_back in enumerate([True, False, True, True]):
        run.store.add_event(run.id, number, "train", {**refused, "rolled_back": rolled_back})
    for number in range(4):
        check_progress(run, number)
    with pytest.raises(DivergedError, match=r"last 2 iterations .*the last one: far"):
        check_progress(run, 4)


# --- age --------------------------------------------------------------------------------------------------------


def test_fresh_rollouts_are_of_age_0_whatever_is_made_of_them(going_on):
    run = going_on(train__num_epochs=3)
    train_stage(run, 0)
    pairs = run.store.dataset(run.found(0, "train")["dataset_id"]).pairs
    ids = {i for pair in pairs for i in (pair.chosen_id, pair.rejected_id)}
    assert read_ages(run.store, run.id, 0) == dict.fromkeys(ids, 0)
    assert run.found(0, "train")["age"] == {
        "mean": 0.0,
        "max": 0,
        "num": len(ids),
        "num_unknown": 0,
        "num_too_old": 0,
        "num_passes": 3,
    }


def episode(server, task, name, value):
    """An agent's episode of one turn, as it and its grader ask for it."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=f"none/{task}/{name}", max_retries=0)
    messages = [{"role": "user", "content": "Book me a flight to Tokyo."}]
    client.chat.completions.create(model="policy", messages=messages, max_tokens=8)
    graded = {"task": task, "episode": name, "value": value, "score": value, "success": value > 0.5}
    assert httpx2.post(f"{server.url}/outcome", json=graded, timeout=30).status_code == 200


@pytest.mark.parametrize(("max_age", "learns"), [(1, True), pytest.param(0, False, marks=pytest.mark.slow)])
def test_episodes_that_a_gateway_served_from_an_older_checkpoint(going_on, max_age, learns):
    run = going_on(train__algorithm="grpo", train__max_age=max_age)
    train_stage(run, 0)
    start, now = run.checkpoint_before(0), run.checkpoint_before(1)
    assert start != now
    with served(run, 1, start, host="127.0.0.1", port=0, token="") as (_, server):
        for task in ("one", "two"):
            episode(server, task, "a", 0.0)
            episode(server, task, "b", 1.0)
    for stage in (rollout_stage, judge_stage, curate_stage, train_stage):
        stage(run, 1)
    trained = run.found(1, "train")
    ids = dict.fromkeys(run.store.dataset(trained["dataset_id"]).all_trajectory_ids, 1)
    assert len(ids) == 4
    if learns:
        assert trained["steps"] > 0 and read_ages(run.store, run.id, 1) == ids
        assert trained["age"] == {**trained["age"], "mean": 1.0, "max": 1, "num": 4, "num_too_old": 0}
        assert trained["warnings"] == ["4 rollouts of 4 were up to 1 updates old"]
    else:
        assert trained["reason"].endswith("4 rollouts left out, older than train.max_age allows")
        assert trained["checkpoint_id"] == now and read_ages(run.store, run.id, 1) == {}
        assert trained["age"] == {**trained["age"], "mean": None, "max": None, "num": 0, "num_too_old": 4}
