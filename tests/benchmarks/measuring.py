"""What the benchmarks of pushes share: commands timed with the processor seconds of everybody who takes part."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Step:
    """A command that was timed."""

    seconds: float
    cpu: Mapping[str, float]
    """Processor seconds, user's and system's, by the name of the program; what has ended is in its parent's."""

    def __add__(self, other: Step) -> Step:
        return Step(self.seconds + other.seconds, Counter(self.cpu) + Counter(other.cpu))

    @property
    def shares(self) -> str:
        """Who spent processor time."""
        spent = sorted(self.cpu.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent if seconds >= 0.05)


def run(*command: object, **variables: str) -> Step:
    """Run a command, with everything on its way to the disk before it begins. Raises CalledProcessError."""
    os.sync()
    before = _cpu_seconds(os.getpid())
    began = time.monotonic()
    with subprocess.Popen(
        [*map(str, command)],
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [*map(str, command)], stderr=errors)
    name = "weightctl" if "weightctl" in command else Path(str(command[0])).name
    cpu = Counter({name: usage.ru_utime + usage.ru_stime}) + (_cpu_seconds(os.getpid()) - before)
    return Step(seconds, cpu)


def _cpu_seconds(ancestor: int) -> Counter[str]:
    """Of every process that descends from `ancestor`, by name."""
    processes = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (directory / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        fields = rest.split()
        processes[int(directory.name)] = (name, int(fields[1]), sum(map(int, fields[11:15])) / TICKS)
    spent: Counter[str] = Counter()
    for pid, (name, parent, seconds) in processes.items():
        above = parent
        while above not in (0, ancestor) and above in processes:
            above = processes[above][1]
        if above == ancestor and pid != ancestor:
            spent[name] += seconds
    return spent


def show(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table in Markdown."""
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(map(str, row))} |")
    print(flush=True)
