"""The numbers on pages of studies are those of their records."""

import re

import pandas
from pages import DOCS, words

from torchtitan.models.llama3_lighthouse.evaluation.bootstrap import bootstrap


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


def test_page_on_extension_is_its_records() -> None:
    page, folder = words(DOCS / "studies/extension.md"), DOCS / "studies/results/extension_17m"
    scalings, distance, documents, retrieval, training, earlier = (
        pandas.read_csv(folder / f"{name}.csv")
        for name in ("scalings", "distance", "documents", "retrieval", "training", "no_copying")
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
    assert f"from {far['before']:.3f} to {far['extended']:.3f}" in page
    assert f"A scaling alone, without training, reaches {far['yarn']:.3f}" in page
    whole = distance[(distance.measure == "context") & (distance.quantity == "full")]
    full = whole.set_index("checkpoint").value[runs]
    assert cells["held-out loss, far targets with all their context"] == [f"{x:.3f}" for x in full]
    short = measured("context", 1024)
    assert cells["the same targets with the last 1,024 tokens alone"] == [f"{x:.3f}" for x in short]
    worth = measured("beyond", 1024)
    assert cells["worth of the text before these 1,024"] == [f"{x:.4f}" for x in worth]
    for tokens in (4096, 16384, 65536, 97280):
        shown = cells[f"gain from a passage {tokens:,} tokens earlier"]
        assert shown == [f"{value:.3f}" for value in measured("repeated", tokens)]
    assert f"saves {measured('repeated', 65536)['extended']:.3f} nats a token" in page
    for name, trials, asked in (
        ("passkeys found at 98,304 tokens, of 50", 50, retrieval[retrieval.length == 98304]),
        ("at all four lengths, of 200", 200, retrieval),
    ):
        right = (asked.accuracy * asked.trials).groupby(asked.checkpoint).sum()[runs]
        assert asked.groupby("checkpoint").trials.sum().eq(trials).all()
        assert cells[name] == [f"{n:.0f}" for n in right]
    near = retrieval[(retrieval.length == 4096) & (retrieval.checkpoint == "yarn")]
    assert f"finds {(near.accuracy * near.trials).sum():.0f} of 50" in page
    tokens = training.groupby("run").tokens.max()
    assert cells["tokens"] == ["0", "0", *(f"{tokens[run] / 1e6:.1f}M" for run in runs[2:])]
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
    books = documents.pivot(
        index=["measure", "tokens", "document"], columns="checkpoint", values="value"
    )
    for name, key in (
        ("held-out loss, 65,537 to 98,304", ("position", 98304)),
        ("gain from a passage 16,384 tokens earlier", ("repeated", 16384)),
        ("gain from a passage 65,536 tokens earlier", ("repeated", 65536)),
    ):
        found = [bootstrap(list((books["extended"] - books[x])[key])) for x in ("yarn", "dense")]
        shown = (f"{x.mean:.3f} ({x.low:.3f} to {x.high:.3f})" for x in found)
        assert f"| {name} | {' | '.join(shown)} |" in page
    # The earlier run, of a model that could not copy.
    assert earlier[earlier.measure == "repeated"].value.max() < 0.02
    fell = earlier[(earlier.measure == "position") & (earlier.tokens == 98304)]
    fell = fell.set_index("checkpoint").value
    assert fell["before"] - fell["extended"] > 1
    far = scalings[scalings["context from"] == 65537].set_index("scaling").loss
    assert f"YaRN with factor 24 keeps the loss at {far['yarn factor=24']:.3f}" in page
    assert f"where the model as it came has {far['none']:.3f}" in page
    first = scalings[scalings["context to"] <= 4096]
    lost = first.pivot(index="context to", columns="scaling", values="loss")
    costs = lost["yarn factor=24"] - lost["none"]
    assert f"{costs.min():.2f} to {costs.max():.2f} nats within the first 4,096" in page
    near = scalings[scalings["context to"] == 16384].set_index("scaling").loss
    assert near["base 8,000,000"] < 1.5 < far["base 8,000,000"]
