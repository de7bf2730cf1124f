"""Numbers as people read them: sizes, rates, durations, counts and shares."""

from __future__ import annotations


def size(count: float) -> str:
    """`91000000` as `91.0 MB` (decimal units, as disks and the Hub count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def rate(count: float) -> str:
    """So many bytes a second: `21.90 GB/s`, and anything but a trickle in the same unit, to be compared at a glance."""
    return f"{count / 1e9:.2f} GB/s" if count >= 1e7 else f"{size(count)}/s"


def seconds(count: float) -> str:
    """A duration, to three digits."""
    return f"{count * 1000:.0f} ms" if count < 0.9995 else f"{count:.2f} s" if count < 100 else f"{count:.0f} s"


def span(low: float, high: float) -> str:
    """From one duration to another, in one unit: `193–284 ms`, `0.74–1.10 s`."""
    unit = seconds(high)[-2:].strip()
    first = f"{low * 1000:.0f}" if unit == "ms" else f"{low:.2f}" if high < 100 else f"{low:.0f}"
    return f"{first}–{seconds(high)}"


def share(part: float) -> str:
    """`0.57` as `57 %`."""
    return f"{part * 100:.0f} %"


def count(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
