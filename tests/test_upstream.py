"""docs/upstream.md and the code agree on what we touch of torch and torchtitan, and it is there.

The first tests compare the page with the code. The others break first where upstream changes
something that no other fast test would notice; the page names them.
"""

import ast
import importlib
import inspect
import queue
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/upstream.md"
OVERLAY = "torchtitan/models/llama3_lighthouse"
PACKAGES = ("lighthouse", "lighthouse_commands", OVERLAY)
UPSTREAM = ("torch", "torchtitan", "torchdata", "triton", "datasets")
PINNED = ("torch", "triton", "torchtitan", "datasets", "flash-attn-4")
READ_THE_PAGE = "docs/upstream.md says where we use it, why, and when it can go"


def is_upstream(module: str | None) -> bool:
    ours = OVERLAY.replace("/", ".")
    return bool(module) and module.split(".")[0] in UPSTREAM and not module.startswith(ours)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def source_files() -> dict[Path, ast.Module]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path: ast.parse(path.read_text()) for path in paths}


def names_of_ours(trees: dict[Path, ast.Module]) -> set[str]:
    """Every name that our own code defines: functions, classes, variables and attributes."""
    found = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                found.add(name)
            case ast.alias(asname=str(name)) | ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                found.add(name)
    return found


def imports_from_upstream(tree: ast.Module) -> Iterator[tuple[ast.stmt, str, str | None, str]]:
    """Yield statement, module, imported name (None for a module) and the name it has here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and is_upstream(node.module):
            for alias in node.names:
                yield node, node.module, alias.name, alias.asname or alias.name
        elif isinstance(node, ast.Import):
            for alias in filter(lambda alias: is_upstream(alias.name), node.names):
                yield node, alias.name, None, alias.asname or alias.name.partition(".")[0]


def root_of(node: ast.expr) -> str | None:
    """``a`` of an expression ``a.b.c``."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def uses_in(tree: ast.Module, ours: set[str]) -> Iterator[tuple[int, str]]:
    """Yield the line and name of everything private, patched or extended of upstream."""
    aliases = {}
    for node, module, name, alias in imports_from_upstream(tree):
        aliases[alias] = module
        for part in filter(is_private, [*module.split("."), name or ""]):
            yield node.lineno, part
    for node in ast.walk(tree):
        match node:
            # Python documents this one.
            case ast.Attribute(value=ast.Name(id="os"), attr="_exit"):
                pass
            case ast.Attribute(value=value, attr=name) if is_private(name):
                is_inherited = isinstance(value, ast.Call) and ast.unparse(value.func) == "super"
                if name not in ours or is_inherited:
                    yield node.lineno, name
            case ast.Subscript(slice=ast.Constant(value=str(name))) if is_private(name):
                yield node.lineno, name
            case ast.Call(args=[target, ast.Constant(value=str(name)), *_]):
                function = ast.unparse(node.func)
                if function == "getattr" and is_private(name):
                    yield node.lineno, name
                elif function == "patch.object" and root_of(target) in aliases:
                    yield node.lineno, name
            case ast.Assign(targets=[ast.Attribute() as target]) | ast.AugAssign(target=target):
                if isinstance(target, ast.Attribute) and root_of(target) in aliases:
                    yield node.lineno, target.attr
            case ast.ClassDef():
                yield from extended_by(node, tree)


def extended_by(node: ast.ClassDef, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield torchtitan's and torchdata's base classes of a class, and the privates it overrides."""
    origins = {
        alias: (module, name) for _, module, name, alias in imports_from_upstream(tree) if name
    }
    for base in node.bases:
        module, name = origins.get(root_of(base), ("", ""))
        if module.partition(".")[0] not in ("torchtitan", "torchdata"):
            continue
        yield node.lineno, ast.unparse(base).rpartition(".")[2]
        try:
            of_base = importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError:
            of_base = getattr(importlib.import_module(module), name)
        if isinstance(base, ast.Attribute):
            of_base = getattr(of_base, base.attr)
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and is_private(method.name):
                if hasattr(of_base, method.name):
                    yield method.lineno, method.name


def private_imports() -> list[tuple[str, str | None]]:
    found = {
        (module, name)
        for tree in source_files().values()
        for _, module, name, _ in imports_from_upstream(tree)
        if any(map(is_private, [*module.split("."), name or ""]))
    }
    return sorted(found, key=str)


def test_page_names_everything_we_touch() -> None:
    trees = source_files()
    ours = names_of_ours(trees)
    text = PAGE.read_text()
    missing = sorted(
        {
            f"{name} ({path.relative_to(ROOT)}:{line})"
            for path, tree in trees.items()
            for line, name in uses_in(tree, ours)
            if not re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", text)
        }
    )
    assert not missing, (
        "docs/upstream.md does not mention what these lines use of torch or torchtitan: "
        f"{', '.join(missing)}. Add a row that says why, when it can go and which test breaks "
        "first, or do without it"
    )


# The ring, and the attentions that it calls.
RING_FILES = ("context_parallel", "ring_attention", "ring_operations", "cpu_flash", "cudnn")


def test_the_ring_uses_few_private_names() -> None:
    """It does without DTensor's dispatcher and torch's own context parallelism."""
    trees = source_files()
    ours = names_of_ours(trees)
    found = {
        name
        for path, tree in trees.items()
        if path.stem in RING_FILES
        for _, name in uses_in(tree, ours)
    }
    # Windows call cuDNN too.
    assert found == {
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_cudnn_attention_backward",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_coalescing_manager",
        # It is public, and changes the whole process.
        "cache_key_tag",
    }


def rows_of_page() -> list[list[str]]:
    """Cells of the tables of ``docs/upstream.md`` that have a column "breaks first"."""
    rows, is_wanted = [], False
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            is_wanted = False
        elif cells[-1] == "breaks first":
            is_wanted = True
        elif is_wanted and not set(line) <= set("|-: "):
            rows.append(cells)
    return rows


def test_every_row_of_the_page_stands() -> None:
    """Every file that a row names is there and uses the thing, and the named test is there."""
    wrong = []
    rows = rows_of_page()
    assert len(rows) > 20
    for row in rows:
        what, where, test = row[0], row[1], row[-1]
        files = [
            path
            for word in re.findall(r"`([^`]+\.py)`", where)
            for path in (ROOT / word, ROOT / OVERLAY / word)
            if path.is_file()
        ]
        if len(files) != len(re.findall(r"`([^`]+)`", where)):
            wrong.append(f"{what}: not every file of {where} exists")
        text = "".join(path.read_text() for path in files)
        used = [name.split(".")[-1] for name in re.findall(r"`([^`]+)`", what)]
        wrong += [f"{what}: {where} has no '{name}'" for name in used if name not in text]
        for file, name in re.findall(r"`(tests/[^`]+\.py)::(\w+)", test) or [("", "")]:
            if not (ROOT / file).is_file() or f"def {name}(" not in (ROOT / file).read_text():
                wrong.append(f"{what}: there is no test {test}")
    assert not wrong, "docs/upstream.md is out of date:\n" + "\n".join(wrong)


def test_page_has_the_pinned_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    requirements = {line for lines in [project["dependencies"], *extras] for line in lines}
    text = PAGE.read_text()
    for line in requirements:
        requirement = line.partition(";")[0].strip()
        name = re.match(r"[\w-]+", requirement).group()
        if name in PINNED:
            assert f"`{requirement}`" in text, f"docs/upstream.md does not explain {requirement}"


@pytest.mark.parametrize(("module", "name"), private_imports())
def test_private_names_are_there(module: str, name: str | None) -> None:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        pytest.fail(f"{module} is gone ({error}); {READ_THE_PAGE}")
    assert name is None or hasattr(found, name), f"{module}.{name} is gone; {READ_THE_PAGE}"


class Operations(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.name()
        self.counts[name] = self.counts.get(name, 0) + 1
        return operation(*arguments, **(options or {}))


def parallelized(**activation_checkpoint: object) -> torch.nn.Module:
    """A small model after ``parallelize_lighthouse`` for one process."""
    from small_model import N, build
    from torchtitan.distributed import ParallelDims

    from torchtitan.models.llama3_lighthouse.infra.parallelize import parallelize_lighthouse
    from torchtitan.models.llama3_lighthouse.job_config import JobConfig

    config = JobConfig()
    config.training.seq_len = N
    for name, value in activation_checkpoint.items():
        setattr(config.activation_checkpoint, name, value)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    return parallelize_lighthouse(build(), dims, config)


def test_selective_checkpointing_keeps_selections_and_attention() -> None:
    """``_op_sac_save_list`` is what torchtitan's selective mode reads, at every call."""
    tokens = torch.randint(0, 320, (1, 256))
    counts = []
    for mode in ("none", "selective"):
        model = parallelized(mode=mode, selective_ac_option="op")
        with Operations() as operations:
            model(tokens).sum().backward()
        counts.append(operations.counts)
    plain, selective = counts
    # Something is repeated, but neither selection nor attention.
    assert sum(selective.values()) > sum(plain.values())
    for name in ("lighthouse::select", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert selective[name] == plain[name] > 0, (name, READ_THE_PAGE)


def test_parallelize_llama_calls_what_we_put_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """``apply_ac`` and ``apply_cp_to_attention_module`` are looked up where we patch them."""
    from torchtitan.models.llama3.infra import parallelize as upstream

    from torchtitan.models.llama3_lighthouse.infra import parallelize as ours

    calls = []
    monkeypatch.setattr(ours, "apply_lighthouse_checkpoint", lambda *_: calls.append("ours"))
    monkeypatch.setattr(ours, "apply_ac", lambda *_, **__: calls.append("upstream"))
    parallelized(mode="lighthouse")
    parallelized(mode="full")
    assert calls == ["ours", "upstream"], f"apply_ac is not called; {READ_THE_PAGE}"
    source = inspect.getsource(upstream.parallelize_llama)
    assert re.search(r"apply_cp_to_attention_module\(\s*(#.*\s*)?\[block\.attention", source), (
        f"parallelize_llama hands over attention modules otherwise; {READ_THE_PAGE}"
    )


def test_compilers_cache_asks_for_a_hash() -> None:
    from torch._functorch._aot_autograd import autograd_cache

    def contexts() -> None: ...

    contexts.cache_hash = "lighthouse []"
    assert autograd_cache._get_context_fn_cache_hash(contexts) == "lighthouse []", READ_THE_PAGE


def test_dynamo_has_the_settings_that_we_change() -> None:
    import torch._dynamo

    assert isinstance(torch._dynamo.config.recompile_limit, int), READ_THE_PAGE
    assert isinstance(torch._dynamo.config.automatic_dynamic_shapes, bool), READ_THE_PAGE


def test_backends_of_dense_attention_are_those_of_the_module() -> None:
    from torch.nn.attention import SDPBackend
    from torchtitan.models.attention import ScaledDotProductAttentionWrapper

    rows = torch.randn(3, 1, 2, 16, 8)
    counts = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        module = ScaledDotProductAttentionWrapper()
        module.sdpa_backends = [backend]
        with Operations() as operations:
            module(*rows)
        counts.append(operations.counts)
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert flash in counts[0] and flash not in counts[1], READ_THE_PAGE


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_collectives_can_be_coalesced(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs alone coalesce, so the manager's contract is checked without a collective."""
    from torch.distributed import distributed_c10d as c10d

    parameters = inspect.signature(c10d._coalescing_manager).parameters
    assert list(parameters)[:3] == ["group", "device", "async_ops"], READ_THE_PAGE
    group = dist.group.WORLD
    monkeypatch.setattr(type(group), "_start_coalescing", lambda *_: None)
    monkeypatch.setattr(type(group), "_end_coalescing", lambda *_: SimpleNamespace(wait=list))
    with c10d._coalescing_manager(group, torch.device("cpu"), async_ops=True) as together:
        pass
    assert callable(together.wait), READ_THE_PAGE


@pytest.mark.skipif(torch.accelerator.is_available(), reason="stands in for a missing device")
def test_every_module_of_torchtitan_has_the_cpu() -> None:
    from torchtitan.tools import utils

    import torchtitan.models.llama3_lighthouse.train  # noqa: F401

    # isort: split
    # The module asks for the device by itself, whenever it is imported.
    import torchtitan.distributed.dual_pipe_v  # noqa: F401

    modules = {name: module for name, module in sys.modules.items() if "torchtitan." in name}
    copies = {name: vars(module)["device_type"] for name, module in modules.items()
              if "device_type" in vars(module)}  # fmt: skip
    assert len(copies) > 3 and set(copies.values()) == {"cpu"}, (copies, READ_THE_PAGE)
    assert utils.get_peak_flops.__name__ == "no_peak_flops", READ_THE_PAGE


def test_retention_goes_through_our_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that are no complete checkpoints are neither counted nor deleted."""
    from torchtitan.components.checkpoint import CheckpointManager

    from torchtitan.models.llama3_lighthouse.checkpoints.manager import LighthouseCheckpointManager

    called = [
        name
        for name in inspect.unwrap(CheckpointManager.save).__code__.co_names
        if is_private(name)
    ]
    assert {"_should_save", "_create_checkpoint_id", "_purge_stale_checkpoints"} <= set(called), (
        f"torchtitan's save calls {called}; {READ_THE_PAGE}"
    )
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    manager = LighthouseCheckpointManager.__new__(LighthouseCheckpointManager)
    manager.folder, manager.keep_latest_k = str(tmp_path), 2
    manager.purge_queue = queue.Queue()
    for step, complete in ((1, True), (2, True), (3, False), (4, True), (5, False), (6, True)):
        path = Path(manager._create_checkpoint_id(step))
        path.mkdir()
        if complete:
            (path / ".metadata").touch()
    manager._purge_stale_checkpoints()
    gone = [Path(manager.purge_queue.get_nowait()).name for _ in range(2)]
    assert gone == ["step-1.purged", "step-2.purged"] and manager.purge_queue.empty()


def test_metrics_are_counted_where_we_correct_them() -> None:
    from torchtitan.components.metrics import MetricsProcessor

    for method in (MetricsProcessor.log, MetricsProcessor.log_validation):
        used = set(method.__code__.co_names)
        assert {"time_last_log", "ntokens_since_last_log"} <= used, (method, READ_THE_PAGE)
    assert "num_flops_per_token" in MetricsProcessor.log.__code__.co_names, READ_THE_PAGE


@pytest.mark.parametrize("name", ["Schedule1F1B", "ScheduleGPipe", "ScheduleInterleaved1F1B"])
def test_pipeline_schedules_evaluate_as_we_call_them(name: str) -> None:
    from torch.distributed.pipelining import schedules

    schedule = getattr(schedules, name)
    assert issubclass(schedule, schedules._PipelineSchedule), READ_THE_PAGE
    parameters = inspect.signature(schedule.eval).parameters
    assert {"args", "target", "losses", "kwargs"} <= set(parameters), (parameters, READ_THE_PAGE)


def test_loader_forgets_its_iterator() -> None:
    """``load_state_dict`` drops ``_iterator``, whose workers have read ahead."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader([1, 2, 3], batch_size=None)
    first = iter(loader)
    assert next(first) == 1 and loader._iterator is not None, READ_THE_PAGE
    loader._iterator = None
    assert list(loader) == [1, 2, 3], READ_THE_PAGE


def test_launcher_reads_the_message(tmp_path: Path) -> None:
    """torchrun closes with the message that a rank leaves in TORCHELASTIC_ERROR_FILE."""
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, ProcessFailure

    file = tmp_path / "error.json"
    file.write_text('{"message": "set lighthouse.top_k to 128", "timestamp": 7}')
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    assert (failure.message, failure.timestamp) == ("set lighthouse.top_k to 128", 7), READ_THE_PAGE
    assert failure.error_file_data["message"] == failure.message, READ_THE_PAGE
    source = inspect.getsource(ErrorHandler)
    assert "TORCHELASTIC_ERROR_FILE" in source, READ_THE_PAGE
