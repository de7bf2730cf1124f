"""weightctl backends, as a user runs it."""

from __future__ import annotations

from tests.command import weightctl


def test_json_is_one_list() -> None:
    done = weightctl("backends", "--json")
    assert done.code == 0
    assert all(list(row) == ["kind", "name", "available", "reason", "summary"] for row in done.result)
    assert {"directory", "layout", "safetensors"} <= {row["name"] for row in done.result}


def test_the_table_lists_all_of_them() -> None:
    rows = weightctl("backends", "--json").result
    done = weightctl("backends", COLUMNS="200")
    assert (done.code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(rows) + 1
    for row, line in zip(rows, lines[1:], strict=True):
        assert line.startswith(row["kind"])
        assert row["name"] in line
