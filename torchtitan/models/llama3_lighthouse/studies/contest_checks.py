"""What is checked of a contest before its first process starts."""

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..checks.parallelism import check_device
from ..checks.text import check_vocabulary
from ..data.mixes import mixes_of
from ..data.text_sources import find_source
from ..data.tokenizer import build_tokenizer
from ..errors import UserValueError
from ..evaluation.distance_text import held_out_sequences
from ..evaluation.progress import say
from ..job_config import JobConfig
from ..stages import distinct_stages, naming, stages_of
from .contest_file import LEAST_TIMED, Contest
from .contest_measures import known_measures
from .contest_plan import Planner, in_table
from .recovery_plan import check_base

FLAG = re.compile(r"--([a-z-]+)(?= [\d(])")


def check_runs(
    planner: Planner,
    rates: Mapping[str, Sequence[float]],
    timed: bool = False,
    device: str | None = None,
) -> None:
    """Check the settings of all runs as the trainer does, and of what measures them.

    No rule joins the seed of a run with its arm or rate, so the seeds are checked with one arm. A
    run takes about 20 ms.

    Args:
        rates: those that each arm tries.
        timed: whether short runs tell times although the contest does not ask for them.
        device: what trains, "cuda" or "cpu"; None if that is not known yet.

    Raises:
        ValueError, TypeError, OSError: a run cannot work; the message names file and table.
    """
    contest, first = planner.contest, planner.contest.seeds[0]

    def check(config: JobConfig) -> None:
        check_base(config)
        if device is not None:
            check_device(config, device)

    if contest.start:
        with in_table(contest, "start"):
            check(planner.start_run(first).config)
    # Arms of one length have the same measures, as all validate alike.
    lengths: dict[int, JobConfig] = {}
    for name, arm in contest.arms.items():
        with in_table(contest, f"arms.{name}"):
            runs = [planner.run(arm, rate, first) for rate in rates[name]]
            check(runs[0].config)
            if contest.start:
                _say_other_scaling(planner.start_run(first).config, runs[0].config, name)
            if contest.gpu_seconds and runs[0].config.training.document_mask:
                raise UserValueError(
                    f"training.document_mask = true beside gpu_seconds = {contest.gpu_seconds:g}: "
                    "how many steps run with masks depends on the text and is not known before the "
                    "run, so no number of steps takes this time; set training.document_mask = "
                    "false, or leave out gpu_seconds and set training.steps"
                )
            if timed or contest.gpu_seconds:
                _check_timed(contest, planner.timing_run(arm).config)
        lengths[runs[0].config.training.seq_len] = runs[0].config
    arm = next(iter(contest.arms.values()))
    for seed in (*contest.rate_seeds, *contest.seeds):
        with in_table(contest, f"seed {seed}"):
            planner.run(arm, arm.rates[0], seed)
    for config in lengths.values():
        check_measures(contest, config)


def _say_other_scaling(start: JobConfig, config: JobConfig, name: str) -> None:
    """Say if an arm begins under another rotary scaling than the one that the start ends with.

    One that a stage of the start brings is easily forgotten. That arms scale a start without a
    scaling is how models are extended.
    """
    last, begins = stages_of(start)[-1], stages_of(config)[0].config.model.rope_scaling
    before = last.config.model.rope_scaling
    if last.has_own_scaling and begins != before:
        say(
            f"arms.{name} begins from weights under '{before}', with which [start] ends, and has "
            f"model.rope_scaling = '{begins}'; set arms.{name} model.rope_scaling to the former, "
            "unless the arm is to change it"
        )


def _check_timed(contest: Contest, config: JobConfig) -> None:
    """Check that the run that tells an arm's times has enough dense steps between others."""
    every = config.lighthouse.dense_every
    if every and any(stage.dense_steps < LEAST_TIMED for stage in stages_of(config)):
        raise UserValueError(
            f"lighthouse.dense_every = {every} leaves less than {LEAST_TIMED} dense steps among a "
            f"stage's timed_steps = {contest.timed_steps}, and the first ones compile; write "
            f"timed_steps = {LEAST_TIMED * every} or more"
        )


def check_text(planner: Planner) -> dict[str, Any]:
    """Check that the text of all runs is there, and return what the record says of runs and text.

    Raises:
        ValueError, OSError: a run has no such text, its tokenizer does not fit it or the model, or
            no document of the held-out text is long enough.
    """
    contest, text = planner.contest, dict[str, str]()
    configs = {
        f"arms.{name}": planner.run(arm, arm.rates[0], contest.seeds[0]).config
        for name, arm in contest.arms.items()
    }
    first = next(iter(configs.values()))
    if contest.start:
        configs["start"] = planner.start_run(contest.seeds[0]).config
    for name, config in configs.items():
        with in_table(contest, name):
            tokenizer = build_tokenizer(config)
            check_vocabulary(config, tokenizer)
            for stage in distinct_stages(config):
                with naming(stage):
                    # The lengths that it checks do not depend on the number of streams.
                    mixes_of(stage.config, tokenizer, 1)
            # The first arm speaks for all that read the same.
            own = "training" if config is first else name
            if config is first or name == "start" or _source(config) != _source(first):
                text[own] = _fingerprint("training", "train", config)
    text["validation"] = _fingerprint("validation", "validation", first)
    seed = first.lighthouse.shuffle_seed
    order = {"training": _fingerprint("training", "train", first, seed)} if seed else {}
    asked = contest.distance
    sequences = held_out_sequences(first, build_tokenizer(first), asked.documents, asked.sequences)
    if len(sequences) < asked.documents:
        say(f"{len(sequences)} of {asked.documents} held-out documents are long enough to measure")
    return {
        "overrides": planner.overrides,
        "processes": planner.processes,
        "text": text,
        "order": order,
    }


def _source(config: JobConfig) -> tuple[str, str | None]:
    return config.training.dataset, config.training.dataset_path


def _fingerprint(key: str, split: str, config: JobConfig, seed: int = 0) -> str:
    """The contents of a text; with a seed, in the order that it draws by the names of files."""
    section = getattr(config, key)
    return find_source(section.dataset, split, section.dataset_path, key, seed).fingerprint()


def check_measures(contest: Contest, config: JobConfig) -> None:
    """Check that the runs will have the measures that the contest decides by.

    Raises:
        ValueError: they will not, or settings of the measures do not fit.
    """
    with _in_distance(contest):
        known = known_measures(contest, config)
    for key, name in (("tuned_by", contest.tuned_by), ("primary", contest.primary)):
        if name not in known:
            shown = ", ".join(known)
            raise UserValueError(f"{contest.path}: {key} = '{name}' is not measured; use {shown}")


@contextmanager
def _in_distance(contest: Contest) -> Generator[None, None, None]:
    """Name settings of the measures by their keys, not by the flags of ``evaluate distance``."""
    try:
        yield
    except UserValueError as error:
        words = FLAG.sub(lambda found: f"distance.{found[1].replace('-', '_')} =", str(error))
        raise UserValueError(f"{contest.path}: {words}") from None
