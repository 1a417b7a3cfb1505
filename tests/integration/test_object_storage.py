"""A cache in a bucket: a real S3 endpoint over HTTP, which the tests let fail, and commands that are killed over it."""

import hashlib
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import s3fs
import yaml
from bucket import Endpoint, environment, serving_buckets
from commanding import run_command
from crash.trees import difference, files_below
from forked import Forks
from tiny import text_data
from versions import since
from watched import wanted

from coldstill.cache import remote_objects
from coldstill.cache.objects import open_objects
from coldstill.cache.reader import Reader
from coldstill.pipeline.outputs.run_index import find_run_rows
from coldstill.pipeline.recipe.file import load_recipe

# Six rows of 24 tokens in each shard.
SHARD_TOKENS = 144
NUM_SHARDS = 5
NUM_TOKENS = 624


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with serving_buckets() as started:
        yield started


Fault = Callable[[int, str, str], str | None]


class Proxy(ThreadingHTTPServer):
    """Passes requests on to an endpoint, keeps a list of them, and lets some fail.

    Attributes:
        seen: Method and path of each request.
        fault: Given number, method and path of a request: None to pass it on, `drop`, or a status such as 503.
    """

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forwarder)
        self.endpoint = urlsplit(endpoint).netloc
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.seen: list[tuple[str, str]] = []
        self.fault: Fault = lambda number, method, path: None
        self.num_faults = 0
        self._lock = threading.Lock()

    def decide(self, method: str, path: str) -> str | None:
        with self._lock:
            self.seen.append((method, path))
            fault = self.fault(len(self.seen), method, path)
            self.num_faults += fault is not None
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


class _Forwarder(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.decide(self.command, self.path)
        if fault == "drop":
            self.close_connection = True
            return
        if fault is not None:
            self._answer(int(fault), {"Content-Type": "application/xml"}, REFUSAL if fault == "403" else FAILURE)
            return
        passed = http.client.HTTPConnection(self.server.endpoint, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            passed.request(self.command, self.path, body, headers)
            answer = passed.getresponse()
            self._answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            passed.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length", len(body)) if self.command == "HEAD" else len(body)
        kept = {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}
        for name, value in {**kept, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward


FAILURE = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
REFUSAL = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
HOP_BY_HOP = {"connection", "content-length", "transfer-encoding", "keep-alive"}


@pytest.fixture
def proxy(endpoint: Endpoint) -> Iterator[Proxy]:
    with Proxy(endpoint.url) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Use = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Use]:
    """Let s3fs speak to an endpoint from here on."""

    def chosen(url: str) -> None:
        forget_clients()
        for name, value in environment(url, tmp_path / "home").items():
            monkeypatch.setenv(name, value)

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(remote_objects, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(remote_objects, "LONGEST_PAUSE_S", 0.05)
    yield chosen
    forget_clients()


def forget_clients() -> None:
    """Close the connections of every S3 file system that fsspec keeps, and forget it."""
    for kept in list(s3fs.S3FileSystem._cache.values()):
        if kept._s3 is not None:
            s3fs.S3FileSystem.close_session(kept.loop, kept._s3)
    s3fs.S3FileSystem.clear_instance_cache()


@dataclass
class Place:
    """A teacher, a text and what a run in a local cache made of them.

    Attributes:
        data: The recipe's data section, over the text.
        tree: What `precompute` wrote of stores and index.
        evaluated: The same after `train` and `evaluate`, which keeps there what it measured.
    """

    folder: Path
    data: dict[str, Any]
    tree: dict[str, bytes] = field(default_factory=dict)
    evaluated: dict[str, bytes] = field(default_factory=dict)
    weights: bytes = b""
    student: bytes = b""
    evaluation: dict[str, Any] = field(default_factory=dict)

    def recipe(self, file: Path, cache: str, **changes: Any) -> Path:
        """Write the recipe with changes to its sections, its output beside it."""
        data: dict[str, Any] = {
            "output": str(file.parent / "run"),
            "cache": cache,
            "teacher": {"path": str(self.folder / "teacher"), "dtype": "float32", "batch_size": 4},
            "data": self.data,
            "student": {"prune": {"layers": {"remove": 1, "method": "last"}}},
            "targets": {"logits": {"kind": "topk", "k": 16, "temperatures": [2]}, "hidden": {"blocks": [2]}},
            "loss": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "temperature": 2, "hidden": "mse"},
            "mapping": {"strategy": "pairs", "pairs": {2: 2}},
            "train": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.001, "logging_steps": 2},
        }
        for section, change in changes.items():
            data[section] = {**data.get(section, {}), **change} if isinstance(change, dict) else change
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(data))
        return file


@pytest.fixture(autouse=True)
def _short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coldstill.cache.laying.SHARD_TOKENS", SHARD_TOKENS)


def local_tree(cache: Path) -> dict[str, bytes]:
    """Give every file of the stores and the index."""
    return {name: data for name, data in files_below(cache).items() if not name.startswith("students/")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus: list[str]) -> Place:
    """Make the teacher's folder and the text, and run all stages with a local cache."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(model_folders["teacher"], folder / "teacher")
    made = Place(folder, text_data(folder, corpus))
    cache = folder / "local/caches"
    recipe = made.recipe(folder / "local/recipe.yaml", str(cache))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coldstill.cache.laying.SHARD_TOKENS", SHARD_TOKENS)
        run_command("precompute", recipe)
        made.tree = local_tree(cache)
        run_command("train", recipe)
        made.evaluation = json.loads(run_command("evaluate", recipe, "--json").stdout)
    made.evaluated = local_tree(cache)
    made.weights = (folder / "local/run/student/model.safetensors").read_bytes()
    (student,) = cache.glob("students/*/model.safetensors")
    made.student = student.read_bytes()
    return made


def in_another_process(
    forks: Forks, url: str, folder: Path, *arguments: Any, kill_at: int | None = None
) -> tuple[int, str]:
    """Run the command line in another process, which dies at a write; give its exit code and what it said."""
    command = forks.command("watched", wanted(shard_tokens=SHARD_TOKENS, kill_at=kill_at), *arguments)
    surroundings = {**os.environ, **environment(url, folder / "home")}
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=surroundings, check=False, timeout=120, **said)
    return done.returncode, done.stdout


def one_line(errors: str) -> str:
    """Give the one line that a command ended with."""
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if "coldstill: " in line]
    return line[line.index("coldstill: ") :]


def test_all_stages_over_a_bucket_give_the_bytes_of_a_local_cache(
    endpoint: Endpoint, use: Use, place: Place, tmp_path: Path
):
    use(endpoint.url)
    bucket = endpoint.make_bucket()
    recipe = place.recipe(tmp_path / "recipe.yaml", f"s3://{bucket}/caches")
    assert f"store      s3://{bucket}/caches/stores/" in run_command("precompute", recipe).output
    assert difference(endpoint.tree(bucket), place.tree) == {}
    run_command("train", recipe)
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == place.weights
    assert json.loads(run_command("evaluate", recipe, "--json").stdout)["models"] == place.evaluation["models"]
    # The pruned student is kept beside the stores, and this machine's copy is in its cache folder.
    (weights,) = [name for name in endpoint.names(bucket) if name.endswith("model.safetensors")]
    assert endpoint.read(bucket, weights) == place.student
    assert (tmp_path / "home/coldstill" / weights).read_bytes() == place.student
    assert json.loads(run_command("precompute", recipe, "--json").stdout)["computed_tokens"] == 0
    assert difference(endpoint.tree(bucket), place.evaluated) == {}


def test_another_machine_trains_from_the_bucket_alone(
    endpoint: Endpoint, use: Use, place: Place, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    use(endpoint.url)
    monkeypatch.setattr("coldstill.pipeline.models.teacher.Teacher.locate", None)
    run_command("train", place.recipe(tmp_path / "recipe.yaml", f"s3://{kept}/caches"))
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == place.weights
    (copy,) = (tmp_path / "home/coldstill/students").iterdir()
    assert (copy / "model.safetensors").read_bytes() == place.student


def fill(endpoint: Endpoint, place: Place) -> str:
    """Make a bucket with what the local run made, and its pruned student."""
    bucket = endpoint.make_bucket()
    students = place.folder / "local/caches/students"
    files = {f"students/{path.relative_to(students)}": path for path in students.rglob("*") if path.is_file()}
    for name, data in {**place.tree, **{name: path.read_bytes() for name, path in files.items()}}.items():
        endpoint.write(bucket, name, data)
    return bucket


@pytest.fixture
def filled(endpoint: Endpoint, place: Place) -> str:
    """A bucket with a complete cache, which a test may damage."""
    return fill(endpoint, place)


@pytest.fixture(scope="module")
def kept(endpoint: Endpoint, place: Place) -> str:
    """A bucket with a complete cache, which no test changes."""
    return fill(endpoint, place)


def array_reads(proxy: Proxy) -> list[str]:
    """Give the paths of the arrays' objects that were read; a metadata file is none."""
    return [path for method, path in proxy.seen if method == "GET" and "/arrays.zarr/" in path and "/c." in path]


def test_a_local_copy_is_read_in_place_of_the_bucket(
    endpoint: Endpoint, proxy: Proxy, use: Use, place: Place, kept: str, tmp_path: Path
):
    use(proxy.url)
    cache, copies = f"s3://{kept}/caches", str(tmp_path / "copies")
    run_command("train", place.recipe(tmp_path / "one/recipe.yaml", cache, local_copy=copies))
    first = array_reads(proxy)
    assert first
    assert len(first) == len(set(first)), "an object was fetched twice"
    proxy.seen.clear()
    run_command("train", place.recipe(tmp_path / "two/recipe.yaml", cache, local_copy=copies))
    assert proxy.seen, "the second run did not ask this proxy"
    assert array_reads(proxy) == []
    for run in ("one", "two"):
        assert (tmp_path / run / "run/student/model.safetensors").read_bytes() == place.weights
    for copy in copied_objects(tmp_path / "copies"):
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == copy.name


def copied_objects(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("??/*") if path.is_file())


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_a_local_copy_that_was_cut_off_is_fetched_again(
    endpoint: Endpoint, use: Use, place: Place, kept: str, tmp_path: Path
):
    use(endpoint.url)
    copies = tmp_path / "copies"
    run = find_run_rows(load_recipe(place.recipe(tmp_path / "recipe.yaml", f"s3://{kept}/caches"), []))

    def tokens(**options: Any) -> list[list[int]]:
        reader = Reader(run.store, run.selections["train"], ["tokens"], **options)
        return [row["tokens"]["ids"].tolist() for row in reader.rows(range(20))]

    expected = tokens()
    assert tokens(local_copy=str(copies)) == expected
    for copy in copied_objects(copies):
        copy.write_bytes(copy.read_bytes()[:-1])
    assert tokens(local_copy=str(copies)) == expected


def test_a_local_copy_that_was_altered_is_never_trained_on_and_made_again_once_it_is_removed(
    endpoint: Endpoint, use: Use, place: Place, kept: str, tmp_path: Path
):
    use(endpoint.url)
    cache, copies = f"s3://{kept}/caches", tmp_path / "copies"
    run_command("train", place.recipe(tmp_path / "one/recipe.yaml", cache, local_copy=str(copies)))
    for copy in copied_objects(copies):
        copy.write_bytes(flip(copy.read_bytes()))
    recipe = place.recipe(tmp_path / "two/recipe.yaml", cache, local_copy=str(copies))
    refused = one_line(run_command("train", recipe, expect=2).stderr)
    assert "corrupt" in refused
    assert f"remove {copies}" in refused, "nothing says that the copy is to blame, not the store"
    shutil.rmtree(copies)
    run_command("train", recipe)
    assert (tmp_path / "two/run/student/model.safetensors").read_bytes() == place.weights


def test_a_damaged_copy_of_a_pruned_student_is_copied_again(
    endpoint: Endpoint, use: Use, place: Place, filled: str, tmp_path: Path
):
    use(endpoint.url)
    recipe = place.recipe(tmp_path / "recipe.yaml", f"s3://{filled}/caches")
    run_command("precompute", recipe)
    (weights,) = (tmp_path / "home/coldstill/students").glob("*/model.safetensors")
    weights.write_bytes(flip(weights.read_bytes()))
    run_command("train", recipe)
    assert weights.read_bytes() == place.student
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == place.weights


@pytest.mark.slow
def test_a_damaged_student_in_the_bucket_is_found_and_repaired(
    endpoint: Endpoint, use: Use, place: Place, filled: str, tmp_path: Path
):
    use(endpoint.url)
    (name,) = [name for name in endpoint.names(filled) if name.endswith("model.safetensors")]
    endpoint.write(filled, name, flip(place.student))
    cache = f"s3://{filled}/caches"
    assert "model.safetensors is not what was written" in run_command("cache", "verify", cache, expect=1).output
    recipe = place.recipe(tmp_path / "recipe.yaml", cache)
    run_command("cache", "repair", recipe)
    assert endpoint.read(filled, name) == place.student
    run_command("cache", "verify", cache)


def test_a_store_in_a_bucket_is_listed_verified_repaired_and_removed(
    endpoint: Endpoint, use: Use, place: Place, filled: str, tmp_path: Path
):
    use(endpoint.url)
    cache = f"s3://{filled}/caches"
    run_command("cache", "verify", cache)
    (listed,) = json.loads(run_command("cache", "ls", cache, "--json").stdout)["stores"]
    assert listed["path"] == f"{cache}/stores/{listed['name']}"
    assert listed["num_shards"] == NUM_SHARDS
    assert listed["age_s"] < 600
    (described,) = json.loads(run_command("cache", "info", cache, "--json").stdout)
    assert {column["name"] for column in described["columns"]} >= {"tokens", "hidden/2/int8", "logits/topk/16/delta"}
    arrays = [name for name in place.tree if "/hidden/2/int8/" in name and "/c." in name]
    damaged, missing = arrays[0], arrays[-1]
    endpoint.write(filled, damaged, flip(place.tree[damaged]))
    endpoint.remove(filled, missing)
    said = run_command("cache", "verify", cache, expect=1).output
    assert "its object is not what was written" in said
    assert "its object is missing" in said
    recipe = place.recipe(tmp_path / "recipe.yaml", cache)
    repaired = json.loads(run_command("cache", "repair", recipe, "--json").stdout)
    assert len(repaired["mended"]["dropped"]) == 2
    assert 0 < repaired["precompute"]["computed_tokens"] <= 2 * SHARD_TOKENS
    assert difference(endpoint.tree(filled), place.tree) == {}
    run_command("cache", "rm", cache, "--column", "hidden/2/int8", "--yes")
    assert not [name for name in endpoint.names(filled) if "/hidden/2/int8/" in name]
    run_command("cache", "verify", cache)
    run_command("cache", "rm", cache, "--yes")
    assert [name for name in endpoint.names(filled) if name.startswith("stores/")] == []
    assert "no store in" in run_command("cache", "ls", cache, expect=2).stderr


MISSING_BUCKET = {
    "precompute": (["precompute", "RECIPE"], "cannot be written: no such bucket"),
    "train": (["train", "RECIPE"], "holds no rows for this recipe's teacher and data sections"),
    "ls": (["cache", "ls", "CACHE"], "no store in CACHE"),
    "info": (["cache", "info", "CACHE"], "no store in CACHE"),
    "verify": (["cache", "verify", "CACHE"], "no store in CACHE"),
    "rm": (["cache", "rm", "CACHE", "--yes"], "no store in CACHE"),
    "repair": (["cache", "repair", "RECIPE"], "no store at CACHE"),
}


@pytest.mark.parametrize("case", MISSING_BUCKET)
def test_a_missing_bucket_is_one_clear_line(endpoint: Endpoint, use: Use, place: Place, tmp_path: Path, case: str):
    use(endpoint.url)
    cache = "s3://nobody-made-this/caches"
    recipe = place.recipe(tmp_path / "recipe.yaml", cache)
    command, message = MISSING_BUCKET[case]
    arguments = [str({"RECIPE": recipe, "CACHE": cache}.get(argument, argument)) for argument in command]
    line = one_line(run_command(*arguments, expect=2).stderr)
    assert message.replace("CACHE", cache) in line
    assert "nobody-made-this" in line


def test_an_endpoint_that_refuses_the_key_is_one_clear_line(
    endpoint: Endpoint, proxy: Proxy, use: Use, place: Place, kept: str, tmp_path: Path
):
    proxy.fault = lambda number, method, path: "403"
    use(proxy.url)
    for command in (["precompute", place.recipe(tmp_path / "recipe.yaml", f"s3://{kept}/caches")],):
        line = one_line(run_command(*command, expect=2).stderr)
        assert f"s3://{kept}/caches" in line
        assert "PermissionError" in line
    assert len(proxy.seen) < 10, "what lasts was tried again"


def test_what_another_machine_writes_is_seen_at_once(endpoint: Endpoint, use: Use):
    use(endpoint.url)
    bucket = endpoint.make_bucket()
    objects = open_objects(f"s3://{bucket}/caches")
    assert (objects.files("commits"), objects.folders(""), objects.exists("commits/a")) == ([], [], False)
    endpoint.write(bucket, "commits/a", b"1")
    assert (objects.files("commits"), objects.folders(""), objects.exists("commits/a")) == (["a"], ["commits"], True)
    endpoint.write(bucket, "commits/a", b"22")
    assert (objects.read("commits/a"), objects.sizes("")) == (b"22", {"commits/a": 2})
    endpoint.remove(bucket, "commits/a")
    assert (objects.files("commits"), objects.sizes(""), objects.exists("commits/a")) == ([], {}, False)


def test_a_bucket_keeps_the_contract_of_a_folder(endpoint: Endpoint, use: Use):
    use(endpoint.url)
    objects = open_objects(f"s3://{endpoint.make_bucket()}/caches")
    tree = {name: name.encode() * 3 for name in ("top", "hidden/1/c/0", "hidden/1/a", "hidden/10/b", "hidden/d")}
    objects.write_all(tree)
    assert objects.sizes("") == {name: len(data) for name, data in tree.items()}
    assert sorted(objects.sizes("hidden/1")) == ["hidden/1/a", "hidden/1/c/0"]
    assert (objects.files("hidden"), objects.folders("hidden")) == (["d"], ["1", "10"])
    assert objects.read_ranges([("top", 3, 3), ("top", 9, 4), ("top", 20, 4), ("hidden/d", 0, 8)]) == [
        b"top",
        b"",
        b"",
        b"hidden/d",
    ]
    with pytest.raises(FileNotFoundError) as raised:
        objects.read_ranges([("top", 0, 1), ("gone", 0, 1)])
    assert raised.value.filename == "gone"
    assert not objects.exists("hidden/1"), "a folder is no object"
    objects.remove_folder("hidden/1")
    objects.remove("gone")
    objects.remove_folder("nowhere")
    assert sorted(objects.sizes("")) == ["hidden/10/b", "hidden/d", "top"]


@pytest.mark.parametrize("kill_at", [70, *(pytest.param(number, marks=pytest.mark.slow) for number in (20, 45))])
def test_a_killed_run_goes_on_to_the_same_bytes(
    forks: Forks, endpoint: Endpoint, use: Use, place: Place, tmp_path: Path, kill_at: int
):
    bucket = endpoint.make_bucket()
    recipe = place.recipe(tmp_path / "recipe.yaml", f"s3://{bucket}/caches")
    code, errors = in_another_process(forks, endpoint.url, tmp_path, "precompute", recipe, kill_at=kill_at)
    assert code == -signal.SIGKILL, errors
    left = endpoint.names(bucket)
    assert [name for name in left if "/writers/" in name], "it was killed outside of its work"
    use(endpoint.url)
    result = json.loads(run_command("precompute", recipe, "--json").stdout)
    assert 0 < result["computed_tokens"] <= NUM_TOKENS
    assert difference(endpoint.tree(bucket), place.tree) == {}
    run_command("cache", "verify", f"s3://{bucket}/caches")


@pytest.mark.parametrize("share", [0.2, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.1, 0.3))])
def test_requests_that_fail_at_random_cost_nothing_but_time(
    forks: Forks, endpoint: Endpoint, proxy: Proxy, use: Use, place: Place, tmp_path: Path, share: float
):
    chance = random.Random(round(share * 10))
    failed: Counter[tuple[str, str]] = Counter()

    def at_random(number: int, method: str, path: str) -> str | None:
        # Three times at most, so that no attempt of seven is sure to fail however the dice fall.
        if chance.random() >= share or failed[method, path] == 3:
            return None
        failed[method, path] += 1
        return chance.choice(["500", "503", "drop"])

    proxy.fault = at_random
    bucket = endpoint.make_bucket()
    recipe = place.recipe(tmp_path / "recipe.yaml", f"s3://{bucket}/caches")
    code, errors = in_another_process(forks, proxy.url, tmp_path, "precompute", recipe)
    assert code == 0, errors
    assert proxy.num_faults > share * 300, "hardly a request failed"
    assert difference(endpoint.tree(bucket), place.tree) == {}
    use(proxy.url)
    run_command("train", recipe)
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == place.weights


@pytest.mark.parametrize(
    ("last_good", "fault"),
    [(400, "503"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, "drop"), (0, "503"), (150, "drop")])],
)
def test_an_endpoint_that_goes_down_is_one_line_and_nothing_is_lost(
    forks: Forks, endpoint: Endpoint, proxy: Proxy, use: Use, place: Place, tmp_path: Path, last_good: int, fault: str
):
    proxy.fault = lambda number, method, path: fault if number > last_good else None
    bucket = endpoint.make_bucket()
    recipe = place.recipe(tmp_path / "recipe.yaml", f"s3://{bucket}/caches")
    started = time.monotonic()
    code, errors = in_another_process(forks, proxy.url, tmp_path, "precompute", recipe)
    assert time.monotonic() - started < 30
    assert len(proxy.seen) > last_good, "the endpoint was never needed after it went down"
    assert code == 2, errors
    line = one_line(errors)
    assert f"s3://{bucket}/caches/" in line
    assert "after 7 attempts" in line
    assert "what was committed stays; run the command again to go on" in line
    committed = {name for name in endpoint.names(bucket) if "/commits/" in name}
    use(endpoint.url)
    result = json.loads(run_command("precompute", recipe, "--json").stdout)
    if last_good == 400:
        assert committed
        assert result["computed_tokens"] < NUM_TOKENS, "what was committed was computed again"
    assert difference(endpoint.tree(bucket), place.tree) == {}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns of any fork beside threads
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@since("5.15")  # the argument that says the method
def test_training_with_processes_that_load_batches_gives_the_same_weights(
    endpoint: Endpoint, use: Use, place: Place, kept: str, tmp_path: Path, method: str
):
    use(endpoint.url)
    # This process has read the bucket before: nothing of that may cross into the others.
    assert open_objects(f"s3://{kept}/caches").folders("") == ["index", "rows", "stores", "students"]
    loading = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": method}
    recipe = place.recipe(tmp_path / "recipe.yaml", f"s3://{kept}/caches", train=loading)
    run_command("train", recipe)
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == place.weights
