"""What `weightctl bench` shows of a result, whoever wrote it."""

from __future__ import annotations

import dataclasses

import pytest

from tests.benchmark.test_reports import COLD_STARTS, RESULT, SHIPPED
from weightctl.benchmark.results import Stage
from weightctl.cli import bench_table, scenario


@pytest.mark.parametrize("columns", [80, 140])
def test_every_line_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    bench_table.show(RESULT)
    scenario.show(COLD_STARTS)
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= columns
    for line in ("torch failed: it crashed with SIGSEGV", "runai unavailable: it is not installed",
                 "volume, copied failed: it is full"):  # fmt: skip
        assert line in shown


def test_nothing_in_a_result_is_believed(capsys: pytest.CaptureFixture[str]) -> None:
    stages = (Stage("fly\x1b[31m", 0, 1e17), Stage("load", 1, 1e-9))
    strange = dataclasses.replace(SHIPPED, way="\x1b[2J", stages=stages, deploy=(Stage("\x07", 1, 1),))
    scenario.show(dataclasses.replace(COLD_STARTS, scenarios=(strange,), environment={"device": "\x1b]0;"}))
    nothing = dataclasses.replace(SHIPPED, stages=())
    scenario.show(dataclasses.replace(COLD_STARTS, scenarios=(nothing,)))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "fly\\x1b[31m" in shown
