"""A stand-in of the Hugging Face Hub's HTTP interface: repositories as folders, commits, ranges, and what it served."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

PIECE = 4096  # bytes written at a time


@dataclass
class Repository:
    """commits: hash -> folder, oldest first. branches: name -> hash. token: that is asked for. gated: by its terms."""

    commits: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, folder: Path, branch: str = "main") -> str:
        """Let a branch stand for the files of a folder; the new commit."""
        number = hashlib.sha1(f"{len(self.commits)} {folder}".encode()).hexdigest()
        self.commits[number] = folder
        self.branches[branch] = number
        return number

    def resolved(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class Hub:
    """The stand-in.

    url: where it listens.
    repositories: `org/name` -> it.
    served: file -> bytes of its content that were sent, ranges included.
    asked: every request as `GET /path`.
    cut_after: file -> bytes after which the connection breaks, once, where it is asked for up to its end.
    broken: files whose HEAD, with which a download begins, is answered with status 400.
    uploaded: sha256 -> content of files that came, committed or not.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cut_after: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    uploaded: dict[str, bytes] = field(default_factory=dict)

    def publish(self, name: str, folder: Path, branch: str = "main", **settings) -> str:
        repository = self.repositories.setdefault(name, Repository(**settings))
        return repository.commit(folder, branch)

    def weights_served(self) -> int:
        return sum(nbytes for file, nbytes in self.served.items() if file.endswith(".safetensors"))

    def forget(self) -> None:
        self.served.clear()
        self.asked.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        self.hub.asked.append(f"PUT {self.path}")
        number = hashlib.sha256(content).hexdigest()
        if number in self.hub.broken or not self.path.endswith(number):
            return self._refuse(400, "Broken")
        self.hub.uploaded[number] = content
        return self._json({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(self.path.partition("?")[0])
        self.hub.asked.append(f"POST {path}")
        match = re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git/info/lfs/objects)?/(preupload|commit|batch)(/.+)?", path
        )
        if path == "/api/validate-yaml":
            return self._json({"warnings": [], "errors": []})
        if (self.headers.get("authorization") or "") != "Bearer hf_right":
            return self._refuse(401, "Unauthorized")
        if path == "/api/repos/create":
            return self._json(self._create(json.loads(body)))
        if match is None or match[1] not in self.hub.repositories:
            return self._refuse(404, "RepoNotFound")
        return self._json(
            {"preupload": self._modes, "batch": self._places, "commit": self._commit}[match[2]](match[1], body)
        )

    def _create(self, asked: dict) -> dict:
        name = f"{asked['organization']}/{asked['name']}"
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories.setdefault(name, Repository(token="hf_right" if private else None))
        return {"url": f"{self.hub.url}/{name}"}

    def _modes(self, name: str, body: bytes) -> dict:
        """Weights go where large files go, all others into the commit."""
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}

    def _places(self, name: str, body: bytes) -> dict:
        """Where to send large files that are not there yet."""
        found = []
        for one in json.loads(body)["objects"]:
            there = one["oid"] in self.hub.uploaded
            found.append(one if there else one | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}})
        return {"objects": found, "transfer": "basic"}

    def _commit(self, name: str, body: bytes) -> dict:
        folder = Path(tempfile.mkdtemp(prefix="hub-commit-"))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                continue
            large = line["key"] == "lfsFile"
            content = self.hub.uploaded[value["oid"]] if large else base64.b64decode(value["content"])
            (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / value["path"]).write_bytes(content)
        number = self.hub.repositories[name].commit(folder)
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{number}", "commitOid": number}

    def _answer(self, *, body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.asked.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if match is None:
            return self._refuse(404, "EntryNotFound")
        repository = self.hub.repositories.get(match[1])
        sent = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if repository is None or (repository.token and not repository.gated and sent != repository.token):
            return self._refuse(404 if sent else 401, "RepoNotFound")
        if repository.gated and sent != repository.token:
            return self._refuse(403 if sent else 401, "GatedRepo")
        commit = repository.resolved((api[3] or "main") if api else file[2])
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        folder = repository.commits[commit]
        if file:
            return self._file(folder, commit, file[3], body=body)
        return self._json(_tree(folder) if api[2] == "tree" else {"id": api[1], "sha": commit, "siblings": []})

    def _file(self, folder: Path, commit: str, name: str, *, body: bool) -> None:
        path = folder / name
        broken = name in self.hub.broken and self.command == "HEAD"
        if broken or not path.is_file():
            self._refuse(*((400, "Broken") if broken else (404, "EntryNotFound")), commit)
            return
        content = path.read_bytes()
        start, stop = 0, len(content)
        ranges = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if ranges:
            start, stop = int(ranges[1]), min(stop, int(ranges[2] or stop) + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if body:
            self._send(name, content[start:stop], whole=stop == len(content))

    def _send(self, name: str, content: bytes, *, whole: bool) -> None:
        limit = self.hub.cut_after.pop(name, None) if whole else None
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            if limit is not None and start + len(piece) > limit:
                self.wfile.flush()
                self.connection.shutdown(2)
                self.close_connection = True
                return
            self.wfile.write(piece)
            self.hub.served[name] = self.hub.served.get(name, 0) + len(piece)

    def _json(self, value: object, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _refuse(self, status: int, code: str, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()


def _tree(folder: Path) -> list[dict]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A Hub of its own, which huggingface_hub talks to; with an empty cache and no token."""
    from huggingface_hub import constants

    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": found}))
    found.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()
