"""A Hub on the loopback, in memory and content-addressed, with the faults of a network at request.

It speaks what huggingface_hub 2 asks for about models over plain HTTP, so HF_HUB_DISABLE_XET=1 is to be set. It has one
user, who may write where the name of a repository begins with his; others read what is not private, and open pull
requests. Needs nothing but the standard library.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
TOKEN = "hf_loopback"

_LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")
_ATTRIBUTES = ".gitattributes"
_MAIN = "refs/heads/main"
_REPO = r"((?:[^/]+/)?[^/]+)"
_REVISION = r"([^/]+)"


# ---------------------------------------------------------------------- what is stored


@dataclass(frozen=True)
class File:
    """The content of a file, in git or, behind a pointer, in the large file storage."""

    data: bytes = field(repr=False)
    large: bool = False

    @cached_property
    def sha256(self) -> str:
        """Name of the content in the large file storage."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def oid(self) -> str:
        """Name of the blob in git."""
        blob = self.data
        if self.large:
            blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(blob)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        """What the Hub tells clients to compare."""
        return self.sha256 if self.large else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        """Return the file's entry in a listing."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 130}
        return entry


@dataclass(frozen=True)
class Commit:
    """A state of a repository's files, and how it came about."""

    files: Mapping[str, File] = field(repr=False)
    message: str
    parent: Commit | None = field(default=None, repr=False)

    @cached_property
    def oid(self) -> str:
        """The commit's name, which its content and its past decide."""
        content = [sorted((path, file.oid) for path, file in self.files.items()), self.message]
        if self.parent is not None:
            content.append(self.parent.oid)
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class Repository:
    """Branches and pull requests, each at a commit."""

    def __init__(self, name: str, private: bool = False) -> None:
        self.name = name
        self.private = private
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES)
        self.refs = {_MAIN: Commit({_ATTRIBUTES: File(attributes.encode())}, "initial commit")}

    @property
    def owner(self) -> str:
        """The name before the slash."""
        return self.name.partition("/")[0]

    def ref(self, revision: str) -> str:
        """Return the full name of a branch or pull request."""
        return revision if revision.startswith("refs/") else f"refs/heads/{revision}"

    def find(self, revision: str = "main") -> Commit:
        """Return the commit that a branch, a pull request or a commit's name stands for."""
        if (commit := self.refs.get(self.ref(revision))) is not None:
            return commit
        for head in self.refs.values():
            for commit in _past(head):
                if commit.oid == revision:
                    return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits up to a revision, newest first, without the one that made the repository."""
        return _past(self.find(revision))[:-1]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the content of each file that was pushed."""
        return {path: file.data for path, file in self.find(revision).files.items() if path != _ATTRIBUTES}


def _past(commit: Commit | None) -> list[Commit]:
    past = []
    while commit is not None:
        past.append(commit)
        commit = commit.parent
    return past


# ---------------------------------------------------------------------- requests and answers


@dataclass(frozen=True)
class Request:
    """One request of a client."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        """The body, as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    """What is answered to a request."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False

    @classmethod
    def of(cls, content: Any, status: int = 200, **headers: str) -> Answer:
        """Return an answer in JSON; underscores in names of headers stand for hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, json.dumps(content).encode(), {"Content-Type": "application/json"} | named)


class Refusal(Exception):
    """An answer that is an error, in the Hub's words."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code

    @property
    def answer(self) -> Answer:
        """The refusal as it is sent."""
        headers = {"X-Error-Message": self.message} | ({"X-Error-Code": self.code} if self.code else {})
        return Answer.of({"error": self.message}, self.status, **headers)


@dataclass(frozen=True)
class Logged:
    """A request that was answered."""

    method: str
    path: str
    status: int


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        down: Every request is answered with 503.
        forbidden: Requests whose method and path match this regular expression are answered with 403.
        cuts: So many downloads are cut in the middle, math.inf for all; of these only files whose paths end with `cut`
            count.
    """

    down: bool = False
    forbidden: str | None = None
    cuts: float = 0
    cut: str = ""


# ---------------------------------------------------------------------- the server


class Hub:
    """The Hub: a context manager, or `start` and `close`.

    Attributes:
        repositories: What is stored, by name.
        faults: What goes wrong.
        log: The requests that were answered, oldest first.

    Example:
        ```python
        >>> from hub import Hub
        >>> with Hub() as hub:
        ...     print(hub.url)
        http://127.0.0.1:40123
        ```
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults = Faults()
        self.log: list[Logged] = []
        self._storage: dict[str, bytes] = {}
        self._announced: set[str] = set()
        self._lock = threading.Lock()
        self._server = _Server(self)

    @property
    def url(self) -> str:
        """Where it listens, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> Self:
        """Answer requests from now on, in a thread of its own."""
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="hub", daemon=True).start()
        return self

    def close(self) -> None:
        """Stop, and free the port."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def reset(self) -> None:
        """Forget everything: repositories, faults and requests."""
        with self._lock:
            self.repositories.clear()
            self._storage.clear()
            self._announced.clear()
            self.log.clear()
            self.faults = Faults()

    def uploads(self) -> list[Logged]:
        """Return the requests that brought a blob to the large file storage."""
        return [logged for logged in self.log if logged.method == "PUT" and logged.status == 200]

    def downloads(self, name: str = "") -> list[Logged]:
        """Return the requests that fetched a file, cut ones included; only those whose paths end with `name`."""
        return [
            logged
            for logged in self.log
            if logged.method == "GET" and logged.status in (200, 206) and "/resolve/" in logged.path
            if logged.path.endswith(name)
        ]

    def answer(self, request: Request) -> Answer:
        """Answer a request, and log it."""
        with self._lock:
            try:
                answer = self._route(request)
            except Refusal as refusal:
                answer = refusal.answer
            self.log.append(Logged(request.method, unquote(request.path), answer.status))
        return answer

    def _route(self, request: Request) -> Answer:
        if self.faults.down:
            raise Refusal(503, "Service Unavailable")
        line = f"{request.method} {request.path}"
        if self.faults.forbidden and re.search(self.faults.forbidden, line):
            raise Refusal(403, "Forbidden")
        for pattern, route in _ROUTES:
            if match := re.fullmatch(pattern, line):
                return route(self, request, *(unquote(part or "") for part in match.groups()))
        raise Refusal(404, f"Not found: {request.path}")

    # ------------------------------------------------------------------ who may do what

    def _is_user(self, request: Request) -> bool:
        """Tell whether the request is the user's; one without a token is anybody's."""
        authorization = request.headers.get("Authorization")
        if authorization is not None and authorization != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid credentials in Authorization header")
        return authorization is not None

    def _demand_user(self, request: Request) -> None:
        if not self._is_user(request):
            raise Refusal(401, "Invalid username or password.")

    def _readable(self, request: Request, name: str) -> Repository:
        is_user = self._is_user(request)
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not (is_user and repository.owner == USER)):
            # The Hub does not tell strangers which private repositories there are.
            if is_user:
                raise Refusal(404, "Repository not found", "RepoNotFound")
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        return repository

    def _writable(self, request: Request, name: str) -> Repository:
        repository = self._readable(request, name)
        self._demand_user(request)
        if repository.owner != USER and "create_pr" not in request.query:
            raise Refusal(403, f"You don't have the rights to write to {name}.")
        return repository

    # ------------------------------------------------------------------ routes: repositories

    def _whoami(self, request: Request) -> Answer:
        self._demand_user(request)
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return Answer.of({"type": "user", "id": "0", "name": USER, "fullname": USER, "orgs": [], "auth": token})

    def _create_repository(self, request: Request) -> Answer:
        self._demand_user(request)
        wanted = request.json
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not name.startswith(f"{USER}/"):
            raise Refusal(403, f"You don't have the rights to create {name}.")
        url = {"url": f"{self.url}/{name}"}
        if name in self.repositories:
            return Answer.of(url | {"error": "You already created this model repo"}, 409)
        self.repositories[name] = Repository(name, private=wanted.get("visibility") == "private")
        return Answer.of(url | {"name": name, "id": name})

    def _create_branch(self, request: Request, name: str, branch: str) -> Answer:
        repository = self._writable(request, name)
        if branch.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a branch: {branch}")
        if repository.ref(branch) in repository.refs:
            raise Refusal(409, f"Reference already exists: {branch}")
        repository.refs[repository.ref(branch)] = repository.find(request.json.get("startingPoint", "main"))
        return Answer.of({})

    def _info(self, request: Request, name: str, revision: str = "main") -> Answer:
        return Answer.of(self._described(self._readable(request, name), revision))

    def _list(self, request: Request) -> Answer:
        found = []
        for name in sorted(self.repositories):
            with suppress(Refusal):  # private ones of others
                found.append(self._described(self._readable(request, name)))
        wanted, (search, *_) = set(request.query.get("filter", [])), request.query.get("search", [""])
        found = [info for info in found if wanted <= set(info["tags"]) and search in info["id"]]
        return Answer.of(found[: int(request.query.get("limit", ["1000"])[0])])

    @staticmethod
    def _described(repository: Repository, revision: str = "main") -> dict[str, Any]:
        commit = repository.find(revision)
        return {
            "_id": repository.name,
            "id": repository.name,
            "modelId": repository.name,
            "author": repository.owner,
            "sha": commit.oid,
            "private": repository.private,
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "tags": _tags(commit),
            "createdAt": "2026-01-01T00:00:00.000Z",
            "lastModified": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def _refs(self, request: Request, name: str) -> Answer:
        refs: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, commit in self._readable(request, name).refs.items():
            kind = "pullRequests" if ref.startswith("refs/pr/") else "branches"
            refs[kind].append({"name": ref.rpartition("/")[2], "ref": ref, "targetCommit": commit.oid})
        return Answer.of(refs)

    # ------------------------------------------------------------------ routes: down

    def _tree(self, request: Request, name: str, revision: str, folder: str) -> Answer:
        commit = self._readable(request, name).find(revision)
        above = f"{folder.rstrip('/')}/" if folder else ""
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(commit.files.items()):
            if not path.startswith(above):
                continue
            parts = path.removeprefix(above).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                inner = above + "/".join(parts[:depth])
                entries[inner] = {"type": "directory", "path": inner, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = file.entry(path)
        if above and not entries:
            raise Refusal(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        return Answer.of(list(entries.values()), X_Repo_Commit=commit.oid)

    def _paths_info(self, request: Request, name: str, revision: str) -> Answer:
        files = self._readable(request, name).find(revision).files
        is_json = request.headers.get_content_type() == "application/json"
        paths = (request.json if is_json else parse_qs(request.body.decode())).get("paths", [])
        return Answer.of([files[path].entry(path) for path in paths if path in files])

    def _resolve(self, request: Request, name: str, revision: str, path: str) -> Answer:
        commit = self._readable(request, name).find(revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file is None:
            refusal = Refusal(404, "Entry not found", "EntryNotFound").answer
            return Answer(refusal.status, refusal.body, {**refusal.headers, "X-Repo-Commit": commit.oid})
        headers["ETag"] = f'"{file.etag}"'
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        cut = request.method == "GET" and self.faults.cuts > 0 and path.endswith(self.faults.cut)
        self.faults.cuts -= cut
        if (asked := request.headers.get("Range")) is None:
            return Answer(200, file.data, headers, cut)
        first, last = _range(asked, len(file.data))
        headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
        return Answer(206, file.data[first : last + 1], headers, cut)

    # ------------------------------------------------------------------ routes: up

    def _validate_yaml(self, request: Request) -> Answer:
        return Answer.of({"errors": [], "warnings": []})

    def _preupload(self, request: Request, name: str, revision: str) -> Answer:
        present = self._writable(request, name).find(revision).files
        modes = []
        for file in request.json["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(_LFS_SUFFIXES) else "regular"
            oid = present[path].etag if path in present else None
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer.of({"files": modes})

    def _lfs_batch(self, request: Request, name: str) -> Answer:
        self._readable(request, name)
        self._demand_user(request)
        objects = []
        for wanted in request.json["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self._storage:
                self._announced.add(wanted["oid"])
                entry["actions"] = {
                    "upload": {"href": f"{self.url}/storage/{wanted['oid']}"},
                    "verify": {"href": f"{self.url}/storage/verify"},
                }
            objects.append(entry)
        return Answer.of({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def _put(self, request: Request, oid: str) -> Answer:
        # No token is asked for: like a signed URL, this one is known to whom the batch was answered.
        if oid not in self._announced:
            raise Refusal(403, "Nobody announced this blob")
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "The blob has another digest")
        self._storage[oid] = request.body
        return Answer()

    def _verify(self, request: Request) -> Answer:
        wanted = request.json
        if len(self._storage.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "The blob is not there")
        return Answer.of({})

    def _commit(self, request: Request, name: str, revision: str) -> Answer:
        repository = self._writable(request, name)
        parent = repository.find(revision)
        header, *operations = (json.loads(line) for line in request.body.splitlines() if line)
        if (expected := header["value"].get("parentCommit", parent.oid)) != parent.oid:
            raise Refusal(412, f"A commit has happened since {expected}")
        files = dict(parent.files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        commit = Commit(files, header["value"]["summary"], parent)
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.url}/{name}/commit/{commit.oid}"}
        if "create_pr" in request.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            repository.refs[f"refs/pr/{number}"] = commit
            answer["pullRequestUrl"] = f"{self.url}/{name}/discussions/{number}"
        elif (ref := repository.ref(revision)) in repository.refs:
            repository.refs[ref] = commit
        else:
            raise Refusal(400, f"{revision} is no branch")
        return Answer.of(answer)

    def _apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            try:
                files[path] = File(base64.b64decode(value["content"], validate=True))
            except binascii.Error as error:
                raise Refusal(400, f"{path} is not in base64") from error
        elif key == "lfsFile":
            if value["oid"] not in self._storage:
                raise Refusal(400, f"The blob of {path} was not uploaded")
            files[path] = File(self._storage[value["oid"]], large=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        else:
            raise Refusal(400, f"Unknown operation: {key}")


def _range(asked: str, size: int) -> tuple[int, int]:
    """Return the first and the last byte that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
    if match is None or not any(match.groups()):
        raise Refusal(400, f"Invalid range: {asked}")
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    if start >= size:
        raise Refusal(416, "Requested range not satisfiable")
    return start, min(int(last), size - 1) if first and last else size - 1


def _tags(commit: Commit) -> list[str]:
    """Return the tags that the front matter of a card lists, and the one that the Hub makes of its base model."""
    if (card := commit.files.get("README.md")) is None or not card.data.startswith(b"---"):
        return []
    _, front, _ = card.data.decode().split("---", 2)
    of_base = [f"base_model:{name}" for name in re.findall(r"^base_model: *(\S+)$", front, re.M)]
    (listed,) = re.findall(r"^tags:\n((?:- .*\n)*)", front, re.M) or [""]
    return [line.removeprefix("- ") for line in listed.splitlines()] + of_base


_ROUTES: list[tuple[str, Callable[..., Answer]]] = [
    (r"GET /api/whoami-v2", Hub._whoami),
    (r"POST /api/repos/create", Hub._create_repository),
    (r"POST /api/validate-yaml", Hub._validate_yaml),
    (rf"POST /api/models/{_REPO}/branch/{_REVISION}", Hub._create_branch),
    (rf"POST /api/models/{_REPO}/preupload/{_REVISION}", Hub._preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Hub._lfs_batch),
    (r"PUT /storage/([0-9a-f]{64})", Hub._put),
    (r"POST /storage/verify", Hub._verify),
    (rf"POST /api/models/{_REPO}/commit/{_REVISION}", Hub._commit),
    (rf"POST /api/models/{_REPO}/paths-info/{_REVISION}", Hub._paths_info),
    (rf"GET /api/models/{_REPO}/tree/{_REVISION}(?:/(.*))?", Hub._tree),
    (rf"GET /api/models/{_REPO}/revision/{_REVISION}", Hub._info),
    (rf"GET /api/models/{_REPO}/refs", Hub._refs),
    (r"GET /api/models", Hub._list),
    (rf"GET /api/models/{_REPO}", Hub._info),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/{_REVISION}/(.+)", Hub._resolve),
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self._connections: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a new connection in a thread of its own."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Free the port, and end the connections that clients keep open."""
        super().server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the end of an answer would wait for the client's acknowledgement
    server: _Server

    def _serve(self) -> None:
        url = urlsplit(self.path)
        request = Request(self.command, url.path, parse_qs(url.query), self.headers, self._body())
        answer = self.server.hub.answer(request)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if answer.cut:
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the Hub keeps a log."""
