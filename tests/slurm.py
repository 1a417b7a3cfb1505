"""What stands in for SLURM and its nodes: run by name from a folder on PATH, as `sbatch`, `srun` and so on.

`sbatch` runs a script when it is submitted, once for each task of its array, all at once, with the variables that SLURM
gives a batch job. `srun` runs a command once for each node, on this machine. `torchrun` starts a process for each of
SLURM_GPUS_ON_NODE, which nodes here have none of: one where it is not set.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from forked import Forks

_COMMANDS = ("sbatch", "srun", "scontrol", "torchrun", "coldstill")
_RANGE = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?:%\d+)?")


def stand_in(folder: Path, forks: Forks, *arguments: str, first_job: int = 100) -> None:
    """Write the commands into a folder, where `coldstill` is one of `forks` that is told some arguments first."""
    folder.mkdir()
    told = {"coldstill": forks.script("watched"), "torchrun": forks.command("torch.distributed.run")}
    (folder / "told.json").write_text(json.dumps({**told, "arguments": arguments}))
    (folder / "jobs").mkdir()
    (folder / "jobs" / str(first_job)).touch()
    for name in _COMMANDS:
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {folder} {name} "$@"\n')
        (folder / name).chmod(0o755)


def main() -> int:
    folder, name, *arguments = Path(sys.argv[1]), *sys.argv[2:]
    if name == "sbatch":
        return _sbatch(folder, arguments)
    if name == "srun":
        nodes = range(int(os.environ["SLURM_NNODES"]))
        return _all_at_once([(arguments, {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}) for node in nodes])
    if name == "scontrol":
        assert arguments == ["show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        sys.stdout.write("localhost\n" * int(os.environ["SLURM_NNODES"]))
        return 0
    told = json.loads((folder / "told.json").read_text())
    program = [*told["coldstill"], *told["arguments"]]
    if name == "coldstill":
        return subprocess.call([sys.executable, "-S", "-E", *program, *arguments])
    assert arguments[arguments.index("-m") + 1] == "coldstill"
    at = arguments.index("-m")
    arguments[at : at + 2] = program
    num_gpus = os.environ.get("SLURM_GPUS_ON_NODE", "1")
    return subprocess.call([*told["torchrun"], *[num_gpus if word == "gpu" else word for word in arguments]])


def _sbatch(folder: Path, arguments: list[str]) -> int:
    """Run a job, all of its tasks at once, and print its number as `--parsable` does."""
    options, words = _options(arguments)
    if "dependency" in options:
        kind, _, of = options["dependency"].partition(":")
        assert kind == "afterok"
        assert (folder / "jobs" / of).exists()
    command = ["bash", *words]
    if "wrap" in options:
        command = ["bash", "-c", options["wrap"]]
    else:
        lines = Path(words[0]).read_text().splitlines()
        assert lines[0].startswith("#!"), "sbatch takes scripts that name their interpreter"
        said = [word for line in lines if line.startswith("#SBATCH ") for word in shlex.split(line)[1:]]
        options = {**_options(said)[0], **options}
    number = str(max(int(job.name) for job in (folder / "jobs").iterdir()) + 1)
    nodes = options.get("nodes", "1")
    of_job = {"SLURM_JOB_ID": number, "SLURM_NNODES": nodes, "SLURM_JOB_NODELIST": f"node[1-{nodes}]"}
    tasks = [(command, {**of_job, **of_task}) for of_task in _array(options.get("array"))]
    code = _all_at_once(tasks)
    if code == 0:
        (folder / "jobs" / number).touch()
    if "parsable" in options:
        sys.stdout.write(f"{number}\n")
    return code


def _options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    options, others = {}, []
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            others.append(word)
            continue
        name, _, value = word[2:].partition("=")
        options[name] = words.pop(0) if name == "wrap" and not value else value
    return options, others


def _array(text: str | None) -> list[dict[str, str]]:
    """Return what SLURM tells each task of an array; once nothing where a job is none."""
    if text is None:
        return [{}]
    match = _RANGE.fullmatch(text)
    assert match
    step = int(match[3] or 1)
    tasks = range(int(match[1]), int(match[2]) + 1, step)
    of_all = {"MIN": tasks[0], "MAX": tasks[-1], "STEP": step, "COUNT": len(tasks)}
    return [
        {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in {**of_all, "ID": task}.items()} for task in tasks
    ]


def _all_at_once(commands: list[tuple[list[str], dict[str, str]]]) -> int:
    """Run commands with variables of their own, what they print on standard error; return the worst exit code."""
    children = [
        subprocess.Popen(command, env={**os.environ, **variables}, stdout=sys.stderr) for command, variables in commands
    ]
    return max(child.wait() for child in children)


if __name__ == "__main__":
    sys.exit(main())
