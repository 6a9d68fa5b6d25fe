"""Ring attention as one operation, forward and backward, which a compiler takes as it is.

Compiled in pieces, a ring would give every rank another graph. Compilers drop what a rank does not
use and share what it does twice, transfers included, so that from four ranks on some wait for what
others never send; and they keep keys, values and everything received from forward to backward.

torch's own ring is not used for what it costs: it copies outputs and gradients in float32 at every
hop, and sends the gradients of a rank's own keys and values all the way round, the last of them
while nothing is computed. Here they stay at home, and half of the work there is left for the time
in which the others' gradients come home.

Shapes: B batch, H heads, W ranks, S places on a rank, D head dimension.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group
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
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_ring_operations: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}


def sum_dtype(dtype: torch.dtype, world_size: int) -> torch.dtype:
    """In which gradients are summed over ranks; two terms are added, and rounded, once."""
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
        """Start to send contiguous tensors to the next rank; the result waits for the last one's.

        All in one transfer: attention kernels that stay on every multiprocessor keep out what has
        not started before them.
        """
        sent, received = list(tensors), [torch.empty_like(rows) for rows in tensors]
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(transfer, rows, group=self.group, group_peer=peer % self.size)
                for transfer, peer, several in (
                    (dist.isend, self.rank + 1, sent),
                    (dist.irecv, self.rank - 1, received),
                )
                for rows in several
            ]
        )

        def wait() -> list[torch.Tensor]:
            for work in works:
                work.wait()
            sent.clear()
            return received

        return wait

    def gather(self, tensors: Sequence[torch.Tensor]) -> Callable[[int], list[torch.Tensor]]:
        """Start to gather contiguous tensors of all ranks; the result waits for those of one."""
        gathered = [rows.new_empty(self.size, *rows.shape) for rows in tensors]
        works = [
            dist.all_gather_into_tensor(whole.flatten(0, 1), rows, self.group, async_op=True)
            for whole, rows in zip(gathered, tensors, strict=True)
        ]

        def wait(rank: int) -> list[torch.Tensor]:
            for work in works:
                work.wait()
            return [whole[rank] for whole in gathered]

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
        held = [key.contiguous(), value.contiguous()]
        if self.gathers:
            of_rank = self.gather(held)
        else:
            arriving = self.pass_on(held)
        yield 0, key, value
        for hop in range(1, self.size):
            if self.gathers:
                yield hop, *of_rank((self.rank - hop) % self.size)
                continue
            held = arriving()
            if hop < self.size - 1:
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
        out_here.copy_(torch.addcmul(out_here * (1 - weight), found, weight))
        total_here.copy_(torch.logaddexp(total_here, logsumexp))
    return out.to(query.dtype), total, *first_others


def _ring_backward(attend: Callable, ring: _Ring, grad, query, key, value, out, logsumexp) -> tuple:
    """Gradients of ``_ring_forward``; ``attend`` is the backward of its ``attend``."""
    length, key_heads = key.shape[SEQUENCE_DIM], key.shape[1]
    grad_query = torch.zeros_like(query, dtype=sum_dtype(query.dtype, ring.size))

    def gradients(hop: int, keys, values, heads: slice, queries: slice, places: slice) -> list:
        """Of ``places`` of the keys and values of ``heads``; that of queries is added up."""
        group = query.shape[1] // key_heads
        of_queries = slice(None), slice(heads.start * group, heads.stop * group), queries
        of_keys = slice(None), heads, places
        grad_queries, *of_pairs = attend(
            grad[of_queries],
            query[of_queries],
            keys[of_keys],
            values[of_keys],
            out[of_queries],
            logsumexp[of_queries].contiguous(),  # as kernels take it to be
            is_causal=hop == 0,
        )
        grad_query[of_queries].add_(grad_queries)
        return of_pairs

    # The second half of the heads waits until the last gradients are on their way home.
    everywhere, all_heads = slice(0, length), slice(0, key_heads)
    halves = _halves(key_heads)

    def arriving() -> list[torch.Tensor]:
        """Gradients follow their keys and values round the ring, one hop behind; none as yet."""
        dtype = sum_dtype(key.dtype, ring.size)
        return [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value)]

    for hop, keys, values in ring.hops(key, value):
        if hop == 0:
            at_home = [gradients(hop, keys, values, halves[0], everywhere, everywhere)]
            continue
        seen = ring.seen(hop, length)
        if seen is not None:
            found = gradients(hop, keys, values, all_heads, *seen)
        passing = arriving()
        if seen is not None:
            for total, rows in zip(passing, found, strict=True):
                total[:, :, seen[1]].add_(rows)
        arriving = ring.pass_on(passing)
    at_home += [gradients(0, key, value, heads, everywhere, everywhere) for heads in halves[1:]]
    totals = torch.empty_like(key), torch.empty_like(value)
    for index, (total, from_others) in enumerate(zip(totals, arriving(), strict=True)):
        for heads, found in zip(halves, at_home, strict=True):
            torch.add(found[index], from_others[:, heads], out=total[:, heads])
    return grad_query.to(query.dtype), *totals


def _halves(heads: int) -> list[slice]:
    middle = (heads + 1) // 2
    return [slice(0, middle), slice(middle, heads)][: min(heads, 2)]


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


def install_ring_attention() -> None:
    """Have torch's context parallelism run these operations, and take the CPU's attention too.

    Before torch enables its dispatcher.
    """
    torch_ring.custom_ops.update(dict.fromkeys(_ring_operations, _handler))
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
