"""A teacher that streams in block by block beside the same teacher loaded whole.

    python benchmarks/streamed.py --teacher FOLDER --text FILE [--rows 32] [--rounds 3] [--dtype float32] [--quick]
    python benchmarks/streamed.py --made 3b [--tokens 16384] [--dtype auto] [--workdir runs/streamed]

With a teacher: `whole` and `streamed` each run what `coldstill precompute` runs over one shard, of 32 rows of 512
tokens unless told otherwise, so that the super-batch has exactly these: int8 last states, and three int8 blocks,
encoded, compressed and committed. Each is a process of its own; they take turns, so that whatever the machine does
meanwhile falls on both alike. Loading is not timed; reading the blocks is. Prints one JSON object a line. The last one
holds `streamed_over_whole` in tokens a second, and each arm's `peak_bytes` over what the process held before the
teacher was loaded; those above say beside them what the weights take: all of them, one block, and those of no block.

With `--made`: writes a Llama with random bfloat16 weights under --workdir, block by block, and runs `coldstill
precompute` on it in a process of its own, streamed, under the recipe's defaults; deletes it in the end. Prints tokens a
second and the process's whole peak memory. `3b` has 3.0 billion weights, 6 GB on disk; `toy` is for a try. The teacher
runs in bfloat16 where the processor has instructions for it, and in float32, with twice the memory, where it has none;
`--dtype` says otherwise.

Without --teacher, or the variable SMOLLM2, the teacher of `coldstill demo` stands in.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from recovery import teacher_and_source, timed
from turns import Turn, reporting, wait_for_turn

ARMS = ("whole", "streamed")
MAKING = "make"
LENGTH = 512
LLAMAS = {
    "3b": {
        "vocab_size": 32_000,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
    },
    "toy": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}


def main() -> None:
    options = parse()
    if options.arm == MAKING:
        make(options)
        return
    if options.arm:
        run_arm(options)
        return
    options.workdir.mkdir(parents=True, exist_ok=True)
    if options.made:
        folder = Path(tempfile.mkdtemp(dir=options.workdir))
        try:
            print(json.dumps(run_made(options, folder)))
        finally:
            shutil.rmtree(folder)
        return
    compare(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=os.environ.get("SMOLLM2"), help="the teacher's folder or hub name")
    parser.add_argument("--text", help="a text file")
    parser.add_argument("--workdir", type=Path, default=Path("runs/streamed"))
    parser.add_argument("--rounds", type=int, default=3, help="passes of each arm that count; one more comes before")
    parser.add_argument("--rows", type=int, default=32, help=f"rows of {LENGTH} tokens in the super-batch")
    parser.add_argument("--batch-size", type=int, default=4, help="teacher.batch_size")
    parser.add_argument("--dtype", help="teacher.dtype: float32 unless a teacher is made")
    parser.add_argument("--quick", action="store_true", help="one round over 4 rows")
    parser.add_argument("--made", choices=LLAMAS, help="make a Llama of random weights instead, and stream it")
    parser.add_argument("--tokens", type=int, default=16_384, help="for --made: how many to precompute")
    parser.add_argument("--arm", choices=[*ARMS, MAKING], help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.rows = 1, 4
    return options


def compare(options: argparse.Namespace) -> None:
    teacher, source = teacher_and_source(options)
    recipe = write_recipe(options, {"path": teacher, "dtype": options.dtype or "float32"}, source, options.rows)
    command = [sys.executable, __file__, "--recipe", str(recipe), "--rounds", str(options.rounds), "--arm"]
    arms = {arm: Turn([*command, arm]) for arm in ARMS}
    rounds = [{arm: turn.take() for arm, turn in arms.items()} for _ in range(options.rounds + 1)]
    results: dict[str, Any] = {}
    for arm, turn in arms.items():
        speeds = [round_[arm]["tokens_per_s"] for round_ in rounds[1:]]
        results[arm] = {
            "tokens_per_s": round(statistics.median(speeds), 1),
            "all": [round(speed, 1) for speed in speeds],
            **turn.answer(),
        }
        print(json.dumps({arm: results[arm]}), flush=True)
    ratio = results["streamed"]["tokens_per_s"] / results["whole"]["tokens_per_s"]
    print(json.dumps({"streamed_over_whole": round(ratio, 4), **{arm: results[arm]["peak_bytes"] for arm in ARMS}}))


def write_recipe(
    options: argparse.Namespace, teacher: dict[str, Any], source: dict[str, Any], rows: int, **changes: Any
) -> Path:
    recipe = {
        "output": str(options.workdir / "run"),
        "cache": str(options.workdir / "caches"),
        "teacher": {"batch_size": options.batch_size, **teacher},
        "data": {
            "sequence_length": LENGTH,
            "train": {**source, "max_rows": rows},
            "eval": {**source, "max_rows": 1},
        },
        "student": {"prune": {"layers": {"remove": 1, "method": "last"}, "reconstruct": False}},
        "targets": {"logits": {"kind": "final", "encoding": "int8"}},
        **changes,
    }
    path = options.workdir / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_arm(options: argparse.Namespace) -> None:
    import psutil
    import torch

    from coldstill.pipeline.recipe.file import load_recipe
    from coldstill.pipeline.runtime.peak_memory import peak_memory_bytes
    from coldstill.pipeline.stage_one.requests import gather

    report = reporting()
    teacher, gathered = gather([load_recipe(options.recipe, [f"teacher.placement={options.arm}"])])
    before = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
    work = one_shard(teacher, gathered, options.recipe.parent)
    report({"ready": True})
    for _ in range(options.rounds + 1):
        wait_for_turn()
        report({"tokens_per_s": work()})
    weights = teacher.weights
    report(
        {
            "peak_bytes": peak_memory_bytes() - before,
            "weight_bytes": weights.total,
            "block_bytes": weights.largest_block,
            "other_bytes": weights.others,
        }
    )


def one_shard(teacher: Any, gathered: Any, workdir: Path) -> Callable[[], float]:
    """Load a teacher, and return what runs it over the train rows as one shard of a new store: tokens a second."""
    import coldstill.cache.laying
    from coldstill.pipeline.stage_one.computing import StoreWork
    from coldstill.pipeline.stage_one.requests import Request
    from coldstill.pipeline.stage_one.streamed_shards import shard_computer
    from coldstill.pipeline.stage_one.write_behind import WriteBehind

    coldstill.cache.laying.SHARD_TOKENS = sum(map(len, gathered[0].rows["train"].tokens))
    blocks = [teacher.num_blocks * quarter // 4 for quarter in (1, 2, 3)]
    assert len(teacher.parts.blocks) == teacher.num_blocks  # loaded, before the clock runs

    def run() -> float:
        with tempfile.TemporaryDirectory(dir=workdir) as folder:
            work = StoreWork(folder, teacher)
            demands = work.register([Request(item, blocks) for item in gathered])
            of_train = demands[0].selections["train"].shard_names
            jobs = [job for job in work.missing(demands) if job.shard in of_train]
            computer = shard_computer(work.store, work.manifest, teacher, row_names=lambda _row_ids: {})
            started = time.perf_counter()
            with WriteBehind(work.store, work.manifest, lambda _bytes: None) as writer:
                computer.run(jobs, writer, lambda _tokens: None)
            return sum(job.num_tokens for job in jobs) / (time.perf_counter() - started)

    return run


def run_made(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    print(f"writing a Llama of random weights under {folder}", file=sys.stderr)
    # In a process of its own: what starts others passes its own peak memory on to them.
    command = [sys.executable, __file__, "--workdir", str(folder), "--made", options.made, "--arm", MAKING]
    command += ["--dtype", options.dtype] if options.dtype else []
    made = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    options.workdir = folder
    recipe = write_recipe(
        options,
        {"path": str(folder / "teacher"), "dtype": made["dtype"], "placement": "streamed"},
        {"path": "builtin:python-docs"},
        options.tokens // LENGTH,
        student={"path": str(folder / "student")},
        targets={},
    )
    done = timed("precompute", recipe)
    summary = done["summary"]
    return {
        **made,
        "tokens": summary["computed_tokens"],
        "tokens_per_s": round(summary["computed_tokens"] / summary["seconds"], 1),
        "peak_gb": done["peak_gb"],
    }


def make(options: argparse.Namespace) -> None:
    """Write the Llama that is to be made and a student for it, and print what the Llama's weights take."""
    from coldstill.pipeline.models.machine import is_slow_on_cpu
    from coldstill.pipeline.models.teacher import Teacher
    from coldstill.pipeline.recipe.sections import TeacherConfig

    sizes, folder = LLAMAS[options.made], options.workdir / "teacher"
    num_weights = write_llama(folder, sizes)
    # A student of the same words; it is only looked at, never trained.
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    write_llama(options.workdir / "student", {**sizes, **small, "num_key_value_heads": 1})
    is_slow = Teacher.locate(TeacherConfig(path=str(folder))).device.type == "cpu" and is_slow_on_cpu("bfloat16")
    dtype = options.dtype or ("float32" if is_slow else "auto")
    weights = Teacher.locate(TeacherConfig(path=str(folder), dtype=dtype)).weights
    facts = {
        "made": options.made,
        "weights": num_weights,
        "dtype": dtype,
        "weights_gb": round(weights.total / 1e9, 3),
        "two_blocks_embedding_and_head_gb": round(weights.streamed / 1e9, 3),
    }
    print(json.dumps(facts))


def write_llama(folder: Path, sizes: dict[str, int]) -> int:
    """Write a Llama of random weights, a file a block, and a tokenizer of bytes; return how many weights it has."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.bos_token_id = config.eos_token_id = 0
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        block = name.split(".")[2] if name.startswith("model.layers.") else "others"
        files.setdefault(f"model-{block}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in files.items():
        tensors = {name: random_weight(shapes[name], generator) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(shape.numel() for shape in shapes.values())


def random_weight(shape: Any, generator: Any) -> Any:
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


def byte_tokenizer() -> Any:
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([], vocab_size=257, special_tokens=["<eos>"], show_progress=False)
    tokenizer = Tokenizer.from_str(trained.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


if __name__ == "__main__":
    main()
