"""What docs/clusters.md says is run here as it stands there, with what stands in for the schedulers and the nodes."""

import json
import os
import re
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from bucket import Endpoint, environment, serving_buckets
from crash.trees import difference, files_below
from forked import Forks
from slurm import stand_in
from watched import wanted

PAGE = (Path(__file__).parents[2] / "docs/clusters.md").read_text()
SHARD_TOKENS = 72  # three rows of 24
FILES = dict(re.findall(r"`([\w.]+)`[^\n]*:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL))
RECIPE = yaml.safe_load(FILES.pop("mine.yaml"))
SUBMITTING = re.findall(r"```sh\n(made=.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with serving_buckets() as started:
        yield started


class Cluster:
    """Nodes that are this machine, with a bucket, and a folder where jobs are submitted.

    Attributes:
        folder: There lie the recipe and the page's files.
        commands: Where `sbatch`, `coldstill` and so on are found first.
        bucket: Its name.
    """

    def __init__(self, folder: Path, forks: Forks, endpoint: Endpoint, write_recipe: Callable[..., Path]) -> None:
        self.folder, self.commands = folder, folder / "commands"
        self._endpoint, self.bucket = endpoint, endpoint.make_bucket()
        told = wanted(shard_tokens=SHARD_TOKENS, commits=folder / "commits")
        # The port that nodes meet at follows from the job's number, which the third one submitted has.
        stand_in(self.commands, forks, told, first_job=free_port() % 20000 - 3)
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JOB_COMPLETION"))},
            **environment(endpoint.url, folder / "home"),
            "PATH": f"{self.commands}:{os.environ['PATH']}",
        }
        places = {
            "cache": RECIPE["cache"].replace("bucket", self.bucket),
            **{key: f"{folder}{RECIPE[key]}" for key in ("local_copy", "output")},
        }
        write_recipe(**places, train__num_train_epochs=1, train__max_steps=-1).rename(folder / "mine.yaml")
        for name, text in FILES.items():
            (folder / name).write_text(text)

    def run(self, command: list[str], **variables: str) -> subprocess.Popen[str]:
        """Start a command as a node does."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**self._environment, **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run_to_its_end(self, command: list[str], **variables: str) -> str:
        """Run a command as a node does; it ends well."""
        child = self.run(command, **variables)
        said, _ = child.communicate(timeout=300)
        assert child.returncode == 0, said
        return said

    def committed(self) -> list[set[tuple[str, str]]]:
        """Give what each process has committed, as shard and column."""
        files = self.folder.glob("commits.*")
        return [{tuple(line.split()) for line in file.read_text().splitlines()} for file in files]

    def stored(self) -> dict[str, bytes]:
        """Give every object of the bucket's stores."""
        tree = self._endpoint.tree(self.bucket)
        return {name: data for name, data in tree.items() if name.startswith("stores/")}


@pytest.fixture
def cluster(forks: Forks, endpoint: Endpoint, workplace: Path, write_recipe: Callable[..., Path]) -> Cluster:
    return Cluster(workplace, forks, endpoint, write_recipe)


def free_port() -> int:
    """Find a port from 20000 to 39999 that nobody listens at."""
    for port in range(20100 + os.getpid() % 1000, 40000):
        with socket.socket() as one:
            if one.connect_ex(("localhost", port)):
                return port
    raise AssertionError


@pytest.fixture
def alone(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, bytes]:
    """The stores of a root that one process fills."""
    monkeypatch.setattr("coldstill.cache.laying.SHARD_TOKENS", SHARD_TOKENS)
    coldstill("precompute", write_recipe(cache=str(workplace / "alone")))
    return {name: data for name, data in files_below(workplace / "alone").items() if name.startswith("stores/")}


def check_workers(cluster: Cluster, count: int) -> None:
    """Hold that so many processes computed shards, each its own."""
    computed = [{shard for shard, column in of_one if "hidden/" in column} for of_one in cluster.committed()]
    computed = [shards for shards in computed if shards]
    assert len(computed) == count
    assert max(Counter(shard for shards in computed for shard in shards).values()) == 1


def test_a_slurm_array_fills_the_bucket_and_two_nodes_train_from_it(cluster: Cluster, alone: dict[str, bytes]):
    (commands,) = SUBMITTING
    cluster.run_to_its_end(["bash", "-euo", "pipefail", "-c", commands])
    check_workers(cluster, 4)
    assert difference(cluster.stored(), alone) == {}
    output = cluster.folder / "shared/runs/mine"
    assert (output / "student/model.safetensors").is_file()
    record = json.loads((output / "train.json").read_text())
    assert record["summary"]["num_steps"] == 3, "twenty rows, four to each of two processes"
    (student,) = (cluster.folder / "scratch/coldstill/students").glob("*/provenance.json")
    assert "prune" in json.loads(student.read_text())["argv"], "a worker made the student"
    said = cluster.run_to_its_end(["coldstill", "precompute", "mine.yaml", "--dry-run"])
    assert "everything is complete: precompute would load no teacher" in said


def test_the_processes_of_an_array_of_nodes_divide_their_nodes_share(cluster: Cluster, alone: dict[str, bytes]):
    cluster.run_to_its_end(["coldstill", "prune", "mine.yaml"])
    cluster.run_to_its_end(["sbatch", "precompute_nodes.sh"], SLURM_GPUS_ON_NODE="2")
    check_workers(cluster, 4)
    assert difference(cluster.stored(), alone) == {}


def test_the_pods_of_an_indexed_job_fill_the_bucket(cluster: Cluster, alone: dict[str, bytes]):
    job = yaml.safe_load(FILES["precompute.yaml"])["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["completionMode"] == "Indexed"
    assert container["command"][-1] == f"auto/{job['completions']}"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    cluster.run_to_its_end([*container["command"][:1], "prune", "mine.yaml"])
    pods = [cluster.run(container["command"], JOB_COMPLETION_INDEX=str(index)) for index in range(job["completions"])]
    said = [pod.communicate(timeout=300)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0] * job["completions"], said
    check_workers(cluster, job["completions"])
    assert difference(cluster.stored(), alone) == {}


def test_a_worker_that_does_not_know_which_it_is_is_refused_in_a_line(
    write_recipe: Callable[..., Path], coldstill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    said = coldstill("precompute", write_recipe(), "--worker", "auto", expect=2).stderr
    assert said.splitlines()[-1] == (
        "coldstill: --worker is auto, and Kubernetes says which worker this is (JOB_COMPLETION_INDEX=1), but not how "
        "many there are: write auto/n with the Job's completions, such as auto/4"
    )
