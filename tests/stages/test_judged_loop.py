"""The loop where nothing is verified: a language model judges, through the real client, against a fake server."""

from __future__ import annotations

import json

import pytest
from tiny_runs import tiny_run

from fakes.served import fake_server
from judge_examples import MODEL
from prefloop import cli
from prefloop.loop import run_loop
from prefloop.report import write_report
from prefloop.stages.context import BEFORE, opened
from prefloop.stages.curating import curate_stage
from prefloop.stages.judging import judge_stage
from prefloop.stages.rollouts import rollout_stage
from prefloop.stages.start import start_policy


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-canary-5ec7e7")


def test_a_judge_stands_for_verified_outcomes(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n} in words."}) + "\n" for n in range(60)))
    assert cli.main(["init-model", "model", "--set", "hidden_size=32", "--set", "num_heads=4"]) == 0
    with fake_server(tmp_path) as fake:
        changes = {
            "environment": {"name": "prompts", "path": str(prompts), "held_out": 0.3},
            "policy": {"model": str(tmp_path / "model")},
            "sft": None,
            "judge": {"kind": "llm", "llm": {"provider": "anthropic", "model": MODEL, "base_url": fake.url}},
            "rollout__sampling": {"max_new_tokens": 8},
            "train__learning_rate": 1e-3,
        }
        with tiny_run(iterations=1, **changes) as run:
            finished = run_loop(run)
            judged, curated, trained = (run.found(0, stage) for stage in ("judge", "curate", "train"))
            assert judged["statuses"] == {"ok": 16}
            assert judged["success"] is None
            assert curated["num_pairs"] > 0
            assert curated["pair_precision"] is None
            assert trained["checkpoint_id"] != run.checkpoint_before(0)
            (attempt,) = trained["attempts"]
            assert attempt["success"] is None  # nothing is verified, and nothing is made up
            for iteration in (BEFORE, 1):
                sampled = run.found(iteration, "evaluate")["sampled"]
                assert sampled["success"] is None
                assert 0 <= sampled["mean_judge_score"] <= 1
                assert sampled["num_unverified"] == 8
            assert finished["paired"] is None
            assert fake.num_billed == run.store.counts()["judge_call"]


NOBODY = {"provider": "anthropic", "model": MODEL, "base_url": "http://127.0.0.1:9", "retry": {"num_attempts": 1}}
VERIFIED = {"train__algorithm": "grpo", "train__beta": None, "reward": {"judge": 0.0, "verified": 1.0}}


def test_a_judge_from_which_nothing_is_learned_is_not_asked():
    with tiny_run(judge={"kind": "llm", "llm": NOBODY}, **VERIFIED) as described, opened(described) as run:
        start_policy(run)
        for stage in (rollout_stage, judge_stage, curate_stage):
            stage(run, 0)
        judged, curated = run.found(0, "judge"), run.found(0, "curate")
        assert judged["skipped"] == "not asked, for grpo learns nothing from it here"
        assert (judged["num"], judged["mean_score"], judged["cost"]) == (0, None, 0.0)
        assert curated["num_without_reward"] == curated["num_pairs"] == run.store.counts()["judge_call"] == 0
        assert run.store.dataset(curated["valued_dataset_id"]).num_members == 16


@pytest.mark.slow
@pytest.mark.parametrize("changes", [VERIFIED, {"train__algorithm": "spin"}], ids=["grpo", "spin"])
def test_a_run_whose_judge_nobody_needs_comes_to_its_end_and_to_a_report(changes):
    with tiny_run(iterations=1, judge={"kind": "llm", "llm": NOBODY}, **changes) as run:
        run_loop(run)
        assert "skipped" in run.found(0, "judge") and run.found(0, "train")["steps"] > 0
        write_report(run.store, run.id, "report.html")
