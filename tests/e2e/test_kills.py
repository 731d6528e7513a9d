"""kill -9 of the server, by the benchmark's own script, twice; the README's table is of twenty."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_nothing_is_lost_when_the_server_is_killed_while_it_saves_and_while_it_makes_tokens(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rows: list[list[str]] = []
    importlib.import_module("kills").run(tmp_path, ["saving", "tokens"], 3, rows.append)
    assert [row[1] for row in rows] == ["saving", "tokens"]
    assert int(rows[0][3].split()[0]) >= 1, "labels acknowledged before the kill"
    # As many items are used as there are labels, each encoded with both weights.
    for row in rows:
        assert row[4].startswith(f"{row[5]} of {row[5]}")
    assert int(rows[1][6]) >= 2 * int(rows[1][5])
