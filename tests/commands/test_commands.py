"""The console command: help, the command line, and how commands end."""

import os
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lighthouse_commands import launch
from lighthouse_commands.arguments import split_overrides
from lighthouse_commands.launch import Machines, torchrun_arguments, training_environment
from lighthouse_commands.main import COMMANDS, EXTRAS, main, needs

ROOT = Path(__file__).parents[2]
DEBUG = str(ROOT / "train_configs/debug_cpu.toml")
# Seconds of processor time, which other work on the machine lengthens less than wall time.
SECONDS_FOR_HELP = 3.0
# Commands that take no --output.
WITHOUT_OUTPUT = ("train", "dry-run", "check-text")
# Packages that take seconds to import, or that the light install lacks.
HEAVY = ("torch", "torchtitan", "numpy", "pandas", "triton", "lighthouse", "matplotlib", "tqdm")


@pytest.mark.parametrize("words", ["", "evaluate", *COMMANDS])
def test_help_comes_at_once_and_without_torch(words: str) -> None:
    program = f"""
import sys
sys.argv[1:] = {[*words.split(), "--help"]!r}
from lighthouse_commands.main import main
try:
    main()
finally:
    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n"
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert spent < SECONDS_FOR_HELP
    assert done.stdout.startswith(f"usage: lighthouse {words}".rstrip())


def test_help_names_every_command(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    measures = capsys.readouterr().out
    for words in COMMANDS:
        group, _, last = words.rpartition(" ")
        assert re.search(rf"^ +{last}\b", measures if group else listed, re.MULTILINE), words


@pytest.mark.parametrize("words", COMMANDS)
def test_flags_follow_one_convention(words: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    text = capsys.readouterr().out
    flags = set(re.findall(r"(?<![\w.])--[\w-]+(?![\w.-])", text)) - {"--section"}
    if words not in WITHOUT_OUTPUT:
        assert "--output" in flags
        if "hf" not in words:
            assert "--no-plots" in flags
    if words.startswith("evaluate"):
        assert {"--device", "--attention"} <= flags
    assert "--section.key value" in text


@pytest.mark.parametrize("line", [
    ["evaluate", "loss", "run", "--output", "out", "--first-buckets", "3"],
    # Shortened flags are unknown too.
    ["evaluate", "niah", "run", "--output", "out", "--trial", "3"],
    ["recovery", DEBUG, "--output", "out", "--split", "0.5", "--training.steps", "3"],
    ["ablations", "grid.toml", "--dry-run"],
    ["train", DEBUG, "--steps", "3"],
])  # fmt: skip
def test_unknown_arguments_are_refused(line: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    (flag,) = [word for word in line[2:] if word in
               ("--first-buckets", "--trial", "--split", "--dry-run", "--steps")]  # fmt: skip
    error = capsys.readouterr().err
    assert f"unknown argument {flag}; a configuration takes --section.key value" in error


def test_overrides_go_to_the_configuration_wherever_they_stand() -> None:
    line = ["run", "--validation.enable", "--lighthouse.dense_layers", "0", "1", "--seeds", "-1"]
    line += ["--optimizer.lr=0.1", "--output", "out", "--debug.seed", "-1"]
    line += ["--activation-checkpoint.mode", "none"]
    own, overrides = split_overrides(line)
    assert own == ["run", "--seeds", "-1", "--output", "out"]
    assert overrides == ["--validation.enable", "--lighthouse.dense_layers", "0", "1",
                         "--optimizer.lr=0.1", "--debug.seed", "-1",
                         "--activation-checkpoint.mode", "none"]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), [
    (["contest", "--training.dataset_path", "text", "a.toml", "--output", "out"],
     "required: CONFIG; 'a.toml' follows --training.dataset_path and so belongs to it: pass CONFIG "
     "before such keys"),
    # A file is named before the second value of a list.
    (["recovery", "--lighthouse.dense_layers", "0", "1", "--validation.enable", "a.toml"],
     "required: CONFIG, --output; 'a.toml' follows --validation.enable and so"),
    (["evaluate", "loss", "--validation.steps=2", "outputs/a", "--output", "out"],
     "required: CHECKPOINT; 'outputs/a' follows --validation.steps and so belongs to it: pass CH"),
    (["train", "--training.document_mask", "a.toml"],
     "no configuration is given: 'a.toml' follows --training.document_mask and so belongs to it; "
     "pass CONFIG, its TOML file, before the keys"),
])  # fmt: skip
def test_a_word_that_an_override_takes_is_named(line: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert words in f"{caught.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("line", [
    ["contest", "--training.dataset_path", "text", "--output", "out"],
    ["contest", "a.toml", "--lighthouse.dense_layers", "0", "1"],
    ["train", "--debug.seed", "-1", "--training.steps=3"],
    ["evaluate", "loss", "--job.config_file", "a.toml", "--output", "out"],
])  # fmt: skip
def test_values_of_an_override_are_not_taken_for_others(line: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert "belongs to" not in f"{caught.value}{capsys.readouterr().err}"


WITHOUT_TRAINER = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from lighthouse_commands.main import main
main({line!r})
"""


@pytest.mark.parametrize("words", COMMANDS)
def test_without_the_trainer_a_command_says_what_to_install(words: str, tmp_path: Path) -> None:
    line = [*words.split(), DEBUG]
    line += [] if words in WITHOUT_OUTPUT else ["--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRAINER.format(package="torchtitan", line=line)],
        text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == f"Error: {needs('torchtitan')}\n"
    assert "pip install 'lighthouse-attention[trainer]'" in done.stderr
    assert not (tmp_path / "out").exists()


class Command:
    """A command that ends with an error."""

    IF_INTERRUPTED = "nothing was written"

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def run(self, options, overrides) -> None:
        raise self.error


def end_with(error: BaseException, monkeypatch) -> None:
    """Run ``main`` with a command that raises ``error``."""
    from argparse import Namespace

    from lighthouse_commands import main as module

    options = Namespace(module=Command(error))
    monkeypatch.setattr(module, "parse", lambda line: (options, []))
    main([])


def test_how_commands_end(monkeypatch, capsys) -> None:
    from torchtitan.models.llama3_lighthouse.errors import UserValueError

    for error, line in (
        (UserValueError("x = 3 is too small; use 4"), "Error: x = 3 is too small; use 4"),
        (FileNotFoundError(2, "No such file or directory", "a"),
         "Error: [Errno 2] No such file or directory: 'a'"),
        (ModuleNotFoundError("No module named 'pandas'", name="pandas"),
         f"Error: {needs('pandas')}"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            end_with(error, monkeypatch)
        assert caught.value.code == line
    with pytest.raises(SystemExit) as caught:
        end_with(KeyboardInterrupt(), monkeypatch)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


def test_the_extra_of_a_missing_package_is_named() -> None:
    """Every one that is named is there, and has the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert "'lighthouse-attention[trainer]'" in needs("torchtitan")
    assert "pip install -e '.[export]' in a clone" in needs("transformers.models")
    for package, extra in EXTRAS.items():
        names = [name.replace("-", "_") for name in extras[extra]]
        assert any(name.startswith(package) for name in names), package


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        KeyError("a bug"),
        ModuleNotFoundError("a bug", name="torchtitan.models.llama3_lighthouse.gone"),
        ModuleNotFoundError("a bug", name="lighthouse.gone"),
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch) -> None:
    with pytest.raises(type(error)) as caught:
        end_with(error, monkeypatch)
    assert caught.value is error


@pytest.fixture
def launched(monkeypatch) -> dict:
    """The arguments of torchrun that ``lighthouse train`` passes, on a machine with two GPUs."""
    found: dict = {}

    def run_torchrun(line: list[str], environment: dict[str, str], grace: int) -> None:
        found.update(line=line, environment=environment, grace=grace)

    monkeypatch.setattr("lighthouse_commands.train.run_torchrun", run_torchrun)
    monkeypatch.setattr("lighthouse_commands.train.gpus_here", lambda: 2)
    return found


def test_train_calls_torchrun(launched: dict, capsys) -> None:
    main(["train", DEBUG, "--training.steps", "5"])
    # The second rank's output goes to a file, and the first one's is not touched.
    assert launched["line"] == [
        "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        "--redirects", "1:3", "--signals-to-handle", "SIGHUP,SIGQUIT",
        "-m", "torchtitan.models.llama3_lighthouse.train",
        "--job.config_file", DEBUG, "--training.steps", "5",
    ]  # fmt: skip
    assert capsys.readouterr().out == (
        "checking the configuration\nstarting 2 training processes\n"
    )
    assert launched["grace"] == 300
    main(["train", "--processes", "1", "--job.config_file", DEBUG])
    assert launched["line"][:2] == ["--nproc-per-node", "1"]
    assert "--redirects" not in launched["line"] and "--tee" not in launched["line"]
    main(["train", "--processes", "3", "--log-rank", "0,1", "--job.config_file", DEBUG])
    shown = launched["line"].index("--local-ranks-filter")
    assert launched["line"][shown : shown + 6] == [
        "--local-ranks-filter", "0,1", "--role", "rank", "--tee", "3"
    ]  # fmt: skip


def test_train_on_several_machines(launched: dict) -> None:
    line = ["train", DEBUG, "--nodes", "2", "--node-rank", "1", "--master-address", "host0"]
    main(line)
    assert launched["line"][:10] == [
        "--nproc-per-node", "2", "--nnodes", "2", "--node-rank", "1",
        "--master-addr", "host0", "--master-port", "29500",
    ]  # fmt: skip
    assert "--rdzv-backend" not in launched["line"]


def test_configuration_is_checked_before_processes_start(launched: dict, tmp_path: Path) -> None:
    cases = [
        (["--parallelism.tensor_parallel_degree", "4"],
         "[parallelism] needs a multiple of 4 processes (tensor_parallel_degree 4), and this run "
         "has 2; set --processes or NGPU"),
        (["--training.global_batch_size", "3"], "training.global_batch_size = 3 must be a multiple "
         "of training.local_batch_size = 1 times the data-parallel degree of 2"),
        (["--lighthouse.data_streams", "3"], "lighthouse.data_streams = 3 must be a multiple"),
        (["--lighthouse.top_k", "31"], "top_k"),
        (["--training.mixed_precision_param", "float32", "--parallelism.context_parallel_degree",
          "2"], "does not go with context parallelism on GPUs"),
    ]  # fmt: skip
    for line, message in cases:
        line = ["train", DEBUG, "--job.dump_folder", str(tmp_path / "run"), *line]
        with pytest.raises(SystemExit) as caught:
            main(line)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not launched
    main([*line, "--no-check"])
    assert launched
    assert not (tmp_path / "run").exists()


def test_text_that_may_not_be_read_is_found_before_processes_start(
    launched: dict, tmp_path: Path, monkeypatch
) -> None:
    """Permissions do not bind an administrator, as whom tests may run."""
    for name in ("a.txt", "secret/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    line = ["train", DEBUG, "--training.dataset", "c4_local"]
    line += ["--training.dataset_path", str(tmp_path), "--job.dump_folder", str(tmp_path / "run")]
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as caught:
        patched.setattr(os, "scandir", scandir)
        main(line)
    assert "cannot be read: Permission denied: " in str(caught.value) and not launched
    main(line)
    assert launched


def test_dry_run_is_an_option_of_train_too(launched: dict, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    main(["train", DEBUG, "--training.steps", "7", f"--job.dump_folder={folder}", "--dry-run"])
    assert "steps         7: all in the Lighthouse stage" in capsys.readouterr().out
    assert not launched and not folder.exists()


@pytest.mark.parametrize(("line", "message"), [
    ([], "no configuration is given; pass CONFIG"),
    (["none.toml"], "none.toml is no file; name a TOML file"),
    ([DEBUG, "--job.config_file", DEBUG], "name two configurations; give one"),
    ([DEBUG, f"--job.config-file={DEBUG}"], "name two configurations; give one"),
    ([DEBUG, "--processes", "0"], "--processes 0 must be at least 1"),
    ([DEBUG, "--log-rank", "abc"], "--log-rank abc must be ranks separated by commas"),
    ([DEBUG, "--log-rank", "2"], "--log-rank 2 names a rank that this machine does not have; it "
     "has 2, counted from 0"),
    ([DEBUG, "--nodes", "0"], "--nodes 0 must be at least 1"),
    ([DEBUG, "--nodes", "2"], "--nodes 2 needs --master-address, the address of the machine with "
     "--node-rank 0"),
    ([DEBUG, "--nodes", "2", "--master-address", "h"], "--nodes 2 needs --node-rank, from 0 to 1"),
    ([DEBUG, "--nodes", "2", "--master-address", "h", "--node-rank", "2"],
     "--nodes 2 needs --node-rank, from 0 to 1, got 2"),
])  # fmt: skip
def test_mistakes_of_a_launch_end_in_one_line(launched: dict, line, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", *line])
    assert str(caught.value).startswith("Error: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and not launched


def test_environment_of_training() -> None:
    given = {"HOME": "/home/me", "OMP_NUM_THREADS": ""}
    allocator = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert training_environment(given, processes=3, gpus=0, cores=8) == {
        "HOME": "/home/me", **allocator, "OMP_NUM_THREADS": "2"
    }  # fmt: skip
    assert training_environment(given, 16, 0, 8)["OMP_NUM_THREADS"] == "1"
    # torchrun would set one thread as well, and say so in five lines.
    assert training_environment(given, 8, 8, 8) == {**given, **allocator, "OMP_NUM_THREADS": "1"}
    assert training_environment(given, 1, 8, 8) == {**given, **allocator}
    own = {"PYTORCH_CUDA_ALLOC_CONF": "a", "OMP_NUM_THREADS": "5"}
    assert training_environment(own, 1, 0, 8) == own


def test_gpus_are_those_that_the_driver_lists(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.gpus_here() == 0
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf 'GPU 0: A\\n  MIG 1g\\nGPU 1: A\\n'\n")
    driver.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.gpus_here() == 2
    for visible, count in (("1", 1), ("", 0), ("0,1,2", 2), ("-1", 0), ("0,-1,1", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert launch.gpus_here() == count
    driver.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert launch.gpus_here() == 0


def test_sweeps_train_by_the_same_command(launched: dict) -> None:
    from torchtitan.models.llama3_lighthouse.studies.sweeps import trainer_command

    arguments = ["--job.config_file", DEBUG, "--training.steps", "5"]
    program, module, name, *line = trainer_command(2, arguments)
    assert (program, module, name) == (sys.executable, "-m", "lighthouse_commands.main")
    main(line)
    assert launched["line"] == torchrun_arguments(Machines(2), arguments, log_rank="0")


def test_choices_are_those_of_the_trainer() -> None:
    from lighthouse_commands.arguments import ATTENTIONS
    from lighthouse_commands.export_hf import DTYPES as written
    from torchtitan.models.llama3_lighthouse import stages
    from torchtitan.models.llama3_lighthouse.hugging_face.format import DTYPES

    assert set(ATTENTIONS) == set(stages.ATTENTIONS)
    assert set(written) <= DTYPES.keys()
