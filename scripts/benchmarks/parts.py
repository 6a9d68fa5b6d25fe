#!/usr/bin/env python3
"""Time what stands around attention: the rotary embedding in a layer, and the loss with its head.

    python scripts/benchmark_parts.py --length 98304 --vocabulary 128256

Rotary embedding: one Lighthouse layer of the paper's model, compiled, with torchtitan's complex
arithmetic and with ours, forward and with backward.
Loss: output projection and cross-entropy with both gradients, by torchtitan's whole logits where
they fit, by ours in chunks, and by whichever of torch's linear_cross_entropy, Liger
(pip install liger-kernel) and cut-cross-entropy (pip install cut-cross-entropy) is there.

Errors are taken first, against float64 at a shorter length; the script stops if ours exceed those
of whole logits. Prints tables; writes them and a JSON record to the output folder.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measuring import environment, forward_and_backward, measure, relative_error
from torch.nn import functional
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.models.llama3 import Transformer

from lighthouse import LighthouseAttention, LighthouseConfig
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
METHOD = LighthouseConfig(levels=3, pooling_factor=4, top_k=1536)
# Of float64 logits 8.4 GB, at the paper's vocabulary.
CHECKED_LENGTH = 8192
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def whole_logits(hidden, weight, labels) -> torch.Tensor:
    return cross_entropy_loss(functional.linear(hidden, weight), labels)


def products_alone(hidden, weight, labels) -> torch.Tensor:
    """The matrix products of a chunked loss and nothing else: its floor. Not a loss."""
    chunk = tokens_per_chunk(len(weight), hidden.element_size())
    total = torch.zeros_like(weight, dtype=torch.float32)
    for x in hidden[0].split(chunk):
        z = x @ weight.T
        z @ weight
        torch.addmm(total, z.T, x, out_dtype=total.dtype, out=total)
    return total


def candidates(vocabulary: int) -> dict[str, Loss]:
    """Every loss there is here, by name: the sum over tokens from hidden states, weight, labels."""
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
    """Hidden states as a norm leaves them, an output projection as initialised, and labels."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    hidden = normal(1, length, DIM).bfloat16()
    weight = (normal(vocabulary, DIM) * DIM**-0.5).bfloat16()
    labels = torch.randint(0, vocabulary, (1, length), generator=generator, device=device)
    labels[0, : length // 50] = -100
    return [hidden, weight, labels]


def gradients(loss: Loss, hidden, weight, labels) -> list[torch.Tensor]:
    """Loss per token and its gradients, as a training step takes them."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    value = loss(*leaves, labels) / labels.numel()
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def errors(found: dict[str, Loss], inputs: list[torch.Tensor]) -> dict[str, list[float]]:
    """Relative error of loss and both gradients of each candidate, against float64.

    Raises:
        SystemExit: ours are not about as small as those of whole logits.
    """
    hidden, weight, labels = inputs

    def in_float64(h, w, y):
        return functional.cross_entropy((h @ w.T).flatten(0, 1), y.flatten(), reduction="sum")

    exact = gradients(in_float64, hidden.double(), weight.double(), labels)
    result = {}
    for name, loss in found.items():
        try:
            got = gradients(loss, *inputs)
        except Exception as error:
            # Another library's failure is a result too.
            if name.startswith(("ours", "whole")):
                raise
            print(f"{name} fails: {type(error).__name__}: {str(error)[:500]}")
            continue
        result[name] = [
            relative_error(value.double(), want) for value, want in zip(got, exact, strict=True)
        ]
    bounds = result["whole logits, compiled"]
    for name in ("ours", "ours, chunks of half a GiB", "ours, chunks of 2 GiB"):
        # The hidden states' gradient is rounded to bfloat16 before scaling and after it.
        for error, bound, factor in zip(result[name], bounds, (1.1, 1.5, 1.1), strict=True):
            if not error <= factor * bound + 1e-6:
                raise SystemExit(f"wrong result: errors of {name} {result[name]}, whole {bounds}")
    return result


def fits(loss: Loss, inputs: list[torch.Tensor]) -> bool:
    try:
        gradients(loss, *inputs)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def benchmark_loss(length: int, vocabulary: int, seconds: float) -> dict:
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


def layer(model_class: type, length: int, positions: torch.Tensor | None) -> Callable:
    """A compiled Lighthouse layer as a function of its input, with ``model_class``'s embedding."""
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


def benchmark_rotary(length: int, seconds: float) -> dict:
    torch._dynamo.reset()
    # Four layers, each with and without a graph, are graphs of one function.
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


def tables(run: dict) -> str:
    """The run as Markdown."""
    lines = [
        f"{run['GPU']}, torch {run['torch']}, triton {run['triton']}, revision {run['revision']}, "
        f"{run['date']}. bf16, B = 1. ms, median ± spread; GiB beyond what was there before.",
        "",
    ]
    for record in run["rotary"]:
        lines += [
            f"One compiled Lighthouse layer, N = {record['N']:,}; outputs differ by "
            f"{record['difference']:.1e}.",
            "",
            "| rotary embedding | ms | GiB |",
            "|---|---|---|",
        ]
        for name, c in record["results"].items():
            lines.append(f"| {name} | {c['ms']:.3f} ± {c['spread']:.1g} | {c['GiB']:.2f} |")
        lines.append("")
    for record in run["loss"]:
        lines += [
            f"Loss and both gradients, N = {record['N']:,}, V = {record['V']:,}. Errors relative "
            f"to float64 at {min(record['N'], CHECKED_LENGTH):,} tokens.",
            "",
            "| | ms | GiB | error of loss | of hidden states' gradient | of weight's gradient |",
            "|---|---|---|---|---|---|",
        ]
        for name, c in record["results"].items():
            error = record["error"].get(name.removesuffix(", both"), [])
            cells = " | ".join(f"{e:.2e}" for e in error) or " | | "
            lines.append(
                f"| {name} | {c['ms']:.2f} ± {c['spread']:.1g} | {c['GiB']:.2f} | {cells} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--length", type=int, default=98304, help="tokens N")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[320, 128256])
    parser.add_argument("--seconds", type=float, default=10.0, help="time to measure each case for")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--name", default="parts", help="stem of the files written")
    parser.add_argument("--revision", help="git revision to record; default: as git says")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("scripts/benchmark_parts.py needs a CUDA device and found none")

    run = {**environment(arguments.revision), "rotary": [], "loss": []}
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = arguments.output / f"{arguments.name}.json"
    for vocabulary in arguments.vocabulary:
        run["loss"].append(benchmark_loss(arguments.length, vocabulary, arguments.seconds))
        record.write_text(json.dumps(run, indent=1) + "\n")
        torch.cuda.empty_cache()
    run["rotary"].append(benchmark_rotary(arguments.length, arguments.seconds))
    record.write_text(json.dumps(run, indent=1) + "\n")
    record.with_suffix(".md").write_text(tables(run))
    print(tables(run))


if __name__ == "__main__":
    main()
