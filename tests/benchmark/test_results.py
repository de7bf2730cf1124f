"""A result comes back from its file as it was, and no other file is believed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmark.test_summary import noisy, result
from weightctl.benchmark.results import Row, parse_result, read_result, write_result
from weightctl.errors import UsageError, WeightctlError


def saved(path: Path) -> dict[str, Any]:
    write_result(result(noisy(1, 0), Row("b", "cold", "failed", "it crashed with SIGSEGV")), path)
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    value = saved(path)
    assert read_result(path) == result(noisy(1, 0), Row("b", "cold", "failed", "it crashed with SIGSEGV"))
    assert parse_result({**value, "from the future": 1}) == read_result(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


TIMES: dict[str, Any] = {"status": "ok", "seconds": [1.0], "median_seconds": 1.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "its schema is 2"),
        ({"schema": True}, "no schema"),
        ({"created": 5}, "created is 5"),
        ({"limits": {}}, "limits is"),
        ({"ceilings": {"warm_read": -1}}, "warm_read is -1"),
        ({"ceilings": {"warm_read": 10**400}}, "int too large"),
        ({"environment": {"gpu": [1]}}, "environment.gpu"),
        ({"results": [{"strategy": "a"}]}, "has no cache"),
        ({"results": [{"strategy": "a", "cache": "hot", "status": "ok"}]}, "cache is"),
        ({"results": [{"strategy": "\x1b[31m", "cache": "warm", "status": "failed"}]}, "no name of a strategy"),
        ({"results": [{"strategy": "a", "cache": "warm", "status": "ok"}]}, "ok with 0 times"),
        ({"results": [{"strategy": "a", "cache": "warm", "status": "failed"}] * 2}, "twice"),
        ({"results": [{**TIMES, "strategy": "a", "cache": "warm", "median_seconds": 0}]}, "a, warm took no time"),
        ({"results": [{**TIMES, "strategy": "a", "cache": "warm", "seconds": [1, 1e-300]}]}, "a, warm took no time"),
        ({"results": [{**TIMES, "strategy": "a", "cache": "warm", "seconds": [1e300]}]}, "seconds is 1e+300"),
        ({"scenarios": [{**TIMES, "scenario": "file", "way": "w", "jobs": None, "median_seconds": 0}]}, "took no time"),
        ({"settings": None}, "settings is no object"),
    ],
)
def test_a_lie_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**saved(path), **change}))
    with pytest.raises(UsageError, match="no result of weightctl bench") as caught:
        read_result(path)
    assert words in caught.value.message


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"schema": NaN}', b"1" * 5000])
def test_no_json_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(UsageError, match="no result of weightctl bench"):
        read_result(tmp_path / "x.json")
    with pytest.raises(WeightctlError, match="cannot read"):
        read_result(tmp_path / "missing.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@given(st.sampled_from(["environment", "ceilings", "limits", "model", "settings", "results", "comparison"]), JSON)
def test_whatever_stands_somewhere_is_parsed_or_refused(key: str, value: object) -> None:
    whole = json.loads(json.dumps(dataclasses.asdict(result(noisy(1, 0)))))
    with contextlib.suppress(ValueError, OverflowError):
        parse_result({**whole, key: value})
