"""The metrics of a run, and its lines on the console."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from torchtitan.models.llama3_lighthouse import metrics
from torchtitan.models.llama3_lighthouse.metrics import STEP_LINE, TimeLeft


class Clock:
    """Stands in for the module ``time``."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make a processor whose upstream part does nothing but hand the metrics to the loggers."""
    speeds = {metrics.THROUGHPUT: 1234.5, metrics.MFU: 40.0, metrics.MEMORY: 1.5}

    def begin(self, *_) -> None:
        self.gpu_peak_flops = make.peak
        self.logger = metrics.BaseLogger()
        self.ntokens_since_last_log = 0
        self.seen: list[tuple[int, float]] = []

    def note(self) -> None:
        self.seen.append((self.ntokens_since_last_log, metrics.time.perf_counter()
                          - self.time_last_log))  # fmt: skip
        self.ntokens_since_last_log, self.time_last_log = 0, metrics.time.perf_counter()

    def log(self, step, loss, maximum, norm, extra) -> None:
        note(self)
        self.logger.log({metrics.LOSS: loss, **speeds, **extra}, step)

    def log_validation(self, loss, step, extra) -> None:
        note(self)
        self.logger.log({"validation_metrics/throughput(tps)": 99.5}, step)

    upstream = metrics.MetricsProcessor
    for name, method in (("__init__", begin), ("log", log), ("log_validation", log_validation)):
        monkeypatch.setattr(upstream, name, method)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)

    def make(rank: int = 0, pipeline: int = 1, peak: float = 1e15, steps: int = 1200):
        make.peak = peak
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        config = SimpleNamespace(
            job=SimpleNamespace(dump_folder=str(tmp_path)),
            parallelism=SimpleNamespace(pipeline_parallel_schedule="1F1B"),
            training=SimpleNamespace(steps=steps),
            metrics=SimpleNamespace(disable_color_printing=True),
        )
        dims = SimpleNamespace(pp_enabled=pipeline > 1, pp=pipeline, world_size=8)
        return metrics.LighthouseMetricsProcessor(config, dims)

    return make


@pytest.mark.parametrize(("pipeline", "logging_rank"), [(1, 0), (2, 4)])
def test_the_rank_that_upstream_logs_from_writes(make, tmp_path, pipeline, logging_rank) -> None:
    """Upstream logs from the first rank, or from the first rank of the last pipeline stage."""
    for rank in range(8):
        processor = make(rank, pipeline)
        processor.logger.log({"rank": rank}, 1)
        processor.logger.close()
    assert (tmp_path / "metrics.jsonl").read_text() == f'{{"step": 1, "rank": {logging_rank}}}\n'


def test_validation_inside_a_log_interval_leaves_it_whole(make, clock) -> None:
    """Here are two steps of 10 s and 100 tokens each, with 7 s of validation between them."""
    processor = make()
    processor.start_clock()
    for step in (1, 2):
        clock.now += 10
        processor.ntokens_since_last_log += 100
        processor.record_step(1.0, "dense")
        if step == 1:
            processor.start_validation()
            clock.now += 7
            processor.ntokens_since_last_log += 30
            processor.log_validation(1.0, step)
    processor.log(2, 1.0, 1.0, 1.0)
    assert processor.seen == [(30, 7.0), (200, 20.0)]


def test_lines_on_the_console(make, clock, caplog) -> None:
    caplog.set_level("INFO")
    processor = make()
    processor.time_left = TimeLeft(["dense"] * 1200, {"dense": 1.0})
    processor.start_clock()
    processor.record_step(1.0, "dense")
    processor.log(1, 6.49, 6.5, 2.4556)
    processor.record_step(1.0, "dense")
    clock.now += 3.0
    processor.log(2, 1.998579, 2.0, 0.5797)
    processor.start_validation()
    processor.log_validation(2.25, 2)
    first, second, held_out = (record.getMessage() for record in caplog.records)
    # The first step compiles, so it tells nothing of the time left.
    assert first == (
        "step     1 of 1,200  loss  6.49000  grad norm   2.4556      1,234 tokens/s each  "
        "MFU 40.0%    1.50 GiB"
    )
    assert second.startswith("step     2 of 1,200  loss  1.99858  grad norm   0.5797 ")
    assert second.endswith("  59:54 left")
    assert held_out == "step     2 of 1,200  held-out loss  2.25000        100 tokens/s each"
    assert STEP_LINE.search(second).groups() == ("2", "1.99858", "1,234")
    assert STEP_LINE.search(held_out) is None


def test_mfu_is_left_out_where_no_peak_is_known(make, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    processor = make(peak=float("inf"))
    processor.start_clock()
    processor.record_step(1.0, "dense")
    processor.log(1, 1.0, 1.0, 1.0)
    processor.logger.close()
    assert "MFU" not in caplog.text
    assert metrics.MFU not in (tmp_path / "metrics.jsonl").read_text()
    assert metrics.THROUGHPUT in (tmp_path / "metrics.jsonl").read_text()


def test_time_left_counts_the_steps_of_each_attention() -> None:
    attentions = ["lighthouse"] * 6 + ["dense"] * 4
    left = TimeLeft(attentions, {"lighthouse": 1.0, "dense": 4.0})
    left.measured(["lighthouse"], 60.0)
    # The first interval may hold compilation.
    assert left.after(1) is None
    left.measured(["lighthouse"] * 2, 6.0)
    # Dense steps have not been measured: their FLOPs say that they take four times as long.
    assert left.after(2) == 4 * 3.0 + 4 * 12.0
    # So may the first interval that has dense steps.
    left.measured(["lighthouse", "dense"], 100.0)
    assert left.after(7) == 3 * 12.0
    left.measured(["dense"], 5.0)
    assert left.after(7) == 3 * 5.0
    assert left.after(5) == 3.0 + 4 * 5.0
    assert left.after(10) == 0
    # Single dense steps within the stage: 3 of 10 units each, 4 times that for the dense one.
    left.measured(["lighthouse", "lighthouse", "dense", "lighthouse"], 14.0)
    assert left.seconds == {"lighthouse": 2.0, "dense": 8.0}


def test_memory_in_graphs_counts_as_active() -> None:
    """Peak and share of the device's memory; what is reserved holds the graphs already."""
    monitor = metrics.MemoryMonitor(metrics.device_type)
    before = monitor.get_peak_stats()
    monitor.in_graphs = 2**40
    after = monitor.get_peak_stats()
    assert after.max_active_gib - before.max_active_gib == pytest.approx(1024, abs=1)
    share = 100 * 2**40 / monitor.device_capacity
    assert after.max_active_pct - before.max_active_pct == pytest.approx(share, rel=0.01)
    assert after.max_reserved_gib == pytest.approx(before.max_reserved_gib, abs=1)
