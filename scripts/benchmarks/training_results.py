"""Results of the training benchmark: throughput, its table and its plot."""

import statistics
from pathlib import Path
from typing import Any

from reporting import crossover, origin, plot_over_length, table_head, table_row, with_spread

NAMES = {"lighthouse": "Lighthouse", "dense": "dense", "upstream": "torchtitan's Llama 3"}
# As LIGHTHOUSE, DENSE and UPSTREAM of the product's figures, whose import takes seconds.
STYLES = {
    "lighthouse": ("tab:orange", "s-"),
    "dense": ("tab:blue", "o-"),
    "upstream": ("tab:purple", "^:"),
}


def summarise(record: dict[str, Any]) -> dict[str, Any]:
    """Add tokens/s and MFU to the record of a case that trained."""
    if "failure" not in record and record["seconds"]:
        seconds = statistics.median(record["seconds"])
        record["s a step"] = seconds
        record["spread"] = max(record["seconds"]) - min(record["seconds"])
        record["tokens/s"] = record["tokens a step"] / seconds
        if record["peak FLOP/s"]:
            record["MFU"] = record["tokens/s"] * record["FLOPs a token"] / record["peak FLOP/s"]
    return record


def best(records: list[dict[str, Any]], attention: str, n: int) -> dict[str, Any] | None:
    """The fastest record of an attention at length ``n``, or None."""
    found = [r for r in records if r["stage"] == attention and r["N"] == n and "tokens/s" in r]
    return max(found, key=lambda record: record["tokens/s"], default=None)


def compared(records: list[dict[str, Any]]) -> str:
    """A sentence that says where Lighthouse is faster, each attention in its best mode."""
    faster = {}
    for n in sorted({record["N"] for record in records}):
        ours, dense = best(records, "lighthouse", n), best(records, "dense", n)
        if ours and dense:
            faster[n] = ours["tokens/s"] > dense["tokens/s"]
    return crossover(faster)


def row_of(record: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """The row of one case, compared with the others at its length."""
    head = [record["stage"], record["mode"], f"{record['N']:,}, {record['k']:,}"]
    if "tokens/s" not in record:
        return table_row([*head, "", record.get("failure", "nothing measured"), *[""] * 5])
    ratios = []
    for attention in ("dense", "upstream"):
        other = best(records, attention, record["N"])
        ratios.append(f"{record['tokens/s'] / other['tokens/s']:.2f}x" if other else "")
    return table_row(
        [
            *head,
            f"{record['S']:,}",
            f"{record['tokens/s']:,.0f}",
            with_spread(record["s a step"], record["spread"], ".3f"),
            f"{record['MFU']:.1%}" if "MFU" in record else "",
            f"{record['reserved GiB']:.1f}",
            *ratios,
        ]
    )


def table(run: dict[str, Any]) -> str:
    """The run as Markdown."""
    records = run["records"]
    lines = [
        f"{run['config']} {' '.join(run['trainer arguments'])}, {origin(run)}. "
        f"{run['steps']} steps after {run['warm-up']} of warm-up.",
        "",
        *table_head(
            ["stage", "checkpointing", "N, k", "S", "tokens/s", "s a step", "MFU", "GiB"]
            + ["over dense", "over upstream"]
        ),
        *(row_of(record, records) for record in records),
        "",
        f"{compared(records)} Ratios are to the fastest mode at that length. GiB: peak reserved. "
        "MFU counts causal attention once and S in Lighthouse layers, no recomputation.",
    ]
    return "\n".join(lines) + "\n"


def plot(run: dict[str, Any], path: Path) -> None:
    """Draw tokens/s and memory over the length, one line for each attention and mode."""
    records = run["records"]
    kinds = list(dict.fromkeys((record["stage"], record["mode"]) for record in records))
    panels = {
        key: {
            f"{NAMES[attention]}, checkpointing {mode}": (
                *STYLES[attention],
                [
                    (record["N"], record[key])
                    for record in records
                    if (record["stage"], record["mode"]) == (attention, mode)
                    and "tokens/s" in record
                ],
            )
            for attention, mode in kinds
        }
        for key in ("tokens/s", "reserved GiB")
    }
    panels = {f"{key}, one GPU" if key == "tokens/s" else "memory, reserved GiB": lines
              for key, lines in panels.items()}  # fmt: skip
    title = f"Training, {run['config']}, {run['device']}. {compared(records)}"
    plot_over_length(path, title, panels)
