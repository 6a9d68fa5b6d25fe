"""The two ways to install: the attention alone, and with the trainer and its commands.

The cheap tests install into an environment that sees this one's packages. The slow ones install
everything into an environment of its own.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest
import torch
from launch import SMALL, arguments

from lighthouse_commands.main import COMMANDS

ROOT = Path(__file__).parents[1]
SOURCES = (
    "lighthouse", "lighthouse_commands", "torchtitan", "scripts",
    "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE",
)  # fmt: skip
OVERLAY = "torchtitan.models.llama3_lighthouse"
# Packages of the trainer that the light install lacks.
TRAINER_PACKAGES = ("torchtitan", "torchdata", "datasets", "numpy", "pandas", "transformers")
SECONDS_FOR_HELP = 3.0


def call(command: list[object], folder: Path, expected_code: int = 0) -> str:
    """Run a command in ``folder`` and return its output, errors included."""
    # Triton's interpreter, which the tests switch on without a GPU, needs numpy.
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, text=True, capture_output=True
    )
    output = result.stdout + result.stderr
    assert result.returncode == expected_code, output[-6000:]
    return output


def readme_lines() -> str:
    """The Python lines of the README."""
    return "".join(
        re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    )


def make_environment(folder: Path, *, shared: bool) -> Path:
    """Make an environment and return its interpreter; ``shared``: it sees this one's packages."""
    call([sys.executable, "-m", "venv", *(["--without-pip"] if shared else []), folder], ROOT)
    if shared:
        (packages,) = folder.glob("lib/python*/*-packages")
        # Python runs no .pth files in a folder named by one: this editable install stays unseen.
        (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin/python"


def install(python: Path, *what: object) -> None:
    """Install without dependencies into an environment that sees this one's packages."""
    call(
        [
            sys.executable, "-m", "pip", "--python", python, "install",
            "--no-deps", "--no-build-isolation", "--ignore-installed", *what,
        ],
        ROOT,
    )  # fmt: skip


def seconds_for_help(python: Path, folder: Path) -> dict[str, float]:
    """Ask each command of an installed ``lighthouse`` for its help, and time the answers."""
    seconds = {}
    for command in COMMANDS:
        start = time.perf_counter()
        usage = call([python.with_name("lighthouse"), *command.split(), "--help"], folder)
        seconds[command] = time.perf_counter() - start
        assert usage.startswith(f"usage: lighthouse {command} ")
    return seconds


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in a folder named like the package."""
    folder = tmp_path_factory.mktemp("parent") / "lighthouse"
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(
        [
            sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
            "--wheel-dir", folder, clone,
        ],
        folder,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def shared_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment with the wheel and, for the rest, this one's packages."""
    python = make_environment(tmp_path_factory.mktemp("shared") / "environment", shared=True)
    install(python, wheel)
    return python


@pytest.fixture(scope="module")
def clean_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment of its own with the wheel and the trainer."""
    python = make_environment(tmp_path_factory.mktemp("clean") / "environment", shared=False)
    # The same build of torch, or a machine without a GPU would get gigabytes of CUDA.
    same_torch = f"torch=={torch.__version__}"
    call([python, "-m", "pip", "install", same_torch, f"{wheel}[trainer]"], wheel.parent)
    return python


def test_editable_install_is_found_from_any_folder(clone: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "environment", shared=True)
    install(python, "--editable", clone)
    # Upstream's packages stand in without their contents, which take seconds to import.
    program = (
        "import sys\n"
        "from importlib.util import find_spec, module_from_spec\n"
        f"for name in ('lighthouse', 'torchtitan', 'torchtitan.models', '{OVERLAY}'):\n"
        "    spec = find_spec(name)\n"
        "    sys.modules[name] = module_from_spec(spec)\n"
        "    print(spec.origin)"
    )
    upstream = Path(sysconfig.get_path("purelib"), "torchtitan")
    # In the folder above the clone, Python sees a folder that has the name of the package.
    for folder in (clone.parent, clone, tmp_path):
        assert call([python, "-c", program], folder).splitlines() == [
            str(clone / "lighthouse/__init__.py"),
            str(upstream / "__init__.py"),
            str(upstream / "models/__init__.py"),
            str(clone.joinpath(*OVERLAY.split("."), "__init__.py")),
        ]
    call([python, "-c", "from lighthouse import LighthouseConfig"], clone.parent)


def test_wheel_offers_every_command(shared_environment: Path, tmp_path: Path) -> None:
    for command, seconds in seconds_for_help(shared_environment, tmp_path).items():
        # Another test may hold the processor. The slow test has the strict bound.
        assert seconds < 3 * SECONDS_FOR_HELP, f"lighthouse {command} --help took {seconds:.1f} s"


def test_wheel_has_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    overlay = OVERLAY.replace(".", "/")
    assert {
        f"{folder}/py.typed" for folder in ("lighthouse", "lighthouse_commands", overlay)
    } < names
    assert f"{overlay}/assets/byte_tokenizer/tokenizer.json" in names
    # A file of ours there would hide upstream's.
    assert not {"torchtitan/__init__.py", "torchtitan/models/__init__.py"} & names


def test_readme_lines_run_without_the_trainer(shared_environment: Path, tmp_path: Path) -> None:
    # None in sys.modules makes an import of that name fail.
    hidden = f"import sys\nsys.modules.update(dict.fromkeys({TRAINER_PACKAGES}))\n"
    call([shared_environment, "-c", hidden + readme_lines()], tmp_path)


@pytest.mark.slow
def test_light_install_runs_the_readme_lines(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "light", shared=False)
    call([python, "-m", "pip", "install", f"torch=={torch.__version__}", wheel], tmp_path)
    call([python, "-c", readme_lines()], tmp_path)
    installed = call([python, "-m", "pip", "list", "--format", "freeze"], tmp_path).lower()
    assert not [name for name in TRAINER_PACKAGES if f"\n{name}==" in f"\n{installed}"]
    seconds_for_help(python, tmp_path)
    refused = call([python.with_name("lighthouse"), "train"], tmp_path, expected_code=1)
    assert "pip install 'lighthouse-attention[trainer]'" in refused
    assert "Traceback" not in refused


@pytest.mark.slow
def test_wheel_offers_every_command_in_a_clean_environment(
    clean_environment: Path, tmp_path: Path
) -> None:
    for command, seconds in seconds_for_help(clean_environment, tmp_path).items():
        assert seconds < SECONDS_FOR_HELP, f"lighthouse {command} --help took {seconds:.1f} s"


@pytest.mark.slow
def test_wheel_trains_in_a_clean_environment(clean_environment: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "training.steps": 4, "lighthouse.dense_from_step": 2}
    log = call(
        [
            clean_environment, "-m", "torch.distributed.run", "--nproc-per-node", 1,
            "-m", "torchtitan.models.llama3_lighthouse.train",
            *arguments({**settings, "job.dump_folder": tmp_path / "dump"}),
        ],
        tmp_path,
    )  # fmt: skip
    assert "Stage 'dense' begins at step 3 after lighthouse" in log
    assert (tmp_path / "dump/checkpoint/step-4/.metadata").is_file()
