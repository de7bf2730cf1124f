"""The model of docs/advise.md, against answers worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from weightctl.benchmark.advice import CLOSE, Option, Part, Rates, Situation, engine_rate, options, recommend, turns

GB = 10**9
RATES = Rates(
    read=1e9, write=1e15, sha256=1e9, unpack=1e9, load=4e9, load_cold=5e8, start=2.0,
    file=2e9, file_cold=1e9, serialize=2e8,
)  # fmt: skip


def situation(**changes: Any) -> Situation:
    rates = dataclasses.replace(RATES, **changes.pop("rates", {}))
    usual = {"shipped_bytes": 10 * GB, "loaded_bytes": 10 * GB, "layers": 4, "cores": 16, "memory_bytes": 100 * GB}
    return Situation(rates=rates, **{**usual, **changes})  # type: ignore[arg-type]


def option(name: str, **changes: Any) -> Option:
    return next(option for option in options(situation(**changes)) if option.name == name)


def part(name: str, which: str, **changes: Any) -> tuple[float, str]:
    found = option(name, **changes)
    return next((part.seconds, part.bound) for part in (*found.start, *found.deploy) if part.name == which)


@pytest.mark.parametrize(
    ("changes", "seconds", "bound"),
    [
        # One layer: nothing overlaps, 10 s to fetch and 10 s to unpack.
        ({"layers": 1}, 20.0, "unpacking"),
        # Four, three at once: the first is there after 3/4 of 10/3 s, and then one core unpacks for 10 s.
        ({}, 12.5, "unpacking"),
        # The network brings the last layer after 100 s; a quarter of the unpacking is left.
        ({"registry": 1e8}, 102.5, "registry"),
        # One core writes and hashes everything twice.
        ({"cores": 1}, 20.0, "processor"),
        # 20 GB are written, of which a fifth of the memory may wait.
        ({"memory_bytes": 10 * GB, "rates": {"write": 1e9}}, 18.0, "disk"),
    ],
)
def test_pull(changes: dict[str, Any], seconds: float, bound: str) -> None:
    assert part("container", "pull", **changes) == (pytest.approx(seconds), bound)


def test_a_container_is_loaded_from_the_page_cache_while_that_holds_it() -> None:
    assert part("container", "load") == (pytest.approx(2.5), "loading")
    assert part("container", "load", memory_bytes=19 * GB) == (pytest.approx(20.0), "loading")


def test_a_volume_is_read_and_loaded_at_once() -> None:
    assert part("volume", "load") == (pytest.approx(20.0), "volume")  # as the local disk: at load_cold
    assert part("volume", "load", volume=2e9) == (pytest.approx(10.0), "volume")  # half of what it gives
    assert part("volume", "load", volume=1e10) == (pytest.approx(2.5), "loading")
    assert part("serialized", "load", volume=1e9) == (pytest.approx(10.0), "volume")
    assert option("volume").start_seconds == pytest.approx(22.0)


def test_only_what_is_loaded_is_read_from_a_volume_and_all_of_it_pulled() -> None:
    changes = {"loaded_bytes": 5 * GB}
    assert part("volume", "load", **changes)[0] == pytest.approx(10.0)
    assert part("container", "pull", **changes)[0] == pytest.approx(12.5)
    assert part("container", "load", **changes)[0] == pytest.approx(1.25)


def test_deployments() -> None:
    assert option("container").deploy == (Part("hash", 10.0, "disk"),)
    assert option("container", registry=1e8).deploy_seconds == pytest.approx(110.0)
    assert part("volume", "hash", layers=1, rates={"read": 1e10}) == (pytest.approx(10.0), "processor")
    assert part("volume", "write", volume=1e8) == (pytest.approx(100.0), "volume")
    assert part("volume", "write", rates={"write": 5e8}) == (pytest.approx(20.0), "volume")
    assert part("serialized", "serialize") == (pytest.approx(50.0), "serializing")
    assert part("serialized", "serialize", volume=1e8) == (pytest.approx(200.0), "volume")


def test_the_rate_of_an_engine_explains_its_pull() -> None:
    rate = engine_rate(10 * GB, 4, 16, part("container", "pull", rates={"unpack": 3e8})[0])
    assert rate == pytest.approx(3e8)


def test_storage_and_transfer() -> None:
    changes = {"replicas": 3, "updates": 2, "loaded_bytes": 6 * GB}
    found = {name: option(name, **changes) for name in ("container", "volume", "serialized")}
    assert [found[name].storage_bytes // GB for name in found] == [40, 10, 6]
    assert [found[name].transfer_bytes // GB for name in found] == [2 * 40, 2 * (10 + 18), 2 * 24]


def test_without_a_serializer_there_are_two_ways() -> None:
    assert [found.name for found in options(situation(rates={"file": None}))] == ["container", "volume"]


def test_of_two_that_start_alike_the_one_that_deploys_sooner() -> None:
    def way(name: Any, start: float, deploy: float) -> Option:
        return Option(name, (Part("load", start, "loading"),), (Part("copy", deploy, "disk"),), 0, 0)

    assert recommend([way("container", 10, 5), way("volume", 10.9, 4)]).name == "volume"
    assert recommend([way("container", 10, 5), way("volume", 11.1, 4)]).name == "container"


def test_the_turning_point_is_where_the_equation_says() -> None:
    # The container takes 24.5 s, and is taken when that is within a tenth of 2 s + 20 GB / V.
    found = turns(situation(layers=1, rates={"file": None}))
    below = next(turn for turn in found if (turn.variable, turn.side) == ("volume", "below"))
    assert below.instead == "container"
    assert below.value == pytest.approx(20e9 / (24.5 / (1 + CLOSE) - 2), rel=1e-3)
    assert {turn.variable for turn in found} == {"volume"}


def test_cores_turn_it_too() -> None:
    # One core pulls for 16 s, two for 11 s; the volume takes 14.3 s.
    found = turns(situation(cores=1, rates={"file": None, "load_cold": 7e8, "unpack": 1.25e9}))
    cores = [turn for turn in found if turn.variable == "cores"]
    assert [(turn.side, turn.value, turn.instead) for turn in cores] == [("from", 2.0, "container")]


rate = some.floats(1e6, 1e11)
many = some.integers(1, 10**12)


@settings(max_examples=25, deadline=None)
@given(
    rates=some.builds(Rates, *[rate] * 6, some.floats(0, 60), *[rate] * 3),
    sizes=some.tuples(many, many, some.integers(1, 120)),
    machine=some.tuples(some.integers(1, 128), many),
    bandwidths=some.tuples(some.none() | rate, some.none() | rate),
)
def test_beyond_a_turning_point_the_choice_is_the_other(
    rates: Rates, sizes: tuple[int, int, int], machine: tuple[int, int], bandwidths: tuple[float | None, float | None]
) -> None:
    here = Situation(*sizes, rates, *machine, *bandwidths)
    chosen = recommend(options(here)).name
    for turn in turns(here):
        beyond = (
            turn.value if turn.side == "from" else turn.value - 1 if turn.variable == "cores" else turn.value * 0.999
        )
        value = int(beyond) if turn.variable == "cores" else beyond
        there = recommend(options(dataclasses.replace(here, **{turn.variable: value}))).name
        assert there == turn.instead != chosen
