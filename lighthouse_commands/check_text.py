"""Read all text of a configuration, and name each document that training would refuse.

lighthouse check-text train_configs/books_16k.toml --training.dataset_path FOLDER

Training checks the first 32 Mi characters when it starts, and the rest when it gets there. This
command reads the whole training split and, if validation is enabled, the held-out split. It ends
with exit code 1 if a document is bad. Empty documents are counted; training skips them.
"""

import argparse

from .arguments import CommandError, add_configuration, trainer_arguments

SUMMARY = "read all text, and name each document that training would refuse"
IF_INTERRUPTED = "nothing was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    arguments = trainer_arguments(options.config, overrides)

    from torchtitan.models.llama3_lighthouse.data.check_text import TextCheck, TextReport
    from torchtitan.models.llama3_lighthouse.evaluation.progress import Progress
    from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager

    job = LighthouseConfigManager().parse_args(arguments)
    checks = {}
    for split, key in (("train", "training"), ("validation", "validation")):
        section = getattr(job, key)
        if split == "train" or section.enable:
            checks[split] = TextCheck(section.dataset, split, section.dataset_path, key)
    # Both splits of a folder leave out the same files.
    for line in dict.fromkeys(line for check in checks.values() for line in check.described):
        print(line)
    reports: dict[str, TextReport] = {}
    for split, check in checks.items():
        with Progress(f"reading {split}", check.size or None, "bytes", scaled=True) as bar:
            reports[split] = check.run(bar.update)
    print(f"{'split':<12}{'documents':>14}{'empty':>12}{'bad':>12}{'characters':>20}")
    for split, report in reports.items():
        print(
            f"{split:<12}{report.documents:>14,}{report.empty:>12,}{report.bad:>12,}"
            f"{report.characters:>20,}"
        )
    for split, report in reports.items():
        for message in report.named:
            print(f"{split}: {message}")
        if report.bad > len(report.named):
            print(f"{split}: {report.bad - len(report.named):,} more")
    bad = sum(report.bad for report in reports.values())
    if bad:
        what = f"{bad:,} documents or files are" if bad > 1 else "1 document or file is"
        raise CommandError(f"{what} bad; remove or mend {'them' if bad > 1 else 'it'}")
