"""Configurations drawn over all keys, as cases of the campaign."""

import shlex

from .cases import Case, Result

COUNT = 500
LIMIT = 150.0
OUTCOMES = {"trained": "ok", "unclear": "traceback"}


def configure(case: Case) -> Result:
    """Train on one of the drawn configurations."""
    try:
        from .configurations import CONFIG, draw, run_one
    except ImportError as error:
        return Result("skipped", "", str(error))
    if not CONFIG.is_file():
        return Result("skipped", "", f"{CONFIG} is not there; run the campaign in a clone")
    arguments = draw(case.seed, COUNT)[case.number]
    end = run_one(arguments, case.folder / "run", LIMIT)
    tried = shlex.join(arguments).encode("unicode_escape").decode()
    return Result(OUTCOMES.get(end.kind, end.kind), tried, end.message[-900:])
