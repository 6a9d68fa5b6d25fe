"""How much of a model's loss comes from text that it should not know yet.

The loss at random positions of held-out text is taken under three futures: the true text, other
text from the predicted token on, and other text from the end of the next coarsest entry on.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..checks import check_output
from ..data.packing import build_validation_dataloader
from ..environment import environment
from ..errors import UserValueError
from ..model.model import lighthouse_config
from .figures import new_figure, save
from .held_out_loss import check_text, estimate
from .inference import (
    TrainedModel,
    find_checkpoint,
    labels_of,
    load_trained_model,
    recorded_config,
)

FUTURES = ("true text", "other text", "other text later")
# A sequence has to hold this many spans of the coarsest level.
SHORTEST_IN_SPANS = 8


@dataclass(frozen=True)
class CausalityOptions:
    """Options of a measurement.

    Attributes:
        checkpoints: as in ``inference.find_checkpoint``.
        attention: "dense", "lighthouse" or both.
        batches: batches of held-out text.
        positions: positions in each sequence of a batch.
    """

    checkpoints: list[Path]
    output: Path
    device: str
    attention: list[str]
    batches: int = 8
    positions: int = 32
    plots: bool = True


def report_causality(options: CausalityOptions, overrides: list[str]) -> None:
    """Measure checkpoints; write causality.json and causality.png, and print a table.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
    """
    paths = [find_checkpoint(path) for path in options.checkpoints]
    texts = [with_text(path, overrides) for path in paths]
    check_output(options.output)
    results = []
    print(f"| checkpoint | attention | {' | '.join(FUTURES)} |\n|---|---|---|---|---|")
    for path, label, text in zip(paths, labels_of(paths), texts, strict=True):
        for attention, summary in _summaries(path, text, options).items():
            print(_line(str(path), attention, summary), flush=True)
            results.append({"checkpoint": str(path), "label": label, "attention": attention,
                            **summary})  # fmt: skip
    record = {
        "unit": "nats per token", "interval": "95%, normal, over positions",
        "device": options.device, **environment(), "batches": options.batches,
        "positions": options.positions, "overrides": overrides, "results": results,
    }  # fmt: skip
    (options.output / "causality.json").write_text(json.dumps(record, indent=1) + "\n")
    if options.plots:
        plot(results, options.output / "causality.png")


def _summaries(
    path: Path, overrides: list[str], options: CausalityOptions
) -> dict[str, dict[str, dict[str, float]]]:
    """The summary of each attention; the model is in memory only during this call."""
    trained = load_trained_model(path, overrides, options.device)
    device = options.device.partition(":")[0]
    found = {}
    for attention in options.attention:
        trained.model.use_attention(attention)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            each = losses(trained, options.batches, options.positions, options.device)
        found[attention] = summarise(each)
    return found


def with_text(path: Path, overrides: list[str]) -> list[str]:
    """Overrides that give the checkpoint at ``path`` a held-out text to be measured on.

    Raises:
        ValueError, TypeError, OSError: there is no such text, or its sequences are too short for
            the selection.
    """
    config = recorded_config(path, overrides)
    if not config.validation.enable:
        own = ["--validation.enable", "--validation.seq_len", str(config.training.seq_len)]
        own += ["--validation.dataset", config.training.dataset]
        own += ["--validation.local_batch_size", "1"]
        if config.training.dataset_path:
            own += ["--validation.dataset_path", config.training.dataset_path]
        overrides = [*own, *overrides]
        config = recorded_config(path, overrides)
    check_text(config)
    span = lighthouse_config(config.lighthouse).coarsest_span
    if config.validation.seq_len < SHORTEST_IN_SPANS * span:
        raise UserValueError(
            f"validation.seq_len = {config.validation.seq_len} has no positions to sample; pass "
            f"at least {SHORTEST_IN_SPANS * span}"
        )
    return overrides


def futures(tokens: torch.Tensor, positions: torch.Tensor, span: int) -> dict[str, torch.Tensor]:
    """``tokens`` [B, N] with each of FUTURES after ``positions`` [B].

    The other text comes from the other half of the same sequence.

    Args:
        span: tokens that a coarsest entry covers.
    """
    length = tokens.shape[1]
    other = tokens.roll(length // 2, dims=1)
    index = torch.arange(length, device=tokens.device)
    last_kept = (length, positions, (positions // span + 2) * span - 1)
    found = {}
    for name, last in zip(FUTURES, last_kept, strict=True):
        last = torch.as_tensor(last, device=tokens.device).reshape(-1, 1)
        found[name] = torch.where(index <= last, tokens, other)
    return found


@torch.no_grad()
def losses(
    trained: TrainedModel, batches: int, positions_each: int, device: str
) -> dict[str, torch.Tensor]:
    """Losses by FUTURES, float64 [trials], at the same random positions of the held-out text.

    Raises:
        ValueError: the held-out split holds too few batches.
    """
    span = trained.model.model_args.lighthouse.coarsest_span
    loader = iter(build_validation_dataloader(1, 0, trained.tokenizer, trained.config))
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in FUTURES}
    for number in range(batches):
        batch = next(loader, None)
        if batch is None:
            raise UserValueError(f"the held-out split holds {number} batches; pass fewer --batches")
        tokens, labels = batch[0]["input"].to(device), batch[1].to(device)
        rows, length = torch.arange(len(tokens), device=device), tokens.shape[1]
        for _ in range(positions_each):
            positions = torch.randint(
                length // 8, length - 2 * span, (len(tokens),), generator=generator
            ).to(device)
            for name, text in futures(tokens, positions, span).items():
                logits = trained.model(text)[rows, positions].double()
                loss = cross_entropy(logits, labels[rows, positions], reduction="none")
                found[name].append(loss.cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def summarise(found: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Mean loss by FUTURES, and the mean difference from the true text with its 95% interval."""
    summary = {}
    for name, values in found.items():
        difference = estimate(values - found[FUTURES[0]])
        assert difference.high is not None, "an interval needs two trials"
        summary[name] = {
            "loss": values.mean().item(),
            "difference": difference.mean,
            "interval": difference.high - difference.mean,
        }
    return summary


def _line(path: str, attention: str, summary: dict[str, dict[str, float]]) -> str:
    """A row of the printed table."""
    cells = [f"{summary[FUTURES[0]]['loss']:.3f}"]
    cells += ["{loss:.3f} ({difference:+.3f} ± {interval:.3f})".format(**summary[name])
              for name in FUTURES[1:]]  # fmt: skip
    return f"| {path} | {attention} | {' | '.join(cells)} |"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """The worth of later tokens: a pair of bars for each checkpoint and attention."""
    figure = new_figure(width=3.0 + 1.6 * len(results))
    axis = figure.subplots()
    width = 0.8 / len(FUTURES[1:])
    for number, name in enumerate(FUTURES[1:]):
        places = [index + (number - 0.5) * width for index in range(len(results))]
        heights = [result[name]["difference"] for result in results]
        intervals = [result[name]["interval"] for result in results]
        axis.bar(places, heights, width, yerr=intervals, capsize=3, label=name)
    axis.set_xticks(range(len(results)),
                    [f"{result['label']}\n{result['attention']} attention" for result in results],
                    fontsize=8)  # fmt: skip
    axis.set_ylabel("loss minus that with the true text,\nnats per token, 95% interval")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    save(figure, path)
