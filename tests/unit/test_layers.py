"""Each module imports only from those above it: the order of the layers is written here, and nowhere else."""

import ast
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
    "pipeline.training_keys",
    "pipeline.recipe_types",
    "pipeline.loss_config",
    "pipeline.student_config",
    "pipeline.presets",
    "pipeline.config",
    "pipeline.advice",
    "pipeline.recipe_file",
    "pipeline.sweep_file",
    "pipeline.whole",
    "pipeline.pruning_record",
    "pipeline.sweep_results",
    "pipeline.provenance",
    "pipeline.builtin_corpus",
    "pipeline.data",
    "pipeline.output_head",
    "pipeline.models",
    "pipeline.forward",
    "pipeline.teacher",
    "pipeline.model_copies",
    "pipeline.depth",
    "pipeline.axes",
    "pipeline.norms",
    "pipeline.read_correction",
    "pipeline.width",
    "pipeline.designs",
    "pipeline.interpolation",
    "pipeline.pruning_report",
    "pipeline.student_making",
    "pipeline.adapters",
    "pipeline.transform_coding",
    "pipeline.encodings",
    "pipeline.token_encodings",
    "pipeline.targets",
    "pipeline.calibrations",
    "pipeline.column_specs",
    "pipeline.stored_head",
    "pipeline.row_blocks",
    "pipeline.teacher_logits",
    "pipeline.tail_sampling",
    "pipeline.capture",
    "pipeline.layer_map",
    "pipeline.pairing",
    "pipeline.projectors",
    "pipeline.losses",
    "pipeline.divergences",
    "pipeline.logits_targets",
    "pipeline.logits_statistics",
    "pipeline.vocabulary_losses",
    "pipeline.chunked_loss",
    "pipeline.schedules",
    "pipeline.hidden_terms",
    "pipeline.student_forward",
    "pipeline.selective_checkpointing",
    "pipeline.distiller",
    "pipeline.warm_start",
    "pipeline.batches",
    "pipeline.trainer",
    "pipeline.run_index",
    "pipeline.run_results",
    "pipeline.target_forms",
    "pipeline.fidelity",
    "pipeline.peak_memory",
    "pipeline.student_folders",
    "pipeline.model_card",
    "pipeline.run_folder",
    "pipeline.push",
    "pipeline.sweep_keys",
    "pipeline.write_behind",
    "pipeline.shard_jobs",
    "pipeline.prune",
    "pipeline.requests",
    "pipeline.workers",
    "pipeline.calibrate",
    "pipeline.byte_estimates",
    "pipeline.room",
    "pipeline.precompute",
    "pipeline.live_errors",
    "pipeline.live_check",
    "pipeline.dry_run",
    "pipeline.trainer_setup",
    "pipeline.train",
    "pipeline.retention",
    "pipeline.tasks",
    "pipeline.task_scores",
    "pipeline.evaluate",
    "pipeline.similarity_measures",
    "pipeline.similarity",
    "pipeline.repair",
    "pipeline.advise",
    "pipeline.budget",
    "pipeline.trial",
    "pipeline.target_options",
    "pipeline.plan",
    "pipeline.summaries",
    "pipeline.evaluation_tables",
    "pipeline.plan_tables",
    "pipeline.demo",
    "pipeline.endings",
    "pipeline.sweep_state",
    "pipeline.sweep_processes",
    "pipeline.ablate",
    "pipeline.sweep_tables",
    "pipeline.figure_svg",
    "pipeline.figures",
    "pipeline.figure_curves",
    "pipeline.figure_blocks",
    "pipeline.figure_layers",
    "pipeline.figure_dots",
    "pipeline.report_numbers",
    "pipeline.report_page",
    "pipeline.report_data",
    "pipeline.report_recovery",
    "pipeline.report_training",
    "pipeline.report_blocks",
    "pipeline.report_record",
    "pipeline.report_variants",
    "pipeline.report_sweep",
    "pipeline.report",
    "pipeline.commands",
    "pipeline.cache_commands",
    "pipeline.advise_commands",
    "pipeline.sweep_commands",
    "pipeline.report_commands",
    "cli",
]

# The stages know nothing of each other; only prune serves precompute, which makes a student that is not there yet.
STAGES = {"pipeline.precompute", "pipeline.train", "pipeline.evaluate"}


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("cache/*.py"), *ROOT.glob("pipeline/*.py"), ROOT / "cli.py"]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files if file.stem != "__init__"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_module_has_a_layer_and_every_layer_a_module():
    assert sorted(modules()) == sorted(LAYERS)


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


def test_stage_two_imports_no_teacher_no_capture_and_no_data():
    reached, pending = set(), ["pipeline.train"]
    while pending:
        name = pending.pop()
        reached.add(name)
        pending += [found for found in imports(modules()[name]) if found in modules() and found not in reached]
    assert not reached & {
        "pipeline.teacher",
        "pipeline.capture",
        "pipeline.data",
        "pipeline.model_copies",
        "pipeline.depth",
        "pipeline.axes",
        "pipeline.norms",
        "pipeline.read_correction",
        "pipeline.width",
        "pipeline.designs",
        "pipeline.interpolation",
        "pipeline.pruning_report",
        "pipeline.student_making",
        "pipeline.prune",
    }


def test_no_file_grows_beyond_what_one_reads_at_a_sitting():
    for name, file in modules().items():
        assert len(file.read_text().splitlines()) <= 360, name
