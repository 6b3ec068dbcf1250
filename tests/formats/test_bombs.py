"""Files made to exhaust memory or time: at most 50 KiB on disk; each is a clear error, soon and in little memory."""

import gzip
import json
import subprocess
import sys

import pytest

from prefloop.formats import Limits, import_file
from prefloop.records import PrefloopError

SIZE = 50 * 1024
MAX_SECONDS = 2.0
MAX_MIB = 300

# In a process of its own, so that the peak of memory is that of the import and not of other tests.
SCRIPT = """
import json, resource, sys, time
from prefloop.formats import import_file
from prefloop.records import PrefloopError
from prefloop.store import Store

resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
with Store(sys.argv[1]) as store:
    start = time.process_time()
    try:
        report = import_file(store, sys.argv[2], on_error="skip")
        said, num_rows = [e.reason for e in report.errors][:3], report.num_rows
    except PrefloopError as error:
        said, num_rows = [str(error)], None
    seconds = time.process_time() - start
    num_kept = store.counts()["task"]
with open("/proc/self/status") as status:  # the peak of getrusage would include the parent's, before the exec
    peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({"said": said, "seconds": seconds, "peak": peak, "num_kept": num_kept, "num_rows": num_rows}))
"""


def packed(text, repeat):
    return gzip.compress(text * repeat, 9)


def parquet_bomb(path, make):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(make(arrow), path, compression="zstd", use_dictionary=True)


BOMBS = {
    "deep.json": b"[" * SIZE,
    "deep.jsonl": b'{"prompt":' + b"[" * (SIZE - 100) + b"\n",
    "deep_list.json": b'[{"prompt":' + b'{"a":' * 9000,
    "line.jsonl.gz": packed(b"a" * 1024, 48_000),
    "blank.jsonl.gz": packed(b"\n" * 1024, 48_000),
    "spaces.json.gz": packed(b" " * 1024, 48_000),
    "nodes.jsonl.gz": gzip.compress(b'{"prompt":[' + b"[]," * 12_000_000, 9),
    "list.json.gz": gzip.compress(b"[" + b'{"prompt":"a"},' * 1_600_000, 9),
    "rows.jsonl.gz": gzip.compress(b'{"prompt":"a"}\n' * 1_600_000, 9),
    "string.json.gz": gzip.compress(b'[{"prompt":"' + b"a" * 40_000_000, 9),
    "twice.jsonl": b'{"prompt":"a",' + b'"k":1,' * 8000 + b'"k":1}',
    "digits.jsonl": b'{"prompt":' + b"9" * (SIZE - 100) + b"}",
}


def check(tmp_path, path):
    assert path.stat().st_size <= SIZE
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store.db"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["said"], "the bomb was imported without a word"
    assert path.name in result["said"][0] or result["num_rows"] is not None
    assert result["seconds"] < MAX_SECONDS, result
    assert result["peak"] < MAX_MIB, result
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_a_clear_error(tmp_path, empty_store, name):
    (tmp_path / "store.db").write_bytes(empty_store.read_bytes())
    path = tmp_path / name
    path.write_bytes(BOMBS[name])
    assert check(tmp_path, path)["num_kept"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda arrow: arrow.table({"prompt": arrow.DictionaryArray.from_arrays([0] * 20_000, ["a" * 3_500_000])}),
        lambda arrow: arrow.table({"prompt": arrow.nulls(4_000_000, arrow.string())}),
        lambda arrow: arrow.table({"prompt": [["a"] * 3_000_000]}),
        lambda arrow: arrow.table({"prompt": [["a"] * 490_000]}),
    ],
    ids=["one large text for all rows", "nulls", "one long list", "one list just short enough"],
)
def test_a_parquet_bomb_is_a_clear_error(tmp_path, empty_store, make):
    (tmp_path / "store.db").write_bytes(empty_store.read_bytes())
    path = tmp_path / "bomb.parquet"
    parquet_bomb(path, make)
    check(tmp_path, path)


def test_the_number_of_rows_and_of_bytes_is_limited(store, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(100)), encoding="utf-8")
    for limits, reason in ((Limits(max_rows=99), "99 rows"), (Limits(max_bytes=1000), "1000 bytes")):
        with pytest.raises(PrefloopError, match=reason):
            import_file(store, path, limits=limits, on_error="skip")
    assert store.counts()["task"] == 0
    assert import_file(store, path, limits=Limits(max_rows=100)).num_tasks == 100


def test_well_packed_but_honest_files_pass(store, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"prompt": "%d aaaaaaaaaaaaaaaaaaaa"}\n' % i for i in range(3000))))
    assert import_file(store, path).num_tasks == 3000
