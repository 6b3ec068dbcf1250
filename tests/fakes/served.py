"""Starting the fake servers and reading their ledgers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SERVER = Path(__file__).with_name("anthropic_server.py")


@dataclass
class Fake:
    """A running fake: its address and what it was asked."""

    url: str
    ledger_path: Path

    @property
    def ledger(self) -> list[dict]:
        if not self.ledger_path.exists():
            return []
        return [json.loads(line) for line in self.ledger_path.read_text().splitlines()]

    @property
    def num_calls(self) -> int:
        return len(self.ledger)

    def num_calls_about(self, text: str) -> int:
        return sum(text in entry["body"] for entry in self.ledger)

    @property
    def num_billed(self) -> int:
        return sum(entry["billed"] for entry in self.ledger)


@contextmanager
def fake_server(folder: Path, script: list[dict] | None = None) -> Iterator[Fake]:
    """A fake server as a process of its own on loopback, ended when the block ends."""
    number = len(list(folder.glob("ledger*.script")))
    ledger, rules = folder / f"ledger{number}.jsonl", folder / f"ledger{number}.script"
    rules.write_text(json.dumps(script or []))
    process = subprocess.Popen([sys.executable, str(SERVER), str(ledger), str(rules)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield Fake(f"http://127.0.0.1:{port}", ledger)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
