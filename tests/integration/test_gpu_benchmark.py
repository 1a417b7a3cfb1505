"""The benchmark of GPUs runs through at toy sizes on a CPU: all figures, and the last line all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_of_gpus_runs_at_toy_sizes_on_a_cpu(tmp_path: Path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--tiny", "--workdir", str(tmp_path)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    *lines, last = map(json.loads, done.stdout.splitlines())
    assert last == {"card": "cpu, toy sizes"} | {name: value for line in lines for name, value in line.items()}
    assert last["tiny.same_bytes_from_two_runs"] is True
    assert {
        "tiny.float32.final_step_over_plain",
        "tiny.reader_tokens_per_s",
        "tiny.precompute_over_bare_body",
    } <= last.keys()
    assert all(value <= 1 for name, value in last.items() if name.endswith("error_over_stated"))
    assert last["kernel.tiny.ours"]["distance"] < 1e-6
    assert not list(tmp_path.iterdir())
