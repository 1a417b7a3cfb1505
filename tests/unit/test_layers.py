"""The packages, in the order in which they may import each other: written here, and nowhere else."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A package imports from those above it, and its own modules from each other without circles.
LAYERS = [
    "cache",
    "pipeline.runtime",
    "pipeline.recipe",
    "pipeline.outputs",
    "pipeline.rows",
    "pipeline.models",
    "pipeline.losses",
    "pipeline.targets",
    "pipeline.students",
    "pipeline.stage_two",
    "pipeline.judging",
    "pipeline.stage_one",
    "pipeline.precompute",
    "pipeline.estimates",
    "pipeline.sweeps",
    "pipeline.figures",
    "pipeline.pages",
    "pipeline",  # the front doors
    "pipeline.commands",
    "cli",
]

# The stages know nothing of each other.
STAGES = {"pipeline.precompute", "pipeline.train", "pipeline.evaluate"}


# Imported in the function that needs it, by a recipe that keeps its teacher beside the student.
LIVE = "pipeline.stage_one.live_run"


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("cache/*.py"), *ROOT.glob("pipeline/**/*.py"), ROOT / "cli.py"]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files if file.stem != "__init__"}


def imports(file: Path) -> set[str]:
    """The modules of this project and the outer ones that a file imports, the former without `coldstill.`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            name = node.module.removeprefix("coldstill.")
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
            # What a package's `__init__` offers is imported from its modules.
            init = ROOT.joinpath(*name.split("."), "__init__.py")
            found |= imports(init) if init.is_file() else set()
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("coldstill.") for alias in node.names}
    return found


def layer_of(module: str) -> str:
    """A package's layer; a module that stands in the list has one of its own."""
    return module if module in LAYERS else module.rpartition(".")[0]


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """The modules of this project that each of them imports."""
    known = modules()
    return {name: {found for found in imports(file) if found in known} for name, file in known.items()}


def test_every_package_has_its_place_and_every_place_a_package():
    assert {layer_of(module) for module in modules()} == set(LAYERS)
    assert len(LAYERS) == len(set(LAYERS))


def test_packages_import_only_from_those_above_them(imported):
    for name, found in imported.items():
        upward = [other for other in found if LAYERS.index(layer_of(other)) > LAYERS.index(layer_of(name))]
        assert not upward, f"{name} imports from a layer below its own"


def test_no_modules_import_each_other_in_a_circle(imported):
    list(graphlib.TopologicalSorter(imported).static_order())


def test_the_root_holds_front_doors_alone():
    assert len(list(ROOT.glob("pipeline/*.py"))) <= 16 + len(["__init__"])


def test_no_stage_imports_another(imported):
    for stage in STAGES:
        assert not imported[stage] & (STAGES - {stage})


@pytest.mark.parametrize(
    "command", ["ablate", "advise", "demo", "evaluate", "plan", "precompute", "prune", "report", "train"]
)
def test_each_command_has_a_file_that_leads_into_its_stage(imported, command):
    assert f"pipeline.commands.{command}" in imported["cli"]
    assert f"pipeline.{command}" in imported[f"pipeline.commands.{command}"]


def test_no_command_imports_its_stage_by_a_string():
    for name, file in modules().items():
        if name.startswith("pipeline.commands."):
            assert "importlib" not in imports(file), name


def test_the_store_knows_neither_torch_nor_transformers():
    for name, file in modules().items():
        if name.startswith("cache."):
            roots = {found.partition(".")[0] for found in imports(file)}
            assert not roots & {"torch", "transformers", "datasets", "pipeline"}, name


def test_the_store_knows_no_student_and_no_file_of_a_model():
    for name, file in modules().items():
        if name.startswith("cache."):
            words = file.read_text().lower()
            assert "student" not in words, name
            assert "safetensors" not in words, name


def test_stage_two_imports_no_teacher_no_capture_no_data_and_nothing_that_makes_students(imported):
    reached, pending = set(), ["pipeline.train"]
    while pending:
        name = pending.pop()
        reached.add(name)
        pending += [found for found in imported[name] - {LIVE} if found not in reached]
    assert not reached & {"pipeline.models.teacher", "pipeline.precompute", "pipeline.prune"}
    assert not [name for name in reached if name.startswith(("pipeline.rows.", "pipeline.stage_one."))]
    of_students = {name for name in reached if name.startswith("pipeline.students.")}
    assert of_students == {f"pipeline.students.{name}" for name in ("adapters", "folders", "pruning_record")}


def test_no_file_grows_beyond_what_one_reads_at_a_sitting():
    for name, file in modules().items():
        assert len(file.read_text().splitlines()) <= 360, name
