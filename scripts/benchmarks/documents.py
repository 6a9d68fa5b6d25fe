#!/usr/bin/env python3
"""Time documents that do not see each other, in a layer and in a training step, on one GPU.

    python scripts/benchmarks/documents.py --length 98304 --flavors 17M 270M

Attention is dense, over a window, or Lighthouse attention with a window. The text is one document
without masks, books, or web pages: lengths are log-normal around 300,000 and 1,000 bytes, cut at
the sequence. With documents, kernels and vectorised PyTorch take turns in random order with
attention without masks, as in attention.py.

Errors are taken first: those of a layer's output and gradients against float32, which may exceed
those of vectorised PyTorch by half; and the difference of a step's losses by both. A step is
forward, loss and backward of one sequence with checkpointing of mode "lighthouse", without an
optimizer and without a loader.

Documents are always given to attention here. Training with rows of one sequence leaves them out
where that is one document, and it takes the time of "no masks". The table says how many sequences
that are, in a stream of such documents, and what the mean is then. A layer is also profiled.

    TRITON_INTERPRET=1 python scripts/benchmarks/documents.py --on-cpu

tries the script out without a GPU: its sizes are small, and its times mean nothing.

Prints a table, and writes it, a JSON record and a CSV file with a line for each time to the output
folder.
"""

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from arguments import add_layer_arguments, benchmark_parser, run_benchmark
from gpu_profile import function_table, profile_of
from measuring import dense, forward_and_backward, measure, relative_error, require_cuda
from reporting import origin, table_head, table_row, write_report

from lighthouse import (
    LighthouseConfig,
    document_attention,
    first_positions,
    lighthouse_attention,
    select,
    window_attention,
)
from lighthouse.inner_attention import InnerAttention
from lighthouse.kernels.launch import INTERPRETED
from torchtitan.models.llama3_lighthouse.environment import environment
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.infra.activation_checkpoint import (
    apply_lighthouse_checkpoint,
)
from torchtitan.models.llama3_lighthouse.infra.parallelize import RECOMPILE_LIMIT
from torchtitan.models.llama3_lighthouse.job_config import ActivationCheckpoint
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.model import LighthouseTransformer

Attention = Callable[..., torch.Tensor]
# Median lengths of documents.
TEXTS = {"no masks": None, "books": 300_000, "web pages": 1000}
ATTENTIONS = ("dense", "window", "lighthouse")
KERNELS, PYTORCH = "kernels", "PyTorch"
# Sequences of the stream in which those of one document are counted.
COUNTED = 10_000
# Kernels may err so many times as much as vectorised PyTorch, or by a step of bf16.
FACTOR, LEAST_ERROR = 1.5, 2**-8
LARGEST_DIFFERENCE_OF_LOSSES = 1e-2


class Sizes(NamedTuple):
    """What is measured.

    Attributes:
        length: N.
        method: Lighthouse attention with a window, which the window alone has too.
        heads, kv_heads, d: those of a layer.
        flavors: sizes of models.
    """

    length: int
    method: LighthouseConfig
    heads: int
    kv_heads: int
    d: int
    flavors: list[str]
    device: str
    dtype: torch.dtype


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The sizes that the command line asks for.

    Raises:
        ValueError: the window is not shorter than the sequence, or a flavor is not known.
    """
    for flavor in options.flavors:
        if flavor not in flavors:
            raise UserValueError(f"--flavors {flavor}: use some of {', '.join(flavors)}")
    settings: dict[str, Any] = dict(entry_score="first", combine="finest")
    if options.on_cpu:
        method = LighthouseConfig(3, 2, 8, picks_per_stratum=4, window=24, **settings)
        return Sizes(64, method, 2, 1, 16, ["debugmodel"], "cpu", torch.float32)
    if options.window >= options.length:
        raise UserValueError(
            f"--window {options.window} must be shorter than --length {options.length}"
        )
    method = LighthouseConfig(3, 4, options.top_k, window=options.window, **settings)
    kv_heads = options.kv_heads or options.heads
    shape = options.heads, kv_heads, options.head_dim, options.flavors
    return Sizes(options.length, method, *shape, "cuda", torch.bfloat16)


def layout(text: str, sizes: Sizes) -> torch.Tensor | None:
    """Documents [1, N] of a text, the same every time; None without masks."""
    median, n, span = TEXTS[text], sizes.length, sizes.method.coarsest_span
    if median is None:
        return None
    # The last document takes the rest. The layouts of the record have no more documents than this.
    begins = spans_of_documents(median, span, max(256, n // 512)).cumsum(0)[:-1]
    number = torch.bucketize(torch.arange(n // span), begins, right=True)
    return first_positions(number.repeat_interleave(span)[None]).to(sizes.device)


def spans_of_documents(median: int, span: int, count: int) -> torch.Tensor:
    """Lengths of documents around a median, in spans that are begun."""
    generator = torch.Generator().manual_seed(0)
    lengths = median * torch.randn(count, generator=generator, dtype=torch.float64).exp()
    return (lengths / span).ceil().long()


def share_of_one_document(text: str, length: int, span: int) -> float:
    """The share of a stream's sequences that lie in one document."""
    median = TEXTS[text]
    if median is None:
        return 1.0
    number = COUNTED * length // span
    # Twice as many documents as fill the sequences if all are of the median's length.
    begins = spans_of_documents(median, span, 2 * COUNTED * length // median + 1).cumsum(0)
    assert begins[-1] >= number
    # A document that begins with a sequence cuts none.
    cut = begins[(begins < number) & (begins % (length // span) != 0)] // (length // span)
    return 1 - len(cut.unique()) / COUNTED


def attention_by(
    name: str, by: str, documents: torch.Tensor | None, sizes: Sizes, selection: Any = None
) -> Attention:
    """An attention of q, k and v by kernels or by vectorised PyTorch."""
    method, masks = sizes.method, {"documents": documents}
    if name == "lighthouse":
        impl = "triton" if by == KERNELS else "torch"
        return partial(lighthouse_attention, config=method, selection=selection, impl=impl, **masks)
    impl = "triton" if by == KERNELS and sizes.device == "cuda" else "torch"
    if name == "window":
        return partial(window_attention, window=method.window, impl=impl, **masks)
    if by == PYTORCH:
        return partial(window_attention, window=sizes.length, impl="torch", **masks)
    if documents is None:
        return partial(dense, enable_gqa=sizes.heads != sizes.kv_heads)
    return partial(document_attention, **masks)


def gradients(attend: Attention, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v, for one gradient of the output."""
    inputs = [x.detach().requires_grad_() for x in rows]
    out = attend(*inputs)
    torch.manual_seed(1)
    grad = torch.randn(out.shape, device=out.device).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def check_layer(
    name: str, documents: torch.Tensor, rows: list[torch.Tensor], sizes: Sizes
) -> dict[str, list[float]]:
    """Errors of output and gradients against float32, by one selection.

    Raises:
        SystemExit: those of kernels are too large.
    """
    selection = None
    if name == "lighthouse":
        selection = select(*rows, sizes.method, documents=documents, impl="triton")
    chosen = partial(attention_by, name, documents=documents, sizes=sizes, selection=selection)
    exact = gradients(chosen(PYTORCH), [x.float() for x in rows])
    errors = {
        by: [relative_error(x, y) for x, y in zip(gradients(chosen(by), rows), exact, strict=True)]
        for by in (KERNELS, PYTORCH)
    }
    for ours, other in zip(errors[KERNELS], errors[PYTORCH], strict=True):
        if not ours <= max(FACTOR * other, LEAST_ERROR):
            raise SystemExit(f"wrong result: errors of {name} attention are {errors}")
    return errors


def step_of(
    flavor: str, name: str, by: str, documents: torch.Tensor | None, sizes: Sizes
) -> Callable[[], torch.Tensor]:
    """Forward, loss and backward of a model; returns the loss."""
    args = replace(flavors[flavor], max_seq_len=sizes.length, lighthouse=sizes.method)
    if name == "window":
        args = replace(args, window=sizes.method.window)
    if sizes.device == "cpu":
        args = replace(args, n_layers=1)
    torch.manual_seed(0)
    with torch.device(sizes.device):
        model = LighthouseTransformer(args)
        with torch.no_grad():
            model.init_weights()
    model.to(sizes.dtype)
    model.use_attention("dense" if name == "dense" else "lighthouse")
    for module in model.modules():
        if isinstance(module, InnerAttention) and name != "dense":
            kernel = "triton"
            if sizes.device == "cpu" and name == "window":
                kernel = "torch"
            module.impl = kernel if by == KERNELS else "torch"
    apply_lighthouse_checkpoint(model, ActivationCheckpoint(mode="lighthouse"))
    if sizes.device == "cuda":
        for block in model.layers.values():
            block.compile(fullgraph=True, dynamic=False)
    tokens = torch.randint(0, args.vocab_size, (1, sizes.length + 1), device=sizes.device)
    options = {} if documents is None else {"attention_masks": documents}

    def step() -> torch.Tensor:
        model.zero_grad()
        logits = model(tokens[:, :-1], **options).flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
        loss.backward()
        return loss.detach()

    return step


def measure_on_cpu(
    variants: dict[str, Callable[[], object]], seconds: float
) -> dict[str, dict[str, float]]:
    """As ``measure``, of one call each."""
    results = {}
    for name, run in variants.items():
        start = time.perf_counter()
        run()
        ms = 1e3 * (time.perf_counter() - start)
        results[name] = {"ms": ms, "spread": 0.0, "turns": 1, "GiB": 0.0}
    return results


def variants_of(text: str) -> list[str]:
    """Who computes a text."""
    return [KERNELS] if TEXTS[text] is None else [KERNELS, PYTORCH]


def benchmark_layer(name: str, sizes: Sizes, seconds: float) -> dict[str, Any]:
    """The record of one attention in a layer."""
    torch.manual_seed(0)
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    rows = [
        torch.randn(1, sizes.length, h, sizes.d, device=sizes.device).to(sizes.dtype) for h in heads
    ]
    rows = [x.transpose(1, 2) for x in rows]
    errors, timed = {}, {}
    for text in TEXTS:
        documents = layout(text, sizes)
        if documents is not None:
            errors[text] = check_layer(name, documents, rows, sizes)
        for by in variants_of(text):
            attend = attention_by(name, by, documents, sizes)
            timed[f"{text}, {by}"] = forward_and_backward(attend, rows)[1]
    record: dict[str, Any] = {"part": "layer", "attention": name, "error": errors}
    if sizes.device == "cpu":
        return record | {"results": measure_on_cpu(timed, seconds)}
    profiles = {key: profile_of(run) for key, run in timed.items() if key.endswith(KERNELS)}
    return record | {"results": measure(timed, seconds), "profiles": profiles}


def benchmark_step(flavor: str, name: str, sizes: Sizes, seconds: float) -> dict[str, Any]:
    """The record of one attention in a training step.

    Vectorised PyTorch is not timed here: it takes most of a second in each layer. It computes the
    losses of the first flavor, to compare them.

    Raises:
        SystemExit: losses by kernels and by vectorised PyTorch differ.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    steps, losses = {}, {}
    for text in TEXTS:
        documents = layout(text, sizes)
        # In a model, dense attention has one implementation alone.
        compared = name != "dense" and flavor == sizes.flavors[0]
        for by in variants_of(text) if compared else [KERNELS]:
            step = step_of(flavor, name, by, documents, sizes)
            torch.manual_seed(2)
            losses[f"{text}, {by}"] = step().item()
            if by == KERNELS:
                steps[f"{text}, {by}"] = step
        other = losses.get(f"{text}, {PYTORCH}", losses[f"{text}, {KERNELS}"])
        if not abs(losses[f"{text}, {KERNELS}"] - other) <= LARGEST_DIFFERENCE_OF_LOSSES:
            raise SystemExit(f"wrong result: losses of {flavor} with {name} attention are {losses}")
    run = measure if sizes.device == "cuda" else measure_on_cpu
    return {"part": flavor, "attention": name, "loss": losses, "results": run(steps, seconds)}


def lines_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each time, with its ratio to attention without masks in the same run."""
    lines = []
    for record in run["records"]:
        unmasked = record["results"][f"no masks, {KERNELS}"]["ms"]
        for key, found in record["results"].items():
            text, by = key.split(", ")
            line = {"part": record["part"], "attention": record["attention"], "text": text}
            line |= {"by": by, **{name: found[name] for name in ("ms", "spread", "turns", "GiB")}}
            lines.append(line | {"over no masks": found["ms"] / unmasked})
    return lines


def table(run: dict[str, Any]) -> str:
    """The run as Markdown."""
    lines = [
        f"{origin(run | {'device': run['GPU'] or 'CPU'})}. N = {run['N']:,}, B = 1, "
        f"{run['method']}. ms of forward with backward, median ± spread.",
        "",
        *table_head(["", "attention", "documents", "by", "ms", "over no masks", "GiB"]),
    ]
    for line in lines_of(run):
        cells = [line[key] for key in ("part", "attention", "text", "by")]
        cells += [f"{line['ms']:.4g} ± {line['spread']:.1g}", f"{line['over no masks']:.2f}x"]
        lines.append(table_row([*cells, f"{line['GiB']:.2f}"]))
    lines += ["", *means_of_streams(run), ""]
    for record in run["records"]:
        for key, profile in record.get("profiles", {}).items():
            lines += function_table(f"A layer, {record['attention']}, {key}", profile)
    return "\n".join(lines).rstrip() + "\n"


def means_of_streams(run: dict[str, Any]) -> list[str]:
    """What a stream of each text takes over no masks, where sequences of one document have none."""
    lines = []
    for line in lines_of(run):
        if line["text"] in run["one document"] and line["by"] == KERNELS:
            share = run["one document"][line["text"]]
            mean = share + (1 - share) * line["over no masks"]
            lines.append(
                f"- {line['part']}, {line['attention']}, {line['text']}: {share:.0%} of sequences "
                f"are one document; all take {mean:.2f}x on average."
            )
    return lines


def write(run: dict[str, Any], folder: Path, name: str) -> None:
    """Write everything measured so far."""
    write_report(run, folder, name, table(run))
    lines = lines_of(run)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def parse() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "documents")
    parser.add_argument("--length", type=int, default=98304, help="N; default: 98304")
    parser.add_argument("--top-k", type=int, default=1536, help="default: 1536")
    parser.add_argument("--window", type=int, default=512, help="default: 512")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS),
                        help="default: all")  # fmt: skip
    parser.add_argument("--flavors", nargs="*", default=["17M", "270M"],
                        help="models whose steps are timed; default: 17M 270M")  # fmt: skip
    parser.add_argument("--on-cpu", action="store_true",
                        help="run small sizes without a GPU, to try the script out")  # fmt: skip
    add_layer_arguments(parser, 5.0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not options.on_cpu:
        require_cuda()
    elif not INTERPRETED:
        raise UserValueError("--on-cpu needs Triton's interpreter; set TRITON_INTERPRET=1")
    sizes = sizes_of(options)
    run = environment(options.revision) | {"N": sizes.length, "method": str(sizes.method)}
    texts = [text for text, median in TEXTS.items() if median is not None]
    span = sizes.method.coarsest_span
    run["one document"] = {x: share_of_one_document(x, sizes.length, span) for x in texts}
    run["records"] = []
    for name in options.attention:
        for part in ("layer", *sizes.flavors):
            print(f"{name} attention, {part}", flush=True)
            if part == "layer":
                record = benchmark_layer(name, sizes, options.seconds)
            else:
                record = benchmark_step(part, name, sizes, options.seconds)
            run["records"].append(record)
            if sizes.device == "cuda":
                torch.cuda.empty_cache()
            write(run, options.output, options.name)
    print(table(run))


if __name__ == "__main__":
    run_benchmark(main)
