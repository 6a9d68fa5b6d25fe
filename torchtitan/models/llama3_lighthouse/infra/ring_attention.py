"""Ring attention as one operation, forward and backward, which a compiler takes as it is.

Compiled in pieces, a ring would give every rank another graph. Compilers drop what a rank does not
use and share what it does twice, transfers included, so that from four ranks on some wait for what
others never send; and they keep keys, values and everything received from forward to backward.

torch's own ring is not used for what it costs: it keeps outputs and gradients in float32 and copies
them at every hop, and sends the gradients of a rank's own keys and values all the way round. Here
those stay at home, and what two ranks add up is kept in the inputs' precision and rounded once.

Shapes: B batch, H heads, W ranks, S places on a rank, D head dimension.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    ProcessGroup,
    _coalescing_manager,
    _resolve_process_group,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._ops.utils import (
    expand_to_full_mesh_op_strategy,
    register_op_strategy,
)
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

SEQUENCE_DIM = 2
NAMESPACE = "lighthouse_ring"

aten = torch.ops.aten
CPU_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
FORWARD = (
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    CPU_FORWARD,
)
BACKWARD = (
    aten._scaled_dot_product_cudnn_attention_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
    CPU_BACKWARD,
)
# Not defined here: its logsumexp is padded, to other lengths on a rank than on a part of it.
REFUSED = (
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
)
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_ring_operations: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}


def sum_dtype(dtype: torch.dtype, world_size: int) -> torch.dtype:
    """In which outputs and gradients are summed over hops; two terms are added and rounded once."""
    return dtype if world_size <= 2 else torch.promote_types(dtype, torch.float32)


class _Ring:
    """Whose keys and values this rank attends to at which hop, and with which queries.

    At hop h it holds those of the rank h places before it. Balanced, a rank holds an early and a
    late chunk of the sequence. Of an earlier rank's, all queries see the early chunk alone; of a
    later rank's, the late queries see both. In order, all queries see all or nothing.
    """

    def __init__(self, group: ProcessGroup, balanced: bool, gathers: bool) -> None:
        self.group, self.balanced, self.gathers = group, balanced, gathers
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def pass_on(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Start to send tensors [B, H, S, D] to the next rank; the result waits for the last one's.

        They travel as [B, S, H, D], as which a model's lie already.
        """
        rows = [tensor.transpose(1, 2).contiguous() for tensor in tensors]
        received = [torch.empty_like(x) for x in rows]
        sends, receives = [0] * self.size, [0] * self.size
        sends[(self.rank + 1) % self.size] = receives[self.rank - 1] = len(rows[0])

        def start() -> list[dist.Work]:
            return [
                dist.all_to_all_single(into, x, receives, sends, group=self.group, async_op=True)
                for into, x in zip(received, rows, strict=True)
            ]

        if rows[0].is_cuda:
            # One kernel: attention's stay on all multiprocessors and keep out what has not started
            # before them. Not P2P, whose memory torch reuses only when the host sees it end.
            with _coalescing_manager(self.group, rows[0].device, async_ops=True) as together:
                start()
            works = [together]
        else:
            works = start()

        def wait() -> list[torch.Tensor]:
            for work in works:
                work.wait()
            return [x.transpose(1, 2) for x in received]

        return wait

    def gather(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Start to gather tensors [B, H, S, D] of all ranks.

        The result waits for those of the rank before this one, then of the one before that.
        """
        rows = [tensor.transpose(1, 2).contiguous() for tensor in tensors]
        gathered = [x.new_empty(self.size, *x.shape) for x in rows]
        works = [
            dist.all_gather_into_tensor(whole.flatten(0, 1), x, self.group, async_op=True)
            for whole, x in zip(gathered, rows, strict=True)
        ]
        ranks = iter((self.rank - hop) % self.size for hop in range(1, self.size))

        def wait() -> list[torch.Tensor]:
            for work in works:
                work.wait()
            rank = next(ranks)
            return [whole[rank].transpose(1, 2) for whole in gathered]

        return wait

    def seen(self, hop: int, length: int) -> tuple[slice, slice] | None:
        """Of ``length`` places each, the queries that see something at ``hop``, and what."""
        everything = slice(0, length)
        if hop == 0:
            return everything, everything
        if hop <= self.rank:
            return everything, slice(0, length // 2) if self.balanced else everything
        return (slice(length // 2, length), everything) if self.balanced else None

    def hops(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield every hop's number, keys and values, the next ones under way meanwhile."""
        arriving = (self.gather if self.gathers else self.pass_on)((key, value))
        yield 0, key, value
        for hop in range(1, self.size):
            held = arriving()
            if not self.gathers and hop < self.size - 1:
                arriving = self.pass_on(held)
            yield hop, *held


def _ring_forward(attend: Callable, ring: _Ring, query, key, value) -> tuple:
    """Causal attention over all ranks' keys and values: what ``attend`` returns for one rank's."""
    for hop, keys, values in ring.hops(key, value):
        if (seen := ring.seen(hop, query.shape[SEQUENCE_DIM])) is None:
            continue
        queries, places = seen
        found, logsumexp, *others = attend(
            query[:, :, queries], keys[:, :, places], values[:, :, places], is_causal=hop == 0
        )
        if hop == 0:
            out = found.to(sum_dtype(found.dtype, ring.size))
            total, first_others = logsumexp, others
            continue
        out_here, total_here = out[:, :, queries], total[:, :, queries]
        # cuDNN's has a last dimension already.
        weight = torch.sigmoid(logsumexp - total_here).view(*found.shape[:3], 1)
        torch.addcmul(out_here * (1 - weight), found, weight, out=out_here)
        total_here.copy_(torch.logaddexp(total_here, logsumexp))
    return out.to(query.dtype), total, *first_others


def _ring_backward(attend: Callable, ring: _Ring, grad, query, key, value, out, logsumexp) -> tuple:
    """Gradients of ``_ring_forward``; ``attend`` is the backward of its ``attend``."""
    dtype = sum_dtype(key.dtype, ring.size)
    length, key_heads = key.shape[SEQUENCE_DIM], key.shape[1]

    def gradients(keys, values, heads: slice, queries: slice, places: slice, causal: bool) -> list:
        """Of ``queries`` and of ``places`` of the keys and values, of ``heads`` of the latter."""
        group = query.shape[1] // key_heads
        of_queries = slice(None), slice(heads.start * group, heads.stop * group), queries
        of_pairs = slice(None), heads, places
        return attend(
            grad[of_queries],
            query[of_queries],
            keys[of_pairs],
            values[of_pairs],
            out[of_queries],
            logsumexp[of_queries].contiguous(),  # as kernels take it to be
            is_causal=causal,
        )

    def add(total: torch.Tensor | None, rows: torch.Tensor, at: slice, like: torch.Tensor):
        """``rows`` added to places of a total, None as yet, in the shape of ``like``."""
        if total is None and rows.shape == like.shape:
            return rows.to(dtype)
        total = torch.zeros_like(like, dtype=dtype) if total is None else total
        total[:, :, at].add_(rows)
        return total

    def own(heads: slice) -> list:
        everything = slice(0, length)
        return gradients(key, value, heads, everything, everything, True)

    # Of the work at home, half of the heads waits until the last gradients are on their way there,
    # to hide their journey.
    middle = (key_heads + 1) // 2
    of_queries = arriving = None
    for hop, keys, values in ring.hops(key, value):
        if hop == 0:
            at_home = [own(slice(0, middle))]
            continue
        # Gradients follow their keys and values round the ring, one hop behind.
        of_pairs = arriving() if arriving else [None, None]
        if (seen := ring.seen(hop, length)) is not None:
            queries, places = seen
            found, *pair = gradients(keys, values, slice(0, key_heads), queries, places, False)
            of_queries = add(of_queries, found, queries, query)
            of_pairs = [add(*both, places, key) for both in zip(of_pairs, pair, strict=True)]
            del found, pair
        elif hop == 1:
            of_pairs = [torch.zeros_like(key, dtype=dtype) for _ in of_pairs]
        arriving = ring.pass_on(of_pairs)
    # What is done with makes room: a dense layer's are gigabytes each.
    del keys, values
    if middle < key_heads:
        at_home.append(own(slice(middle, key_heads)))
    if of_queries is None:
        of_queries = torch.zeros_like(query)
    elsewhere = [of_queries, *arriving()]
    parts = [list(of_heads) for of_heads in zip(*at_home, strict=True)]
    del of_queries, of_pairs, at_home, arriving
    return tuple(_sum(parts.pop(0), elsewhere.pop(0), like) for like in (query, key, value))


def _sum(parts: list[torch.Tensor], other: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``parts`` joined along the heads, plus ``other``, rounded once to ``like``'s dtype."""
    total = torch.empty_like(like)
    sizes = [part.shape[1] for part in parts]
    for into, part, rows in zip(total.split(sizes, 1), parts, other.split(sizes, 1), strict=True):
        torch.add(part, rows, out=into)
    return total


def _laid_out(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``rows`` in the memory layout of ``empty_like(like)``, which compiled code can count on."""
    assert rows.shape == like.shape, "heads of queries, keys and values must be equally wide"
    strides = torch.empty_like(like, device="meta").stride()
    return rows if rows.stride() == strides else torch.empty_like(like).copy_(rows)


def _define(operation: torch._ops.OpOverload, is_forward: bool) -> None:
    """Define the ring's version of ``operation``: the same arguments after those of the ring."""
    name, _, rest = str(operation._schema).removeprefix("aten::").partition("(")
    _library.define(f"{name}(str group_name, bool balanced, bool gathers, {rest}")
    names = [argument.name for argument in operation._schema.arguments]
    rows = ["query", "key", "value"]
    if not is_forward:
        rows = [names[0], *rows, "out", "logsumexp"]

    def bound(given: tuple, options: dict) -> dict:
        arguments = dict(zip(names, given, strict=False)) | options
        if not arguments["is_causal"] or arguments.get("dropout_p"):
            raise NotImplementedError("ring attention is causal and without dropout")
        if "compute_log_sumexp" in names:
            arguments["compute_log_sumexp"] = True
        return arguments

    def with_layout(results: Sequence, arguments: dict) -> tuple:
        inputs = [arguments[name] for name in ("query", "key", "value")]
        if is_forward:
            out, logsumexp, *others = results
            return _laid_out(out, inputs[0]), logsumexp.contiguous(), *others
        return tuple(_laid_out(*pair) for pair in zip(results, inputs, strict=True))

    def run(group_name: str, balanced: bool, gathers: bool, *given, **options) -> tuple:
        arguments = bound(given, options)

        def attend(*values, is_causal: bool) -> tuple:
            changed = arguments | dict(zip(rows, values, strict=True)) | {"is_causal": is_causal}
            for limit, of in (("max_q", "query"), ("max_k", "key")):
                if limit in changed:
                    changed[limit] = changed[of].shape[SEQUENCE_DIM]
            return operation(**changed)

        ring = _Ring(_resolve_process_group(group_name), balanced, gathers)
        if ring.size == 1:
            return with_layout(operation(**arguments), arguments)
        function = _ring_forward if is_forward else _ring_backward
        return with_layout(function(attend, ring, *(arguments[name] for name in rows)), arguments)

    def fake(group_name: str, balanced: bool, gathers: bool, *given, **options) -> tuple:
        arguments = bound(given, options)
        return with_layout(operation(**arguments), arguments)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _ring_operations[operation] = getattr(getattr(torch.ops, NAMESPACE), name).default


for _operation in FORWARD:
    _define(_operation, is_forward=True)
for _operation in BACKWARD:
    _define(_operation, is_forward=False)


def _handler(operation: torch._ops.OpOverload, args: tuple, kwargs: dict) -> object:
    """What DTensor does for attention over a sharded sequence."""
    dispatcher = DTensor._op_dispatcher
    info = dispatcher.unwrap_to_op_info(operation, args, kwargs)
    dispatcher.sharding_propagator.propagate(info)
    assert not info.output_sharding.needs_redistribute, "attention's inputs are sharded unlike"
    options = torch_ring._cp_options
    results = _ring_operations[operation](
        info.compute_mesh.get_group().group_name,
        options.enable_load_balance,
        options.rotate_method is torch_ring._RotateMethod.ALL_GATHER,
        *info.local_args,
        **info.local_kwargs,
    )
    return dispatcher.wrap(results, info.output_sharding.output_spec)


def _refuse(operation: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
    raise NotImplementedError(
        f"ring attention runs cuDNN's and flash attention, in bfloat16 or float16, not {operation}"
    )


def install_ring_attention() -> None:
    """Have torch's context parallelism run these operations, and take the CPU's attention too.

    Before torch enables its dispatcher.
    """
    torch_ring.custom_ops.update(dict.fromkeys(_ring_operations, _handler))
    # Where torch's own ring would take over unasked.
    torch_ring.custom_ops.update(dict.fromkeys(REFUSED, _refuse))
    for operation, outputs, tensors in ((CPU_FORWARD, 2, 3), (CPU_BACKWARD, 3, 6)):

        def strategy(op_schema, count=outputs + tensors, outputs=outputs):
            placements = [[Shard(SEQUENCE_DIM)] * count, [Replicate()] * count]
            return expand_to_full_mesh_op_strategy(
                op_schema.get_mesh_from_args(validate=False),
                op_schema,
                placements,
                input_index=outputs,
            )

        register_op_strategy(operation)(strategy)
