"""The report of a contest against plain formulas, from CSV files with planted differences."""

import csv
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from contest_cases import contest_with
from scipy import stats

from torchtitan.models.llama3_lighthouse.studies.contest_file import Contest
from torchtitan.models.llama3_lighthouse.studies.contest_report import report
from torchtitan.models.llama3_lighthouse.studies.contest_results import Results

ARMS, SEEDS, DOCUMENTS = ("dense", "window", "lighthouse"), (11, 5, 8), range(4)
PAIRS = [("lighthouse", "dense"), ("window", "dense")]
SHORT, LONG = "retrieval/passkey/512", "retrieval/passkey/1024"
EQUAL_TIME = "validation, equal time"
# Seconds of a step. The dense arm has one stage and the others have two.
TIMES = {
    "dense": {"1 dense": 0.5},
    "window": {"1 lighthouse": 0.9, "2 dense": 0.7},
    "lighthouse": {"1 lighthouse": 0.2, "2 dense": 0.55},
}
# Eight steps: 8 * 0.5, 6 * 0.9 + 2 * 0.7 and 6 * 0.2 + 2 * 0.55.
TOTAL_SECONDS = {"dense": 4.0, "window": 6.8, "lighthouse": 2.3}
VALIDATED = (1, 4, 8)

Key = tuple[str, int]


@dataclass
class Planted:
    """Numbers of each run, by arm and seed."""

    loss: dict[Key, list[float]]
    curve: dict[Key, list[float]]
    retrieval: dict[Key, dict[str, float]]

    def value(self, arm: str, seed: int, measure: str) -> float:
        if measure == "loss":
            return sum(self.loss[arm, seed]) / len(DOCUMENTS)
        if measure == "validation":
            return self.curve[arm, seed][-1]
        return self.retrieval[arm, seed][measure]

    def gaps(self, arm: str, control: str, measure: str) -> list[float]:
        return [self.value(arm, n, measure) - self.value(control, n, measure) for n in SEEDS]

    def gaps_at_equal_time(self, arm: str) -> list[float]:
        """Gaps to the dense arm where the faster of two runs ends."""
        gaps = []
        for seed in SEEDS:
            ours, dense = self.curve[arm, seed], self.curve["dense", seed]
            if arm == "lighthouse":
                # It ends after 2.3 s. Dense runs validate after 2.0 s and after 4.0 s.
                gaps.append(ours[2] - (0.85 * dense[1] + 0.15 * dense[2]))
            else:
                # Dense runs end after 4.0 s. Those under the window validate after 3.6 and 6.8 s.
                gaps.append(0.875 * ours[1] + 0.125 * ours[2] - dense[2])
        return gaps


def plant(random: np.random.Generator, lighthouse: float, window: float) -> Planted:
    """Draw runs in which seeds differ by hundreds of times the gaps of two arms to the dense one.

    Args:
        lighthouse: loss of the arm minus loss of the dense arm, in the mean.
        window: the same for the arm under the window.
    """
    planted = Planted({}, {}, {})
    gap_of = {"dense": 0.0, "lighthouse": lighthouse, "window": window}
    seed_noise = dict(zip(SEEDS, random.normal(50, 10, len(SEEDS)).tolist(), strict=True))
    difficulty = random.normal(0, 2, len(DOCUMENTS))
    for arm, gap in gap_of.items():
        # Documents gain unlike amounts, which have the planted mean.
        by_document = gap * np.array([0.1, 0.6, 1.4, 1.9])
        for seed in SEEDS:
            run = seed_noise[seed] + random.normal(0, 0.002)
            noise = random.normal(0, 0.001, len(DOCUMENTS))
            planted.loss[arm, seed] = (run + difficulty + by_document + noise).tolist()
            ends = seed_noise[seed] + gap + random.normal(0, 0.002)
            first, second = random.uniform(3, 5), random.uniform(1, 2)
            planted.curve[arm, seed] = [ends + first, ends + second, ends]
            planted.retrieval[arm, seed] = {each: random.uniform() for each in (SHORT, LONG)}
    return planted


def steps_of(arm: str, step: int) -> str:
    """The steps of each kind until ``step``; a second stage begins after six."""
    counts = {"1 dense": step} if arm == "dense" else {"1 lighthouse": min(step, 6)}
    if arm != "dense" and step > 6:
        counts["2 dense"] = step - 6
    return json.dumps(counts)


def write(path: Path, rows: Sequence[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_files(
    planted: Planted, folder: Path, random: np.random.Generator, missing: Sequence[Key] = ()
) -> None:
    """Write the CSV files of a contest, with its runs in a random order.

    Args:
        missing: arm and seed of runs that have not finished.
    """
    runs, measures, curves = [], [], []
    # Runs that chose rates bear the seed of a judged one, and their numbers judge nothing.
    todo = [("rates", 0.001, arm, SEEDS[0]) for arm in ARMS]
    todo += [("seeds", 0.002, *key) for key in planted.loss if key not in missing]
    random.shuffle(todo)
    for stage, rate, arm, seed in todo:
        place = {"stage": stage, "arm": arm, "rate": rate, "seed": seed}
        wrong = 0.0 if stage == "seeds" else random.uniform(100, 200)
        key = arm, int(seed)
        logged = [
            place | {"step": step, "tokens": 512 * step, "steps by kind": steps_of(arm, step)}
            for step in VALIDATED
        ]
        runs.append(logged[-1])
        for row, loss in zip(logged, planted.curve[key], strict=True):
            curves.append(row | {"validation": loss + wrong})
        numbers = [("loss", n, value) for n, value in enumerate(planted.loss[key])]
        random.shuffle(numbers)
        numbers += [("validation", "", planted.curve[key][-1])]
        numbers += [(name, "", value) for name, value in planted.retrieval[key].items()]
        measures += [
            place | {"measure": measure, "document": document, "value": float(value) + wrong}
            for measure, document, value in numbers
        ]
    folder.mkdir(exist_ok=True)
    write(folder / "runs.csv", runs)
    write(folder / "measures.csv", measures)
    write(folder / "curves.csv", curves)
    times = [{"arm": arm, "kind": kind, "GPU seconds": seconds}
             for arm, kinds in TIMES.items() for kind, seconds in kinds.items()]  # fmt: skip
    write(folder / "times.csv", times)


def interval(gaps: Sequence[float], level: float) -> tuple[float, float, float]:
    """Mean and interval by Student's t."""
    low, high = stats.ttest_1samp(gaps, 0).confidence_interval(level)
    return float(np.mean(gaps)), float(low), float(high)


def numbers_of(row: dict[str, str]) -> tuple[float, float, float]:
    return float(row["difference"]), float(row["t, low"]), float(row["t, high"])


@pytest.fixture(scope="module")
def base() -> Contest:
    """A contest of two comparisons, 97.5% each for 95% of both."""
    return contest_with(seeds=list(SEEDS), compare=PAIRS, level=0.95, primary="loss",
                        direction="lower", margin=0.01, rule="mean")  # fmt: skip


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.fixture
def planted(random, tmp_path) -> Planted:
    """Files in which lighthouse is 0.05 below the dense arm, and the window 0.04 above it."""
    found = plant(random, lighthouse=-0.05, window=0.04)
    write_files(found, tmp_path, random)
    return found


def test_only_the_right_pairs_of_seeds_resolve_the_planted_gaps(planted) -> None:
    for arm, control in PAIRS:
        ours = [planted.value(arm, seed, "loss") for seed in SEEDS]
        theirs = [planted.value(control, seed, "loss") for seed in SEEDS]
        for order in itertools.permutations(theirs):
            _, low, high = interval(np.subtract(ours, order).tolist(), 0.975)
            assert (low < 0 < high) == (list(order) != theirs)


@pytest.mark.parametrize("measure", ["loss", "validation", SHORT, LONG])
def test_differences_are_arm_minus_control_of_one_seed(base, planted, tmp_path, measure) -> None:
    results = Results(base, tmp_path)
    for arm, control in PAIRS:
        found = results.differences(arm, control, measure)
        assert found == pytest.approx(planted.gaps(arm, control, measure), abs=1e-9)


def test_a_seed_that_one_arm_lacks_is_left_out_of_both(base, random, tmp_path) -> None:
    planted = plant(random, lighthouse=-0.05, window=0.04)
    first, second, last = SEEDS
    write_files(planted, tmp_path, random, missing=[("lighthouse", first), ("dense", last)])
    results = Results(base, tmp_path)
    gap = planted.value("lighthouse", second, "loss") - planted.value("dense", second, "loss")
    assert results.differences("lighthouse", "dense", "loss") == pytest.approx([gap], abs=1e-9)
    over = results.over_documents("lighthouse", "dense", "loss")
    assert over is not None and over.mean == pytest.approx(gap, abs=1e-9)
    at_equal_time = results.at_equal_time("lighthouse", "dense")
    assert at_equal_time == pytest.approx([planted.gaps_at_equal_time("lighthouse")[1]], abs=1e-9)
    words = report(base, tmp_path, plots=False).splitlines()
    assert words == [
        f"- {arm} against dense: no verdict, as {number} of 3 seeds have finished in both."
        for arm, number in (("lighthouse", 1), ("window", 2))
    ]


def test_documents_keep_the_sign_and_are_resampled(base, planted, tmp_path) -> None:
    results = Results(base, tmp_path)
    for arm, control in PAIRS:
        gaps = [
            statistics.fmean(planted.loss[arm, n][each] - planted.loss[control, n][each]
                             for n in SEEDS)
            for each in DOCUMENTS
        ]  # fmt: skip
        found = results.over_documents(arm, control, "loss")
        assert found is not None and found.low is not None and found.high is not None
        assert found.mean == pytest.approx(sum(gaps) / 4, abs=1e-9)
        # Four documents can be drawn in 256 ways. Draws of them may miss the exact share a little.
        means = [sum(each) / 4 for each in itertools.product(gaps, repeat=4)]
        bounds = np.quantile(means, [0.015, 0.04, 0.96, 0.985])
        assert bounds[0] - 1e-9 <= found.low <= bounds[1] + 1e-9
        assert bounds[2] - 1e-9 <= found.high <= bounds[3] + 1e-9
    assert results.over_documents("lighthouse", "dense", LONG) is None


def test_seconds_are_steps_of_each_stage_by_their_own_time(base, planted, tmp_path) -> None:
    results = Results(base, tmp_path)
    assert len(results.runs) == 9
    for arm, seconds in zip(results.runs.arm, results.runs["GPU seconds"], strict=True):
        assert seconds == pytest.approx(TOTAL_SECONDS[arm])
    seconds, losses = zip(*results.curve("window", SEEDS[1]), strict=True)
    # One step and four of the first stage, then all of both.
    assert seconds == pytest.approx((0.9, 3.6, 6.8))
    assert losses == pytest.approx(tuple(planted.curve["window", SEEDS[1]]))


def test_equal_time_is_where_the_faster_run_ends(base, planted, tmp_path) -> None:
    results = Results(base, tmp_path)
    for arm, control in PAIRS:
        found = results.at_equal_time(arm, control)
        assert found == pytest.approx(planted.gaps_at_equal_time(arm), abs=1e-9)
        turned = results.at_equal_time(control, arm)
        assert turned == pytest.approx([-gap for gap in found], abs=1e-9)


def test_a_report_says_which_times_are_not_steady(base, planted, tmp_path) -> None:
    times = read(tmp_path / "times.csv")
    for spread, said in ((0.01, 0), (0.271, 1)):
        rows = [row | {"spread": "0.01"} for row in times]
        rows[0]["spread"] = str(spread)
        write(tmp_path / "times.csv", rows)
        report(base, tmp_path, plots=False)
        text = " ".join((tmp_path / "results.md").read_text().split())
        assert text.count("Another process") == said
    of = f"{times[0]['arm']} of kind `{times[0]['kind']}`"
    assert f"timed steps of {of} is 27% above their lower quartile." in text


def test_unknown_times_leave_out_equal_time_alone(base, planted, tmp_path) -> None:
    kept = [row for row in read(tmp_path / "times.csv") if row["arm"] != "window"]
    write(tmp_path / "times.csv", kept)
    results = Results(base, tmp_path)
    unknown = results.runs["GPU seconds"].isna()
    assert (unknown == (results.runs.arm == "window")).all()
    assert results.at_equal_time("window", "dense") == []
    report(base, tmp_path, plots=False)
    rows = [(row["arm"], row["measure"]) for row in read(tmp_path / "comparisons.csv")]
    assert ("lighthouse", EQUAL_TIME) in rows and ("window", "loss") in rows
    assert ("window", EQUAL_TIME) not in rows


def test_a_run_of_which_one_stage_has_no_time_has_no_seconds(base, planted, tmp_path) -> None:
    write(tmp_path / "times.csv",
          [row for row in read(tmp_path / "times.csv") if row["kind"] != "2 dense"])  # fmt: skip
    runs = Results(base, tmp_path).runs
    assert (runs["GPU seconds"].isna() == (runs.arm != "dense")).all()


def test_the_primary_measure_alone_shares_its_confidence(base, planted, tmp_path) -> None:
    results = Results(base, tmp_path)
    assert results.level("loss") == pytest.approx(0.975)
    assert results.level("validation") == results.level(LONG) == 0.95
    one = Results(replace(base, compare=PAIRS[:1], level=0.8, primary=LONG), tmp_path)
    assert one.level(LONG) == pytest.approx(0.8)
    assert one.level("loss") == 0.95


def test_the_table_of_comparisons_is_that_of_plain_formulas(base, planted, tmp_path) -> None:
    report(base, tmp_path, plots=False)
    rows = {(r["arm"], r["control"], r["measure"]): r for r in read(tmp_path / "comparisons.csv")}
    measures = ("loss", "validation", SHORT, LONG, EQUAL_TIME)
    assert set(rows) == {(*pair, measure) for pair in PAIRS for measure in measures}
    for (arm, control, measure), row in rows.items():
        gaps = (planted.gaps_at_equal_time(arm) if measure == EQUAL_TIME
                else planted.gaps(arm, control, measure))  # fmt: skip
        level = 0.975 if measure == "loss" else 0.95
        assert row["seeds"] == "3"
        assert numbers_of(row) == pytest.approx(interval(gaps, level), abs=1e-7)
        resampled = row["bootstrap, low"], row["bootstrap, high"]
        if measure == "loss":
            low, high = map(float, resampled)
            # Gains of documents have one sign, so resampling them keeps it.
            assert low < np.mean(gaps) < high and (high < 0 if arm == "lighthouse" else low > 0)
        else:
            assert resampled == ("", "")


def test_the_report_says_verdicts_arms_and_the_main_differences(base, planted, tmp_path) -> None:
    said = report(base, tmp_path, plots=False)
    text = (tmp_path / "results.md").read_text()
    assert said in text
    for line, (arm, control), word in zip(
        said.splitlines(), PAIRS, ("better", "worse"), strict=True
    ):
        mean, low, high = interval(planted.gaps(arm, control, "loss"), 0.975)
        assert line == (
            f"- {arm} against {control}: {word}; loss differs by {mean:+.4f} ({low:+.4f} to "
            f"{high:+.4f}, 3 seeds, lower is better, margin 0.01)."
        )
    for arm in ARMS:
        loss, validation = (
            statistics.fmean(planted.value(arm, seed, each) for seed in SEEDS)
            for each in ("loss", "validation")
        )
        assert (
            f"| {arm} | 0.002 | 0.001 to 0.002 | 3 | 4,096 | {TOTAL_SECONDS[arm]:.4f} | "
            f"{loss:.1f} | {validation:.1f} |"
        ) in text
    for arm, control in PAIRS:
        assert text.count(f"| {arm} | {control} | ") == 4
        mean, low, high = interval(planted.gaps_at_equal_time(arm), 0.95)
        row = f"| {arm} | {control} | {EQUAL_TIME} | 3 | {mean:.4f} | {low:.4f} | {high:.4f} |"
        assert row in text
    # Only the longest length of a retrieval task is a main difference.
    assert LONG in text and SHORT not in text


@pytest.mark.parametrize(
    ("direction", "words"), [("lower", ("better", "worse")), ("higher", ("worse", "better"))]
)
def test_planted_gaps_are_found_on_their_side(base, random, tmp_path, direction, words) -> None:
    contest = replace(base, direction=direction)
    for _ in range(10):
        write_files(plant(random, lighthouse=-0.05, window=0.04), tmp_path, random)
        lines = report(contest, tmp_path, plots=False).splitlines()
        for (arm, control), word, line in zip(PAIRS, words, lines, strict=True):
            assert line.startswith(f"- {arm} against {control}: {word}; ")


def test_an_arm_against_itself_is_no_difference(base, random, tmp_path) -> None:
    contest, draws = replace(base, margin=0.0), 80
    quiet, clear_of_zero = 0, 0
    for _ in range(draws):
        write_files(plant(random, lighthouse=0.0, window=0.0), tmp_path, random)
        lines = report(contest, tmp_path, plots=False).splitlines()
        quiet += sum(f"against {control}: no difference" in line
                     for line, (_, control) in zip(lines, PAIRS, strict=True))  # fmt: skip
        for row in read(tmp_path / "comparisons.csv"):
            _, low, high = numbers_of(row)
            clear_of_zero += row["measure"] == "loss" and not low < 0 < high
    verdicts = len(PAIRS) * draws
    assert quiet >= 0.95 * verdicts
    # Without a margin, verdicts follow the intervals of the table, and chance finds a few.
    assert verdicts - quiet == clear_of_zero > 0
