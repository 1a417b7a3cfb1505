"""Each module imports only from those above it: the order of the layers is written here, and nowhere else."""

import ast
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]

LAYERS = [
    "cache.errors",
    "cache.identity",
    "cache.processes",
    "cache.local_objects",
    "cache.remote_objects",
    "cache.objects",
    "cache.columns",
    "cache.array_object",
    "cache.index",
    "cache.store",
    "cache.tables",
    "cache.manifest",
    "cache.writer",
    "cache.rows",
    "cache.tokens",
    "cache.selections",
    "cache.leases",
    "cache.local_copy",
    "cache.arrays",
    "cache.reader",
    "cache.audit",
    "cache.repair",
    "cache.inventory",
    "cache.student_files",
    "cache.root_audit",
    "pipeline.units",
    "pipeline.interruptions",
    "pipeline.training_keys",
    "pipeline.recipe_types",
    "pipeline.loss_config",
    "pipeline.student_config",
    "pipeline.presets",
    "pipeline.config",
    "pipeline.retention",
    "pipeline.advice",
    "pipeline.yaml_text",
    "pipeline.recipe_file",
    "pipeline.whole",
    "pipeline.held_out",
    "pipeline.places",
    "pipeline.provenance",
    "pipeline.builtin_corpus",
    "pipeline.rows.faults",
    "pipeline.rows.sources",
    "pipeline.rows.tokenising",
    "pipeline.data",
    "pipeline.output_head",
    "pipeline.models.loading",
    "pipeline.models.positions",
    "pipeline.models.vocabularies",
    "pipeline.models.structure",
    "pipeline.machine",
    "pipeline.outlines",
    "pipeline.compiled_blocks",
    "pipeline.labels",
    "pipeline.forward",
    "pipeline.teacher",
    "pipeline.targets.transform_coding",
    "pipeline.targets.encodings",
    "pipeline.targets.token_encodings",
    "pipeline.targets.columns",
    "pipeline.targets.calibrations",
    "pipeline.targets.column_specs",
    "pipeline.targets.stored_head",
    "pipeline.targets.row_blocks",
    "pipeline.targets.teacher_logits",
    "pipeline.targets.tail_sampling",
    "pipeline.capture",
    "pipeline.layer_map",
    "pipeline.pairing",
    "pipeline.projectors",
    "pipeline.losses.terms",
    "pipeline.losses.divergences",
    "pipeline.losses.logits_targets",
    "pipeline.losses.logits_statistics",
    "pipeline.losses.vocabulary_losses",
    "pipeline.losses.chunked_loss",
    "pipeline.losses.schedules",
    "pipeline.losses.hidden_terms",
    "pipeline.student_forward",
    "pipeline.selective_checkpointing",
    "pipeline.distiller",
    "pipeline.warm_start",
    "pipeline.live_targets",
    "pipeline.assembly",
    "pipeline.batches",
    "pipeline.run_index",
    "pipeline.target_forms",
    "pipeline.peak_memory",
    "pipeline.students.pruning_record",
    "pipeline.students.model_copies",
    "pipeline.students.layer_patterns",
    "pipeline.students.cut_weights",
    "pipeline.students.cut_check",
    "pipeline.students.depth",
    "pipeline.students.axes",
    "pipeline.students.norms",
    "pipeline.students.ridge",
    "pipeline.students.read_correction",
    "pipeline.students.width",
    "pipeline.students.designs",
    "pipeline.students.interpolation",
    "pipeline.students.reconstruction",
    "pipeline.students.pruning_report",
    "pipeline.students.making",
    "pipeline.students.adapters",
    "pipeline.students.folders",
    "pipeline.resumable_trainer",
    "pipeline.trainer",
    "pipeline.runs.model_card",
    "pipeline.runs.folder",
    "pipeline.runs.results",
    "pipeline.training_arguments",
    "pipeline.tasks",
    "pipeline.preflight",
    "pipeline.prune",
    "pipeline.stage_one.write_behind",
    "pipeline.stage_one.shard_jobs",
    "pipeline.stage_one.requests",
    "pipeline.stage_one.workers",
    "pipeline.stage_one.calibrate",
    "pipeline.stage_one.byte_estimates",
    "pipeline.stage_one.room",
    "pipeline.precompute",
    "pipeline.live_errors",
    "pipeline.live_check",
    "pipeline.dry_run",
    "pipeline.trainer_setup",
    "pipeline.train",
    "pipeline.task_scores",
    "pipeline.evaluate",
    "pipeline.similarity_measures",
    "pipeline.similarity",
    "pipeline.repair",
    "pipeline.advise",
    "pipeline.planning.fidelity",
    "pipeline.planning.budget",
    "pipeline.planning.trial",
    "pipeline.planning.target_options",
    "pipeline.plan",
    "pipeline.demo",
    "pipeline.endings",
    "pipeline.sweeps.file",
    "pipeline.sweeps.results",
    "pipeline.sweeps.keys",
    "pipeline.sweeps.state",
    "pipeline.sweeps.processes",
    "pipeline.push",
    "pipeline.figures.svg",
    "pipeline.figures.sheet",
    "pipeline.figures.curves",
    "pipeline.figures.blocks",
    "pipeline.figures.layers",
    "pipeline.figures.dots",
    "pipeline.commands.summaries",
    "pipeline.commands.evaluation_tables",
    "pipeline.commands.plan_tables",
    "pipeline.commands.sweep_tables",
    "pipeline.commands.shared",
    "pipeline.commands.cache",
    "pipeline.commands.advise",
    "pipeline.commands.ablate",
    "pipeline.commands.report",
    "pipeline.ablate",
    "pipeline.reports.numbers",
    "pipeline.reports.page",
    "pipeline.reports.data",
    "pipeline.reports.recovery",
    "pipeline.reports.training",
    "pipeline.reports.blocks",
    "pipeline.reports.record",
    "pipeline.reports.variants",
    "pipeline.reports.sweep",
    "pipeline.report",
    "cli",
]

# The stages know nothing of each other; only prune serves precompute, which makes a student that is not there yet.
STAGES = {"pipeline.precompute", "pipeline.train", "pipeline.evaluate"}


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("cache/*.py"), *ROOT.glob("pipeline/**/*.py"), ROOT / "cli.py"]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files if file.stem != "__init__"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            # What a package's `__init__` offers is imported from its modules.
            init = ROOT.joinpath(*node.module.split("."), "__init__.py")
            found |= imports(init) if init.is_file() else set()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_module_has_a_layer_and_every_layer_a_module():
    assert sorted(modules()) == sorted(LAYERS)


def test_a_package_is_one_layer():
    rooms = [name.rpartition(".")[0] if name.count(".") == 2 else name for name in LAYERS]
    starts = [room for previous, room in pairwise(["", *rooms]) if room != previous]
    assert len(starts) == len(set(starts)), "two packages import each other"


def test_each_module_imports_only_from_layers_above_it():
    for name, file in modules().items():
        below = set(LAYERS[LAYERS.index(name) :])
        assert not imports(file) & below, f"{name} imports from its own layer or one below"


def test_no_stage_imports_another():
    for stage in STAGES:
        assert not imports(modules()[stage]) & (STAGES - {stage})


def test_the_store_knows_neither_torch_nor_transformers():
    for name, file in modules().items():
        if name.startswith("cache."):
            roots = {found.partition(".")[0] for found in imports(file)}
            assert not roots & {"torch", "transformers", "datasets", "pipeline"}, name


def test_stage_two_imports_no_teacher_no_capture_no_data_and_nothing_that_makes_students():
    reached, pending = set(), ["pipeline.train"]
    while pending:
        name = pending.pop()
        reached.add(name)
        pending += [found for found in imports(modules()[name]) if found in modules() and found not in reached]
    assert not reached & {"pipeline.teacher", "pipeline.capture", "pipeline.data", "pipeline.prune"}
    assert not [name for name in reached if name.startswith("pipeline.rows.")]
    of_students = {name for name in reached if name.startswith("pipeline.students.")}
    assert of_students == {f"pipeline.students.{name}" for name in ("adapters", "folders", "pruning_record")}


def test_no_file_grows_beyond_what_one_reads_at_a_sitting():
    for name, file in modules().items():
        assert len(file.read_text().splitlines()) <= 360, name
