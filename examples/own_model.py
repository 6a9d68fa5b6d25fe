"""Train a hand-written GPT, first under Lighthouse attention, then dense.

    .venv/bin/python examples/own_model.py

It needs torch and lighthouse alone, and takes under a minute on two CPU cores. The text is the
source of Python's standard library, a byte a token.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from lighthouse import LighthouseAttention, LighthouseConfig

LENGTH, WIDTH, HEADS, LAYERS = 512, 128, 4, 4
# A window and four strata of 8 picks at each pooled level, for sequences of 512 tokens.
METHOD = LighthouseConfig(
    pooling_factor=2,
    top_k=32,
    picks_per_stratum=8,
    entry_score="first",
    combine="finest",
    window=64,
)


class Block(nn.Module):
    """A block of a GPT. All that is Lighthouse's is the module in ``inner``."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.inner = LighthouseAttention(METHOD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, N, WIDTH], and so is the result."""
        q, k, v = (
            each.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for each in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        x = x + self.out(self.inner(q, k, v).transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norms[1](x))


class GPT(nn.Module):
    """A GPT over bytes, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, N, 256] for tokens [B, N]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.blocks(self.tokens(tokens) + self.positions(positions)))

    def use_lighthouse(self, enabled: bool) -> None:
        """Attend over selected entries and a window, or densely."""
        for block in self.blocks:
            block.inner.enabled = enabled


def rows_of_text(steps: int) -> torch.Tensor:
    """Bytes of Python's standard library, in a mixed order, [steps, 4, LENGTH + 1]."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[: steps * 4 * (LENGTH + 1)]
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).view(steps * 4, -1).long()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order].view(steps, 4, -1)


def main() -> list[float]:
    """The loss of each step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="of each stage; default: 20")
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step, row in enumerate(rows_of_text(2 * steps).to(device)):
        model.use_lighthouse(step < steps)
        logits = model(row[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        stage = "Lighthouse" if step < steps else "dense"
        print(f"step {step + 1:>3} of {2 * steps}  loss {losses[-1]:.3f}  {stage}")
    return losses


if __name__ == "__main__":
    main()
