"""The language-model judge through the real Anthropic SDK, against a fake of the API in its own process."""

import pytest
from fakes.served import fake_server
from judge_examples import make_items, open_store, settings

from prefloop.judges import judge_all
from prefloop.judges.llm import LLMJudge
from prefloop.records import Status


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-canary-5ec7e7")


def test_scores_are_the_weighted_mean_of_the_points_and_are_paid_once(tmp_path):
    items = make_items("Booked.", "I give up.", "Flight XX99 is booked.")
    with fake_server(tmp_path) as fake, open_store(tmp_path, items) as store:
        judge = LLMJudge(settings(fake.url), store)
        report = judge_all(judge, items, store)
        assert report.by_status == {"ok": 3}
        assert fake.num_calls == 3
        for judgement in store.judgements(rater_id=judge.rater.id):
            points = judgement.criteria
            mean = (3 * points["outcome"] + points["process"] + points["honesty"]) / 5
            assert judgement.value == pytest.approx(mean)
            assert judgement.score == pytest.approx(mean / 5)
            assert judgement.status is Status.OK
        again = judge_all(judge, items, store)
        assert (again.num_known, again.by_status) == (3, {})
        assert judge.judge(items) == judge.judge(items)
        assert fake.num_calls == 3
