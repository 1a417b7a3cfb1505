"""A model hub over HTTP that speaks what an upload of a folder needs: repositories, LFS, the Xet store, commits."""

import base64
import hashlib
import json
from typing import Any

from flask import Flask, Response, jsonify, request

TOKEN = "hf_writes"
READ_TOKEN = "hf_reads"
# As the hub has it: what is binary or large goes to the store of large files, small text into the commit.
_LARGE_SUFFIXES = (".safetensors", ".bin")


class Hub:
    """The hub's repositories, and the requests that it saw.

    Attributes:
        repositories: By name, the content of each file by its path.
        private: The names of those that are private.
        objects: Large files by sha256; of those that came through Xet only their chunks are here.
        xorbs: What the Xet store was given: compressed chunks.
        breaks_uploads: Whether to answer 400 to each large file.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.large: dict[str, tuple[str, int]] = {}
        self.xorbs: list[bytes] = []
        self.cards: list[str] = []
        self.breaks_uploads = False
        self.app = Flask("hub")
        self.app.before_request(self._check_token)
        for rule, method, view in (
            ("/api/repos/create", "POST", self._create),
            ("/api/models/<owner>/<name>", "GET", self._info),
            ("/api/validate-yaml", "POST", self._validate),
            ("/api/models/<owner>/<name>/preupload/main", "POST", self._modes),
            ("/<owner>/<name>.git/info/lfs/objects/batch", "POST", self._batch),
            ("/objects/<oid>", "PUT", self._put),
            ("/api/models/<owner>/<name>/xet-write-token/main", "GET", self._xet_token),
            # Of the Xet store its first protocol, which the client falls back to where a later one is not found.
            ("/xet/v1/xorbs/default/<xorb>", "POST", self._xorb),
            ("/xet/v1/shards", "POST", self._shard),
            ("/api/models/<owner>/<name>/commit/main", "POST", self._commit),
        ):
            self.app.add_url_rule(rule, view.__name__, view, methods=[method])

    def _check_token(self) -> tuple[Response, int] | None:
        if request.path.startswith(("/objects/", "/xet/", "/v1/")):
            return None
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_TOKEN):
            return jsonify(error="Invalid username or password."), 401
        if token == READ_TOKEN and request.path == "/api/repos/create":
            return jsonify(error="You don't have the rights to create a model under this namespace"), 403
        return None

    def _create(self) -> Any:
        repo = f"{request.json['organization']}/{request.json['name']}"
        url = f"{request.host_url}{repo}"
        if repo in self.repositories:
            return jsonify(error="You already created this model repo", url=url), 409
        self.repositories[repo] = {}
        if request.json.get("visibility") == "private":
            self.private.add(repo)
        return jsonify(url=url)

    def _info(self, owner: str, name: str) -> Any:
        repo = f"{owner}/{name}"
        if repo not in self.repositories:
            return jsonify(error="Repository not found"), 404
        return jsonify(id=repo, private=repo in self.private, tags=[], siblings=[], downloads=0, likes=0)

    def _validate(self) -> Any:
        self.cards.append(request.json["content"])
        return jsonify(errors=[], warnings=[])

    def _modes(self, owner: str, name: str) -> Any:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LARGE_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in request.json["files"]
        ]
        return jsonify(files=files)

    def _batch(self, owner: str, name: str) -> Any:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{request.host_url}objects/{wanted['oid']}"}}}
            for wanted in request.json["objects"]
        ]
        return jsonify(transfer="basic", objects=objects)

    def _put(self, oid: str) -> Any:
        if self.breaks_uploads:
            return jsonify(error="the store is full"), 400
        self.objects[oid] = request.get_data()
        return ""

    def _xet_token(self, owner: str, name: str) -> Any:
        return jsonify(accessToken="xet", exp=2**31, casUrl=f"{request.host_url}xet")

    def _xorb(self, xorb: str) -> Any:
        self.xorbs.append(request.get_data())
        return jsonify(was_inserted=True)

    def _shard(self) -> Any:
        return jsonify(result=1)

    def _commit(self, owner: str, name: str) -> Any:
        repository = self.repositories[f"{owner}/{name}"]
        for line in request.get_data().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                repository[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                self.large[value["path"]] = value["oid"], value["size"]
                if value["oid"] in self.objects:
                    repository[value["path"]] = self.objects[value["oid"]]
        oid = hashlib.sha1(request.get_data()).hexdigest()
        return jsonify(commitOid=oid, commitUrl=f"{request.host_url}{owner}/{name}/commit/{oid}")
