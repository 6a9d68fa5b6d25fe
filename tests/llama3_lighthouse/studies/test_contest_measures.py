"""Measures of contests: which runs have them, and which choose the rate."""

from dataclasses import replace

import pytest

from torchtitan.models.llama3_lighthouse.studies.contest_file import read_contest
from torchtitan.models.llama3_lighthouse.studies.contest_measures import for_tuning


@pytest.mark.parametrize("key", ["primary", "tuned_by"])
def test_a_measure_that_no_run_will_have_is_refused_before_any_runs(
    call, faked, path, key: str
) -> None:
    lines = path.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(key)]
    path.write_text("\n".join([f'{key} = "repeated/100/loss"', *kept]))
    _, line = call()
    assert (
        f"{key} = 'repeated/100/loss' is not measured; use validation, loss, position/256" in line
    )
    assert "repeated/480" in line and "retrieval/passkey/512" in line and not faked.trained


def test_runs_that_choose_a_rate_measure_no_more_than_it(path) -> None:
    contest = read_contest(path)
    names = ("validation", "beyond/256", "repeated/480", "retrieval/passkey/512")
    parts = {name: for_tuning(replace(contest, tuned_by=name)) for name in names}
    asked = {name: (each.distance.contexts, each.distance.distances, each.retrieval)
             for name, each in parts.items()}  # fmt: skip
    assert asked == {
        "validation": ((), (), []),
        "beyond/256": (None, (), []),
        "repeated/480": ((), None, []),
        "retrieval/passkey/512": ((), (), ["passkey"]),
    }
