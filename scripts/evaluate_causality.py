#!/usr/bin/env python3
"""Measure how much of a checkpoint's loss comes from text that the model should not see.

    python scripts/evaluate_causality.py CHECKPOINT... --output FOLDER

The loss at sampled positions of held-out text, once with the true text after them and once with
other text in its place, from the token to be predicted on. Under dense attention both are the same,
to rounding. Under Lighthouse attention they differ as far as the selection, which looks at later
tokens, tells the model about them.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from torchtitan.models.llama3_lighthouse.datasets import build_validation_dataloader
from torchtitan.models.llama3_lighthouse.inference import TrainedModel, load_trained_model


@torch.no_grad()
def losses_at(
    trained: TrainedModel, tokens: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Loss of row i of tokens [B, N] at ``positions[i]``, [B]."""
    logits = trained.model(tokens)
    row = torch.arange(len(tokens), device=tokens.device)
    return cross_entropy(logits[row, positions].float(), labels[row, positions], reduction="none")


def true_and_other_future(
    trained: TrainedModel, samples: int, positions_each: int, device: str
) -> dict[str, torch.Tensor]:
    """Losses with the true text after each position, with other text, and with other text from
    the end of the coarsest entry on."""
    loader = iter(build_validation_dataloader(1, 0, trained.tokenizer, trained.config))
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[torch.Tensor]] = {"true": [], "other": [], "other far": []}
    span = trained.model.model_args.lighthouse.pooling_factor ** (
        trained.model.model_args.lighthouse.levels - 1
    )
    for _ in range(samples):
        inputs, labels = next(loader)
        tokens, labels = inputs["input"].to(device), labels.to(device)
        other = tokens.flip(0) if len(tokens) > 1 else tokens.roll(tokens.shape[1] // 2, 1)
        n = tokens.shape[1]
        index = torch.arange(n, device=device)
        for _ in range(positions_each):
            t = torch.randint(n // 8, n - 2 * span, (len(tokens), 1), generator=generator)
            t = t.to(device)
            ends = {"true": n, "other": t, "other far": (t // span + 2) * span - 1}
            for name, end in ends.items():
                mixed = torch.where(index <= end, tokens, other)
                found[name].append(losses_at(trained, mixed, labels, t[:, 0]))
    return {name: torch.cat(values).double().cpu() for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("outputs/causality.json"))
    parser.add_argument("--samples", type=int, default=8, help="batches of held-out text")
    parser.add_argument("--positions", type=int, default=32, help="of each batch")
    parser.add_argument("--device", default="cpu")
    options, overrides = parser.parse_known_args()
    records = []
    for path in options.checkpoints:
        trained = load_trained_model(path, overrides, options.device)
        for stage in ("dense", "lighthouse"):
            trained.model.set_stage(stage)
            with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
                found = true_and_other_future(
                    trained, options.samples, options.positions, options.device
                )
            record = {"checkpoint": str(path), "stage": stage}
            for name, losses in found.items():
                difference = losses - found["true"]
                error = difference.std() / len(losses) ** 0.5
                record[name] = [losses.mean().item(), difference.mean().item(), error.item()]
            records.append(record)
            print(json.dumps(record), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
