"""Launches of training for the campaign: forks of one process that has imported everything.

Importing the trainer takes ten seconds, and a launch of this size takes two. A launch stands in for
torchrun: when one rank fails it asks the others to end, kills those that do not, and takes a user's
mistake from the report that the rank leaves.
"""

import faulthandler
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

FORKS = multiprocessing.get_context("fork")
FLAVOR = "campaign"
# Seconds for the other ranks once one has failed or a signal came, and for a whole launch.
GRACE, LIMIT = 30.0, 120.0
# Launches by torchrun import the trainer again.
LAUNCHER_LIMIT = 240.0
STEPS, INTERVAL = 12, 2
LAUNCHES = itertools.count()
SETTINGS: dict[str, Any] = {
    "model.flavor": FLAVOR,
    "lighthouse.dense_from_step": 5,
    "lighthouse.levels": 3,
    "lighthouse.pooling_factor": 2,
    "lighthouse.top_k": 16,
    "lighthouse.picks_per_stratum": 8,
    "lighthouse.dense_layers": [0],
    "training.dataset": "c4_local",
    "training.seq_len": 256,
    "training.local_batch_size": 1,
    "training.steps": STEPS,
    "training.mixed_precision_param": "float32",
    "lr_scheduler.warmup_steps": 2,
    "lr_scheduler.decay_ratio": 0.0,
    "metrics.log_freq": 1,
    "checkpoint.enable": True,
    "checkpoint.interval": INTERVAL,
    "checkpoint.keep_latest_k": 2,
    "activation_checkpoint.mode": "none",
}
WORDS = ("light house keeper lamp sea stone stair storm ship rock night bell gull rope tide wind "
         "north glass flame watch").split()  # fmt: skip


def warm_up() -> None:
    """Import the trainer and its commands, and add a model that trains a step in a moment."""
    import torch

    from lighthouse_commands import main, train  # noqa: F401
    from torchtitan.models.llama3_lighthouse import train as trainer  # noqa: F401
    from torchtitan.models.llama3_lighthouse.data.tokenizer import PADDED_VOCABULARY_SIZE
    from torchtitan.models.llama3_lighthouse.evaluation import inference  # noqa: F401
    from torchtitan.models.llama3_lighthouse.hugging_face import export, import_model  # noqa: F401
    from torchtitan.models.llama3_lighthouse.model.flavors import flavors
    from torchtitan.models.llama3_lighthouse.model.model import LighthouseModelArgs

    torch.set_num_threads(1)
    flavors[FLAVOR] = LighthouseModelArgs(
        dim=64, n_layers=2, n_heads=2, n_kv_heads=1, multiple_of=32,
        vocab_size=PADDED_VOCABULARY_SIZE, rope_theta=500000,
    )  # fmt: skip


def write_text(folder: Path, files: int = 3, documents: int = 12) -> Path:
    """A folder of JSON lines, the same every time; a run of a few steps reads all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    words = random.Random(0)
    for number in range(files):
        lines = [json.dumps({"text": f"{number}.{i} " + " ".join(words.choices(WORDS, k=20))})
                 for i in range(documents)]  # fmt: skip
        (folder / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@dataclass(frozen=True)
class End:
    """How a launch ended.

    Attributes:
        code: exit code of the rank that failed first, negative for a signal; 0 if none failed.
        message: the user's mistake that a rank reported, or "".
        traceback: a traceback in the output of the first rank, or "".
        unexplained: the end of a failure without a message, or "".
        hung: whether it had to be killed after its time.
        log: output of the first rank.
    """

    code: int
    message: str
    traceback: str
    unexplained: str
    hung: bool
    log: str


class Launch:
    """Ranks that train together in a process group of their own.

    Args:
        line: command line of the trainer.
        folder: takes the output and the report of each rank.
        inside: is called with the rank in each process before it trains.
        main: what the processes do, in place of training.
        launcher: whether ``main`` starts ranks itself, and needs no environment of a rank.
    """

    def __init__(
        self,
        line: list[str],
        folder: Path,
        processes: int = 1,
        inside: Callable[[int], None] | None = None,
        main: Callable[[], None] | None = None,
        launcher: bool = False,
    ) -> None:

        self.folder = folder / f"launch-{time.monotonic_ns()}"
        self.folder.mkdir(parents=True)
        self.group = 0
        self.started = time.monotonic()
        self.ranks: list[Any] = []
        port = _free_port()
        for rank in range(processes):
            arguments = (line, self.folder, rank, processes, port, inside, main, launcher)
            process = FORKS.Process(target=_rank, args=arguments)
            process.start()
            self.group = self.group or process.pid
            _join_group(process.pid, self.group)
            self.ranks.append(process)

    @property
    def running(self) -> bool:
        return any(rank.exitcode is None for rank in self.ranks)

    @property
    def failed(self) -> bool:
        return any(rank.exitcode for rank in self.ranks)

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL one rank, or all of them and whatever they started."""
        self._signal(signal.SIGKILL, rank)

    def terminate(self) -> None:
        """Send SIGTERM to every rank, as torchrun passes it on."""
        for rank in range(len(self.ranks)):
            self._signal(signal.SIGTERM, rank)

    def _signal(self, number: int, rank: int | None) -> None:
        try:
            if rank is None:
                os.killpg(self.group, number)
            elif self.ranks[rank].exitcode is None:
                os.kill(self.ranks[rank].pid, number)
        except ProcessLookupError:
            pass

    def wait(self, limit: float = LIMIT) -> End:
        """Wait for all ranks, and end those that outlive a failed one."""
        deadline, first, hung = time.monotonic() + limit, 0, False
        while self.running:
            sentinels = [rank.sentinel for rank in self.ranks if rank.exitcode is None]
            wait(sentinels, min(0.2, max(0.0, deadline - time.monotonic())))
            if self.failed and not first:
                first = next(rank.exitcode for rank in self.ranks if rank.exitcode)
                self.terminate()
                deadline = min(deadline, time.monotonic() + GRACE)
            if time.monotonic() > deadline and self.running:
                # torchrun, too, kills ranks that outlive a failed one. Only others are stuck.
                hung = not first
                if hung:
                    self._signal(signal.SIGABRT, None)
                    time.sleep(1)
                break
        self.kill()
        for rank in self.ranks:
            rank.join()
        first = first or next((rank.exitcode for rank in self.ranks if rank.exitcode), 0)
        return self._end(first, hung)

    def _end(self, code: int, hung: bool) -> End:
        from lighthouse_commands.protocol import USERS_MISTAKE

        message, crash = "", ""
        for file in sorted(self.folder.glob("error-*.json")):
            try:
                report = json.loads(file.read_text())
            except ValueError:
                continue
            if report.get(USERS_MISTAKE):
                message = message or report["message"]
            else:
                crash = crash or str(report["message"])
        outputs = sorted(self.folder.glob("output-*"))
        log = outputs[0].read_text(errors="replace")
        if code < 0:
            # A rank that a signal ended says why in its own output.
            log += "".join(file.read_text(errors="replace")[-600:] for file in outputs[1:])
        # The launcher prints the mistake itself.
        printed = re.search(r"^Error: (.*)", log, re.MULTILINE)
        message = message or (printed.group(1) if printed else "")
        traceback = log[log.index("Traceback (") :] if "Traceback (" in log else ""
        unexplained = (crash or log[-2000:]) if code > 0 and not message else ""
        return End(code, message, traceback, unexplained, hung, log)


def _free_port() -> int:
    """A port that no other case takes: below those that the system hands out, by process."""
    while True:
        port = 10_000 + (4 * os.getpid() + next(LAUNCHES)) % 22_000
        with socket.socket() as attempt:
            try:
                attempt.bind(("", port))
            except OSError:
                continue
        return port


def until(launch: Launch, happened: Callable[[], bool]) -> None:
    """Wait until something happened, or the launch ended before."""
    deadline = time.monotonic() + LAUNCHER_LIMIT
    while launch.running and not happened() and time.monotonic() < deadline:
        time.sleep(0.002)


def _join_group(pid: int, group: int) -> None:
    """Parent and child both do this, whichever comes first."""
    try:
        os.setpgid(pid, group)
    except (PermissionError, ProcessLookupError):
        pass


def _rank(
    line: list[str],
    folder: Path,
    rank: int,
    processes: int,
    port: int,
    inside: Callable[[int], None] | None,
    main: Callable[[], None] | None,
    launcher: bool,
) -> None:
    import torch
    import torchtitan.train as upstream

    from lighthouse_commands.protocol import LAUNCHER
    from torchtitan.models.llama3_lighthouse import train

    if rank == 0:
        _join_group(0, 0)
    # Many cases run at a time; each rank with a thread for every core would be too many threads.
    torch.set_num_threads(1)
    with (folder / f"output-{rank}").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    faulthandler.enable()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = "1"
    environment = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), LAUNCHER: str(os.getppid()),
        "TORCHELASTIC_ERROR_FILE": str(folder / f"error-{rank}.json"),
    }  # fmt: skip
    os.environ.update({} if launcher else environment)
    # Processes that a rank spawns import its main module again.
    sys.modules["__main__"] = ModuleType("__main__")
    sys.argv = ["train", *line]
    # Upstream waits two seconds at the end, for ranks that torchrun would end.
    upstream.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    if inside:
        inside(rank)
    (main or train.main)()


def command(dump: Path, text: Path, **settings: Any) -> list[str]:
    """The trainer's command line; keywords are section__key."""
    from torchtitan.models.llama3_lighthouse.studies.settings import command_line

    given = {name.replace("__", "."): value for name, value in settings.items()}
    places = {"job.dump_folder": dump, "training.dataset_path": text}
    return command_line({**SETTINGS, **places, **given})
