"""A Hugging Face Hub small enough to run in a test, for the real huggingface_hub client.

It answers what hf_hub_download, dataset_info and list_repo_tree ask (look-ups, listings, files, ranges) and fails
on demand: ``hub.faults["GET a.parquet"] = ["500", "wrong"]`` spoils the next two GETs of that file ("GET api": of
any listing). The faults: an HTTP status, ``short`` (half the bytes, then a dead line), ``stall`` (half the bytes,
then silence), ``wrong`` (other bytes of the same length). A list that ends in ``...`` repeats its last fault for
ever. It also takes what HfApi.create_repo and create_commit send: large files by Git LFS, without Xet.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "beef"


def talk_to(hub, monkeypatch, cache):
    """Make huggingface_hub of this process talk to the fake Hub, with an empty cache and without pauses."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


class FakeHub:
    def __init__(self, files):
        self.files = files  # {path in the repository: bytes}
        self.faults = {}
        self.requests = []  # "METHOD path", in order
        self.visibility = None  # as create_repo asked for it; None: there is no repository yet
        self.tokens = set()  # that were sent
        self.uploaded = {}  # {sha256: bytes} of large files
        self.starts = []  # the first byte of each answer to a GET
        self.closing = threading.Event()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fault(self, method, name):
        waiting = self.faults.get(f"{method} {name.rsplit('/', 1)[-1]}", [])
        if len(waiting) > 1 and waiting[1] is ...:
            return waiting[0]
        return waiting.pop(0) if waiting else None

    def count(self, method, ending):
        return sum(r.startswith(method) and r.endswith(ending) for r in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_PUT(self):
        oid = self.path.rsplit("/", 1)[1]
        self.hub.uploaded[oid] = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(self.hub.uploaded[oid]).hexdigest() == oid
        self.reply(200, b"")

    def do_POST(self):
        path, hub = unquote(urlsplit(self.path).path), self.hub
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        hub.requests.append(f"POST {path}")
        hub.tokens.add(self.headers["Authorization"])
        if fault := hub.fault("POST", path.removesuffix("/main")):
            return self.reply(int(fault), b'{"error": "no"}')
        take = {"create": self.create, "validate-yaml": lambda sent: {}, "preupload": self.preupload}
        take |= {"batch": self.batch, "commit": self.commit}
        answer = json.dumps(take[path.removesuffix("/main").rsplit("/", 1)[1]](sent)).encode()
        self.reply(200, answer, {"Content-Type": "application/json"})

    def create(self, sent):
        self.hub.visibility = self.hub.visibility or json.loads(sent).get("visibility", "public")
        return {"url": f"{self.hub.endpoint}/a/b"}

    def preupload(self, sent):
        modes = {True: "lfs", False: "regular"}
        names = [file["path"] for file in json.loads(sent)["files"]]
        large = [modes[name.endswith(".safetensors")] for name in names]
        files = zip(names, large, strict=True)
        return {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in files]}

    def batch(self, sent):
        place = f"{self.hub.endpoint}/lfs/"
        objects = json.loads(sent)["objects"]
        return {"objects": [o | {"actions": {"upload": {"href": place + o["oid"]}}} for o in objects]}

    def commit(self, sent):
        for line in sent.splitlines():
            kind, value = json.loads(line).values()
            if kind == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                self.hub.files[value["path"]] = self.hub.uploaded[value["oid"]]
            elif kind == "deletedFile":
                del self.hub.files[value["path"]]
        return {"commitUrl": f"{self.hub.endpoint}/a/b/commit/{COMMIT}", "commitOid": COMMIT}

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # the client asks once a day, whatever it is called for
            return self.reply(404, b"{}")
        self.hub.requests.append(f"{self.command} {path}")
        if path.startswith("/api/"):
            if fault := self.hub.fault("GET", "api"):
                self.reply(int(fault), b"{}")
            elif "/tree/" in path:
                self.reply(200, json.dumps(self.tree(path.split("/tree/")[1].partition("/")[2])).encode())
            else:
                found = {"id": "a/b", "sha": COMMIT, "tags": [], "private": self.hub.visibility == "private"}
                siblings = [{"rfilename": name} for name in self.hub.files]
                self.reply(200, json.dumps(found | {"siblings": siblings}).encode())
        else:
            self.send_file(path.split("/resolve/")[1].partition("/")[2])

    def tree(self, folder):
        return [
            {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
                "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134},
            }
            for name, content in self.hub.files.items()
            if name.startswith(folder)
        ]

    def send_file(self, name):
        fault = self.hub.fault(self.command, name)
        if name not in self.hub.files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        if fault and fault.isdigit():
            return self.reply(int(fault), b"")
        if fault == "stall" and self.command == "HEAD":
            return self.hang_up(silent=True)
        content = self.hub.files[name]
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{sha256}"', "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        headers |= {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if fault == "wrong":
            content = bytes(byte ^ 1 for byte in content)
        status, start = 200, 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET":
            self.hub.starts.append(start)
        self.reply(status, content[start:], headers, fault)

    def reply(self, status, body, headers=None, fault=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = fault in ("short", "stall")
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.hang_up(silent=fault == "stall")

    def hang_up(self, silent):
        self.wfile.flush()
        if silent:
            self.hub.closing.wait()
        self.close_connection = True
        self.connection.close()
