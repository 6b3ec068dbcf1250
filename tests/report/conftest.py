import pytest
from synthetic_run import RUN, SyntheticRun

from prefloop.report import write_report
from prefloop.store import Store

PAYLOAD = "<script>alert('x')</script><img src=\"https://evil.example/p.png\" onerror=alert(1)> {{ 7*7 }} </style>&amp;"
AGREEMENT = {
    "num": 40, "num_agree": 34, "num_judge_ties": 3, "num_unscored": 2, "share": 0.85, "low": 0.709, "high": 0.929,
}  # fmt: skip


@pytest.fixture
def store():
    with Store("sqlite://") as opened:
        yield opened


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(builder, its store, path of the report) of a finished run whose texts attack the page."""
    folder = tmp_path_factory.mktemp("report")
    with Store(f"sqlite:///{folder / 'prefloop.db'}") as opened:
        builder = SyntheticRun(opened, num_tasks=96, payload=PAYLOAD).build(AGREEMENT)
        yield builder, opened, write_report(opened, RUN, folder / "report.html")
