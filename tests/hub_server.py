"""A small Hub on loopback: repositories in memory, as much of the Hub's HTTP as pushing and loading a model takes.

    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path)   # clients of this process; other processes take `hub.environment(folder)`

A commit is applied as a whole or not at all. `hub.break_at("PUT", "/lfs/")` makes requests fail from then on.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub

TOKEN = "hf_" + "loopbacktoken" * 3
USER = "someone"


@dataclass
class Repository:
    """Commits, oldest first: their sha and the content of every file by name."""

    is_private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)

    def add(self, changes: dict[str, bytes | None]) -> str:
        """A new commit with changed and (None) removed files; returns its sha."""
        files = {**(self.commits[-1][1] if self.commits else {}), **changes}
        kept = {name: content for name, content in files.items() if content is not None}
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(kept)}".encode()).hexdigest()
        self.commits.append((sha, kept))
        return sha


class HubServer:
    """The server, in a thread of its own."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens_seen: set[str] = set()
        self._broken: tuple[str, str, int] | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def break_at(self, method: str, part: str, status: int = 500) -> None:
        """Answer requests of a method, whose path has this part, with an error until `mend`."""
        self._broken = (method, part, status)

    def mend(self) -> None:
        self._broken = None

    def fails(self, method: str, path: str) -> int | None:
        if self._broken and method == self._broken[0] and self._broken[1] in path:
            return self._broken[2]
        return None

    def files(self, repo_id: str) -> dict[str, bytes]:
        """Content of the newest commit."""
        return self.repositories[repo_id].commits[-1][1]

    def environment(self, folder: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables for a process that is to use this Hub, with caches of its own."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_XET": "1"}
        return {**variables, "HF_HUB_DISABLE_TELEMETRY": "1", **({"HF_TOKEN": token} if token else {})}

    def use(self, monkeypatch: Any, folder: Path, token: str | None = TOKEN) -> None:
        """Send the clients of this process here: they read their variables when they are imported."""
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(folder / "tokens"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between attempts
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            monkeypatch.delenv("HF_TOKEN", raising=False)


def _is_large(name: str, size: int) -> bool:
    return name.endswith((".safetensors", ".png", ".bin")) or size > 10 << 20


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            """Nothing on stderr."""

        def do_HEAD(self) -> None:
            self.answer_request()

        def do_GET(self) -> None:
            self.answer_request()

        def do_POST(self) -> None:
            self.answer_request()

        def do_PUT(self) -> None:
            self.answer_request()

        def answer_request(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            hub.tokens_seen.add(self.token)
            status = hub.fails(self.command, path)
            if status:
                # as careless as a proxy that repeats what it was sent
                return self.answer({"error": f"broken here; you sent Authorization: Bearer {self.token}"}, status)
            if path == "/":
                return self.answer({})
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if path.startswith("/lfs/"):
                return self.answer_large_file(path)
            if path == "/api/whoami-v2" or path == "/api/repos/create":
                if self.token != TOKEN:
                    return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
                user = {"type": "user", "name": USER, "auth": {"type": "access_token"}, "orgs": []}
                return self.answer(user) if path == "/api/whoami-v2" else self.create()
            return self.answer_repository(path)

        def answer_repository(self, path: str) -> None:
            words = path.strip("/").split("/")
            is_api = words[:2] == ["api", "models"]
            owner, name, *rest = words[2:] if is_api else words
            repo_id = f"{owner}/{name.removesuffix('.git')}"
            repository = hub.repositories.get(repo_id)
            if repository is None or (repository.is_private and self.token != TOKEN):
                return self.missing("RepoNotFound", 401)  # the Hub does not tell one from the other
            if self.command in ("POST", "PUT") and self.token != TOKEN:
                return self.answer({"error": "no permission"}, 403)
            if rest[:1] == ["preupload"]:
                return self.preupload(repository)
            if rest[:1] == ["commit"]:
                return self.commit(repo_id, repository)
            if rest == ["info", "lfs", "objects", "batch"]:
                return self.batch()
            revision = rest[1] if len(rest) > 1 else "main"
            found = repository.files(revision)
            if found is None:
                return self.missing("RevisionNotFound", 404)
            sha, files = found
            if rest[:1] == ["resolve"]:
                return self.resolve(sha, files, "/".join(rest[2:]))
            if rest[:1] == ["tree"]:
                return self.answer([_tree_entry(name, content) for name, content in files.items()])
            siblings = [{"rfilename": name} for name in sorted(files)]
            private = repository.is_private
            self.answer({"id": repo_id, "modelId": repo_id, "sha": sha, "private": private, "siblings": siblings})

        def create(self) -> None:
            asked = json.loads(self.body)
            repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
            if not repo_id.startswith(f"{USER}/"):
                return self.answer({"error": f"You don't have the rights to create a model under {repo_id}"}, 403)
            answer = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
            if repo_id in hub.repositories:
                return self.answer({**answer, "error": "You already created this model repo"}, 409)
            hub.repositories[repo_id] = Repository(asked.get("private") or asked.get("visibility") == "private")
            hub.repositories[repo_id].add({".gitattributes": b"*.safetensors filter=lfs\n"})
            self.answer(answer)

        def preupload(self, repository: Repository) -> None:
            present = repository.commits[-1][1]
            modes = []
            for entry in json.loads(self.body)["files"]:
                name = entry["path"]
                mode = "lfs" if _is_large(name, entry["size"]) else "regular"
                oid = _oid(present[name], mode) if name in present else None
                modes.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.answer({"files": modes})

        def batch(self) -> None:
            objects = []
            for entry in json.loads(self.body)["objects"]:
                known = entry["oid"] in hub.large_files
                upload = {"href": f"{hub.endpoint}/lfs/{entry['oid']}", "header": {}}
                verify = {"href": f"{hub.endpoint}/lfs/verify", "header": {}}
                objects.append(entry if known else {**entry, "actions": {"upload": upload, "verify": verify}})
            self.answer({"transfer": "basic", "objects": objects})

        def answer_large_file(self, path: str) -> None:
            if path == "/lfs/verify":
                entry = json.loads(self.body)
                whole = len(hub.large_files.get(entry["oid"], b"")) == entry["size"]
                return self.answer({}, 200 if whole else 422)
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self.answer({"error": "another checksum"}, 400)
            hub.large_files[oid] = self.body
            return self.answer({})

        def commit(self, repo_id: str, repository: Repository) -> None:
            changes: dict[str, bytes | None] = {}
            for line in self.body.splitlines():
                entry = json.loads(line)
                kind, value = entry["key"], entry["value"]
                if kind == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    if value["oid"] not in hub.large_files:
                        return self.answer({"error": f"{value['path']} was not uploaded"}, 400)
                    changes[value["path"]] = hub.large_files[value["oid"]]
                elif kind == "deletedFile":
                    changes[value["path"]] = None
            sha = repository.add(changes)
            self.answer({"commitUrl": f"{hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True})

        def resolve(self, sha: str, files: dict[str, bytes], name: str) -> None:
            if name not in files:
                return self.missing("EntryNotFound", 404, {"X-Repo-Commit": sha})
            content = files[name]
            mode = "lfs" if _is_large(name, len(content)) else "regular"
            headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(content, mode)}"'}
            if mode == "lfs":
                headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
            self.send(content, 200, headers, "application/octet-stream")

        def missing(self, code: str, status: int, headers: dict[str, str] | None = None) -> None:
            self.answer({"error": code}, status, {"X-Error-Code": code, **(headers or {})})

        def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send(json.dumps(content).encode(), status, headers or {}, "application/json")

        def send(self, body: bytes, status: int, headers: dict[str, str], kind: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _oid(content: bytes, mode: str) -> str:
    """Name of a content: its sha256 as a large file, git's own as another."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _oid(content, "regular")}
    if _is_large(name, len(content)):
        entry["lfs"] = {"oid": _oid(content, "lfs"), "size": len(content), "pointerSize": 134}
    return entry
