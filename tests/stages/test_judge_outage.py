"""A judge that fails in the middle of an iteration, through the real client and against a real server on loopback.

The stage waits and asks again; it stops where too much is left unjudged, and nothing is learned from scores that nobody
gave.
"""

from __future__ import annotations

import json

import pytest
from tiny_runs import tiny_run

from fakes.served import fake_server
from judge_examples import MODEL
from prefloop import cli
from prefloop.loop import run_loop
from prefloop.losses.registry import objective
from prefloop.records import PrefloopError, Status
from prefloop.stages.context import opened
from prefloop.stages.judging import judge_stage
from prefloop.stages.rollouts import iteration_rollouts, iteration_tasks, rollout_stage
from prefloop.stages.start import start_policy

NUM = 16
RETRY = {"num_attempts": 4, "base_wait_s": 0.01, "max_wait_s": 0.05}
DOWN = {"kind": "status", "code": 503}
ALGORITHMS = ["grpo", "online_dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rloo", "ppo", "dpo"))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shape = ["hidden_size=32", "num_heads=4"]
    assert cli.main(["init-model", str(folder / "model"), *(f"--set={one}" for one in shape)]) == 0
    return folder / "model"


@pytest.fixture
def judged_run(model, tmp_path, monkeypatch):
    """A run of one iteration whose rollouts a server judges."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-canary-5ec7e7")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n}, in words."}) + "\n" for n in range(60)))

    def of(algorithm, url, **changes):
        llm = {"provider": "anthropic", "model": MODEL, "base_url": url, "retry": RETRY, "concurrency": 4}
        given = {
            "environment": {"name": "prompts", "path": str(prompts), "held_out": 0.3},
            "policy": {"model": str(model)},
            "sft": None,
            "judge": {"kind": "llm", "llm": llm},
            "curation__margin": 0.0,
            "rollout__sampling": {"max_new_tokens": 8},
            "train__algorithm": algorithm,
            "train__learning_rate": 1e-3,
            "evaluation__num_tasks": 2,
            "guard__max_kl": 1e3,
            **({"train__beta": None} if objective(algorithm).records == "rollouts" else {}),
        }
        return tiny_run(iterations=1, **{**given, **changes})

    return of


def rolled_out(run):
    """The iteration's rollouts, made before anything is judged."""
    with opened(run):
        start_policy(run)
        rollout_stage(run, 0)
    return iteration_rollouts(run, 0)


def judge_iteration(run):
    with opened(run):
        judge_stage(run, 0)


def good(run):
    found = run.store.judgements(rater_id=run.judge.rater.id)
    return {one.trajectory_id: one for one in found if one.status is Status.OK}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_outage_stops_the_stage_and_the_same_command_asks_for_what_is_missing(algorithm, judged_run, tmp_path):
    script = [{"match": "", "do": ["good"] * 7 + [DOWN] * 28 + ["good"]}]
    with fake_server(tmp_path, script) as fake, judged_run(algorithm, fake.url) as run:
        rollouts = rolled_out(run)
        with pytest.raises(
            PrefloopError, match=rf"failed on \d+ of {NUM} trajectories \(budget 2\.0%\).*goes on"
        ) as said:
            judge_iteration(run)
        assert "\n" not in str(said.value) and "HTTP 503" in str(said.value)
        before = good(run)
        assert 7 <= len(before) < NUM
        assert run.found(0, "judge") is run.found(0, "curate") is run.found(0, "train") is None
        assert not run.store.datasets() and len(run.store.checkpoints()) == 1  # nothing was learned

        num_billed = fake.num_billed
        judge_iteration(run)
        after = good(run)
        assert fake.num_billed - num_billed == NUM - len(before)  # what was judged is not asked again
        assert {i: after[i] for i in before} == before and after.keys() == {one.id for one in rollouts}
        assert run.found(0, "judge")["statuses"] == {"ok": NUM}

        run_loop(run)
        trained = run.found(0, "train")
        dataset = run.store.dataset(trained["dataset_id"])
        assert trained["steps"] > 0
        if objective(algorithm).records == "rollouts":
            assert {one.trajectory_id: one.value for one in dataset.valued} == {i: j.value for i, j in after.items()}
        else:
            gaps = [after[pair.chosen_id].score - after[pair.rejected_id].score for pair in dataset.pairs]
            assert [pair.gap for pair in dataset.pairs] == pytest.approx(gaps)


def test_a_short_outage_is_waited_for(judged_run, tmp_path):
    script = [{"match": "", "do": ["good"] * 5 + [DOWN] * 3 + ["good"]}]
    with fake_server(tmp_path, script) as fake, judged_run("grpo", fake.url) as run:
        rolled_out(run)
        judge_iteration(run)
        assert run.found(0, "judge")["statuses"] == {"ok": NUM} and fake.num_calls == NUM + 3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_attempts_that_nobody_could_judge_are_left_out_and_counted(algorithm, judged_run, tmp_path):
    """All attempts at one task fail, and the budget allows for it: no score of theirs is made up."""
    with judged_run(algorithm, "http://127.0.0.1:9") as run:
        text = iteration_tasks(run, 0)[0].messages[-1].content
    refused = {"match": text, "do": [{"kind": "status", "code": 400}]}
    with fake_server(tmp_path, [refused]) as fake, judged_run(algorithm, fake.url, judge__failure_budget=0.3) as run:
        rollouts = rolled_out(run)
        lost = {one.id for one in rollouts if one.messages[0].content == text}
        assert len(lost) == 4
        run_loop(run)
        assert run.found(0, "judge")["statuses"] == {"http_error": 4, "ok": NUM - 4}
        assert run.found(0, "curate")["num_without_reward"] == 4
        failed = run.store.judgements(trajectory_ids=lost)
        assert {one.status for one in failed} == {Status.HTTP_ERROR}
        assert all(one.value is one.score is None for one in failed)
        trained = run.found(0, "train")
        assert trained["steps"] > 0
        assert lost.isdisjoint(run.store.dataset(trained["dataset_id"]).all_trajectory_ids)
        if objective(algorithm).records == "rollouts":
            assert trained["credit"]["num"] == NUM - 4
