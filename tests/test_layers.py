"""Imports run downward: each layer imports only itself and the layers below it."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
OVERLAY = "torchtitan.models.llama3_lighthouse"
PACKAGES = ["lighthouse", OVERLAY, "lighthouse_commands"]
# The lowest layer comes first. Modules and packages of one layer may import one another.
LAYERS = [
    ["lighthouse", "lighthouse_commands.protocol"],
    [
        f"{OVERLAY}.{name}"
        for name in (
            "errors", "command_line", "job_config", "stages", "environment", "processes",
        )
    ],
    [f"{OVERLAY}.data"],
    [f"{OVERLAY}.model"],
    [f"{OVERLAY}.infra"],
    [
        f"{OVERLAY}.{name}"
        for name in (
            "console", "stopping", "verdict", "checkpoints", "checks", "lr_schedule",
            "metrics",
            "document_statistics", "selection_statistics", "validate",
        )
    ],
    [
        OVERLAY,
        *(
            f"{OVERLAY}.{name}"
            for name in (
                "train_spec", "baseline", "memory_estimate", "time_estimate", "run_stages",
                "description", "train", "dry_run",
            )
        ),
    ],
    [f"{OVERLAY}.evaluation"],
    [f"{OVERLAY}.hugging_face"],
    [f"{OVERLAY}.studies"],
    ["lighthouse_commands"],
]  # fmt: skip
ORACLE_MAY_IMPORT = {"lighthouse.config", "lighthouse.geometry"}


def modules() -> dict[str, Path]:
    """Each module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for file in sorted(ROOT.joinpath(*package.split(".")).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imported(module: str) -> Iterator[str]:
    """The modules that ``module`` imports at its top or in its functions, not only ours."""
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: 1 - node.level or None]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if name in MODULES else source


def layer(module: str) -> int:
    """The layer with the longest name that ``module`` is or lies in."""
    places = {name: place for place, names in enumerate(LAYERS) for name in names}
    # Only the overlay's own __init__.py belongs to the overlay's entry.
    fitting = [
        name
        for name in places
        if module == name or (name != OVERLAY and module.startswith(f"{name}."))
    ]
    assert fitting, f"give {module} a place in LAYERS of {Path(__file__).name}"
    return places[max(fitting, key=len)]


def test_no_import_runs_upward() -> None:
    upward = []
    for module in MODULES:
        place = layer(module)
        upward += [
            f"{module} imports {target}, which lies above it"
            for target in imported(module)
            if target in MODULES and layer(target) > place
        ]
    assert not upward, (
        "move what both need to the lower layer, or hand it in as an argument "
        f"(the order is LAYERS of {Path(__file__).name}):\n" + "\n".join(upward)
    )


def test_no_imports_in_a_circle() -> None:
    graph = {
        module: {name for name in imported(module) if name in MODULES and name != module}
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(
            "imported in a circle: " + " imports ".join(error.args[1][::-1])
        ) from None


def test_the_method_needs_torch_and_triton_alone() -> None:
    allowed = {"lighthouse", "torch", "triton", *sys.stdlib_module_names}
    # A user of an extra imports this module by its name; no other module does.
    adapter = "lighthouse.transformers"
    assert not [module for module in MODULES if adapter in imported(module)]
    foreign = [
        f"{module} imports {target}"
        for module in MODULES
        if module.split(".")[0] == "lighthouse"
        for target in imported(module)
        if target.split(".")[0] not in allowed | ({"transformers"} if module == adapter else set())
    ]
    assert not foreign, f"the light install has torch and Triton alone: {foreign}"


def test_the_launcher_needs_no_trainer() -> None:
    """Importing it would take seconds in a process that does not train."""
    for module in ("lighthouse_commands.launch", "lighthouse_commands.grace"):
        assert not [target for target in imported(module) if target.startswith("torchtitan")]


def test_the_oracle_and_the_kernels_are_independent() -> None:
    taken = {target for target in imported("lighthouse.reference") if target in MODULES}
    assert taken <= ORACLE_MAY_IMPORT, (
        f"lighthouse.reference may import {sorted(ORACLE_MAY_IMPORT)} alone, or it would share "
        f"the mistakes it is there to find: it imports {sorted(taken)}"
    )
    users = [
        module
        for module in MODULES
        if module.startswith("lighthouse.kernels") and "lighthouse.reference" in imported(module)
    ]
    assert not users, f"the kernels must not import their oracle: {users}"
