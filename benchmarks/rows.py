"""What rows cost in memory: `precompute` and `train` over short rows, few of them and very many.

Each run is a process of its own, and says the most that it held. Teacher and student are as small as models can be, so
that what is seen is what rows cost. Prints one JSON line a run, and one with the ratios: anonymous memory, and all that
is resident with the files that are mapped.

    python benchmarks/rows.py                   100,000 and 10,000,000 rows of four tokens: half an hour on two cores
    python benchmarks/rows.py --quick           20,000 and 1,000,000
    python benchmarks/rows.py --rows 100000 3000000
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROW_TOKENS = 4
DOCUMENT_CHARACTERS = 400
STEPS = 50
COMMANDS = ("precompute", "precompute again", "train")
STATUS = {"resident_mb": "VmHWM", "anonymous_mb": "RssAnon"}


def write_text(file: Path, num_rows: int) -> None:
    """Write documents of letters, a token each, enough for so many rows."""
    generator = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    num_documents = num_rows * ROW_TOKENS // DOCUMENT_CHARACTERS + 8
    with file.open("wb") as stream:
        for _ in range(num_documents):
            stream.write(letters[generator.integers(0, 26, DOCUMENT_CHARACTERS)].tobytes() + b"\n")


def make_models(folder: Path) -> None:
    """Make a teacher and a student, and a tokenizer with a token a byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    for name in ("teacher", "student"):
        config = LlamaConfig(vocab_size=len(words), num_hidden_layers=1, max_position_embeddings=16, **size, **ids)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / name)


def write_recipe(folder: Path, num_rows: int) -> Path:
    source = {"path": "text", "data_files": str(folder / "text.txt")}
    recipe: dict[str, Any] = {
        "output": str(folder / "run"),
        "cache": str(folder / "caches"),
        "teacher": {"path": str(folder / "teacher"), "dtype": "float32", "batch_size": 8192},
        "data": {
            "sequence_length": ROW_TOKENS,
            "train": {**source, "max_rows": num_rows},
            "eval": {**source, "max_rows": 8},
        },
        "student": {"path": str(folder / "student")},
        "mapping": {"strategy": "last"},
        "targets": {"logits": {"kind": "none"}, "hidden": {"blocks": [0], "encoding": "int8"}},
        "loss": {"alpha": 0.5, "beta": 0.0, "gamma": 0.5, "hidden": "mse"},
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 32,
            "save_strategy": "no",
            "eval_strategy": "no",
            "logging_steps": STEPS,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_here(command: str, recipe_path: str) -> None:
    """Run a command in this process, and print what it held."""
    from coldstill.pipeline.precompute import precompute
    from coldstill.pipeline.recipe.file import load_recipe
    from coldstill.pipeline.train import train

    recipe = load_recipe(Path(recipe_path))
    started = time.monotonic()
    if command == "train":
        train(recipe)
    else:
        precompute(recipe, show_progress=False)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    held = {name: int(status[key].split()[0]) // 1024 for name, key in STATUS.items()}
    print(json.dumps({**held, "seconds": round(time.monotonic() - started, 1)}))


def measure(num_rows: int) -> dict[str, dict[str, float]]:
    """Run all commands over so many rows, each in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="coldstill-rows-benchmark-"))
    try:
        make_models(folder)
        write_text(folder / "text.txt", num_rows)
        recipe = write_recipe(folder, num_rows)
        found = {}
        for command in COMMANDS:
            run = [sys.executable, __file__, "--run", command, str(recipe)]
            ended = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            found[command] = json.loads(ended.stdout.splitlines()[-1])
            print(json.dumps({"rows": num_rows, "command": command, **found[command]}), flush=True)
        return found
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=(100_000, 10_000_000), help="few rows, and many")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_here(*options.run)
        return
    few, many = (measure(num_rows) for num_rows in ((20_000, 1_000_000) if options.quick else options.rows))
    ratios = {
        f"{command.replace(' ', '_')}_{name}_ratio": round(many[command][name] / few[command][name], 3)
        for command in COMMANDS
        for name in STATUS
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
