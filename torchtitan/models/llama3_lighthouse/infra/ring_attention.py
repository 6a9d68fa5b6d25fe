"""Ring attention as two operations, forward and backward, that a compiler does not look into.

A compiler that looked into them would make a different graph for every rank. It would drop what a
rank does not use and merge what a rank computes twice, transfers included. From four ranks on,
some would then wait for transfers that others never start. It would also keep keys, values and
everything received from forward to backward.

torch's own ring is not used because of its cost. It keeps outputs and gradients in float32, copies
them at every hop, and sends the gradients of a rank's own keys and values all the way round. Here
those gradients stay at home. On two ranks, sums over hops have two terms; they are kept in the
inputs' precision and rounded once.

Shapes: B batch, H heads, W ranks, S positions on a rank, D head dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    ProcessGroup,
    _coalescing_manager,
    _resolve_process_group,
)
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import OpSchema, OpStrategy
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
# Memory-efficient attention pads its logsumexp: that of half the queries is not half as long.
REFUSED = (
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
)
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_ring_operations: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}

# Attention over the keys and values of one rank; ``is_causal`` is a keyword argument.
Attend = Callable[..., Sequence[Any]]
# Waits for tensors to arrive and returns them.
Arrival = Callable[[], list[torch.Tensor]]


def sum_dtype(dtype: torch.dtype, world_size: int) -> torch.dtype:
    """Precision in which outputs and gradients of ``dtype`` are summed over hops.

    A sum of two terms is rounded once even without more precision; longer sums are in float32.
    """
    return dtype if world_size <= 2 else torch.promote_types(dtype, torch.float32)


class _Ring:
    """The ring as one rank sees it: what it holds at each hop, and which parts attend.

    At hop h a rank holds the keys and values of the rank h places before it; at hop 0 they are its
    own. The layout decides how much of the later hops causal attention leaves:

    - Balanced, each rank holds an early and a late chunk of the sequence. The early chunk of an
      earlier rank comes before all queries here, and its late chunk after all of them. Both chunks
      of a later rank come between the early queries here and the late ones.
    - Contiguous, all queries here come after an earlier rank's chunk and before a later rank's.

    Args:
        group: the process group of the W ranks.
        balanced: whether the layout is the balanced one.
        gathers: fetch the keys and values of all ranks at once, rather than pass them round.
    """

    def __init__(self, group: ProcessGroup, balanced: bool, gathers: bool) -> None:
        self.group, self.balanced, self.gathers = group, balanced, gathers
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def pass_on(self, tensors: Sequence[torch.Tensor]) -> Arrival:
        """Start to send ``tensors`` to the next rank and to receive the previous rank's.

        They travel as [B, S, H, D], because that is how a model's lie in memory already.

        Args:
            tensors: [B, H, S, D] each, of the same shapes and dtypes on all ranks.

        Returns:
            A function that waits for the previous rank's tensors and returns them.
        """
        rows = [tensor.transpose(1, 2).contiguous() for tensor in tensors]
        received = [torch.empty_like(x) for x in rows]
        sends, receives = [0] * self.size, [0] * self.size
        sends[(self.rank + 1) % self.size] = receives[self.rank - 1] = len(rows[0])

        def start() -> list[dist.Work]:
            # pyrefly: ignore[bad-return]  Only a rank outside the group gets None instead of work.
            return [
                dist.all_to_all_single(into, x, receives, sends, group=self.group, async_op=True)
                for into, x in zip(received, rows, strict=True)
            ]

        if rows[0].is_cuda:
            # All tensors go in one kernel. Attention's kernels occupy all multiprocessors, and a
            # transfer that has not started before them waits until they end. Point-to-point sends
            # would not do: torch reuses their memory only once the host has seen them end.
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

    def gather(self, tensors: Sequence[torch.Tensor]) -> Arrival:
        """Start to gather the ``tensors`` of all ranks, each [B, H, S, D].

        Returns:
            A function to be called once for each hop after the first. It returns the tensors of
            the rank before this one, then those of the rank before that, and so on.
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

    def attending(self, hop: int, length: int) -> tuple[slice, slice] | None:
        """Slices of queries and keys that attend at this hop, or None.

        Args:
            length: S, the positions of the queries here and of the keys that are held.
        """
        everything = slice(0, length)
        if hop == 0:
            return everything, everything
        if hop <= self.rank:
            return everything, slice(0, length // 2) if self.balanced else everything
        return (slice(length // 2, length), everything) if self.balanced else None

    def hops(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield each hop's number, keys and values, while the next hop's are on their way.

        Args:
            key, value: this rank's own, [B, H, S, D] each.
        """
        arriving = (self.gather if self.gathers else self.pass_on)((key, value))
        yield 0, key, value
        for hop in range(1, self.size):
            keys, values = arriving()
            if not self.gathers and hop < self.size - 1:
                arriving = self.pass_on((keys, values))
            yield hop, keys, values


def _ring_forward(
    attend: Attend, ring: _Ring, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple:
    """Causal attention of this rank's queries over the keys and values of all ranks.

    Outputs of two hops are averaged with the weights of their softmax denominators, as in online
    softmax: ``logsumexp`` holds the logarithms of the denominators.

    Args:
        attend: returns output, logsumexp and further results for one rank's keys and values.
        query, key, value: this rank's, [B, H, S, D] each.

    Returns:
        The results of ``attend``. Those after output and logsumexp are of hop 0.
    """
    for hop, keys, values in ring.hops(key, value):
        if (attending := ring.attending(hop, query.shape[SEQUENCE_DIM])) is None:
            continue
        queries_here, keys_here = attending
        found, logsumexp, *others = attend(
            query[:, :, queries_here],
            keys[:, :, keys_here],
            values[:, :, keys_here],
            is_causal=hop == 0,
        )
        if hop == 0:
            out = found.to(sum_dtype(found.dtype, ring.size))
            total, first_others = logsumexp, others
            continue
        out_here, total_here = out[:, :, queries_here], total[:, :, queries_here]
        # cuDNN's logsumexp already has a last dimension of one; the other backends' has none.
        weight = torch.sigmoid(logsumexp - total_here).view(*found.shape[:3], 1)
        torch.addcmul(out_here * (1 - weight), found, weight, out=out_here)
        total_here.copy_(torch.logaddexp(total_here, logsumexp))
    return out.to(query.dtype), total, *first_others


def _ring_backward(
    attend: Attend,
    ring: _Ring,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of ``_ring_forward`` with respect to this rank's query, key and value.

    Keys and values go round as in forward. The gradients of each rank's keys and values follow
    them, one hop behind: every rank that they visit adds its own part, and the last hop brings
    them home. A rank computes its part for its own keys and values (hop 0) at home. It computes
    half of the heads at first, and the other half while the last gradients are on their way.

    Args:
        attend: the backward of the ``attend`` that forward was called with.
        grad: gradient of ``out``, [B, H, S, D].
        out, logsumexp: what forward returned.
    """
    dtype = sum_dtype(key.dtype, ring.size)
    length, key_heads = key.shape[SEQUENCE_DIM], key.shape[1]

    def gradients(
        keys: torch.Tensor,
        values: torch.Tensor,
        heads: slice,
        queries_here: slice,
        keys_here: slice,
        causal: bool,
    ) -> Sequence[torch.Tensor]:
        """Gradients of query, key and value for the part that attends at a hop.

        Args:
            keys, values: what this rank holds at the hop, [B, H, S, D] each.
            heads: heads of keys and values to compute, with the query heads of their groups.
            queries_here, keys_here: from ``_Ring.attending``.
        """
        group = query.shape[1] // key_heads
        query_part = slice(None), slice(heads.start * group, heads.stop * group), queries_here
        key_part = slice(None), heads, keys_here
        return attend(
            grad[query_part],
            query[query_part],
            keys[key_part],
            values[key_part],
            out[query_part],
            # Kernels assume that the logsumexp is contiguous.
            logsumexp[query_part].contiguous(),
            is_causal=causal,
        )

    def at_home(heads: slice) -> Sequence[torch.Tensor]:
        """Gradients from this rank's queries attending to its own keys and values."""
        everything = slice(0, length)
        return gradients(key, value, heads, everything, everything, True)

    middle = (key_heads + 1) // 2
    query_total = arriving = None
    for hop, keys, values in ring.hops(key, value):
        if hop == 0:
            home_parts = [at_home(slice(0, middle))]
            continue
        # Sums for the keys and values that are held; at hop 1 no rank has begun them.
        held_totals = arriving() if arriving else [None, None]
        if (attending := ring.attending(hop, length)) is not None:
            queries_here, keys_here = attending
            all_heads = slice(0, key_heads)
            found, *pair = gradients(keys, values, all_heads, queries_here, keys_here, False)
            query_total = _add(query_total, found, queries_here, query, dtype)
            held_totals = [
                _add(*both, keys_here, key, dtype) for both in zip(held_totals, pair, strict=True)
            ]
            del found, pair
        elif hop == 1:
            held_totals = [torch.zeros_like(key, dtype=dtype) for _ in held_totals]
        # pyrefly: ignore[bad-argument-type]  Hop 1 has made sums, if there were none before it.
        arriving = ring.pass_on(held_totals)
    # Free the last keys and values received, which take gigabytes in a dense layer.
    del keys, values
    if middle < key_heads:
        home_parts.append(at_home(slice(middle, key_heads)))
    if query_total is None:
        query_total = torch.zeros_like(query)
    assert arriving is not None, "a ring has two ranks or more"
    away = [query_total, *arriving()]
    home = [list(parts) for parts in zip(*home_parts, strict=True)]
    # ``home`` and ``away`` hold the only references from here on, so that each sum frees its terms.
    del query_total, held_totals, home_parts, arriving
    return tuple(_sum(home.pop(0), away.pop(0), like) for like in (query, key, value))


def _add(
    total: torch.Tensor | None,
    rows: torch.Tensor,
    positions: slice,
    like: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Add ``rows`` at ``positions`` of ``total``.

    A ``total`` of None stands for zeros with the shape of ``like`` in ``dtype``.
    """
    if total is None and rows.shape == like.shape:
        return rows.to(dtype)
    total = torch.zeros_like(like, dtype=dtype) if total is None else total
    total[:, :, positions].add_(rows)
    return total


def _sum(parts: list[torch.Tensor], other: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Join ``parts`` along the heads and add ``other``, rounded once to the dtype of ``like``."""
    total = torch.empty_like(like)
    sizes = [part.shape[1] for part in parts]
    for into, part, rows in zip(total.split(sizes, 1), parts, other.split(sizes, 1), strict=True):
        torch.add(part, rows, out=into)
    return total


def _laid_out(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``rows`` in the memory layout of ``empty_like(like)``, on which compiled code can count."""
    assert rows.shape == like.shape, "heads of queries, keys and values must be equally wide"
    strides = torch.empty_like(like, device="meta").stride()
    return rows if rows.stride() == strides else torch.empty_like(like).copy_(rows)


class _RingOperation:
    """The ring's version of one of torch's attention operations, forward or backward.

    It takes the same arguments as the operation, after three of its own: the name of the process
    group, and ``balanced`` and ``gathers`` of ``_Ring``.
    """

    def __init__(self, operation: torch._ops.OpOverload, is_forward: bool) -> None:
        self.operation, self.is_forward = operation, is_forward
        self.names = [argument.name for argument in operation._schema.arguments]
        # The arguments that differ from hop to hop, in the order of ``attend``.
        self.rows = ["query", "key", "value"]
        if not is_forward:
            self.rows = [self.names[0], *self.rows, "out", "logsumexp"]

    def register(self) -> torch._ops.OpOverload:
        """Define the operation in torch's library, with a fake implementation for compilers."""
        name, _, rest = str(self.operation._schema).removeprefix("aten::").partition("(")
        _library.define(f"{name}(str group_name, bool balanced, bool gathers, {rest}")
        _library.impl(name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", self.fake, lib=_library)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    def run(
        self, group_name: str, balanced: bool, gathers: bool, *given: Any, **options: Any
    ) -> tuple:
        """Run the operation over the ring, on this rank's tensors."""
        arguments = self.bound(given, options)

        def attend(*values: torch.Tensor, is_causal: bool) -> Sequence[Any]:
            changed = arguments | dict(zip(self.rows, values, strict=True))
            changed["is_causal"] = is_causal
            for longest, name in (("max_q", "query"), ("max_k", "key")):
                if longest in changed:
                    changed[longest] = changed[name].shape[SEQUENCE_DIM]
            return self.operation(**changed)

        # pyrefly: ignore[bad-argument-type]  torch's GroupName is a str, as operations take it.
        ring = _Ring(_resolve_process_group(group_name), balanced, gathers)
        if ring.size == 1:
            return self.with_layout(self.operation(**arguments), arguments)
        function = _ring_forward if self.is_forward else _ring_backward
        rows = (arguments[name] for name in self.rows)
        return self.with_layout(function(attend, ring, *rows), arguments)

    def fake(
        self, group_name: str, balanced: bool, gathers: bool, *given: Any, **options: Any
    ) -> tuple:
        """Results of the right shapes and memory layouts, for a compiler that traces."""
        arguments = self.bound(given, options)
        return self.with_layout(self.operation(**arguments), arguments)

    def bound(self, given: tuple, options: dict[str, Any]) -> dict[str, Any]:
        """The operation's arguments by name."""
        arguments = dict(zip(self.names, given, strict=False)) | options
        if not arguments["is_causal"] or arguments.get("dropout_p"):
            raise NotImplementedError("ring attention is causal and without dropout")
        if "compute_log_sumexp" in self.names:
            arguments["compute_log_sumexp"] = True
        return arguments

    def with_layout(self, results: Sequence[Any], arguments: dict[str, Any]) -> tuple:
        """Results in the memory layouts that ``fake`` announces and ``run`` has to keep to."""
        inputs = [arguments[name] for name in ("query", "key", "value")]
        if self.is_forward:
            out, logsumexp, *others = results
            return _laid_out(out, inputs[0]), logsumexp.contiguous(), *others
        return tuple(_laid_out(*pair) for pair in zip(results, inputs, strict=True))


for _operation in (*FORWARD, *BACKWARD):
    _ring_operations[_operation] = _RingOperation(_operation, _operation in FORWARD).register()


def ring_operation(operation: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The ring's version of ``operation``, one of ``FORWARD`` or ``BACKWARD``."""
    return _ring_operations[operation]


def _handle(operation: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> object:
    """Run the ring in place of an attention operation that DTensor meets on a sharded sequence."""
    dispatcher = DTensor._op_dispatcher
    info = dispatcher.unwrap_to_op_info(operation, args, kwargs)
    dispatcher.sharding_propagator.propagate(info)
    sharding = info.output_sharding
    assert sharding is not None, "propagate sets it"
    assert not sharding.needs_redistribute, "attention's inputs must be sharded alike"
    options = torch_ring._cp_options
    results = _ring_operations[operation](
        info.compute_mesh.get_group().group_name,
        options.enable_load_balance,
        options.rotate_method is torch_ring._RotateMethod.ALL_GATHER,
        *info.local_args,
        **info.local_kwargs,
    )
    return dispatcher.wrap(results, sharding.output_spec)


def _refuse(operation: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> None:
    raise NotImplementedError(
        f"ring attention runs cuDNN's and flash attention, in bfloat16 or float16, not {operation}"
    )


def install_ring_attention() -> None:
    """Make torch's context parallelism run this ring, on CPUs too.

    Call it before torch's context parallelism is applied to a module: torch copies the handlers
    when it enables its dispatcher.
    """
    # pyrefly: ignore[no-matching-overload]  torch calls handlers by position.
    torch_ring.custom_ops.update(dict.fromkeys(_ring_operations, _handle))
    # Without an entry of ours, torch's own ring would run these without a word.
    # pyrefly: ignore[no-matching-overload]  torch calls handlers by position.
    torch_ring.custom_ops.update(dict.fromkeys(REFUSED, _refuse))
    # torch has no sharding rule for the CPU's attention.
    for operation, outputs, tensors in ((CPU_FORWARD, 2, 3), (CPU_BACKWARD, 3, 6)):

        def strategy(
            op_schema: OpSchema, count: int = outputs + tensors, outputs: int = outputs
        ) -> OpStrategy:
            placements: list[list[Placement | None]] = [
                [Shard(SEQUENCE_DIM)] * count,
                [Replicate()] * count,
            ]
            return expand_to_full_mesh_op_strategy(
                op_schema.get_mesh_from_args(validate=False),
                op_schema,
                placements,
                input_index=outputs,
            )

        register_op_strategy(operation)(strategy)
