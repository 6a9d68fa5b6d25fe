#!/usr/bin/env python3
"""Measure how much of a checkpoint's loss comes from text that the model should not know yet.

    python scripts/evaluate_causality.py CHECKPOINT... --output outputs/causality.json

Takes the loss at random positions of held-out text three times: with the true text after them, with
other text in its place from the predicted token on, and with other text from the end of the next
coarsest entry on. Under dense attention all are the same. Under Lighthouse attention, whose
selection may look at later tokens, the differences are what those are worth to the model, in nats:
of "other text" all of them, of "other text later" those outside the position's own entries.

The text is what the run validated on, or the held-out split of its dataset in sequences of
training.seq_len. Overrides of the checkpoints' configuration, --section.key value, come last.
Prints a table and writes a JSON record. docs/selection.md says what was found.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from lighthouse_commands.arguments import (
    check_device,
    command_parser,
    parse_with_overrides,
    run_command,
)

from ..data.packing import build_validation_dataloader
from ..errors import UserValueError
from .held_out_loss import check_text, estimate
from .inference import (
    TrainedModel,
    find_checkpoint,
    load_trained_model,
    recorded_config,
)

FUTURES = ("true text", "other text", "other text later")


def futures(tokens: torch.Tensor, positions: torch.Tensor, span: int) -> dict[str, torch.Tensor]:
    """``tokens`` [B, N] with each of FUTURES after ``positions`` [B]; ``span`` of an entry.

    What is put in comes from the other half of the same sequence.
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
    args = trained.model.model_args
    span = args.lighthouse.pooling_factor ** (args.lighthouse.levels - 1)
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
    """Mean loss by FUTURES, and the mean difference from the first with its 95% interval."""
    summary = {}
    for name, values in found.items():
        difference = estimate(values - found[FUTURES[0]])
        summary[name] = {
            "loss": values.mean().item(),
            "difference": difference.mean,
            "interval": difference.high - difference.mean,
        }
    return summary


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--output", type=Path, default=Path("outputs/causality.json"),
                        metavar="FILE", help="default: outputs/causality.json")  # fmt: skip
    parser.add_argument("--batches", type=int, default=8, help="of held-out text; default: 8")
    parser.add_argument("--positions", type=int, default=32,
                        help="in each sequence of a batch; default: 32")  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options, overrides = parse_with_overrides(parser)
    if min(options.batches, options.positions) < 1 or options.batches * options.positions < 2:
        raise UserValueError(
            f"--batches {options.batches} and --positions {options.positions} leave no interval; "
            "pass at least 2 of one of them"
        )
    check_device(options.device)
    if options.output.is_dir():
        raise UserValueError(f"--output {options.output} is a folder; name a file in it")
    return options, overrides


def with_text(path: Path, overrides: list[str]) -> list[str]:
    """``overrides`` that give the checkpoint at ``path`` a held-out text to be measured on.

    Raises:
        ValueError, TypeError, OSError: it has none, or one too short for what it selects.
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
    span = config.lighthouse.pooling_factor ** (config.lighthouse.levels - 1)
    if config.validation.seq_len < 8 * span:
        raise UserValueError(
            f"validation.seq_len = {config.validation.seq_len} has no positions to sample; pass "
            f"at least {8 * span}"
        )
    return overrides


def evaluate() -> None:
    """What the command does.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
    """
    options, overrides = parse_arguments()
    paths = [find_checkpoint(path) for path in options.checkpoints]
    texts = [with_text(path, overrides) for path in paths]
    records = []
    for path, text in zip(paths, texts, strict=True):
        trained = load_trained_model(path, text, options.device)
        for attention in ("dense", "lighthouse"):
            trained.model.use_attention(attention)
            with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
                found = losses(trained, options.batches, options.positions, options.device)
            summary = summarise(found)
            if not records:
                print(f"| checkpoint | attention | {' | '.join(FUTURES)} |\n|---|---|---|---|---|")
            records.append({"checkpoint": str(trained.path), "attention": attention, **summary})
            cells = [f"{summary[FUTURES[0]]['loss']:.3f}"]
            cells += ["{loss:.3f} ({difference:+.3f} ± {interval:.3f})".format(**summary[name])
                      for name in FUTURES[1:]]  # fmt: skip
            print(f"| {trained.path} | {attention} | {' | '.join(cells)} |", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(records, indent=1) + "\n")


def main() -> None:
    run_command(evaluate, "nothing was written")


if __name__ == "__main__":
    main()
