"""Whether this working tree trains the very student that an earlier commit trains, from a store which that one wrote.

    python benchmarks/same_student.py COMMIT [--only final topk]

COMMIT is checked out beside a tiny random teacher and some text, and precomputes the recipes below. From that one store
it trains each of them, and so does the working tree: on the CPU, in float32, with one thread. Weights of student and
projectors must agree in every byte. Prints one line a recipe, and exits 1 where any differs.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 384
PROMPTS = {"path": "json", "text_column": "answer", "prompt_column": "question"}
BASE: dict[str, Any] = {
    "teacher": {"path": "teacher", "dtype": "float32", "device": "cpu"},
    "data": {
        "sequence_length": 24,
        "train": {"path": "text", "data_files": "text.txt", "max_rows": 24},
        "eval": {"path": "text", "data_files": "text.txt", "max_rows": 4},
    },
    "student": {"prune": {"layers": {"remove": 1, "method": "last"}}},
    "mapping": {"strategy": "kept"},
    "loss": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "temperature": 2.0},
    # Accumulated: what is counted over a whole step must be the same too.
    "train": {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.001,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "use_cpu": True,
    },
}
ASKED = {
    "data.packing": False,
    "data.train": {**PROMPTS, "data_files": "train.jsonl"},
    "data.eval": {**PROMPTS, "data_files": "eval.jsonl"},
}
RECIPES: dict[str, dict[str, Any]] = {
    "final": {"targets.hidden.encoding": "coded", "loss.delta": 0.1},
    "final_float32": {"targets.logits.encoding": "float32", "loss.hidden": "normalised_mse", "loss.gamma": 5.0},
    "topk": {"targets.logits": {"kind": "topk", "k": 16, "temperatures": [1, 2]}},
    "topk_sampled": {
        "targets.logits": {"kind": "topk_sampled", "k": 16, "samples": 8, "temperatures": [1, 2]},
        "targets.hidden.token_fraction": 0.5,
    },
    "prompt": ASKED,
    "prompt_topk": {**ASKED, "targets.logits": {"kind": "topk", "k": 16, "temperatures": [1, 2]}},
    "linear": {"student": {"path": "narrow"}, "mapping.strategy": "uniform", "projector.init": "least_squares"},
    "task_alone": {"loss": {"alpha": 1.0, "beta": 0.0, "gamma": 0.0}},
}
# Runs commands one after another in one process; the imports take longer than such a training.
COMMANDS = """
import json, sys
from {module} import main
for arguments in json.load(sys.stdin):
    sys.argv = ["coldstill", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="these recipes; else all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, checked_out(options.commit, Path(folder) / "then") as then:
        place = Path(folder) / "place"
        write_place(place, options.only)
        trainings = {
            which: [["train", f"{name}.yaml", f"output=runs/{name}-{which}"] for name in options.only]
            for which in ("then", "now")
        }
        run(then, place, [["precompute", *(f"{name}.yaml" for name in options.only)], *trainings["then"]])
        run(ROOT, place, trainings["now"])
        same = [compare(name, place / "runs") for name in options.only]
    sys.exit(0 if all(same) else 1)


def run(checkout: Path, place: Path, commands: Sequence[Sequence[str]]) -> None:
    """Run the commands of a checkout in a folder, one after another."""
    # Until a commit its modules stood at the top level of an installation too: `cli`, `cache`, `pipeline`.
    is_package = (checkout / "__init__.py").is_file()
    with tempfile.TemporaryDirectory() as parent:
        Path(parent, "coldstill").symlink_to(checkout)
        surroundings = {
            **os.environ,
            "PYTHONPATH": parent if is_package else str(checkout),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        code = COMMANDS.format(module="coldstill.cli" if is_package else "cli")
        subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(commands),
            text=True,
            check=True,
            cwd=place,
            env=surroundings,
            stdout=sys.stderr,
        )


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out beside the working tree, for as long as it is needed."""
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", folder, commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder], check=True)


def compare(name: str, runs: Path) -> bool:
    """Say whether a recipe's two students, and their projectors, agree in every byte."""
    then, now = (weights_of(runs / f"{name}-{which}") for which in ("then", "now"))
    differing = [file for file in sorted({*then, *now}) if then.get(file) != now.get(file)]
    num_bytes = sum(map(len, then.values()))
    verdict = f"the same {num_bytes:,} bytes in {', '.join(sorted(then))}"
    if differing:
        verdict = f"DIFFERS in {', '.join(differing)}"
    print(f"{name:14} {verdict}", flush=True)
    return not differing


def weights_of(output: Path) -> dict[str, bytes]:
    """Read the weights of student and projectors that a run exported."""
    files = [*(output / "student").glob("*.safetensors"), *output.glob("*.safetensors")]
    if not files:
        raise SystemExit(f"{output} has no weights: nothing was compared")
    return {file.name: file.read_bytes() for file in files}


def write_place(place: Path, names: Sequence[str]) -> None:
    """Write teacher, narrow student, texts and recipes."""
    place.mkdir()
    text = "\n".join(topics[name] for name in sorted(topics)[:30])
    lines = [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if len(paragraph) > 80][:300]
    (place / "text.txt").write_text("\n".join(lines))
    for name, chosen in (("train", lines[:20]), ("eval", lines[20:26])):
        # Every third row without a question, so that rows with and without one are in one batch.
        asked = [(line.split()[: 3 * (index % 3 > 0)], line.split()[3:9]) for index, line in enumerate(chosen)]
        rows = [{"question": " ".join(question), "answer": " ".join(answer)} for question, answer in asked]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(lines, vocab_size=VOCAB_SIZE, special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<eos>", pad_token="<eos>")
    for seed, (name, width, blocks) in enumerate((("teacher", 32, 4), ("narrow", 16, 2))):
        tiny_llama(width=width, num_blocks=blocks, seed=seed).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    for name in names:
        (place / f"{name}.yaml").write_text(yaml.safe_dump(recipe_of(name)))


def tiny_llama(*, width: int, num_blocks: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_hidden_layers=num_blocks,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    # Random weights of the usual size give near-uniform logits; larger ones show a difference sooner.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    return model


def recipe_of(name: str) -> dict[str, Any]:
    recipe = {"output": f"runs/{name}", **copy.deepcopy(BASE)}
    for dotted, value in RECIPES[name].items():
        *parents, last = dotted.split(".")
        section: dict[str, Any] = recipe
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return recipe


if __name__ == "__main__":
    main()
