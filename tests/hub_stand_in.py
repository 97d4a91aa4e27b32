"""A small hub on this machine: repositories with branches, large files by LFS, and a record of every request."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

_NO_REPO = {"error": "Repository not found"}
TOKEN = "hf_aSecretThatNobodyMaySee"


class Hub(ThreadingHTTPServer):
    """Its state, which tests look at and set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str]] = []
        """Method and path, in order."""
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        """By repository and branch, the files."""
        self.private: dict[str, bool] = {}
        self.commits: list[dict[str, Any]] = []
        """repo, branch, summary, and the paths that it changed."""
        self.large: dict[str, bytes] = {}
        """What was sent by LFS, by its sha256."""
        self.refusals: dict[str, int] = {}
        """Status by the beginning of a path: such requests are refused, with the request's own login in the message."""

    def paths(self, beginning: str) -> list[str]:
        return [path for _, path in self.requests if path.startswith(beginning)]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def _serve(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        body = self._read_body()
        self.server.requests.append((self.command, self.path))
        login = self.headers.get("Authorization")
        for beginning, status in self.server.refusals.items():
            if self.path.startswith(beginning):
                return self._answer({"error": f"refused {login}"}, status)
        if not self.path.startswith(("/large/", "/api/validate-yaml")) and login != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        return self._answer(*self._route(body))

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: Any, status: int = 200) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status >= 400 and isinstance(content, dict) and "error" in content:
            self.send_header("X-Error-Message", content["error"])
            if content == _NO_REPO:
                self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _route(self, body: bytes) -> tuple[Any, int] | tuple[Any]:
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if parts[0] == "large":
            return self._keep(parts[1], body)
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return (self._batch(json.loads(body)),)
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:], body)
        if parts[2:3] == ["resolve"]:
            content = self.server.repos.get("/".join(parts[:2]), {}).get(parts[3], {}).get("/".join(parts[4:]))
            return (content,) if content is not None else (_NO_REPO, 404)
        return {"error": "no such path"}, 404

    def _create(self, asked: dict[str, Any]) -> tuple[Any, int]:
        repo = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{repo}", "error": "You already created this model repo"}
        if repo in self.server.repos:
            return answer, 409
        self.server.repos[repo] = {"main": {}}
        self.server.private[repo] = asked.get("visibility") == "private"
        return answer, 200

    def _validate(self, card: str) -> tuple[Any, int]:
        head = yaml.safe_load(card.split("---")[1])
        errors = [] if head.get("license") else [{"message": '"license" is required'}]
        return {"errors": errors, "warnings": []}, 400 if errors else 200

    def _keep(self, oid: str, body: bytes) -> tuple[Any, int]:
        if hashlib.sha256(body).hexdigest() != oid:
            return {"error": "another sha256"}, 422
        self.server.large[oid] = body
        return {}, 200

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for wanted in asked["objects"]:
            known = wanted["oid"] in self.server.large
            action = {"actions": {"upload": {"href": f"{self.server.url}/large/{wanted['oid']}"}}}
            objects.append(wanted if known else wanted | action)
        return {"transfer": "basic", "objects": objects}

    def _api(self, repo: str, rest: list[str], body: bytes) -> tuple[Any, int] | tuple[Any]:
        branches = self.server.repos.get(repo)
        if branches is None:
            return _NO_REPO, 404
        match rest:
            case [] | ["revision", _]:
                private = self.server.private[repo]
                return ({"id": repo, "private": private, "sha": self._oid(repo), "tags": [], "siblings": []},)
            case ["branch", branch]:
                branches.setdefault(branch, dict(branches["main"]))
                return ({},)
            case ["preupload", branch]:
                held = branches[branch]
                return ({"files": [self._mode(held, file) for file in json.loads(body)["files"]]},)
            case ["commit", branch]:
                return (self._commit(repo, branch, [json.loads(line) for line in body.splitlines()]),)
        return {"error": "no such path"}, 404

    def _mode(self, held: dict[str, bytes], file: dict[str, Any]) -> dict[str, Any]:
        path, content = file["path"], held.get(file["path"])
        is_large = path.endswith(".safetensors")
        oid = None
        if content is not None:
            git = hashlib.sha1(b"blob %d\0" % len(content) + content)
            oid = (hashlib.sha256(content) if is_large else git).hexdigest()
        return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}

    def _oid(self, repo: str) -> str:
        made = [commit for commit in self.server.commits if commit["repo"] == repo]
        return hashlib.sha1(f"{repo} {len(made)}".encode()).hexdigest()

    def _commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        held, header = self.server.repos[repo][branch], lines[0]["value"]
        paths = []
        for line in lines[1:]:
            value = line["value"]
            paths.append(value["path"])
            is_large = line["key"] == "lfsFile"
            held[value["path"]] = self.server.large[value["oid"]] if is_large else base64.b64decode(value["content"])
        self.server.commits.append({"repo": repo, "branch": branch, "summary": header["summary"], "paths": paths})
        oid = self._oid(repo)
        return {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid}


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield hub
        hub.shutdown()


def use_hub(monkeypatch: Any, url: str, home: Any) -> None:
    """Point the hub's library of this process at `url`, with a login, no cache and no files by Xet."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    files = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", f"{url}{files}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
