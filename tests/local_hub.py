"""A Hub of one's own: an HTTP server in a thread that answers what huggingface_hub asks, from memory."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

#: token -> the account that it writes as.
TOKENS = {"hf_user": "user", "hf_guest": "guest"}


@dataclass
class Repository:
    """``commits``: sha -> files by name. ``refs``: branches and tags -> sha."""

    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)

    def commit(self, branch, files):
        sha = hashlib.sha1(f"{branch}{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha

    def sha_of(self, revision):
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """Attributes:
    repositories: by id. lfs: whether *.safetensors go to large file storage. stored: what lies there, by sha256.
    requests: (method, path) of all that was asked. broken: answer 500 to everything. sizes: by file name, lengths that
        are claimed instead of the real ones.
    """

    def __init__(self, url):
        self.url, self.repositories, self.lfs, self.stored = url, {}, False, {}
        self.requests, self.broken, self.sizes = [], False, {}

    def create(self, repo_id, **how):
        self.repositories[repo_id] = repository = Repository(**how)
        repository.commit("main", {".gitattributes": b""})
        return repository


class Refused(Exception):
    """An answer of (status, X-Error-Code, X-Error-Message)."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        hub.requests.append((self.command, path))
        try:
            if hub.broken:
                raise Refused(500, "", "Internal error")
            bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if bearer and bearer not in TOKENS:
                raise Refused(401, "", "Invalid credentials in Authorization header")
            self.account = TOKENS.get(bearer)
            for pattern, answer in self.ROUTES:
                found = re.fullmatch(pattern, path)
                if found:
                    return answer(self, hub, **found.groupdict())
            raise Refused(404, "", f"no such place: {path}")
        except Refused as error:
            status, code, message = error.args
            content = json.dumps({"error": message}).encode()
            named = {"X-Error-Code": code} if code else {}
            self.answer(content, status, {**named, "X-Error-Message": message})

    do_POST = do_PUT = do_HEAD = do_GET

    def answer(self, content, status=200, headers=None, length=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def say(self, data, status=200):
        self.answer(json.dumps(data).encode(), status, {"Content-Type": "application/json"})

    def repository(self, hub, id, write=False):
        """The one that is asked for, if this account may."""
        repository = hub.repositories.get(id)
        if repository is None or (repository.private and self.account != id.split("/")[0]):
            raise Refused(404 if self.account else 401, "RepoNotFound", "Repository not found")
        if repository.gated and self.account != id.split("/")[0]:
            raise Refused(403 if self.account else 401, "GatedRepo", "Access to this repository is restricted")
        if write and self.account != id.split("/")[0]:
            raise Refused(403 if self.account else 401, "", "You have no write access to this repository")
        return repository

    def create(self, hub):
        asked = json.loads(self.body)
        if self.account is None:
            raise Refused(401, "", "Invalid username or password.")
        id = f"{asked.get('organization') or self.account}/{asked['name']}"
        if self.account != id.split("/")[0]:
            raise Refused(403, "", f"You don't have the rights to create a model under {id.split('/')[0]}")
        if id in hub.repositories:
            return self.say({"error": "You already created this model repo", "url": f"{hub.url}/{id}"}, 409)
        hub.create(id, private=bool(asked.get("private") or asked.get("visibility") == "private"))
        self.say({"url": f"{hub.url}/{id}", "name": id})

    def validate(self, hub):
        if "license: no-such-license" in json.loads(self.body)["content"]:
            message = '"license" must be one of [apache-2.0, ...]'
            return self.say({"errors": [{"message": message}], "warnings": []}, 400)
        self.say({"errors": [], "warnings": []})

    def info(self, hub, id, revision="main"):
        repository = self.repository(hub, id)
        sha = self.sha(repository, revision)
        siblings = [{"rfilename": name} for name in repository.commits[sha]]
        self.say({"id": id, "private": repository.private, "sha": sha, "siblings": siblings, "tags": []})

    def sha(self, repository, revision):
        sha = repository.sha_of(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def ref(self, hub, id, name):
        repository = self.repository(hub, id, write=True)
        if name in repository.refs:
            raise Refused(409, "", f"Reference already exists: {name}")
        repository.refs[name] = repository.refs["main"]
        self.say({}, 201)

    def tag(self, hub, id, revision):
        repository = self.repository(hub, id, write=True)
        repository.refs[json.loads(self.body)["tag"]] = self.sha(repository, revision)
        self.say({}, 201)

    def preupload(self, hub, id, revision):
        repository = self.repository(hub, id, write=True)
        self.sha(repository, revision)
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if hub.lfs and file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.say({"files": modes})

    def batch(self, hub, id):
        self.repository(hub, id, write=True)
        objects = [
            {**part, "actions": {"upload": {"href": f"{hub.url}/storage/{part['oid']}"}}}
            for part in json.loads(self.body)["objects"]
        ]
        self.say({"transfer": "basic", "objects": objects})

    def store(self, hub, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "", "another content than was announced")
        hub.stored[oid] = self.body
        self.answer(b"")

    def commit(self, hub, id, revision):
        repository = self.repository(hub, id, write=True)
        files = dict(repository.commits[self.sha(repository, revision)])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.stored[value["oid"]]
        sha = repository.commit(revision, files)
        self.say({"commitUrl": f"{hub.url}/{id}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None})

    def resolve(self, hub, id, revision, name):
        repository = self.repository(hub, id)
        sha = self.sha(repository, revision)
        if name not in repository.commits[sha]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content = repository.commits[sha][name]
        etag = hashlib.sha256(content).hexdigest()
        self.answer(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": sha}, hub.sizes.get(name))

    ID = r"(?P<id>[\w.-]+/[\w.-]+)"
    ROUTES = (
        ("/api/repos/create", create),
        ("/api/validate-yaml", validate),
        (rf"/api/models/{ID}", info),
        (rf"/api/models/{ID}/revision/(?P<revision>.+)", info),
        (rf"/api/models/{ID}/branch/(?P<name>.+)", ref),
        (rf"/api/models/{ID}/tag/(?P<revision>.+)", tag),
        (rf"/api/models/{ID}/preupload/(?P<revision>.+)", preupload),
        (rf"/api/models/{ID}/commit/(?P<revision>.+)", commit),
        (rf"/{ID}\.git/info/lfs/objects/batch", batch),
        (r"/storage/(?P<oid>\w+)", store),
        (rf"/{ID}/resolve/(?P<revision>.+)/(?P<name>[^/]+)", resolve),
    )


@contextmanager
def local_hub():
    """A running server's ``Hub``; the client asks it, as ``HF_ENDPOINT`` would make it do."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            url = server.hub.url
            patch.setattr(constants, "ENDPOINT", url)
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
            yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
