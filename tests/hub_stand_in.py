"""A hub on this machine: as much of the protocol of huggingface_hub as an upload and a download take."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub():
    """(address, {repository: {file: bytes}})."""
    repositories = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlsplit(self.path).path
            if path == "/api/repos/create":
                values = json.loads(body)
                name = "/".join(filter(None, (values.get("organization"), values["name"])))
                repositories.setdefault(name, {})
                return self.answer(200, {"url": f"{address}/{name}", "name": name, "id": name})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            name, _, what = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
            files = repositories[name]
            if _ and what == "preupload":
                told = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": told})
            for line in body.splitlines():
                values = json.loads(line)
                if values["key"] == "file":
                    files[values["value"]["path"]] = base64.b64decode(values["value"]["content"])
            return self.answer(200, {"commitUrl": f"{address}/{name}/commit/{SHA}", "commitOid": SHA, "success": True})

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            parts = path.strip("/").split("/")
            if parts[0] == "api":
                name = "/".join(parts[2:4])
                if name not in repositories:
                    return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                if "tree" in parts:
                    listed = [
                        {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for file, data in repositories[name].items()
                    ]
                    return self.answer(200, listed)
                siblings = [{"rfilename": file} for file in repositories[name]]
                return self.answer(
                    200, {"id": name, "modelId": name, "sha": SHA, "siblings": siblings, "tags": [], "private": False}
                )
            name, file = "/".join(parts[:2]), "/".join(parts[4:])
            data = repositories.get(name, {}).get(file)
            if data is None:
                return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
            return self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=SHA)

        do_HEAD = do_GET  # noqa: N815 - the name that the library calls

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, repositories
    finally:
        server.shutdown()
        server.server_close()
