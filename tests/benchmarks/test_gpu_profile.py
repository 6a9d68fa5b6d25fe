"""Summaries of what a GPU ran."""

from types import SimpleNamespace

import pytest
from gpu_profile import COUNTED, function_table, kernels_of, wait_table
from torch.autograd import DeviceType


def event(name: str, start: float, end: float, **more: object) -> SimpleNamespace:
    """A kernel from ``start`` to ``end`` in microseconds."""
    time_range = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=time_range, device_type=DeviceType.CUDA, **more)


def test_kernels_that_overlap_count_once() -> None:
    events = [
        event("matmul", 0, 4000),
        event("ncclDevKernel_SendRecv", 3000, 6000),
        event("add", 5500, 7000),
        event("matmul", 9000, 9500),
        event("ncclDevKernel_SendRecv", 9100, 9200),
        event("a step", 0, 10_000, is_user_annotation=True),
    ]
    profile = SimpleNamespace(events=lambda: list(reversed(events)))
    found = kernels_of(profile)
    assert found["busy ms"] == pytest.approx(7.5)
    # From the end of the first product to the sum.
    assert found["sending alone ms"] == pytest.approx(1.5)
    assert [(row["name"], row["count"], row["ms"]) for row in found["kernels"]] == [
        ("matmul", 2, 4.5), ("ncclDevKernel_SendRecv", 2, 3.1), ("add", 1, 1.5)
    ]  # fmt: skip
    assert found["gaps"] == [{"ms": 2.0, "after": "add", "before": "matmul"}]
    assert [list(wait.values()) for wait in found["waits"]] == [
        [2.0, 1.0, 0.0, "add", "", "matmul"],
        [1.5, 1.0, 1.5, "matmul", "ncclDevKernel_SendRecv", "add"],
    ]
    assert function_table("layer", found)[0] == (
        "layer: 7.50 ms busy, 1.50 of them with sending alone"
    )


def test_sending_by_several_groups_counts_once_in_each_wait() -> None:
    """One kernel lies across two waits, others end before the second, and many follow."""
    events = [event("attend", 0, 100), event("ncclA", 50, 700), event("ncclB", 110, 180)]
    events += [event("merge", 200, 500), event("loss", 1000, 1100)]
    events += [event("ncclB", start, start + 10) for start in range(650, 900, 20)]
    found = kernels_of(SimpleNamespace(events=lambda: events))["waits"]
    # From 500 to 700, and then ten of ten microseconds.
    assert [(wait["sent"], wait["after"]) for wait in found] == [
        ("ncclA and ncclB", "merge"), ("ncclA and ncclB", "attend")
    ]  # fmt: skip
    assert [wait["sending ms"] for wait in found] == pytest.approx([0.3, 0.1])


def test_nothing_ran() -> None:
    found = kernels_of(SimpleNamespace(events=list))
    times = {"busy ms": 0.0, "sending alone ms": 0.0}
    assert found == times | {"kernels": [], "gaps": [], "waits": []}


def test_several_steps_are_averaged_without_the_first() -> None:
    events = [event("first", 0, 900)]
    for begin in (1000, 3000):
        events += [
            event(COUNTED, begin, begin + 1900, is_user_annotation=True),
            event("attend", begin, begin + 1000),
            event("nccl", begin + 900, begin + 1300),
            event("loss", begin + 1500, begin + 1900),
        ]
    found = kernels_of(SimpleNamespace(events=lambda: events), steps=2)
    assert found["busy ms"] == pytest.approx(1.7)
    assert found["sending alone ms"] == pytest.approx(0.3)
    assert [(row["name"], row["count"]) for row in found["kernels"]] == [
        ("attend", 1), ("nccl", 1), ("loss", 1)
    ]  # fmt: skip
    within, between = found["waits"]
    assert within["count"] == 1 and within["ms"] == pytest.approx(0.5)
    assert within["sending ms"] == pytest.approx(0.3)
    assert between["count"] == 0.5 and between["ms"] == pytest.approx(0.05)
    assert wait_table(found["waits"])[-2:] == [
        "| 0.50 | 0.30 | 1 | `attend` | `nccl` | `loss` |",
        "| 0.05 | 0.00 | 0.5 | `loss` | `` | `attend` |",
    ]
