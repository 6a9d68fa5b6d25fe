"""What the GPU ran in a training step or a function: read from torch's profiler, as a table."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from reporting import table_head, table_row
from torch.autograd import DeviceType

LISTED_KERNELS, LISTED_GAPS, LISTED_WAITS = 40, 8, 24
# Kernels of a function that a record keeps.
KEPT_KERNELS = 30
# How the names of NCCL's kernels begin.
SENDING = "nccl"
# A record_function of this name says which steps of a profile count.
COUNTED = "counted step"


def profile_of(function: Callable[[], object]) -> dict[str, Any]:
    """The kernels that this GPU runs in ``function``, as ``kernels_of`` sums them up.

    Every rank has to call it where the ranks of ``function`` wait for one another.
    """
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        function()
        torch.cuda.synchronize()
    found = kernels_of(profile)
    return {**found, "kernels": found["kernels"][:KEPT_KERNELS]}


def kernels_of(profile: Any, steps: int = 1) -> dict[str, Any]:
    """Summarise a profile of torch's profiler.

    Args:
        steps: how many steps the result is an average of. If the profile has steps named
            ``COUNTED``, those before the first of them are left out.

    Returns:
        "busy ms", the time in which at least one kernel or copy ran; "sending alone ms", the part
        of it in which nothing but NCCL's kernels ran; "kernels", each with name, count and ms, the
        longest first; "gaps", the longest times in which nothing ran, in ms, with the kernels
        before and after; and "waits", the times in which nothing or sending alone ran, summed over
        those between the same kernels, the longest first.
    """
    events = [e for e in profile.events() if e.device_type == DeviceType.CUDA]
    counted = [e.time_range.start for e in events if e.name == COUNTED]
    if steps > 1 and events and not counted:
        raise RuntimeError(f"the profiler lists no {COUNTED!r} on the GPU; profile one step")
    begin = min(counted, default=-math.inf)
    # An annotation, such as the optimizer's step, spans kernels that are there themselves.
    events = [
        e
        for e in events
        if not getattr(e, "is_user_annotation", False) and e.time_range.start >= begin
    ]
    events.sort(key=lambda e: e.time_range.start)
    kernels: dict[str, list[float]] = {}
    for event in events:
        ms = (event.time_range.end - event.time_range.start) / 1e3
        kernels.setdefault(event.name, []).append(ms)
    rows = [
        {"name": name, "count": len(ms) / steps, "ms": sum(ms) / steps}
        for name, ms in kernels.items()
    ]
    gaps = [
        {"ms": (end - start) / 1e3, "after": after, "before": before}
        for start, end, after, before in _between(events)
    ]
    computing = [e for e in events if not e.name.startswith(SENDING)]
    busy = _busy(events)
    return {
        "busy ms": busy / steps,
        "sending alone ms": (busy - _busy(computing)) / steps,
        "kernels": sorted(rows, key=lambda row: -row["ms"]),
        "gaps": sorted(gaps, key=lambda gap: -gap["ms"])[:LISTED_GAPS],
        "waits": _waits(computing, [e for e in events if e.name.startswith(SENDING)], steps),
    }


def _between(events: list[Any]) -> Iterator[tuple[float, float, str, str]]:
    """The times in which none of ``events`` ran, given in the order in which they started.

    Yields:
        Beginning and end in microseconds, and the names of the events before and after.
    """
    reached, before = events[0].time_range.start if events else 0.0, ""
    for event in events:
        start, end = event.time_range.start, event.time_range.end
        if start > reached:
            yield reached, start, before, event.name
        if end > reached:
            reached, before = end, event.name


def _waits(computing: list[Any], sending: list[Any], steps: int) -> list[dict[str, Any]]:
    """The times between ``computing``, by the kernels before and after and by what was sent."""
    waits: dict[tuple[str, ...], list[float]] = {}
    for start, end, after, before in _between(computing):
        sent = [e for e in sending if e.time_range.start < end and e.time_range.end > start]
        names = " and ".join(sorted({e.name for e in sent}))
        alone = _busy(sent, start, end)
        found = waits.setdefault((after, names, before), [0, 0.0, 0.0])
        found[0] += 1 / steps
        found[1] += (end - start) / 1e3 / steps
        found[2] += alone / steps
    rows = [
        {"ms": ms, "count": count, "sending ms": alone, "after": after, "sent": sent,
         "before": before}
        for (after, sent, before), (count, ms, alone) in waits.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["ms"])[:LISTED_WAITS]


def _busy(events: list[Any], since: float = -math.inf, until: float = math.inf) -> float:
    """ms in which at least one of ``events`` ran, given in the order in which they started.

    Args:
        since, until: the time that counts, in microseconds.
    """
    busy, reached = 0.0, since
    for event in events:
        start, end = event.time_range.start, min(event.time_range.end, until)
        busy += max(0.0, end - max(start, reached)) / 1e3
        reached = max(reached, end)
    return busy


def profile_table(run: dict[str, Any]) -> str:
    """The profiles of a run's cases as Markdown."""
    lines = [f"One step each on one {run['device']}, {run['date']}, revision {run['revision']}."]
    for record in run["records"]:
        if "profile" not in record:
            continue
        profile, step = record["profile"], record["s a step"] * 1e3
        lines += [
            "",
            f"## {record['stage']}, {record['mode']}, {record['N']:,} tokens",
            "",
            f"{profile['busy ms']:.0f} ms busy, of {step:.0f} ms that a step takes unprofiled.",
            "",
            *table_head(["kernel", "launches", "ms", "share of the step"]),
        ]
        for row in profile["kernels"][:LISTED_KERNELS]:
            name, ms = as_cell(row["name"], 120), row["ms"]
            cells = [f"`{name}`", str(row["count"]), f"{ms:.1f}", f"{ms / step:.1%}"]
            lines.append(table_row(cells))
        lines += ["", "Longest gaps:", "", *gap_lines(profile["gaps"])]
    return "\n".join(lines) + "\n"


def gap_lines(gaps: list[dict[str, Any]]) -> list[str]:
    """List items of the times in which nothing ran."""
    lines = []
    for gap in gaps:
        after, before = (as_cell(gap[key], 60) for key in ("after", "before"))
        lines.append(f"- {gap['ms']:.1f} ms between `{after}` and `{before}`")
    return lines


def wait_table(waits: list[dict[str, Any]]) -> list[str]:
    """Lines with the times in which nothing was computed, the longest sums first."""
    head = ["ms", "of them sending", "times", "after", "sent", "before"]
    lines = table_head(head)
    for wait in waits:
        names = [f"`{as_cell(wait[key], 50)}`" for key in ("after", "sent", "before")]
        figures = [f"{wait['ms']:.2f}", f"{wait['sending ms']:.2f}", f"{wait['count']:g}"]
        lines.append(table_row([*figures, *names]))
    return lines


def function_table(name: str, profile: dict[str, Any]) -> list[str]:
    """Lines with the kernels of a function, of which ``profile`` is the ``profile_of``."""
    rows = [
        table_row([f"`{as_cell(row['name'], 120)}`", str(row["count"]), f"{row['ms']:.3f}"])
        for row in profile["kernels"]
    ]
    heading = f"{name}: {profile['busy ms']:.2f} ms busy"
    if profile["sending alone ms"]:
        heading += f", {profile['sending alone ms']:.2f} of them with sending alone"
    return [heading, "", *table_head(["kernel", "launches", "ms"]), *rows, ""]


def as_cell(name: str, length: int) -> str:
    """A kernel's name, cut to ``length`` and without the character that ends a table's cell."""
    return name.replace("|", "/")[:length]
