"""Statistics of the selections of Lighthouse layers, to see whether and how they change.

Shapes: B batch, Hkv key-value heads, P pyramid length, n entries of a level, T strata, m picks of a
stratum.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lighthouse import LighthouseAttention, select
from lighthouse.geometry import PyramidGeometry


class Selected(NamedTuple):
    """The selection of one layer.

    Attributes:
        included: for each level, whether each entry is included, bool [B, Hkv, n].
    """

    geometry: PyramidGeometry
    included: tuple[torch.Tensor, ...]

    def picks(self, level: int) -> torch.Tensor:
        """Whether each entry of a pooled level is picked, bool [B, Hkv, n].

        An entry is picked if its children are included.
        """
        return self.included[level - 1][..., :: self.geometry.config.pooling_factor]


@contextmanager
def _recorded(model: nn.Module) -> Generator[list[Selected]]:
    """Collect the selections of every Lighthouse layer in all forward passes inside the context.

    These passes run eagerly, so that compiled code stays as it is. Layers select twice in them,
    once for the record.
    """
    recorded: list[Selected] = []

    def record(
        module: LighthouseAttention, rows: tuple[torch.Tensor, ...], options: dict[str, Any]
    ) -> None:
        q, k, v = rows
        layout = module.context_parallel
        slot = select(
            q,
            k,
            v,
            module.config,
            impl=module.impl,
            context_parallel=layout,
            documents=options.get("documents"),
        ).slot
        config = layout.per_chunk(module.config, q.shape[2])
        geometry = PyramidGeometry(config, q.shape[2] // len(layout.held))
        recorded.append(Selected(geometry, (slot >= 0).split(geometry.lengths, dim=-1)))

    layers = [module for module in model.modules() if isinstance(module, LighthouseAttention)]
    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield recorded
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def selections(model: nn.Module, forward: Callable[[], object]) -> list[Selected]:
    """The selection of each Lighthouse layer of ``model`` in ``forward``, one pass over a text."""
    with _recorded(model) as recorded:
        forward()
    # A backward would do this. Weights that stay gathered are not those that a checkpoint saves.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return recorded


def selection_statistics(
    before: list[Selected],
    after: list[Selected],
    other_heads: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Means over layers, heads, sequences and ranks of two passes over the same text.

    The geometry fixes how many entries a head includes at a level and how many it picks in a
    stratum. The statistics show the part that depends on the text, as "selection/level_L/NAME":

    - "covered", for all levels but the coarsest, which is always included whole: the share of
      positions whose entry at least one head of the layer includes.
    - "spread", for pooled levels: how the picks of a stratum lie in it. It is the number of groups
      of p neighbours that hold a pick, over the number of picks: 1 if no two picks share a group,
      1 / p if groups are picked whole. "spread_lowest" is the spread of the stratum whose picks
      lie closest together.
    - "overlap", for pooled levels: the share of the picks in ``before`` that ``after`` repeats.

    Every rank has to call it.

    Args:
        other_heads: the ranks that hold other heads of the same text, this rank included.
    """
    if not before:
        return {}
    layers = [_of_layer(*pair) for pair in zip(before, after, strict=True)]
    values = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    values |= _covered(before, other_heads)
    result = {}
    for name, each in values.items():
        lowest = name.endswith("lowest")
        value = each.amin() if lowest else each.mean()
        dist.all_reduce(value, op=dist.ReduceOp.MIN if lowest else dist.ReduceOp.SUM)
        result[f"selection/{name}"] = value.item() / (1 if lowest else dist.get_world_size())
    return result


def _covered(
    layers: list[Selected], other_heads: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """The statistic "covered" of each level but the coarsest, over heads of all ranks."""
    by_any = torch.stack([torch.cat(layer.included, dim=-1).any(dim=1) for layer in layers])
    by_any = by_any.to(torch.uint8)
    if other_heads is not None:
        dist.all_reduce(by_any, op=dist.ReduceOp.MAX, group=other_heads)
    levels = by_any.double().split(layers[0].geometry.lengths, dim=-1)[:-1]
    return {f"level_{number}/covered": level.mean() for number, level in enumerate(levels)}


def _of_layer(before: Selected, after: Selected) -> dict[str, torch.Tensor]:
    """The statistics of one layer that need no other rank."""
    values: dict[str, torch.Tensor] = {}
    for level in range(1, before.geometry.config.levels):
        picks = before.picks(level)
        spread = _spread(picks, before.geometry, level)
        values[f"level_{level}/spread"] = spread.mean()
        values[f"level_{level}/spread_lowest"] = spread.amin()
        kept = (picks & after.picks(level)).sum()
        values[f"level_{level}/overlap"] = kept.double() / picks.sum()
    return values


def _spread(picks: torch.Tensor, geometry: PyramidGeometry, level: int) -> torch.Tensor:
    """Groups of p neighbours that hold a pick, over picks: float64 [B, Hkv, T], by stratum."""
    p = geometry.config.pooling_factor
    scale = geometry.spans[-1] // geometry.spans[level]
    bounds = [bound * scale for bound in geometry.stratum_bounds]
    spreads = []
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        part = picks[..., first:last]
        # At the coarsest level a stratum need not be a whole number of groups.
        part = nn.functional.pad(part, (0, -part.shape[-1] % p))
        groups = part.unflatten(-1, (-1, p)).any(dim=-1)
        spreads.append(groups.sum(-1, dtype=torch.float64) / part.sum(-1))
    return torch.stack(spreads, dim=-1)
