"""The numbers on pages of studies are those of their records."""

import re
import tomllib
from decimal import ROUND_HALF_UP, Decimal

import pandas
from contest_records import between, difference, with_half
from pages import DOCS, ROOT, words

from torchtitan.models.llama3_lighthouse.dry_run import dry_run
from torchtitan.models.llama3_lighthouse.evaluation.bootstrap import bootstrap
from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager


def test_page_on_copying_is_its_records() -> None:
    page, folder = words(DOCS / "studies/copying.md"), DOCS / "studies/results/copying_17m"
    runs, pilot = (pandas.read_csv(folder / name) for name in ("training.csv", "pilot.csv"))
    # The first tenth of a run is too steep to compare its sequences.
    learned = runs[(runs.gain > 0.3) & (runs.tokens > 12e6)].groupby("run").tokens.min()
    assert f"after {learned.min() / 1e6:.0f} to {learned.max() / 1e6:.0f} million tokens" in page
    shares = runs.groupby("run").share.first()
    assert (shares == 0.5).sum() == 4 and (shares == 0.125).sum() == 2
    assert len(learned) == 3 and set(learned.index) < set(shares[shares == 0.5].index)
    pilot = pilot[pilot.start_rate == 1e-3].pivot_table(
        index=["arm", "rate"], columns="measure", values="value"
    )
    best = pilot["repeated/16384/loss"].groupby("arm").idxmin()
    shown = ("loss", "repeated/4096", "repeated/16384", "repeated/31744")
    rows = re.findall(r"\| `(\w+)` \|[^|]*\| (\S+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|", page)
    assert len(rows) == len(best) == 5
    for arm, rate, *cells in rows:
        assert float(rate) == best[arm][1]
        assert cells == [f"{pilot.loc[best[arm], name]:.3f}" for name in shown]
    other = pilot.loc[("dense", 5e-4)]
    assert f"a held-out loss of {other['loss']:.3f} and a gain of {other[shown[2]]:.3f}" in page


def flops_of_a_token() -> tuple[float, ...]:
    """FLOPs under Lighthouse and in dense steps, as the dry run has them.

    The extended model has the sizes of the flavor 17M, which needs no folder.
    """
    config = tomllib.loads((ROOT / "train_configs/extend_17m_98k.toml").read_text())
    method = ("levels", "pooling_factor", "top_k", "window", "entry_score", "combine")
    line = ["--job.config_file", str(ROOT / "train_configs/recovery_books_32k.toml")]
    line += ["--training.seq_len", str(config["training"]["seq_len"]), "--validation.no-enable"]
    line += ["--training.dataset_path", str(ROOT), "--lighthouse.dense_layers"]
    for key in method:
        line += [f"--lighthouse.{key}", str(config["lighthouse"][key])]
    text = dry_run(LighthouseConfigManager().parse_args(line), 1)
    (found,) = re.findall(r"FLOPs/token +Lighthouse (\S+), dense (\S+)", text)
    return tuple(map(float, found))


def test_page_on_extension_is_its_records() -> None:
    page, folder = words(DOCS / "studies/extension.md"), DOCS / "studies/results/extension_17m"
    scalings, distance, documents, retrieval, training = (
        pandas.read_csv(folder / f"{name}.csv")
        for name in ("scalings", "distance", "documents", "retrieval", "training")
    )
    runs = ["before", "yarn", "extended", "dense"]
    rows = dict(re.findall(r"\| ([^|]+?) \|((?: [^|]* \|){4})", page))
    cells = {name: [cell.strip() for cell in row.split("|")[:-1]] for name, row in rows.items()}

    def measured(measure: str, tokens: int) -> pandas.Series:
        found = distance[(distance.measure == measure) & (distance.tokens == tokens)]
        return found[found.quantity.isna()].set_index("checkpoint").value[runs]

    positions = {
        "held-out loss, 2,049 to 4,096 tokens of context": 4096,
        "16,385 to 32,768": 32768,
        "65,537 to 98,304": 98304,
    }
    for name, tokens in positions.items():
        assert cells[name] == [f"{value:.3f}" for value in measured("position", tokens)]
    far = measured("position", 98304)
    assert f"the model as it came has {far['before']:.3f} nats" in page
    assert f"brings {far['yarn']:.3f}, and training brings {far['extended']:.3f}" in page
    whole = distance[(distance.measure == "context") & (distance.quantity == "full")]
    full = whole.set_index("checkpoint").value[runs]
    assert cells["loss of sampled targets with all their context"] == [f"{x:.3f}" for x in full]
    short = measured("context", 1024)
    assert cells["the same targets with the last 1,024 tokens alone"] == [f"{x:.3f}" for x in short]
    for tokens in (4096, 16384, 65536, 97280):
        shown = cells[f"gain from a passage {tokens:,} tokens earlier"]
        assert shown == [f"{value:.3f}" for value in measured("repeated", tokens)]
    saved = measured("repeated", 65536)
    assert f"saves {saved['extended']:.3f} nats a token" in page
    assert f"Under the scaling alone it saves {saved['yarn']:.3f}" in page
    assert retrieval.groupby(["checkpoint", "length"]).trials.sum().eq(50).all()
    right = (retrieval.accuracy * retrieval.trials).groupby(
        [retrieval.length, retrieval.checkpoint]
    )
    right = right.sum().round().astype(int).unstack()[runs]
    for length, found in right.iterrows():
        # The first of these rows has a longer name.
        names = (f"in {length:,} tokens", f"passkeys found in {length:,} tokens, of 50")
        (shown,) = (cells[name] for name in names if name in cells)
        assert shown == [str(number) for number in found]
    found = right.loc[98304]
    assert f"It finds {found['extended']} of 50 passkeys" in page
    assert f"where the scaling alone finds {found['yarn']}" in page
    assert f"but it finds {found['dense']} passkeys" in page
    assert f"found before, {right['before'][4096]} to {right['dense'][4096]} in 4,096" in page
    assert (right["yarn"] > right[["extended", "dense"]].max(axis=1))[[4096, 16384]].all()
    tokens = training.groupby("run").tokens.max()
    assert cells["tokens"] == ["0", "0", *(f"{tokens[run] / 1e6:.1f}M" for run in runs[2:])]
    assert (training[training.run == "dense"]["to step"].max(), tokens["dense"]) == (116, 11403264)
    stage_one = training[(training.run == "extended") & (training.stage == 1)]
    assert stage_one["to step"].max() == 210
    lighthouse, dense = flops_of_a_token()
    assert f"are {210 * lighthouse / dense:.0f} dense ones" in page
    assert f"costs {116 / (210 * lighthouse / dense + 90) - 1:.0%} more" in page
    # Copying brings the training loss down within few steps.
    steps = training[training.run == "short"].set_index("to step").loss
    assert steps[2600] - steps[3200] > 0.2 > 5 * (steps[2000] - steps[2600])
    learned = [training[training["to step"] == step].tokens.iloc[0] / 1e6 for step in (2600, 3200)]
    assert "between {:.0f} and {:.0f} million tokens".format(*learned) in page
    costs = [
        measured("position", end)["extended"] - measured("position", end)["before"]
        for end in (256, 512, 1024, 2048, 4096)
    ]
    assert f"the loss rises by {min(costs):.3f} to {max(costs):.3f}" in page
    books = documents.fillna({"quantity": ""}).pivot(
        index=["measure", "tokens", "quantity", "document"], columns="checkpoint", values="value"
    )
    for name, key in (
        ("held-out loss, 65,537 to 98,304", ("position", 98304, "")),
        ("gain from a passage 16,384 tokens earlier", ("repeated", 16384, "")),
        ("gain from a passage 65,536 tokens earlier", ("repeated", 65536, "")),
    ):
        found = [bootstrap(list((books["extended"] - books[x])[key])) for x in ("yarn", "dense")]
        shown = (f"{x.mean:.3f} ({x.low:.3f} to {x.high:.3f})" for x in found)
        assert f"| {name} | {' | '.join(shown)} |" in page
    found = bootstrap(list((books["extended"] - books["dense"])["position", 98304, ""]))
    assert f"lower by {found.mean:.3f} ({found.low:.3f} to {found.high:.3f})" in page
    above = (books["extended"] - books["dense"]).loc["position", 98304, ""]
    assert f"lower on {(above > 0).sum()} of 12 books, by {above.median():.3f} in" in page
    worst = above.idxmax()
    over_yarn = (books["extended"] - books["yarn"]).loc["position", 98304, "", worst]
    assert f"is {above.max():.3f} above it, and {over_yarn:.3f} above YaRN alone" in page
    full, short = books.loc["context"].xs("full", level="quantity"), books.loc["context", 1024, ""]
    for run, words_of in (("extended", "above"), ("dense", "below")):
        found = bootstrap(list(full[run].to_numpy() - short["before"].to_numpy()))
        assert f"{abs(found.mean):.3f} {words_of}" in page
        assert f"({-found.low:.3f} below to {found.high:.3f} above)" in page
    far = scalings[scalings["context from"] == 65537].set_index("scaling").loss
    assert f"YaRN with factor 24 keeps the loss at {far['yarn factor=24']:.3f}" in page
    assert f"where the model as it came has {far['none']:.3f}" in page
    first = scalings[scalings["context to"] <= 4096]
    lost = first.pivot(index="context to", columns="scaling", values="loss")
    costs = lost["yarn factor=24"] - lost["none"]
    assert f"{costs.min():.2f} to {costs.max():.2f} nats within the first 4,096" in page
    costs = lost["base 8,000,000"] - lost["none"]
    assert f"8,000,000 costs {costs.min():.2f} to {costs.max():.2f} there" in page
    whole = scalings["context from"].ne(1) | scalings["context to"].eq(256)
    all_of = scalings[whole].pivot(index="context to", columns="scaling", values="loss")
    better = all_of["base 8,000,000"] < all_of["yarn factor=24"]
    assert better.loc[:16384].all() and not better.loc[32768:].any()
    assert (all_of["linear factor=24"] > 2.6).all()


def test_a_model_that_cannot_copy_gains_nothing_from_afar_when_extended() -> None:
    page, folder = words(DOCS / "studies/extension.md"), DOCS / "studies/results/extension_17m"
    found = pandas.read_csv(folder / "no_copying.csv")
    gains = found[found.measure == "repeated"].value
    assert f"at most {gains.max():.3f} nats" in page
    far = found[(found.measure == "position") & (found.tokens == 98304)]
    far = far.set_index("checkpoint").value
    assert far["before"] - far["extended"] > 1
    training = pandas.read_csv(folder / "no_copying_training.csv")
    assert f"within {training.tokens.max() / 1e6:.0f} million tokens" in page
    # Its training loss falls without the jump of a quarter of a nat that copying brings.
    assert (training.loss.iloc[10:].diff(4).dropna() > -0.12).all()


def at_the_end(name: str) -> pandas.Series:
    """Held-out losses at step 2,400 by arm, learning rate and seed, of a record of recovery."""
    rows = pandas.read_csv(DOCS / f"studies/results/{name}/held_out.csv").query("step == 2400")
    return rows.set_index(["arm", "learning_rate", "seed"]).held_out_loss.sort_index()


def test_page_on_recovery_is_its_records() -> None:
    page = words(DOCS / "studies/recovery.md")
    arms = ["dense", "Lighthouse to 1,500, then dense"]
    ends = at_the_end("learning_rates")
    for rate in ("5e-4", "1e-3", "2e-3", "4e-3"):
        (row,) = re.findall(rf"\| \**{rate}\** \| ([^|]*) \| ([^|]*) \|", page)
        shown = [cell.strip("* ") for cell in row]
        assert shown == [f"{ends[arm, float(rate), 0]:.3f}" for arm in arms]
    dense, lighthouse = (ends[arm].xs(0, level="seed") for arm in arms)
    assert dense.idxmin() == lighthouse.idxmin() == 1e-3
    assert f"dense ends {lighthouse.min() - dense.min():.3f} lower" in page
    assert f"another seed ends at {ends['dense', 1e-3, 1]:.3f}" in page
    pairs = at_the_end("paired_seeds")
    dense, lighthouse = (pairs[arm, 1e-3] for arm in arms)
    gaps = lighthouse - dense
    for name, values in (
        ("dense", dense),
        ("Lighthouse to step 1,500, then dense", lighthouse),
        ("Lighthouse less dense", gaps),
    ):
        (row,) = re.findall(rf"\| {name} \|((?: [^|]+ \|){{7}})", page)
        *seeds, mean = (cell.strip() for cell in row.split("|")[:-1])
        assert seeds == [f"{value:.3f}" for value in values]
        expected = f"{values.mean():.3f}" if values is not gaps else f"**{with_half(list(gaps))}**"
        assert mean == expected
    assert f"dense throughout, ended {with_half(list(-gaps))} nats below" in page
    finer = pairs["dense"].unstack()[[1, 2]]
    assert "end at {:.3f} and {:.3f}, at 1.4e-3".format(*finer.loc[7e-4]) in page
    assert "at 1.4e-3 at {:.3f} and {:.3f}".format(*finer.loc[1.4e-3]) in page
    above = finer.min() - lighthouse[[1, 2]]
    assert "rates is {:.3f} and {:.3f} above Lighthouse".format(*above) in page
    mean, low, high = difference("books_17m", "dense", "short_to_long_30", "loss")
    assert f"by {mean:.3f} nats {between(low, high)}" in page
    steps = pandas.read_csv(DOCS / "studies/results/learning_rates/held_out.csv")
    after = steps.query("step == 1650 and learning_rate == 1e-3 and seed == 0")
    after = after.set_index("arm").held_out_loss
    assert f"Lighthouse is {after[arms[1]] - after['dense']:.3f} higher" in page
    summary = pandas.read_csv(DOCS / "studies/results/recovery_books_2400/summary.csv")
    speeds = summary.set_index("run")["speed-up"]
    assert f"it is [{speeds['split 0.625']:.2f} times as fast]" in page
    log = words(DOCS / "log/recovery.md")
    faster = f"{speeds['split 0.625']:.2f} and {speeds['split 0.75']:.2f} times as fast"
    assert f"the whole run is {faster}" in log


def half_up(value: float, digits: int) -> str:
    """A number with so many digits after the point, halves rounded up."""
    exact = Decimal(f"{value:.6f}")
    return str(exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def test_page_on_the_neighbourhood_is_its_records() -> None:
    page = words(DOCS / "studies/neighbourhood.md")
    rows = pandas.read_csv(DOCS / "studies/results/neighbourhood/seeds.csv").query("tail == 0.125")
    runs = rows.set_index(["arm", "seed"]).sort_index()
    table = re.findall(r"\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", page)
    tested = set()
    for name, *cells in table:
        arm = re.sub(r"window alone, W = |merged, W = ", lambda m: m[0].split(",")[0] + " ", name)
        arm = arm.replace("window alone", "window")
        if (arm, 2) not in runs.index or len(cells[0].split(", ")) != 3:
            continue
        tested.add(arm)
        kinds = (("books", 3, 1, ""), ("repeats", 2, 1, ""), ("keys 4096", 0, 100, "%"),
                 ("keys 32768", 0, 100, "%"))  # fmt: skip
        for cell, (column, digits, factor, unit) in zip(cells, kinds, strict=True):
            shown = [part.strip("* ") for part in cell.split(",")]
            values = [half_up(value * factor, digits) for value in runs.loc[arm][column]]
            assert shown == [f"{value}{unit}" for value in values]
    assert len(tested) == 8
    arms = {name: runs.loc[name].books for name in ("merged 256", "window 256", "dense")}
    gaps = arms["window 256"] - arms["merged 256"]
    assert f"arrangement, {with_half(list(gaps))} nats ahead of the window alone" in page
    behind = arms["merged 256"] - arms["dense"]
    least, most = (half_up(value, 3) for value in (behind.min(), behind.max()))
    assert f"is {least} to {most} behind dense training in books" in page
