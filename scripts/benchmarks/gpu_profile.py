"""What the GPU ran in a training step or a function: read from torch's profiler, as a table."""

import math
from collections.abc import Callable
from typing import Any

import torch
from reporting import table_head, table_row
from torch.autograd import DeviceType

LISTED_KERNELS, LISTED_GAPS = 40, 8
# Kernels of a function that a record keeps.
KEPT_KERNELS = 30
# How the names of NCCL's kernels begin.
SENDING = "nccl"


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


def kernels_of(profile: Any) -> dict[str, Any]:
    """Summarise a profile of torch's profiler.

    Returns:
        "busy ms", the time in which at least one kernel or copy ran; "sending alone ms", the part
        of it in which nothing but NCCL's kernels ran; "kernels", each with name, count and ms, the
        longest first; and "gaps", the longest times in which nothing ran, in ms, with the kernels
        before and after.
    """
    # An annotation, such as the optimizer's step, spans kernels that are there themselves.
    events = [
        e
        for e in profile.events()
        if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
    ]
    events.sort(key=lambda e: e.time_range.start)
    kernels: dict[str, list[float]] = {}
    reached, before = events[0].time_range.start if events else 0.0, ""
    gaps = []
    for event in events:
        start, end = event.time_range.start, event.time_range.end
        kernels.setdefault(event.name, []).append((end - start) / 1e3)
        if start > reached:
            gaps.append({"ms": (start - reached) / 1e3, "after": before, "before": event.name})
        if end > reached:
            reached, before = end, event.name
    rows = [{"name": name, "count": len(ms), "ms": sum(ms)} for name, ms in kernels.items()]
    busy = _busy(events)
    return {
        "busy ms": busy,
        "sending alone ms": busy - _busy([e for e in events if not e.name.startswith(SENDING)]),
        "kernels": sorted(rows, key=lambda row: -row["ms"]),
        "gaps": sorted(gaps, key=lambda gap: -gap["ms"])[:LISTED_GAPS],
    }


def _busy(events: list[Any]) -> float:
    """ms in which at least one of ``events`` ran, given in the order in which they started."""
    busy, reached = 0.0, -math.inf
    for event in events:
        start, end = event.time_range.start, event.time_range.end
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
