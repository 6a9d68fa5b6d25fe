"""The logged statistics of selections against counts of single entries; metrics and their file."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_model import METHOD, N, build

from lighthouse import LighthouseAttention, reference
from lighthouse.geometry import PyramidGeometry
from torchtitan.models.llama3_lighthouse import metrics
from torchtitan.models.llama3_lighthouse.model.model import LighthouseTransformer
from torchtitan.models.llama3_lighthouse.selection_statistics import (
    selection_statistics,
    selections,
)

GEOMETRY = PyramidGeometry(METHOD, N)
PICKS = METHOD.picks_per_stratum


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def by_oracle(model: LighthouseTransformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The slots that the oracle gives each Lighthouse layer, [B, Hkv, P]."""
    slots = []

    def record(module, rows, options):
        slots.append(reference.select(*rows, module.config)[1])

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True)
             for module in model.modules() if isinstance(module, LighthouseAttention)]  # fmt: skip
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return slots


def entries(slot: torch.Tensor, level: int) -> set[int]:
    """Numbers of the included entries of a level, of one sequence and head."""
    first = GEOMETRY.offsets[level]
    row = slot[first : first + GEOMETRY.lengths[level]]
    return {i for i, place in enumerate(row.tolist()) if place >= 0}


def test_statistics_are_what_counting_gives(one_rank) -> None:
    model = build()
    tokens = torch.randint(0, 320, (2, N), generator=torch.Generator().manual_seed(1))
    slots_before = by_oracle(model, tokens)
    before = selections(model, lambda: model(tokens))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            parameter += 0.02 * noise
    slots_after = by_oracle(model, tokens)
    after = selections(model, lambda: model(tokens))
    assert len(before) == len(slots_before) == 2

    counted: dict[str, list[float]] = {}
    for old, new in zip(slots_before, slots_after, strict=True):
        for level in range(METHOD.levels):
            for sequence in range(2):
                if level < METHOD.levels - 1:
                    by_any = set.union(*(entries(slot, level) for slot in old[sequence]))
                    share = len(by_any) / GEOMETRY.lengths[level]
                    counted.setdefault(f"level_{level}/covered", []).append(share)
                for head in range(2) if level else ():
                    picks, other = ({i // 2 for i in entries(slot[sequence, head], level - 1)}
                                    for slot in (old, new))  # fmt: skip
                    assert len(picks) == METHOD.top_k
                    counted.setdefault(f"level_{level}/overlap", []).append(
                        len(picks & other) / len(picks)
                    )
                    span = GEOMETRY.spans[level]
                    strata = Counter(i * span // (N // GEOMETRY.strata) for i in picks)
                    assert set(strata.values()) == {PICKS}
                    groups = Counter(i * 2 * span // (N // GEOMETRY.strata)
                                     for i in {i // 2 for i in picks})  # fmt: skip
                    spreads = [groups[stratum] / PICKS for stratum in strata]
                    counted.setdefault(f"level_{level}/spread", []).extend(spreads)
    expected = {f"selection/{name}": sum(each) / len(each) for name, each in counted.items()}
    for level in (1, 2):
        lowest = min(counted[f"level_{level}/spread"])
        expected[f"selection/level_{level}/spread_lowest"] = lowest
    assert selection_statistics(before, after) == pytest.approx(expected)
    assert 0.1 < expected["selection/level_1/overlap"] < 0.95
    same = selection_statistics(before, before)
    assert same["selection/level_1/overlap"] == same["selection/level_2/overlap"] == 1


def test_recording_leaves_the_model_as_it_was(one_rank) -> None:
    """It leaves no hook or gradient, draws no random number, and compiles nothing."""
    model = build()
    tokens = torch.randint(0, 320, (1, N), generator=torch.Generator().manual_seed(1))
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    for index in model.layers:
        model.layers[index] = torch.compile(model.layers[index], backend=backend, fullgraph=True)
    expected = model(tokens)
    graphs = len(compiled)
    state = torch.get_rng_state()
    recorded = selections(model, lambda: model(tokens))
    assert len(recorded) == 2 and graphs > 0
    assert torch.equal(torch.get_rng_state(), state)
    out = model(tokens)
    assert torch.equal(out, expected) and out.requires_grad
    assert len(compiled) == graphs
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.use_attention("dense")
    assert selection_statistics([], []) == {}


def test_metrics_survive_a_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "deep/metrics.jsonl"
    first = metrics.JSONLinesLogger(path)
    first.log({"loss": 1.5}, 3)
    # The line is in the file before the file is closed.
    assert path.read_text() == '{"step": 3, "loss": 1.5}\n'
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    again = metrics.JSONLinesLogger(path)
    again.log({"loss": 1.25}, 4)
    again.close()
    assert path.read_text().splitlines()[2] == '{"step": 4, "loss": 1.25}'
