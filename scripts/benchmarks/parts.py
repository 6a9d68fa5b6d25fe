#!/usr/bin/env python3
"""Time what stands around attention: the rotary embedding in a layer, and the loss with its head.

    python scripts/benchmarks/parts.py --length 98304 --vocabulary 128256

Rotary embedding: one Lighthouse layer of the paper's model, compiled, with torchtitan's complex
arithmetic and with ours, forward and with backward.
Loss: output projection and cross-entropy with both gradients. Candidates are torchtitan's whole
logits where they fit, ours in chunks, and those of torch's linear_cross_entropy, Liger
(pip install liger-kernel) and cut-cross-entropy (pip install cut-cross-entropy) that are installed.

Errors are taken first, against float64 at a shorter length. The script stops if ours exceed those
of whole logits. Prints tables, and writes them and a JSON record to the output folder.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from arguments import add_seconds, benchmark_parser, run_benchmark
from measuring import PAPERS, forward_and_backward, measure, relative_error, require_cuda
from reporting import origin, table_head, table_row, with_spread, write_report
from torch.nn import functional
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.models.llama3 import Transformer

from lighthouse import LighthouseAttention, LighthouseConfig
from lighthouse.geometry import PyramidGeometry
from torchtitan.models.llama3_lighthouse.environment import environment
from torchtitan.models.llama3_lighthouse.infra.parallelize import RECOMPILE_LIMIT
from torchtitan.models.llama3_lighthouse.model.flavors import PAPER
from torchtitan.models.llama3_lighthouse.model.linear_cross_entropy import (
    linear_cross_entropy,
    tokens_per_chunk,
)
from torchtitan.models.llama3_lighthouse.model.model import (
    LighthouseModelArgs,
    LighthouseTransformer,
)

DIM = PAPER["dim"]
METHOD = LighthouseConfig(levels=3, pooling_factor=4, top_k=1536, **PAPERS)
# At the paper's vocabulary, float64 logits of this length take 8.4 GB.
CHECKED_LENGTH = 8192
# From hidden states [B, N, D], weight [V, D] and labels [B, N] to the sum over tokens.
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def whole_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy_loss(functional.linear(hidden, weight), labels)


def products_alone(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The matrix products of a chunked loss and nothing else: the least time that it can take."""
    chunk = tokens_per_chunk(len(weight), hidden.element_size())
    total = torch.zeros_like(weight, dtype=torch.float32)
    for x in hidden[0].split(chunk):
        z = x @ weight.T
        z @ weight
        torch.addmm(total, z.T, x, out_dtype=total.dtype, out=total)
    return total


def candidates(vocabulary: int) -> dict[str, Loss]:
    """Every loss that can run here, by name."""
    chunk = tokens_per_chunk(vocabulary, 2)
    found: dict[str, Loss] = {
        "whole logits, compiled": torch.compile(whole_logits, dynamic=False),
        "ours": linear_cross_entropy,
        "ours, chunks of half a GiB": partial(linear_cross_entropy, chunk=chunk // 2),
        "ours, chunks of 2 GiB": partial(linear_cross_entropy, chunk=chunk * 2),
    }
    if hasattr(functional, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch"] = lambda h, w, y: functional.linear_cross_entropy(
            h.flatten(0, 1), w, y.flatten(), reduction="sum", options=options
        )
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as missing:
        print(f"without Liger: {missing}")
    else:
        for name, dtype in (("Liger", None), ("Liger, float32", torch.float32)):
            module = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=dtype)
            found[name] = lambda h, w, y, module=module: module(w, h.flatten(0, 1), y.flatten())
    try:
        from cut_cross_entropy import linear_cross_entropy as cut
    except ImportError as missing:
        print(f"without cut-cross-entropy: {missing}")
    else:
        for implementation in ("cce", "cce_kahan_full_c"):
            found[f"cut-cross-entropy, {implementation}"] = partial(
                cut, reduction="sum", impl=implementation
            )
    return found


def problem(length: int, vocabulary: int, device: str = "cuda") -> list[torch.Tensor]:
    """Hidden states as a norm leaves them, an output projection as initialised, and labels.

    Returns:
        bf16 [1, N, D] and [V, D], and int64 [1, N].
    """
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    hidden = normal(1, length, DIM).bfloat16()
    weight = (normal(vocabulary, DIM) * DIM**-0.5).bfloat16()
    labels = torch.randint(0, vocabulary, (1, length), generator=generator, device=device)
    labels[0, : length // 50] = -100
    return [hidden, weight, labels]


def gradients(
    loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> list[torch.Tensor]:
    """Loss per token and its gradients, as a training step takes them."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    value = loss(*leaves, labels) / labels.numel()
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def errors(found: dict[str, Loss], inputs: list[torch.Tensor]) -> dict[str, list[float]]:
    """Relative error of loss and both gradients of each candidate, against float64.

    Raises:
        SystemExit: errors of ours exceed those of whole logits.
    """
    hidden, weight, labels = inputs

    def in_float64(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy((h @ w.T).flatten(0, 1), y.flatten(), reduction="sum")

    exact = gradients(in_float64, hidden.double(), weight.double(), labels)
    result = {}
    for name, loss in found.items():
        try:
            got = gradients(loss, *inputs)
        except Exception as error:
            # A failure of another library is a result too.
            if name.startswith(("ours", "whole")):
                raise
            print(f"{name} fails: {type(error).__name__}: {str(error)[:500]}")
            continue
        result[name] = [
            relative_error(value.double(), want) for value, want in zip(got, exact, strict=True)
        ]
    bounds = result["whole logits, compiled"]
    for name in ("ours", "ours, chunks of half a GiB", "ours, chunks of 2 GiB"):
        # The gradient of the hidden states is rounded to bfloat16 twice, before and after scaling.
        for error, bound, factor in zip(result[name], bounds, (1.1, 1.5, 1.1), strict=True):
            if not error <= factor * bound + 1e-6:
                raise SystemExit(
                    f"wrong result: errors of {name} are {result[name]}, those of whole logits "
                    f"are {bounds}"
                )
    return result


def fits(loss: Loss, inputs: list[torch.Tensor]) -> bool:
    """Whether the GPU has memory for a loss and its gradients."""
    try:
        gradients(loss, *inputs)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def benchmark_loss(length: int, vocabulary: int, seconds: float) -> dict[str, Any]:
    """The record of every loss at one size of the vocabulary."""
    found = candidates(vocabulary)
    error = errors(found, problem(min(length, CHECKED_LENGTH), vocabulary))
    torch.cuda.empty_cache()
    inputs = problem(length, vocabulary)
    variants = {
        f"{name}, both": partial(gradients, found[name], *inputs)
        for name in error
        if fits(found[name], inputs)
    }
    validate = torch.no_grad()(linear_cross_entropy)
    variants["ours, forward"] = partial(validate, *inputs)
    variants["products alone, both"] = torch.no_grad()(partial(products_alone, *inputs))
    return {"N": length, "V": vocabulary, "error": error, "results": measure(variants, seconds)}


def layer(
    model_class: type, length: int, positions: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A compiled Lighthouse layer of [B, N, D], with the rotary embedding of ``model_class``."""
    args = LighthouseModelArgs(
        **{**PAPER, "n_layers": 1}, vocab_size=320, max_seq_len=length, lighthouse=METHOD
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = model_class(args)
        with torch.no_grad():
            model.init_weights()
    block, table = model.layers["0"].bfloat16(), model.freqs_cis
    if model_class is Transformer:
        attention = block.attention
        attention.inner_attention = LighthouseAttention(METHOD, attention.inner_attention)
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    return lambda x: compiled(x, table, None, positions)


def benchmark_rotary(length: int, seconds: float) -> dict[str, Any]:
    """The record of a layer with either rotary embedding."""
    torch._dynamo.reset()
    # torch counts all graphs of one function: here four layers, each with and without gradients.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    x = torch.randn(1, length, DIM, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(length, dtype=torch.int32, device="cuda")[None]
    variants = {}
    for name, model_class in (("torchtitan", Transformer), ("ours", LighthouseTransformer)):
        for suffix, given in (("", None), (", positions given", positions)):
            run = layer(model_class, length, given)
            forward, both = forward_and_backward(run, [x])
            variants[f"{name}{suffix}, forward"] = forward
            variants[f"{name}{suffix}, both"] = both
    outputs = [variants[f"{name}, forward"]().float() for name in ("torchtitan", "ours")]
    return {
        "N": length,
        "difference": relative_error(outputs[1], outputs[0]),
        "results": measure(variants, seconds),
    }


def rotary_table(record: dict[str, Any]) -> list[str]:
    """Lines of Markdown for the rotary embedding."""
    lines = [
        f"One compiled Lighthouse layer, N = {record['N']:,}; outputs differ by "
        f"{record['difference']:.1e}.",
        "",
        *table_head(["rotary embedding", "ms", "GiB"]),
    ]
    for name, c in record["results"].items():
        lines.append(table_row([name, with_spread(c["ms"], c["spread"], ".3f"), f"{c['GiB']:.2f}"]))
    return lines


def loss_table(record: dict[str, Any]) -> list[str]:
    """Lines of Markdown for the losses at one size of the vocabulary."""
    lines = [
        f"Loss and both gradients, N = {record['N']:,}, V = {record['V']:,}. Errors relative "
        f"to float64 at {min(record['N'], CHECKED_LENGTH):,} tokens.",
        "",
        *table_head(
            ["", "ms", "GiB", "error of loss", "of hidden states' gradient", "of weight's gradient"]
        ),
    ]
    for name, c in record["results"].items():
        error = record["error"].get(name.removesuffix(", both"))
        cells = [f"{e:.2e}" for e in error] if error else [""] * 3
        time = with_spread(c["ms"], c["spread"], ".2f")
        lines.append(table_row([name, time, f"{c['GiB']:.2f}", *cells]))
    return lines


def tables(run: dict[str, Any]) -> str:
    """The run as Markdown."""
    lines = [
        f"{origin(run)}. bf16, B = 1. ms, median ± spread; GiB beyond what was there before.",
        "",
    ]
    for record in run["rotary"]:
        lines += [*rotary_table(record), ""]
    for record in run["loss"]:
        lines += [*loss_table(record), ""]
    return "\n".join(lines)


def main() -> None:
    parser = benchmark_parser(__doc__, "parts")
    parser.add_argument("--length", type=int, default=98304, help="tokens N; default: 98304")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[320, 128256],
                        help="sizes of the vocabulary; default: 320 128256")  # fmt: skip
    add_seconds(parser, 10.0)
    arguments = parser.parse_args()
    require_cuda()
    try:
        PyramidGeometry(METHOD, arguments.length)
    except ValueError as error:
        parser.error(f"--length {arguments.length}: {error}")

    run: dict[str, Any] = {**environment(arguments.revision), "rotary": [], "loss": []}
    for vocabulary in arguments.vocabulary:
        run["loss"].append(benchmark_loss(arguments.length, vocabulary, arguments.seconds))
        write_report(run, arguments.output, arguments.name)
        torch.cuda.empty_cache()
    run["rotary"].append(benchmark_rotary(arguments.length, arguments.seconds))
    write_report(run, arguments.output, arguments.name, tables(run))
    print(tables(run))


if __name__ == "__main__":
    run_benchmark(main)
