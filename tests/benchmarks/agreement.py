"""Whether a bench can be believed: two of the same thing agree, and a strategy that takes a fifth longer is found.

python -m tests.benchmarks.agreement MODEL [--runs 10]

Each pair of benches is compared as `weightctl bench --compare` does it. Of the second pair, one strategy sleeps 0.5 s
in both benches, the other 0.5 s and then 0.6 s. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import tests.benchmark.strategies  # noqa: F401 - registers `steady` and `delayed`
from tests.benchmarks.measuring import show
from weightctl import units
from weightctl.benchmark.results import BenchResult
from weightctl.config import Config
from weightctl.operations.bench import bench
from weightctl.progress import Progress


def measured(model: Path, strategies: tuple[str, ...], runs: int, older: Path | None, output: Path) -> BenchResult:
    """One bench, compared with the older one."""
    config = Config(runs=runs, device="cpu")
    return bench(
        str(model), strategies=strategies, output=output, against=older, config=config, progress=Progress()
    )  # fmt: skip


def compared(title: str, before: BenchResult, after: BenchResult) -> None:
    """A row for each strategy that has times in both."""
    assert after.comparison is not None
    rows = []
    for change in after.comparison.changes:
        medians, spans = [], []
        for row in filter(None, (result.row(change.strategy, change.cache) for result in (before, after))):
            assert row.interval is not None, row
            spans.append(row.interval)
            span = units.span(row.interval.low, row.interval.high)
            medians.append(f"{units.seconds(row.median_seconds or 0)} ({span}; {len(row.seconds)})")
        overlap = max(span.low for span in spans) <= min(span.high for span in spans)
        ratio = f"{change.ratio:.3f} ({change.ratio_low:.3f}–{change.ratio_high:.3f})" if change.ratio_low else "?"
        rows.append((change.strategy, *medians, "yes" if overlap else "no", ratio, change.verdict))
    show((title, "first (interval; runs)", "second", "do they overlap", "ratio (99 %)", "verdict"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        first, second = Path(directory, "first.json"), Path(directory, "second.json")
        same = ("pipelined", "safetensors", "torch")
        before = measured(asked.model, same, asked.runs, None, first)
        compared("the same twice", before, measured(asked.model, same, asked.runs, first, second))
        small = Path(directory, "small")
        small.mkdir()
        save_file({"a": torch.rand(1000), "b": torch.rand(3)}, small / "model.safetensors")
        os.environ["DELAY"] = "0.5"
        before = measured(small, ("steady", "delayed"), asked.runs, None, first)
        os.environ["DELAY"] = "0.6"
        after = measured(small, ("steady", "delayed"), asked.runs, first, second)
        compared("`delayed` a fifth longer", before, after)


if __name__ == "__main__":
    main()
