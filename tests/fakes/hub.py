"""A fake of the Hugging Face hub on loopback that real huggingface_hub downloads from and uploads to.

It holds repositories in memory as branches of commits: information, trees, files with ranges, uploads of small and
large files (Git LFS), branches, private and gated repositories, and a hub that is down. `requests` lists what was
asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "of" * 17
LARGE = (".safetensors", ".parquet", ".bin")
REPO = r"(?P<repo>(?!api/)[\w.-]+(?:/[\w.-]+)?)"
REVISION = r"(?P<revision>refs/[^/]+/[^/]+|[^/]+)"
API = r"/api/(?P<kind>models|datasets)/" + REPO


@dataclass
class Repository:
    """Commits by their hash, and branches."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; returns the commit's hash."""
        held = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        told = json.dumps([self.branches.get(branch), {name: digest(content) for name, content in held.items()}])
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = held, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Hub:
    """The repositories of a server."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.down = False
        self.url = ""

    def add(self, repo: str, folder: Path | dict[str, bytes], kind: str = "models", **traits: Any) -> str:
        """Put a folder's files into a repository, new or not; returns the commit's hash."""
        if isinstance(folder, Path):
            found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        else:
            found = folder
        repository = self.repositories.setdefault((kind, repo), Repository(**traits))
        return repository.commit({".gitattributes": b"", **found})

    def files(self, repo: str, branch: str = "main", kind: str = "models") -> dict[str, bytes]:
        repository = self.repositories[kind, repo]
        return repository.commits[repository.branches[branch]]


@contextmanager
def served() -> Iterator[Hub]:
    """A hub on loopback while the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{method} {path}")
        if self.hub.down:
            self._answer(503, {"error": "the hub is down"})
            return
        for verb, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and verb in (method, "GET" if method == "HEAD" else method):
                answer(self, **found.groupdict())
                return
        self._answer(404, {"error": f"no such page: {path}"})

    def _answer(self, code: int, said: Any, headers: dict[str, str] | None = None) -> None:
        content = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, kind: str, repo: str) -> Repository | None:
        """The repository; None, and the answer given, where it may not be seen."""
        found = self.hub.repositories.get((kind, repo))
        if found is None or (found.private and not self._known()):
            self._answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _commit(self, repository: Repository, revision: str) -> str | None:
        sha = repository.resolve(revision)
        if sha is None:
            self._answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return sha

    def information(self, kind: str, repo: str, revision: str = "main") -> None:
        repository = self._repository(kind, repo)
        if repository is None or (sha := self._commit(repository, revision)) is None:
            return
        siblings = [{"rfilename": name} for name in repository.commits[sha]]
        self._answer(200, {"id": repo, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings})

    def tree(self, kind: str, repo: str, revision: str, folder: str | None = None) -> None:
        repository = self._repository(kind, repo)
        if repository is None or (sha := self._commit(repository, revision)) is None:
            return
        inside = f"{folder}/" if folder else ""
        found = [_entry(name, content) for name, content in repository.commits[sha].items() if name.startswith(inside)]
        if folder and not found:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        self._answer(200, found)

    def file(self, repo: str, revision: str, name: str, kind: str = "models") -> None:
        repository = self._repository(kind, repo)
        if repository is None or (sha := self._commit(repository, revision)) is None:
            return
        if repository.gated and not self._known():
            self._answer(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
            return
        content = repository.commits[sha].get(name)
        if content is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, content, headers)
            return
        start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._answer(206, content[start : end + 1], headers)

    def dataset_file(self, repo: str, revision: str, name: str) -> None:
        self.file(repo, revision, name, "datasets")

    def create(self) -> None:
        said = json.loads(self.body)
        if not self._known():
            self._answer(401, {"error": "Invalid username or password."})
            return
        key = (f"{said.get('type', 'model')}s", "/".join(filter(None, (said.get("organization"), said["name"]))))
        url = {"url": f"{self.hub.url}/{key[1]}", "name": key[1], "id": key[1]}
        if key in self.hub.repositories:
            self._answer(409, {"error": "You already created this model repo", **url})
            return
        private = said.get("private") or said.get("visibility") == "private"
        self.hub.repositories[key] = Repository(private=bool(private))
        self.hub.repositories[key].commit({".gitattributes": b""})
        self._answer(200, url)

    def branch(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo)
        if repository is None:
            return
        if revision in repository.branches:
            self._answer(409, {"error": "Reference already exists"})
            return
        repository.branches[revision] = repository.branches["main"]
        self._answer(200, {})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo)
        if repository is None or self._commit(repository, revision) is None:
            return
        files = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular"}
            for one in json.loads(self.body)["files"]
        ]
        self._answer(200, {"files": [{**one, "shouldIgnore": False, "oid": None} for one in files]})

    def large_files(self, repo: str, kind: str = "") -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}}}
            for one in json.loads(self.body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def large_file(self, oid: str) -> None:
        assert digest(self.body) == oid
        self.hub.large[oid] = self.body
        self._answer(200, {})

    def add_commit(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo)
        if repository is None:
            return
        if not self._known():
            self._answer(401, {"error": "Invalid username or password."})
            return
        files = {}
        for line in filter(None, self.body.splitlines()):
            said = json.loads(line)
            if said["key"] == "header":
                repository.messages.append(said["value"]["summary"])
            elif said["key"] == "file":
                files[said["value"]["path"]] = base64.b64decode(said["value"]["content"])
            elif said["key"] == "lfsFile":
                files[said["value"]["path"]] = self.hub.large[said["value"]["oid"]]
        sha = repository.commit(files, revision)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None})

    def check_yaml(self) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def who(self) -> None:
        self._answer(200, {"name": "ann", "type": "user"}) if self._known() else self._answer(401, {"error": "who?"})


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 128}
    return entry


ROUTES = (
    ("GET", API, _Handler.information),
    ("GET", API + r"/revision/(?P<revision>.+)", _Handler.information),
    ("GET", API + r"/tree/" + REVISION + r"(?:/(?P<folder>.+))?", _Handler.tree),
    (
        "GET",
        r"/datasets/" + REPO + "/resolve/" + REVISION + "/(?P<name>.+)",
        _Handler.dataset_file,
    ),
    ("GET", "/" + REPO + "/resolve/" + REVISION + "/(?P<name>.+)", _Handler.file),
    ("GET", "/api/whoami-v2", _Handler.who),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.check_yaml),
    ("POST", API + r"/branch/(?P<revision>.+)", _Handler.branch),
    ("POST", API + r"/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", API + r"/commit/(?P<revision>.+)", _Handler.add_commit),
    ("POST", r"/(?:(?P<kind>datasets)/)?" + REPO + r"\.git/info/lfs/objects/batch", _Handler.large_files),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]+)", _Handler.large_file),
)
