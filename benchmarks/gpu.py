"""Both stages on a GPU, at real sizes, without a network and without weights: all that is said of a GPU in one command.

    python benchmarks/gpu.py              under eight minutes on an H100 or an A100
    python benchmarks/gpu.py --only smollm2_135m encoders
    python benchmarks/gpu.py --tiny       toy sizes on the CPU: that it runs, and nothing of how fast

Models have the shapes of real ones and random weights, rows are random tokens: neither changes what a step costs. For
each model the student lacks a few blocks; `plain` is fine-tuning by the stock Trainer, `topk` and `final` are
Coldstill's with six int8 blocks, `live` is the stock Trainer with the teacher in memory (benchmarks/step_arm.py). Times
are of whole steps, between two moments at which the GPU has done all that it was given; waiting is the host's time for
batches within them. Stage one is timed beside the teacher's bare body over the same rows.

Prints one JSON object a figure, and a last one with all of them and the card's name.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from gpu_checks import encoder_errors, half_precision_losses, reader_speeds
from gpu_kernels import losses_over_vocabulary
from gpu_stage_one import store_of_two_runs, teacher_speeds
from gpu_steps import step_figures
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.recipe.sections import Recipe

Figures = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Size:
    """An architecture at a size, and how it is run.

    Attributes:
        architecture: As transformers calls it.
        config: What its config says.
        rows: In a batch.
        tokens: In a row.
        precisions: In which its student trains.
        has_live: Whether there is an arm with the teacher in memory.
    """

    architecture: str
    config: dict[str, int]
    rows: int
    tokens: int
    precisions: tuple[str, ...] = ("bf16",)
    has_live: bool = False


def shape(width: int, inner: int, blocks: int, heads: int, groups: int, vocabulary: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {**dict(zip(names, (width, inner, blocks, heads, groups), strict=True)), "vocab_size": vocabulary}


SIZES = {
    "smollm2_135m": Size("llama", shape(576, 1536, 30, 9, 3, 49_152), 8, 1024, ("float32", "bf16"), has_live=True),
    "qwen2.5_0.5b": Size("qwen2", shape(896, 4864, 24, 14, 2, 151_936), 8, 1024, has_live=True),
    "llama_1b": Size("llama", shape(2048, 8192, 16, 32, 8, 128_256), 4, 1024),
}
TINY = {"tiny": Size("llama", shape(32, 48, 8, 4, 2, 384), 2, 16, ("float32",), has_live=True)}
WARM_STEPS, STEPS = 4, 12


def main() -> None:
    options = parse()
    device = torch.device("cpu" if options.tiny else "cuda")
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here that torch knows; --tiny runs at toy sizes on the CPU")
    # What libraries print goes elsewhere.
    lines, sys.stdout = sys.stdout, sys.stderr
    found: dict[str, Any] = {"card": "cpu, toy sizes" if options.tiny else torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=options.workdir) as folder:
        for name, part in parts(Path(folder), device, options).items():
            if options.only and name not in options.only:
                continue
            started = time.perf_counter()
            for figure, value in part():
                found[figure] = value
                print(json.dumps({figure: value}), file=lines, flush=True)
            print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(found), file=lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--only", nargs="+", help="parts to run: encoders, kernels, fp16, or a model")
    parser.add_argument("--workdir", type=Path, help="where models and stores lie meanwhile; some 20 GB")
    return parser.parse_args()


def parts(folder: Path, device: torch.device, options: argparse.Namespace) -> dict[str, Callable[[], Figures]]:
    sizes = TINY if options.tiny else SIZES
    first, first_size = next(iter(sizes.items()))
    return {
        "encoders": partial(encoder_errors, device),
        "kernels": partial(losses_over_vocabulary, device, is_tiny=options.tiny),
        **{name: partial(of_model, folder, name, size, device, options.tiny) for name, size in sizes.items()},
        "fp16": lambda: half_precision_losses(made(folder, first, first_size, "topk", options.tiny), device),
    }


def of_model(folder: Path, name: str, size: Size, device: torch.device, is_tiny: bool) -> Figures:
    """Run both stages of one model."""
    recipes = {kind: made(folder, name, size, kind, is_tiny) for kind in ("topk", "final")}
    steps = (1, 2) if is_tiny else (WARM_STEPS, STEPS)
    figures = [
        store_of_two_runs(list(recipes.values()), folder / name),
        teacher_speeds(recipes["final"], device, folder / name),
        reader_speeds(recipes["topk"]),
        *(step_figures(recipes, precision, steps, device, size.has_live) for precision in size.precisions),
    ]
    for part in figures:
        yield from ((f"{name}.{figure}", value) for figure, value in part)


def made(folder: Path, name: str, size: Size, kind: str, is_tiny: bool) -> Recipe:
    """Write a recipe, with its models and its text where they are not there yet."""
    place = folder / name
    blocks = size.config["num_hidden_layers"]
    if not place.exists():
        tokenizer = words(size.config["vocab_size"])
        for model, num_blocks in (("teacher", blocks), ("student", blocks - blocks // 7)):
            torch.manual_seed(0)
            ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
            config = CONFIG_MAPPING[size.architecture](
                **{**size.config, "num_hidden_layers": num_blocks, "max_position_embeddings": 2048, **ids},
                tie_word_embeddings=True,
            )
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(place / model)
            tokenizer.save_pretrained(place / model)
        write_text(place / "text.txt", size, num_rows=size.rows * (WARM_STEPS + STEPS) + 4)
    path = place / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(recipe_of(place, size, kind, "float32" if is_tiny else "bfloat16")))
    return load_recipe(path)


def recipe_of(place: Path, size: Size, kind: str, dtype: str) -> dict[str, Any]:
    source = {"path": "text", "data_files": str(place / "text.txt")}
    num_rows = size.rows * (WARM_STEPS + STEPS)
    logits = {"kind": "topk", "k": 64, "temperatures": [1, 2]} if kind == "topk" else {"kind": kind}
    return {
        "output": str(place / kind),
        "cache": str(place / "caches"),
        "teacher": {"path": str(place / "teacher"), "dtype": dtype, "batch_size": size.rows},
        "data": {
            "sequence_length": size.tokens,
            "train": {**source, "max_rows": num_rows},
            "eval": {**source, "max_rows": 2},
        },
        "student": {"path": str(place / "student")},
        "mapping": {"strategy": "uniform", "num_pairs": 6},
        "targets": {"logits": logits, "hidden": {"encoding": "int8"}},
        "loss": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "temperature": 2.0, "hidden": "normalised_mse"},
        "train": {
            "per_device_train_batch_size": size.rows,
            "learning_rate": 1e-5,
            "save_strategy": "no",
            "eval_strategy": "no",
            "logging_steps": 1000,
            "report_to": "none",
            "disable_tqdm": True,
        },
    }


def words(vocabulary: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are numbered words."""
    numbered = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{n}": n for n in range(1, vocabulary)}}, "<eos>"))
    numbered.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=numbered, eos_token="<eos>", pad_token="<eos>")


def write_text(file: Path, size: Size, *, num_rows: int) -> None:
    """Write random words, a row's tokens a line."""
    generator = np.random.default_rng(0)
    with file.open("w") as stream:
        for _ in range(num_rows):
            ids = generator.integers(1, size.config["vocab_size"], size.tokens)
            stream.write(" ".join(f"w{index}" for index in ids) + "\n")


if __name__ == "__main__":
    main()
