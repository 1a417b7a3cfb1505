"""Stage one: make a recipe's columns complete for its rows. Where all are, no model is loaded."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cache.columns import ArraySpec, Column
from cache.errors import DataError, RecipeError
from cache.identity import row_id
from cache.manifest import Manifest
from cache.rows import Selection, find_rows, lay_rows, publish_rows, shard_rows, write_selection
from cache.store import CONSTANTS, Store, create_store
from cache.writer import write_column
from pipeline.config import Recipe
from pipeline.data import Rows, build_rows, tokenizer_digest
from pipeline.encodings import encode_hidden, to_numpy
from pipeline.models import ModelParts, load_config, text_config
from pipeline.pairing import layer_map_between, layer_map_of
from pipeline.provenance import write_record
from pipeline.prune import PreparedStudent, check_student, prepare_student
from pipeline.run_index import RunRows, publish_run_rows
from pipeline.shard_jobs import ShardComputer, ShardJob, plan_jobs, write_tokens
from pipeline.students import num_removed
from pipeline.targets import OUTPUT_HEAD, TargetColumns, columns_of
from pipeline.teacher import Teacher


@dataclass(frozen=True)
class PrecomputeSummary:
    """What a run of stage one did.

    Attributes:
        store: The store's folder or URL.
        student: The student's folder.
        num_rows: Rows of each split.
        num_tokens: Tokens of all rows.
        num_shards: Shards that hold them.
        computed_tokens: Tokens that the teacher ran over; 0 where everything was complete.
        written_bytes: Bytes written for them.
        teacher_was_loaded: Whether the teacher's weights were needed.
        seconds: Time of the teacher's pass over the rows, encoding and writing included.
    """

    store: str
    student: str
    num_rows: dict[str, int]
    num_tokens: int
    num_shards: int
    computed_tokens: int
    written_bytes: int
    teacher_was_loaded: bool
    seconds: float


def precompute(recipe: Recipe, *, show_progress: bool = True) -> PrecomputeSummary:
    """Make the recipe's columns complete for its train and eval rows, and its student if it is to be pruned.

    Raises:
        ColdstillError: Something in the recipe cannot be carried out; what was committed stays.
        OSError: The disk refuses; what was committed stays.
    """
    teacher = Teacher.locate(recipe.teacher)
    _check_recipe(recipe, teacher)
    check_student(recipe, teacher)
    _check_mapping(recipe, teacher)
    train_rows, eval_rows = build_rows(recipe.data, teacher.tokenizer)
    rows = {"train": train_rows, "eval": eval_rows}
    student = prepare_student(recipe, teacher, train_rows)
    blocks = _blocks_to_store(recipe, teacher, student)
    store = create_store(recipe.cache, teacher.describe())
    manifest = Manifest(store)
    run = RunRows(store, _register_rows(recipe, store, manifest, rows, teacher))
    publish_run_rows(recipe, run)
    targets = {
        split: columns_of(recipe.targets, blocks=blocks, split=split, manifest=manifest, selection=selection)
        for split, selection in run.selections.items()
    }
    jobs = _missing(store, manifest, run.selections, targets)
    started = time.monotonic()
    written_bytes = _compute(recipe, teacher, run, manifest, targets, jobs, rows, show_progress=show_progress)
    manifest.compact()
    summary = PrecomputeSummary(
        store=store.path,
        student=str(student.folder),
        num_rows={split: len(selection) for split, selection in run.selections.items()},
        num_tokens=sum(selection.num_tokens for selection in run.selections.values()),
        num_shards=len({shard for selection in run.selections.values() for shard in selection.shard_names()}),
        computed_tokens=sum(job.num_tokens for job in jobs),
        written_bytes=written_bytes,
        teacher_was_loaded=teacher.is_loaded,
        seconds=time.monotonic() - started,
    )
    if summary.computed_tokens or student.was_made:
        facts = {"teacher": teacher.identity, "store": store.name, "selections": _names(run.selections)}
        write_record(Path(recipe.output) / "precompute", recipe, facts)
    return summary


def _check_recipe(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse, before any work, what this teacher cannot do."""
    config = text_config(teacher.config)
    logits = recipe.targets.logits
    if logits.kind == "topk" and logits.k > config.vocab_size:
        raise RecipeError(
            f"targets.logits.k is {logits.k}, but the teacher's vocabulary has {config.vocab_size} entries"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and recipe.data.sequence_length > longest:
        raise RecipeError(
            f"data.sequence_length is {recipe.data.sequence_length}, but the teacher reads at most {longest} tokens"
        )
    blocks = recipe.targets.hidden.blocks
    for block in blocks if isinstance(blocks, list) else []:
        if block >= teacher.num_blocks:
            raise RecipeError(
                f"targets.hidden.blocks names block {block}; the teacher has blocks 0 to {teacher.num_blocks - 1}"
            )


def _check_mapping(recipe: Recipe, teacher: Teacher) -> None:
    """Hold the mapping against a student that is yet to be pruned: how many blocks it will have is known."""
    if recipe.student.prune is not None and recipe.targets.hidden.blocks == "mapped":
        remaining = teacher.num_blocks - num_removed(recipe.student.prune.layers)
        layer_map_between(recipe.mapping, remaining, teacher.num_blocks, kept_blocks=range(remaining))


def _register_rows(
    recipe: Recipe, store: Store, manifest: Manifest, rows: Mapping[str, Rows], teacher: Teacher
) -> dict[str, Selection]:
    """Lay new rows into shards, commit their tokens, and publish each split's selection."""
    vocab_size = int(text_config(teacher.config).vocab_size)
    tokenizer = tokenizer_digest(teacher.tokenizer)
    selections = {}
    for split in ("eval", "train"):
        tokens = {row_id(ids): ids for ids in rows[split].tokens}
        largest = max(int(ids.max()) for ids in tokens.values())
        if largest >= vocab_size:
            raise DataError(
                f"the tokenizer in {teacher.folder} gives token id {largest}; the teacher's vocabulary has "
                f"{vocab_size} entries"
            )
        row_ids = [row_id(ids) for ids in rows[split].tokens]
        laid = lay_rows(store, row_ids, [len(ids) for ids in rows[split].tokens])
        write_tokens(store, manifest, laid, tokens, vocab_size=vocab_size)
        publish_rows(store, laid)
        provenance = {
            "tokenizer": tokenizer,
            "source": getattr(recipe.data, split).model_dump(),
            "num_documents": rows[split].num_documents,
            "num_shared": rows[split].num_shared,
        }
        selections[split] = write_selection(store, find_rows(store, row_ids), rows[split].loss_starts, provenance)
    return selections


def _blocks_to_store(recipe: Recipe, teacher: Teacher, student: PreparedStudent) -> list[int]:
    section = recipe.targets.hidden.blocks
    if isinstance(section, list):
        return section
    if section == "none":
        return []
    config = load_config(student.folder, trust_remote_code=recipe.student.trust_remote_code)
    return list(layer_map_of(recipe.mapping, config, num_teacher_blocks=teacher.num_blocks).values())


def _missing(
    store: Store, manifest: Manifest, selections: Mapping[str, Selection], targets: Mapping[str, TargetColumns]
) -> list[ShardJob]:
    needed: dict[str, list[str]] = {}
    for split, selection in selections.items():
        for shard in selection.shard_names():
            needed.setdefault(shard, []).extend(targets[split].names())
    incomplete = [shard for shard, names in needed.items() if any((shard, name) not in manifest for name in names)]
    return plan_jobs(manifest, shard_rows(store, incomplete), {shard: needed[shard] for shard in incomplete})


def _compute(
    recipe: Recipe,
    teacher: Teacher,
    run: RunRows,
    manifest: Manifest,
    targets: Mapping[str, TargetColumns],
    jobs: list[ShardJob],
    rows: Mapping[str, Rows],
    *,
    show_progress: bool,
) -> int:
    """Run the jobs, and give the bytes that they wrote."""
    if (CONSTANTS, OUTPUT_HEAD) not in manifest:
        _write_output_head(run.store, manifest, teacher.parts)
    if not jobs:
        return 0
    names = {row_id(ids): f"{split} row {index}" for split in rows for index, ids in enumerate(rows[split].tokens)}
    computer = ShardComputer(
        run.store,
        manifest,
        teacher.parts,
        list(targets.values()),
        batch_size=recipe.teacher.batch_size,
        row_names=names,
    )
    written_bytes = 0
    total = sum(job.num_tokens for job in jobs)
    with tqdm(total=total, unit="tok", unit_scale=True, desc="precompute", disable=not show_progress) as bar:

        def on_progress(num_tokens: int, num_bytes: int) -> None:
            nonlocal written_bytes
            written_bytes += num_bytes
            bar.set_postfix_str(f"{written_bytes / 1e6:.1f} MB written", refresh=False)
            bar.update(num_tokens)

        for job in jobs:
            computer.run(job, on_progress)
    return written_bytes


def _write_output_head(store: Store, manifest: Manifest, parts: ModelParts) -> None:
    """Keep the output head, bit for bit, so that eval rows' last states give exact logits without the teacher."""
    head = parts.output_head
    dtype = str(head.weight_VD.dtype).removeprefix("torch.")
    vocab_size, width = head.weight_VD.shape
    stored = "uint16" if dtype == "bfloat16" else dtype
    arrays = {"weight": encode_hidden(head.weight_VD.detach(), encoding=dtype)["values"]}
    specs = {"weight": ArraySpec(stored, (vocab_size, width), axis="shard")}
    if head.bias_V is not None:
        arrays["bias"] = encode_hidden(head.bias_V.detach(), encoding=dtype)["values"]
        specs["bias"] = ArraySpec(stored, (vocab_size,), axis="shard")
    column = Column(OUTPUT_HEAD, specs, {"dtype": dtype, "scale": head.scale, "softcap": head.softcap})
    host = {name: to_numpy(values) for name, values in arrays.items()}
    write_column(store, manifest, CONSTANTS, column, host, num_tokens=0, num_rows=0)


def _names(selections: Mapping[str, Selection]) -> dict[str, str]:
    return {split: selection.name for split, selection in selections.items()}
