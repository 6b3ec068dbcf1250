import re
from html.parser import HTMLParser

import pytest
from synthetic_run import JUDGE, RUN, VERIFIED, SyntheticRun

from prefloop.evaluation import compare_on_tasks, judge_calibration
from prefloop.records import PrefloopError
from prefloop.report import write_report
from prefloop.report.words import share_with_interval
from prefloop.stats.intervals import proportion


class Page(HTMLParser):
    """The elements of a page: (tag, attributes), and the text outside of scripts and styles."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.elements, self.inside, self._texts = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", "".join(self._texts)).replace("\u00a0", " ")

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.inside):
            self._texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(finished):
    return Page(finished[2])


# --- the numbers are those of the rows ----------------------------------------------------------------------


def test_headline_and_table_say_what_the_rows_say(finished, page):
    builder, _, _ = finished
    start, end = (proportion(list(builder.outcomes(updates).values())).to_dict() for updates in (0, 4))
    headline = f"Success on 96 held-out tasks rose from {share_with_interval(start)} to {share_with_interval(end)}."
    assert headline in page.text
    assert page.text.count(share_with_interval(end)) >= 3  # headline, final table, table of iterations


def test_paired_comparison_is_that_of_the_rows(finished, page):
    builder, _, _ = finished
    paired = compare_on_tasks(builder.outcomes(0), builder.outcomes(4))
    counts = f"{paired.better} won, {paired.worse} lost, {paired.same} unchanged"
    assert counts in page.text
    assert f"{100 * paired.difference.value:+.1f} points" in page.text


def test_judge_separation_is_that_of_the_rows(finished, page):
    _, store, _ = finished
    rollouts = [t.id for t in store.trajectories(run_id=RUN) if t.extra["stage"] == "rollout"]
    scores = {j.trajectory_id: j.score for j in store.judgements(trajectory_ids=rollouts, rater_id=JUDGE.id)}
    truth = {j.trajectory_id: j.criteria["success"] for j in store.judgements(rater_id=VERIFIED.id)}
    separation = judge_calibration([scores[i] for i in rollouts], [bool(truth[i]) for i in rollouts]).separation
    assert len(rollouts) == 4 * 64
    assert f"A success outscores a failure {100 * separation:.1f} % of the time." in page.text


def test_everything_the_run_recorded_has_its_place(page):
    for words in (
        "3.60 nats a trajectory", "2 min 8 s", "Invented ids", "Ignored constraints",
        "Iteration 2: an update was rolled back",
        "Iteration 1, its training:", "step 24: chosen completions have become 6.1 nats less likely.",
        "a loss of 18.8 points", "85.0 % [70.9, 92.9] of 40 decisive votes", "3 on pairs it scored the same",
        "learning_rate = 0.0003", "# store is not set", "2.13.0", "256: 256 ok", "The guards refused 1 update",
    ):  # fmt: skip
        assert words in page.text, words
    titles = {attributes.get("title", "") for _, attributes in page.elements}
    assert any(title.startswith("dataset ") and len(title) == len("dataset ") + 32 for title in titles)


def test_every_plot_is_there_and_speaks(page):
    plots = [attributes for attributes in page.all("svg") if attributes.get("role") == "img"]
    assert len(plots) == 10
    assert all(attributes["aria-label"] for attributes in plots)
    success = next(plot["aria-label"] for plot in plots if plot["aria-label"].startswith("Success."))
    assert success.count("%") == 5  # the start and four updates


# --- one file, no network, nothing that a model wrote runs --------------------------------------------------


def test_the_page_asks_the_network_for_nothing(finished, page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert not page.all("link") and not page.all("img") and not page.all("iframe")
    markup = finished[2].read_text(encoding="utf-8")
    assert "@import" not in markup
    assert not re.search(r"url\((?!#)", markup)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_what_models_wrote_is_text(finished, page):
    assert len(page.all("script")) == 1
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    assert "<script>alert('x')</script><img src=\"https://evil.example/p.png\" onerror=alert(1)>" in page.text
    assert "{{ 7*7 }}" in page.text  # templates are not expanded twice


def test_ids_are_unique_and_links_lead_somewhere(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for _, a in page.elements if a.get("href")]
    assert targets and set(targets) <= set(ids)


def test_the_file_is_small_and_the_same_again(finished, tmp_path):
    _, store, path = finished
    again = write_report(store, RUN, tmp_path / "deep" / "folder" / "again.html")
    assert path.stat().st_size < 3_000_000
    assert again.read_bytes() == path.read_bytes()


def test_examples_show_both_sides_of_the_same_task(finished, page):
    builder, store, _ = finished
    titles = [a["title"].split()[1] for a in page.all("span") if a.get("title", "").startswith("trajectory ")]
    pairs = list(zip(titles[::2], titles[1::2], strict=True))
    assert 30 <= len(pairs) <= 60
    for start, end in pairs:
        first, second = store.trajectories([start, end])
        assert first.task_id == second.task_id
        assert (first.author, second.author) == (builder.checkpoints[0], builder.checkpoints[-1])


# --- runs that are not finished -----------------------------------------------------------------------------


def _report(store, tmp_path):
    return Page(write_report(store, RUN, tmp_path / "report.html")).text


def test_a_run_that_has_only_begun(store, tmp_path):
    SyntheticRun(store).begin()
    text = _report(store, tmp_path)
    assert "There is no evaluation yet, so nothing can be said about success." in text
    for gap in ("the start policy has not been evaluated", "no iteration has begun", "the run has not finished"):
        assert gap in text
    assert "Agreement with people no human votes" in text
    assert "No examples yet" in text


def test_a_run_killed_in_its_second_iteration(store, tmp_path):
    run = SyntheticRun(store).begin()
    run.evaluate(0, guard=False)
    run.train(0, run.rollout_to_curate(0))
    run.evaluate(1, guard=True)
    run.rollout_to_curate(1)
    text = _report(store, tmp_path)
    latest = share_with_interval(proportion(list(run.outcomes(1).values())).to_dict())
    assert f"the latest on {latest} on 16 guard tasks" in text
    assert "iteration 2 has not finished: no train yet" in text
    assert "the end policy has not been evaluated on all held-out tasks" in text
    assert "1 min 11 s" in text  # summed from the events of the stages that have finished: 70.7


def test_a_run_without_any_event(store, tmp_path):
    store.add_run(RUN, "empty", "", {})
    text = _report(store, tmp_path)
    assert "No stage has finished yet." in text
    assert "Nothing to draw yet" in text


def test_errors_name_the_run_and_the_path(store, tmp_path):
    with pytest.raises(PrefloopError, match="there is no run nobody in sqlite://; the newest there: none"):
        write_report(store, "nobody", tmp_path / "x.html")
    SyntheticRun(store).begin()
    (tmp_path / "file").write_text("")
    with pytest.raises(PrefloopError, match="cannot write the report to"):
        write_report(store, RUN, tmp_path / "file" / "x.html")


# --- learning from own rollouts -----------------------------------------------------------------------------


def test_a_run_that_learns_from_its_own_rollouts_shows_what_they_were_worth(store, tmp_path):
    SyntheticRun(store, online=True).build()
    page = Page(write_report(store, RUN, tmp_path / "report.html"))
    said = [one["aria-label"] for one in page.all("svg") if "aria-label" in one]
    assert "Reward. 1: 0.200; 2: 0.300; 3: 0.400; 4: 0.500." in said
    assert "Share of tasks. 1: 0; 2: 0.125; 3: 0.250; 4: 0.375." in said
    assert "Explained variance. 1: 0; 2: 0.250; 3: 0.500; 4: 0.750." in said
    # rollouts, reward, its SD, tasks, nothing to choose, KL, coefficient, mismatch, effective share, critic
    assert "4 64" + "0.500" + "0.400" + "8" + "3" + " 1.50" + "0.0200" + "2.0e-04" + "98.7 %" + "75.0 %" in page.text


def test_a_run_that_learns_from_pairs_shows_nothing_of_that(page):
    assert "What its own rollouts were worth" not in page.text and "The critic" not in page.text
