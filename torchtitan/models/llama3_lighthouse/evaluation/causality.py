"""How much of a model's loss comes from text that it should not know yet.

The loss at random positions of held-out text is taken under three futures: the true text, other
text from the predicted token on, and other text from the end of the next coarsest entry on.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..checkpoints.record import read_record
from ..checks.output import check_output
from ..data.packing import build_validation_dataloader
from ..environment import environment
from ..errors import UserValueError
from ..model.model import lighthouse_config
from .figures import new_figure, save
from .held_out_loss import check_text, estimate, with_held_out_text
from .inference import (
    TrainedModel,
    find_checkpoint,
    labels_of,
    load_trained_model,
    recorded_config,
    without_output,
)
from .progress import Progress, say, say_what_was_written

FUTURES = ("true text", "other text", "other text later")
# Batches and positions by device. On a CPU a forward pass takes a second.
DEFAULT_TRIALS = {"cuda": (8, 32), "cpu": (2, 6)}
# A sequence has to hold this many spans of the coarsest level.
SHORTEST_IN_SPANS = 8


@dataclass(frozen=True)
class CausalityOptions:
    """Options of a measurement.

    Attributes:
        checkpoints: as in ``inference.find_checkpoint``.
        attention: "dense", "lighthouse" or both; None: Lighthouse, and a checkpoint that was never
            trained under it is refused.
        batches: batches of held-out text; None: those of ``DEFAULT_TRIALS``.
        positions: positions in each sequence of a batch; None: those of ``DEFAULT_TRIALS``.
    """

    checkpoints: list[Path]
    output: Path
    device: str
    attention: list[str] | None = None
    batches: int | None = None
    positions: int | None = None
    plots: bool = True

    def trials(self) -> tuple[int, int]:
        """Batches, and positions in each sequence: as given, or those that take a minute."""
        batches, positions = DEFAULT_TRIALS[self.device.partition(":")[0]]
        return self.batches or batches, self.positions or positions


def report_causality(options: CausalityOptions, overrides: list[str]) -> None:
    """Measure checkpoints; write causality.json and causality.png, and print a table.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
    """
    paths = [find_checkpoint(path) for path in options.checkpoints]
    texts = [with_text(path, overrides) for path in paths]
    for path in paths:
        _check_stage(path, options.attention)
    check_output(options.output)
    attentions = options.attention or ["lighthouse"]
    batches, positions = options.trials()
    results = []
    forwards = len(paths) * len(attentions) * batches * (1 + positions * len(FUTURES[1:]))
    with Progress("causality", forwards, "forward passes") as bar:
        for path, label, text in zip(paths, labels_of(paths), texts, strict=True):
            trained = load_trained_model(path, text, options.device)
            for attention in attentions:
                found = _losses_under(trained, attention, options, lambda: bar.advance(1, ""))
                results.append({"checkpoint": str(path), "label": label, "attention": attention,
                                **summarise(found)})  # fmt: skip
            # Two models would take twice the memory.
            del trained
    print(_table(results))
    if "dense" in attentions:
        print("Under dense attention no position sees later tokens: the differences are zero.")
    record = {
        "unit": "nats per token", "interval": "95%, normal, over positions",
        "device": options.device, **environment(), "batches": batches,
        "positions": positions, "overrides": overrides, "results": results,
    }  # fmt: skip
    (options.output / "causality.json").write_text(json.dumps(record, indent=1) + "\n")
    if options.plots:
        plot(results, options.output / "causality.png")
    say_what_was_written(options.output, "causality.json", "causality.png")


def _check_stage(path: Path, attention: list[str] | None) -> None:
    """Refuse a checkpoint that never trained under Lighthouse; say so if its last steps were dense.

    Raises:
        ValueError: it never did, and no attention was asked for.
    """
    record = read_record(path)
    if record is None or attention is not None:
        return
    if record.last_lighthouse_step == 0:
        raise UserValueError(
            f"{path} was never trained under Lighthouse attention, and dense attention sees no "
            "later tokens; pass --attention lighthouse to measure it all the same"
        )
    if record.dense_steps:
        say(
            f"{path}: its last {record.dense_steps:,} steps were dense; what its Lighthouse stage "
            f"knew shows in a checkpoint of step {record.last_lighthouse_step:,} or earlier"
        )


def _losses_under(
    trained: TrainedModel,
    attention: str,
    options: CausalityOptions,
    after_forward: Callable[[], None],
) -> dict[str, torch.Tensor]:
    trained.model.use_attention(attention)
    device = options.device.partition(":")[0]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return losses(trained, *options.trials(), options.device, after_forward)


def with_text(path: Path, overrides: list[str]) -> list[str]:
    """Overrides that give the checkpoint at ``path`` a held-out text to be measured on.

    Raises:
        ValueError, TypeError, OSError: there is no such text, its sequences are too short for the
            selection, or the attention of the first stage is a window.
    """
    overrides = with_held_out_text(path, overrides)
    config = recorded_config(path, overrides)
    if config.lighthouse.attention == "window":
        raise UserValueError(
            f"{path} has lighthouse.attention = 'window', which selects nothing: no position sees "
            "later tokens, and there is nothing to measure; name a checkpoint of another attention"
        )
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
    trained: TrainedModel,
    batches: int,
    positions_each: int,
    device: str,
    after_forward: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Losses by FUTURES, float64 [trials], at the same random positions of the held-out text.

    The true text is the same at every position, so one forward pass of it serves them all.

    Raises:
        ValueError: the held-out split holds too few batches.
    """
    span = trained.model.model_args.lighthouse.coarsest_span
    loader = iter(build_validation_dataloader(1, 0, trained.tokenizer, trained.config, span=0))
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in FUTURES}
    for number in range(batches):
        batch = next(loader, None)
        if batch is None:
            raise UserValueError(f"the held-out split holds {number} batches; pass fewer --batches")
        tokens, labels = batch[0]["input"].to(device), batch[1].to(device)
        rows, length = torch.arange(len(tokens), device=device), tokens.shape[1]
        drawn = [
            torch.randint(length // 8, length - 2 * span, (len(tokens),), generator=generator)
            for _ in range(positions_each)
        ]
        with without_output(trained.model) as output:

            def hidden(text: torch.Tensor) -> torch.Tensor:
                found = trained.model(text)
                after_forward()
                return found

            true = hidden(tokens)
            for positions in (each.to(device) for each in drawn):
                for name, text in futures(tokens, positions, span).items():
                    states = true if name == FUTURES[0] else hidden(text)
                    logits = output(states[rows, positions]).double()
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


def _table(results: list[dict[str, Any]]) -> str:
    lines = [f"| checkpoint | attention | {' | '.join(FUTURES)} |", "|---|---|---|---|---|"]
    for result in results:
        cells = [f"{result[FUTURES[0]]['loss']:.3f}"]
        cells += ["{loss:.3f} ({difference:+.3f} ± {interval:.3f})".format(**result[name])
                  for name in FUTURES[1:]]  # fmt: skip
        lines.append(f"| {result['checkpoint']} | {result['attention']} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
