"""The debug contest with other values, and logs of made-up runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from pages import ROOT

from torchtitan.models.llama3_lighthouse.stages import attention_at, stage_at, stages_of
from torchtitan.models.llama3_lighthouse.studies.contest_file import Contest, read_contest

DEBUG = ROOT / "train_configs/contests/debug.toml"


def write_logs(
    run, rates_best: float = 2e-3, gain: float = 0.05, fast: float = 0.5, shift: float = 0.0
) -> None:
    """Log lines and measures of a run whose arm "lighthouse" is better by ``gain``.

    Steps take 0.5 s, and ``fast`` where they are not dense. Losses are higher by ``shift``.
    """
    rate, seed = run.settings["optimizer.lr"], run.settings["debug.seed"]
    loss = 1.5 + abs(np.log(rate / rates_best)) + 0.001 * seed
    loss += shift - gain * run.name.startswith("lighthouse")
    lines, stages, last = [], stages_of(run.config), run.config.training.steps
    for step in range(1, last + 1):
        selects = attention_at(step, stage_at(step, stages)) == "lighthouse"
        lines.append(
            {
                "step": step,
                "n_tokens_seen": 512 * step,
                "lighthouse/stage": float(selects),
                "time_metrics/end_to_end(s)": fast if selects else 0.5,
                "loss_metrics/global_avg_loss": loss,
            }
        )
        if step == 1 or step % 4 == 0:
            lines.append({"step": step, "validation_metrics/loss": loss + last - step})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def contest_with(**values) -> Contest:
    """The debug contest with other values."""
    return replace(read_contest(DEBUG), **values)


def at_equal_time(path: Path, seconds: float) -> None:
    """Let the contest at ``path`` give all arms as many GPU seconds."""
    text = path.read_text().replace("training.steps = 8\n", "")
    path.write_text(f"gpu_seconds = {seconds}\n" + text.replace("until=6", "until=75%"))


def with_start(path: Path, more: str = "") -> None:
    path.write_text(
        path.read_text().replace(
            "[distance]",
            "[start]\nrate = 5e-4\ntraining.steps = 12\n"
            f'lighthouse.schedule = ["dense seq_len=128"]\n{more}\n[distance]',
        )
    )
