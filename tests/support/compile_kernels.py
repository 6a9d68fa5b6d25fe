"""Compile every kernel, as its launcher would launch it, for GPUs that need not be there.

Run by test_kernels.py in a process of its own, without Triton's interpreter. Tensors are on the
meta device: they have shapes and no memory.

    compile_kernels.py CAPABILITY CASE      CASE: a number in ``CASES``, "long" or "loss"
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from lighthouse.kernels import (
    document_selection,
    gather,
    interval_attention,
    merge,
    online_softmax,
    pooling,
    row_sums,
    scatter,
    scoring,
    seams,
    selection,
)
from torchtitan.models.llama3_lighthouse.model import cross_entropy_kernel

# Bytes that a program may use on the smallest GPU since Ampere (compute capability 8.6).
SHARED_MEMORY = 99 * 1024
# On Hopper, whose compute capability comes first.
HOPPER, SHARED_MEMORY_OF_HOPPER = 90, 227 * 1024
# Lines of a kernel's text before optimisation. Several thousand take minutes to compile.
MOST_LINES = 4000
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
            torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1"}  # fmt: skip
# L, p, N, B, Hq, Hkv, D, picks per stratum, strata, dtype.
CASES = [
    (3, 4, 98304, 1, 8, 8, 128, 128, 12, torch.bfloat16),
    (3, 2, 131072, 2, 6, 2, 192, 128, 64, torch.float32),
    (4, 4, 2**22, 1, 32, 8, 256, 128, 3, torch.bfloat16),
    # One of everything: one program selects, and it has one coarsest entry.
    (3, 2, 4, 1, 1, 1, 16, 2, 1, torch.bfloat16),
    (2, 2, 8192, 1, 4, 2, 64, 16, 4, torch.float16),
]


class Compiler:
    """Takes the place of a kernel: launching it compiles it.

    Args:
        capability: that of the GPU.
        aligned: tell the compiler what 16 divides, as most launches do. Loads are then vectors.
    """

    count = 0
    shared_memory = SHARED_MEMORY

    def __init__(self, kernel, capability: int, aligned: bool) -> None:
        self.kernel = kernel
        self.target = GPUTarget("cuda", capability, 32)
        self.aligned = aligned

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, num_warps: int, num_stages: int = 3, **constants) -> None:
        names = self.kernel.arg_names
        signature = dict.fromkeys(constants, "constexpr")
        attributes = {}
        for number, (name, value) in enumerate(zip(names, arguments, strict=False)):
            divisible = isinstance(value, torch.Tensor) or (
                isinstance(value, int) and value % 16 == 0
            )
            if self.aligned and divisible:
                attributes[number,] = [["tt.divisibility", 16]]
            if isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value is None or value == 1:
                # A launch makes it a constant of the text, which has no methods of a tensor.
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        signature = {name: signature[name] for name in names}
        constants = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = compile(source, target=self.target, options=options)
        assert compiled.asm["cubin"]
        assert compiled.asm["ttir"].count("\n") <= MOST_LINES, self.kernel
        assert compiled.metadata.shared <= Compiler.shared_memory, self.kernel
        Compiler.count += 1


def rows_of(batch: int, heads: int, length: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(batch, length, heads, d, dtype=dtype, device="meta").transpose(1, 2)


def launch_all(levels, p, n, batch, heads, kv_heads, d, m, strata, dtype) -> None:
    q, k = (rows_of(batch, h, n, d, dtype) for h in (heads, kv_heads))
    coarsest, a = pooling.launch_pool(q, p, levels, p)
    _, b = pooling.launch_pool(k, p, levels, 1)
    for x, y in ((q, k), (k, q)):
        scoring.gla_norms(x, y, k, heads, 4)
    for by_first in (False, True):
        index, slot = selection.launch_selection(a, b, levels, p, m, strata, by_first)
        parts = torch.empty(4, batch, coarsest.shape[2], dtype=torch.int32, device="meta")
        document_selection.launch_selection_by_documents(
            a, b, parts, levels, p, m, strata, by_first
        )
    gathered = gather.launch_gather(q, coarsest, index, p, levels)
    for onto in (None, q):
        scatter.launch_spread(gathered, slot, n, p, levels, False, False, onto)
    documents = torch.empty(batch, n, dtype=torch.int32, device="meta")
    for finest in (False, True):
        scatter.launch_collect(q, slot, index.shape[2], p, levels, finest)
        rows = scatter.launch_spread(gathered, slot, n, p, levels, True, finest)
        seam = gathered[:, :, : levels - 1]
        scatter.launch_spread_with_seam(rows, gathered, slot, seam, p, levels, finest)
        scatter.launch_spread(gathered, slot, n, p, levels, True, finest, None, documents)
        scatter.launch_collect(q, slot, index.shape[2], p, levels, finest, documents)
    far_lse, lse = (x[..., 0].float() for x in (gathered, q))
    for layout in (None, documents):
        merge.launch_merge(gathered, far_lse, q, lse, slot, p, levels, layout)
        merge.launch_collect(q, q, lse, gathered, far_lse, index, slot, p, levels, layout)
        crossing = gathered[:, :, : levels - 1], far_lse[:, :, : levels - 1]
        continues = None if layout is None else layout[:, 0] > 0
        pyramid, chunks = (slot, p, levels), (continues, 0, 2)
        merge.launch_merge(gathered, far_lse, q, lse, *pyramid, layout, *crossing, *chunks)
        sums = seams.launch_seam_sums(q, q, lse, slot, crossing[1], p, levels, 0, 2, continues)
        seams.launch_add_seam_sums(gathered, gathered, gathered, *sums, slot, n, p, levels)
    launch_interval_attention(q, k)
    if n == p ** (levels - 1):
        # A chunk may be a single position.
        launch_interval_attention(q[:, :, :1], k[:, :, :1])
    for x in (q, q.float()):
        online_softmax.launch_merge_in_place(x, lse, q, lse)
        row_sums.launch_add_rows(q, q, x[:, :, n // 2 :], n // 2)


def launch_interval_attention(q: torch.Tensor, k: torch.Tensor) -> None:
    """With the tiles of all GPUs, and on Hopper with those of its own."""
    (batch, _, length, d), lse = q.shape, q[..., 0].float()
    ends = torch.empty(2, batch * length, dtype=torch.int32, device="meta")
    seen = interval_attention.Intervals(*ends)
    shown = torch.empty(batch, dtype=torch.int32, device="meta")
    halo = k[:, :, -511:]
    keys_before = interval_attention.Before(halo, halo, shown)
    tables = [interval_attention.launches(q, length)]
    if q.dtype != torch.float32 and interval_attention._attend.target.arch == HOPPER:
        for table in (interval_attention.LARGE, interval_attention.SHORT):
            tables.append(next(x for largest, x in table.items() if d <= largest))
    for number, table in enumerate(tables):
        interval_attention.launches = lambda q, longest, table=table: table
        Compiler.shared_memory = SHARED_MEMORY_OF_HOPPER if number else SHARED_MEMORY
        for before in (None, keys_before):
            more = seen, 0.1, length, before
            interval_attention.interval_forward(q, k, k, *more)
            interval_attention.interval_backward(q, q, k, k, q, lse, *more)
    for dtype in (None, torch.int32, torch.int64):
        layout = None if dtype is None else ends.to(dtype)[0].view(batch, length)
        interval_attention.Windows(batch, length, length, -511, 1).tensors(q.device, layout)
    Compiler.shared_memory = SHARED_MEMORY


def launch_long(p: int, picks: int, heads: int, d: int, dtype: torch.dtype) -> None:
    """The kernels whose text grows with the rows under an entry, at two levels."""
    coarsest, s = picks + 1, picks + 1 + picks * p
    n = coarsest * p
    rows, gathered = (rows_of(1, heads, length, d, dtype) for length in (n, s))
    slot, index = (
        torch.empty(1, heads, length, dtype=torch.int32, device="meta")
        for length in (n + coarsest, s)
    )
    far_lse, lse = (x[..., 0].float() for x in (gathered, rows))
    pooling.launch_pool(rows, p, 2, p)
    scatter.launch_collect(rows, slot, s, p, 2, True)
    for layout in (None, torch.empty(1, n, dtype=torch.int64, device="meta")):
        merge.launch_collect(rows, rows, lse, gathered, far_lse, index, slot, p, 2, layout)


def launch_loss(tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits = torch.empty(tokens, vocabulary, dtype=dtype, device="meta")
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    losses = torch.empty(tokens, device="meta")
    for flag in (False, True):
        cross_entropy_kernel.cross_entropy_(logits, labels, losses, flag)


def main() -> None:
    kernels = [(pooling, "_pool"), (selection, "_select"),
               (document_selection, "_select_by_documents"), (gather, "_gather"),
               (scatter, "_spread"), (scatter, "_collect"), (scoring, "_gla_norms"),
               (interval_attention, "_attend"), (interval_attention, "_query_gradients"),
               (interval_attention, "_key_gradients"), (interval_attention, "_write_windows"),
               (merge, "_merge"), (merge, "_collect"),
               (seams, "_seam_sums"), (seams, "_add_seam_sums"),
               (online_softmax, "_merge_in_place"), (row_sums, "_add_rows"),
               (cross_entropy_kernel, "_cross_entropy")]  # fmt: skip
    capability, case = sys.argv[1:]
    for module, name in kernels:
        setattr(module, name, Compiler(getattr(module, name), int(capability), case == "long"))
    if case == "long":
        launch_long(128, 2048, 8, 128, torch.bfloat16)
    elif case == "loss":
        launch_loss(4096, 128256, torch.bfloat16)
        launch_loss(77, 300, torch.float32)
    else:
        launch_all(*CASES[int(case)])
    print(f"compiled {Compiler.count} kernels")


if __name__ == "__main__":
    main()
