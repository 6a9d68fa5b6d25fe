"""Each figure in the README stands in the record that docs/claims.md names for it."""

import itertools
import json
import re
import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
from contest_records import (
    between,
    costs_of_yarn,
    difference,
    results_of,
    steps_by_kind,
    undisturbed_seconds,
    untrained_by_seed,
    with_half,
)
from pages import DOCS, ROOT, words

from torchtitan.models.llama3_lighthouse.dry_run import dry_run
from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.studies.contest_statistics import t_interval

# Steps of a run, those of its first stage, and tokens of a step, in all configurations for 98K.
STEPS, FIRST_STAGE, TOKENS = 16000, 10000, 32 * 98304


README = words(ROOT / "README.md")
CLAIMS = words(DOCS / "claims.md")


def training(config: str, length: int = 98304) -> dict[str, dict[str, Any]]:
    """The measurements of a configuration at a length, by attention, in its first mode."""
    runs = json.loads((DOCS / "benchmarks/training_98k.json").read_text())
    (run,) = [run for run in runs if run["config"] == f"{config}.toml"]
    mode = run["records"][0]["mode"]
    return {
        record["stage"]: record
        for record in run["records"]
        if (record["N"], record["mode"]) == (length, mode)
    }


def speeds(config: str, length: int = 98304) -> tuple[float, float]:
    """Tokens/s under Lighthouse and dense attention."""
    records = training(config, length)
    return records["lighthouse"]["tokens/s"], records["dense"]["tokens/s"]


def hours(config: str) -> tuple[float, float]:
    """Hours on one GPU: of the whole recipe, and of dense training throughout."""
    lighthouse, dense = speeds(config)
    first, rest = FIRST_STAGE * TOKENS, (STEPS - FIRST_STAGE) * TOKENS
    return (first / lighthouse + rest / dense) / 3600, (first + rest) / dense / 3600


def fastest_dense(length: int) -> float:
    """Tokens/s of dense training in its fastest mode of checkpointing."""
    runs = json.loads((DOCS / "benchmarks/training_98k.json").read_text())
    records = next(run["records"] for run in runs if run["config"] == "270m_98k.toml")
    return max(r["tokens/s"] for r in records if (r["stage"], r["N"]) == ("dense", length))


def faster() -> str:
    long, short = (
        speeds("270m_98k", length)[0] / fastest_dense(length) for length in (98304, 32768)
    )
    return f"{long:.1f} times as fast as dense attention, and {short:.1f} times at 32,768"


def faster_in_all() -> str:
    whole, dense = hours("270m_98k")
    lighthouse, throughout = speeds("270m_98k", 32768)
    shorter = 1 / (0.625 * throughout / lighthouse + 0.375)
    return f"is {dense / whole:.1f} times as fast, and {shorter:.1f} times at 32,768"


def layer() -> str:
    records = json.loads((DOCS / "benchmarks/attention.json").read_text())["records"]
    (case,) = [record["results"] for record in records if record["case"] == "98304,3,4,1536"]
    forward, both = (
        case[f"dense, {part}"]["ms"] / case[f"lighthouse, {part}"]["ms"]
        for part in ("forward", "both")
    )
    return (
        f"{forward:.1f} times as fast as dense cuDNN attention forward, and {both:.1f} times with "
        "backward"
    )


def shorter() -> str:
    """The first stage and a whole run at 8,192 tokens."""
    runs = json.loads((DOCS / "benchmarks/training_graphs.json").read_text())
    (speed,) = [
        {record["stage"]: record["tokens/s"] for record in run["records"]}
        for run in runs
        if not run["trainer arguments"]
    ]
    first = speed["lighthouse"] / speed["dense"]
    whole = 1 / (0.625 / first + 0.375)
    return f"the first stage is {first:.2f} times as fast, and a whole run {whole:.1f} times"


def memory(config: str) -> str:
    records = training(config)
    lighthouse, dense = (records[stage]["reserved GiB"] for stage in ("lighthouse", "dense"))
    return f"{lighthouse:.0f} GiB, dense {dense:.0f}"


def tokens_a_second(config: str) -> str:
    lighthouse, dense = speeds(config)
    return f"{lighthouse:,.0f}, dense {dense:,.0f}"


def whole_run(config: str) -> str:
    whole, dense = hours(config)
    gpu = "H200" if config == "270m_98k" else "H100"
    return f"{whole:.0f} {gpu} hours, dense throughout {dense:.0f}"


@cache
def estimate(config: str, processes: int) -> str:
    """Memory of a GPU in the dense stage, which takes more, as the dry run has it."""
    line = ["--job.config_file", str(ROOT / f"train_configs/{config}.toml")]
    line += ["--model.hf_assets_path", str(ROOT)]
    text = dry_run(LighthouseConfigManager().parse_args(line), processes)
    (gibibytes,) = re.findall(r"([\d.]+) GiB dense", text)
    return f"{float(gibibytes):.0f} GiB, estimated"


def on_a_laptop() -> str:
    """The newcomer's run: median speeds of both stages, and its time."""
    log = (DOCS / "benchmarks/first_run.log").read_text()
    first, second = log.split("Stage 'dense' begins")
    lighthouse, dense = (
        statistics.median(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens/s", part))
        for part in (first, second)
    )
    (memory,) = set(re.findall(r"step 45 of 45 .* ([\d.]+) GiB", log))
    (time,) = re.findall(r"45 steps in (\d+):", log)
    return (
        f"{float(memory):.0f} GiB of the host | {round(lighthouse, -2):,.0f}, "
        f"dense {round(dense, -1):.0f} | "
        f"{int(time) + 1} minutes on two CPU cores"
    )


def in_contest(name: str, measure: str, higher: str, lower: str, words: str) -> str:
    """Words about how far one arm lies above another, by an interval on one side of zero."""
    mean, low, high = difference(name, higher, lower, measure)
    return words.format(f"{mean:.3f} nats {between(low, high)}")


on_books = partial(in_contest, "books_17m", "loss")
at_distance = partial(in_contest, "distance_17m", "repeated/16384/loss")


def beside_half_dense() -> str:
    """How much the intervals of Lighthouse with half of its steps dense leave open."""
    arm, measure, ends = "lighthouse_half", "repeated/16384/loss", []
    for name in ("distance_17m", "distance_skips_17m"):
        for control in ("dense", "short_then_long"):
            _, low, high = difference(name, arm, control, measure)
            assert low < 0 < high
            ends += [-low, high]
    return f"it may be up to {max(ends):.2f} nats better or worse"


def over_books(name: str, arm: str, control: str, measure: str) -> str:
    """How far an arm lies below another; the interval is over books."""
    found = results_of(name).over_documents(arm, control, measure)
    assert found and found.low is not None and found.high is not None
    return f"{-found.mean:.3f} nats {between(found.low, found.high)}"


FAR = "repeated/65536/loss"
SCALING, SCALING_32K = "scaling_17m_98k", "scaling_17m_32k"


def untrained(name: str, measure: str) -> float:
    return statistics.fmean(untrained_by_seed(name, measure))


def mean_of(name: str, arm: str, measure: str) -> float:
    results = results_of(name)
    return statistics.fmean(results.value(arm, seed, measure)
                            for seed in results.seeds(arm, measure))  # fmt: skip


def yarn_alone() -> str:
    """What YaRN brings without training, and training with skips without YaRN."""
    runs = results_of(SCALING).runs
    runs = runs[runs.arm == "skip_then_long"]
    return (
        f"65,536 tokens earlier costs {untrained(SCALING, 'repeated/65536'):.3f} nats less than a "
        "new one. After "
        f"{runs['GPU seconds'].mean():.0f} GPU seconds of skips and long sequences without YaRN it "
        f"costs {mean_of(SCALING, 'skip_then_long', 'repeated/65536'):.3f} nats less"
    )


def skips_after_another_start() -> str:
    return f"brought {mean_of('trend_17m_98k', 'skip_then_long', 'repeated/65536'):.3f}"


def cost_of_yarn() -> str:
    """What YaRN costs before training, within the length of the start's training."""
    costs = costs_of_yarn(SCALING)
    return f"YaRN costs {min(costs):.3f} to {max(costs):.3f} nats before training"


def less_time_of_dense() -> str:
    """How much less time dense training had at 32,768 tokens than short sequences first."""
    dense, short = (undisturbed_seconds(SCALING_32K, arm) for arm in ("dense", "short_then_long"))
    return f"dense training had up to {1 - dense / short:.0%} less time"


def passages_under_yarn() -> str:
    """Loss of passages at 32,768 tokens under YaRN, without training and after it."""
    measure = "repeated/16384/loss"
    dense, short, skips = (mean_of(SCALING_32K, arm, measure)
                           for arm in ("dense", "short_then_long", "skip_then_long"))  # fmt: skip
    return (
        f"a loss of {untrained(SCALING_32K, measure):.3f} nats under YaRN alone, {dense:.3f} after "
        f"dense training, {short:.3f} after short sequences first, and {skips:.3f} if their "
        "positions skip"
    )


def books_under_yarn() -> str:
    """How far short sequences first lie below dense training on plain books, under YaRN."""
    short, skips = (in_contest(SCALING_32K, "loss", "dense", arm, "{}")
                    for arm in ("short_then_long", "skip_then_long"))  # fmt: skip
    return f"short sequences first end {short} below dense training, and with skips {skips}"


def headline() -> str:
    """How far short sequences first lie below dense training and Lighthouse at 98,304 tokens."""
    dense, lighthouse = (
        over_books("headline_270m_98k", "short_to_long", control, FAR)
        for control in ("dense", "short_to_lighthouse")
    )
    return f"ends {dense} lower on passages that return after 65,536 tokens, and {lighthouse} lower"


def speed_of_the_headline() -> str:
    runs = results_of("headline_270m_98k").runs.set_index("arm")
    speed = runs.tokens / runs["GPU seconds"]
    return f"{speed['short_to_long'] / speed['dense']:.1f} times as many tokens a second"


class Recipe(NamedTuple):
    """Where the README's table has a recipe's numbers from."""

    # The arms of the contests of distance, of YaRN at both lengths, and on books.
    at_distance: str | None
    under_yarn_32k: str | None = None
    under_yarn: str | None = None
    on_books: str | None = None
    # The arm of the headline that has its two stages, and the kinds of their steps.
    at_98k: tuple[str, str, str] | None = None


UNTRAINED = "YaRN alone, not trained"
RECIPES = {
    "dense": Recipe("dense", "dense", "scaled_dense", "dense", ("dense", "1 dense", "1 dense")),
    "short sequences first": Recipe(
        "short_then_long",
        "short_then_long",
        "scaled_short_then_long",
        "short_to_long_30",
        ("short_to_long", "1 dense", "2 dense"),
    ),
    "short sequences first, positions skip": Recipe(
        None,
        "skip_then_long",
        "scaled_skip_then_long",
        None,
        ("short_to_long", "1 dense", "2 dense"),
    ),
    "Lighthouse, half dense": Recipe(
        "lighthouse_half",
        None,
        "scaled_lighthouse_half",
        None,
        ("short_to_lighthouse", "2 lighthouse", "3 dense"),
    ),
    "Lighthouse, an eighth dense": Recipe(
        "lighthouse", None, None, "recommended", ("short_to_lighthouse", "2 lighthouse", "3 dense")
    ),
    "window of 256, an eighth dense": Recipe(
        "window", None, None, "window", ("short_to_window", "2 lighthouse", "3 dense")
    ),
    "published selection, an eighth dense": Recipe("published", None, None, "published"),
}


def share_in_full(recipe: Recipe) -> float:
    """The share of a recipe's steps that are dense and at full length."""
    arms = {"distance_17m": recipe.at_distance, SCALING_32K: recipe.under_yarn_32k}
    steps = next(list(steps_by_kind(name, arm).values()) for name, arm in arms.items() if arm)
    return steps[-1] / sum(steps)


def share_of_long() -> str:
    (share,) = {f"{share_in_full(each):.0%}" for name, each in RECIPES.items() if "short" in name}
    return f"count with {share} of their steps at full length here"


def speed_of(recipe: Recipe) -> str:
    """How much faster a whole run is than dense training, by the times of the headline's steps."""
    if recipe.at_98k is None:
        return ""
    return speed_at_98k(recipe.at_98k, share_in_full(recipe))


def speed_at_98k(stages: tuple[str, str, str], share: float) -> str:
    """As ``speed_of``, with a share of steps in the second of two stages of an arm."""
    arm, first, last = stages
    times = results_of("headline_270m_98k").times
    own = (1 - share) * times[arm][first] + share * times[arm][last]
    return f"{times['dense']['1 dense'] / own:.2g}x"


def speed_of_the_recommended() -> str:
    """Of the file for a model from nothing, a tenth of whose steps are long."""
    text = (ROOT / "train_configs/short_to_long_98k.toml").read_text()
    (last,) = re.findall(r"dense until=(\d+) seq_len=8192 skip_positions", text)
    stages = RECIPES["short sequences first"].at_98k
    assert stages and int(last) / STEPS == 0.9
    return (
        f"With a tenth, as in the recommended file from nothing, it is {speed_at_98k(stages, 0.1)}"
    )


def row_of_the_untrained() -> str:
    """The row of the README's table for YaRN alone, without its last bar."""
    near = with_half(untrained_by_seed(SCALING_32K, "repeated/16384/loss"))
    return f"{UNTRAINED} | | {near} | {untrained(SCALING, FAR):.3f}"


def row_of(name: str) -> str:
    """A row of the README's table of recipes, without its last bar."""
    recipe = RECIPES[name]
    cells = [name]
    for contest, arm, measure in (("distance_17m", recipe.at_distance, "repeated/16384/loss"),
                                  (SCALING_32K, recipe.under_yarn_32k, "repeated/16384/loss"),
                                  (SCALING, recipe.under_yarn, FAR),
                                  ("books_17m", recipe.on_books, "loss")):  # fmt: skip
        results = results_of(contest)
        values = (
            [results.value(arm, seed, measure) for seed in results.seeds(arm, measure)]
            if arm
            else []
        )
        # Half an interval of two seeds would be far too wide.
        shown = with_half(values) if len(values) > 2 else f"{statistics.fmean(values or [0]):.3f}"
        # It was chosen without YaRN, and is twice that of the other arms.
        shown += ", at twice the rate" if arm == "scaled_short_then_long" else ""
        cells.append(shown if values else "")
    cells.append(speed_of(recipe))
    return " ".join(" | ".join(cells).split())


FIGURES: dict[str, Callable[[], str]] = {
    "speed of the stage": faster,
    "speed of a whole run": faster_in_all,
    "speed of the layer": layer,
    "shorter lengths": shorter,
    "short sequences first": partial(
        on_books, "recommended", "short_to_long_30", "short sequences first ends {} below"
    ),
    "dense on books": partial(on_books, "dense", "recommended", "it ends {} below dense training"),
    "behind at distance": partial(at_distance, "lighthouse", "dense", "{} above dense training"),
    "YaRN alone": yarn_alone,
    "YaRN at 32,768 tokens": passages_under_yarn,
    "books under YaRN": books_under_yarn,
    "another start": skips_after_another_start,
    "cost of YaRN": cost_of_yarn,
    "less time": less_time_of_dense,
    "speed of the recommended file": speed_of_the_recommended,
    UNTRAINED: row_of_the_untrained,
    "half dense": beside_half_dense,
    "share at full length": share_of_long,
    "headline": headline,
    "speed of the headline": speed_of_the_headline,
    "laptop": on_a_laptop,
    "270m_256k_cp8": lambda: estimate("270m_256k_cp8", 8),
    "8b_128k": lambda: estimate("8b_128k", 8),
    "paper_530m_1m_cp8": lambda: estimate("paper_530m_1m_cp8", 32),
}
for name in RECIPES:
    FIGURES[f"{name}, its row"] = partial(row_of, name)
for name in ("270m_98k", "paper_530m_98k"):
    for figure in (memory, tokens_a_second, whole_run):
        FIGURES[f"{name}, {figure.__name__}"] = partial(figure, name)


@pytest.mark.parametrize("name", FIGURES)
def test_figure_stands_in_its_record(name: str) -> None:
    text = FIGURES[name]()
    assert text in README, f"the record says: {text}"
    listed = re.sub(r"( \|)+ ", ", ", text).rstrip(" |")
    assert listed in CLAIMS, f"docs/claims.md has no row for: {listed}"


def test_the_lowest_losses_are_those_of_the_most_dense_time() -> None:
    results = results_of("distance_17m")
    losses: dict[bool, list[float]] = {True: [], False: []}
    for arm in results.contest.arms:
        seconds = [results.times[arm][kind] * steps
                   for kind, steps in steps_by_kind("distance_17m", arm).items()]  # fmt: skip
        values = [results.value(arm, s, "repeated/16384/loss") for s in results.contest.seeds]
        losses[seconds[-1] > sum(seconds) / 2].append(statistics.fmean(values))
    assert len(losses[True]) == 3 and max(losses[True]) < min(losses[False])


def test_lighthouse_is_not_told_apart_from_a_window_alone() -> None:
    _, low, high = difference("books_17m", "recommended", "window", "loss")
    assert low < 0 < high


def test_arms_under_yarn_are_not_told_apart() -> None:
    """Nor from YaRN alone, in passages after 16,384 tokens."""
    measure, seeds = "repeated/16384/loss", (1, 2, 3, 4)
    results = results_of(SCALING_32K)
    values = {arm: [results.value(arm, seed, measure) for seed in seeds]
              for arm in ("dense", "short_then_long", "skip_then_long")}  # fmt: skip
    values[UNTRAINED] = untrained_by_seed(SCALING_32K, measure)
    for ours, theirs in itertools.combinations(values.values(), 2):
        found = t_interval([a - b for a, b in zip(ours, theirs, strict=True)], 0.95)
        assert found.low is not None and found.high is not None and found.low < 0 < found.high


def test_lighthouse_is_ahead_of_short_sequences_at_twice_the_rate() -> None:
    results = results_of(SCALING)
    arms = ("scaled_lighthouse_half", "scaled_short_then_long")
    assert all(max(results.differences(*arms, each)) < 0 for each in (FAR, "loss"))


def test_rates_of_the_contest_at_98k() -> None:
    rates = results_of(SCALING).runs.groupby("arm").rate.first()
    assert rates.pop("scaled_short_then_long") == 2 * rates.unique().item()


def test_log_in_the_readme_is_the_record() -> None:
    log = (DOCS / "benchmarks/first_run.log").read_text()
    (quoted,) = re.findall(r"(?ms)^```\n(step .*?)^```", (ROOT / "README.md").read_text())
    for line in quoted.splitlines():
        assert f"  {line}\n" in log, f"{line} is not in docs/benchmarks/first_run.log"


def test_every_number_of_the_readme_is_a_figure_or_a_setting() -> None:
    """A new measured number needs an entry above and a row in docs/claims.md."""
    settings = {
        # Names of models and lengths, lengths, steps, and GPUs of the configurations.
        *("3", "98K", "1M", "16K", "32K", "268M", "17M", "530M", "8B", "4.6M", "10k", "16k"),
        *(
            "4,096",
            "8,192",
            "16,384",
            "32,768",
            "65,536",
            "98,304",
            "131,072",
            "262,144",
            "1,048,576",
            "1",
            "8",
            "32",
        ),
        # A window, and the GPU seconds of contests.
        *("256", "15", "36", "40"),
        # Versions, a compute capability, a GPU's memory, tokens of a run, Llama 3.1.
        *("0.2.2", "3.11", "8.0", "80", "50.3", "3.1"),
        # 1e-4, and 4% and 6% of an estimate, have tests; intervals are at 95%.
        *("1e", "4", "4%", "6%", "95%"),
    }
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+", " ", README)
    for figure in FIGURES.values():
        text = text.replace(figure(), " ")
    numbers = set(re.findall(r"(?<![\w.])\d[\d.,]*[\w%]*(?<![.,])", text))
    assert not numbers - settings, f"without a record: {sorted(numbers - settings)}"


def test_claims_name_records_and_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[^`:]+\.py)(?:::(\w+))?`", (DOCS / "claims.md").read_text())
    assert len(named) > 5
    for record in re.findall(r"\]\(([^)#]+\.(?:json|csv|log))\)", (DOCS / "claims.md").read_text()):
        assert (DOCS / record).is_file(), record
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(), f"{file} has no {test}"
