"""The plan of a contest in words, and what of it has finished."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from .contest_file import RECORD, fix
from .contest_plan import Planner
from .contest_rates import best_rates, tried_places


def plan_lines(
    planner: Planner, rates: Mapping[str, list[float]], arms: Sequence[str]
) -> Iterator[str]:
    """A line for the start, if there is one, one for each arm, and one if no verdict can follow.

    Raises:
        ValueError, OSError: the folder holds results of another file or of other overrides.
    """
    contest = planner.contest
    if (planner.output / RECORD).exists():
        fix(contest, planner.output, {"overrides": planner.overrides})
    if contest.start:
        chosen = contest.rate_seeds if any(len(rates[name]) > 1 for name in arms) else ()
        seeds = dict.fromkeys((*chosen, *contest.seeds))
        done = [seed for seed in seeds if planner.start_run(seed).is_finished]
        steps = contest.start.settings["training.steps"]
        line = f"all arms begin from {steps:,} steps at rate {contest.start.rate:g}"
        yield line + (f"; finished: {_seeds(done)}" if done else "; nothing has finished")
    for name in arms:
        steps = planner.steps.get(name)
        of_steps = f"{steps:,} steps; " if steps else ""
        shown = ", ".join(f"{rate:g}" for rate in rates[name])
        # No run chooses a rate that stands alone.
        rate = f"rate {shown},"
        if len(rates[name]) > 1:
            rate = f"rates {shown} ({_seeds(contest.rate_seeds)}), then"
        line = f"{name}: {of_steps}{rate} {_seeds(contest.seeds)}"
        yield f"{line}; {_finished(planner, rates, name)}"
    if len(contest.seeds) == 1:
        yield f"{contest.path}: one seed gives no verdict; name two or more in seeds"


def _finished(planner: Planner, rates: Mapping[str, list[float]], name: str) -> str:
    """What has finished of an arm."""
    contest, arm = planner.contest, planner.contest.arms[name]
    tried = {place: planner.run(arm, *place[1:])
             for place in tried_places(contest, rates, [name])}  # fmt: skip
    parts, best = [], rates[name][0]
    if tried:
        count = sum(run.is_finished for run in tried.values())
        parts = [f"{count} of {len(tried)} runs that choose the rate"] if count else []
        if (found := best_rates(contest, tried).get(name)) is None:
            return f"finished: {parts[0]}" if parts else "nothing has finished"
        best = found
        parts[0] += f", which is {best:g}"
    seeds = [seed for seed in contest.seeds if planner.run(arm, best, seed).is_finished]
    parts += [_seeds(seeds)] if seeds else []
    return f"finished: {'; '.join(parts)}" if parts else "nothing has finished"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {_numbers(seeds)}"


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
