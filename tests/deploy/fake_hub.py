"""A Hugging Face of our own on loopback: one repository, and connections that break on request."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """What it holds, what was asked of it, and the byte of every file at which connections break."""

    def __init__(self, repository: str, files: Mapping[str, bytes]) -> None:
        self.repository = repository
        self.files = dict(files)
        self.asked: list[tuple[str, str]] = []  # file, its Range
        self.breaks_at: int | None = None
        self.sums: dict[str, str] = {}  # SHA-256 that it announces
        self.commit = COMMIT
        self.url = ""

    def fetched(self) -> list[str]:
        """Files of which something was sent, in order, each once."""
        return list(dict.fromkeys(name for name, _ in self.asked))


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = self.path.split("?")[0]
            if path.startswith(f"/api/models/{hub.repository}"):
                siblings: list[dict[str, object]] = []
                for name, content in hub.files.items():
                    siblings.append({"rfilename": name, "size": len(content)})
                    if name in hub.sums:
                        siblings[-1]["lfs"] = {"sha256": hub.sums[name], "size": len(content), "pointerSize": 1}
                self._send(200, json.dumps({"id": hub.repository, "sha": hub.commit, "siblings": siblings}).encode(),
                           {"content-type": "application/json"}, with_body)
            elif path.startswith(f"/{hub.repository}/resolve/{hub.commit}/"):
                self._file(path.rsplit("/", 1)[-1], with_body)
            else:
                self._send(404, b"", {"x-error-code": "RepoNotFound"}, with_body)

        def _file(self, name: str, with_body: bool) -> None:
            content = hub.files[name]
            digest = hashlib.sha256(content).hexdigest()
            headers = {"x-repo-commit": hub.commit, "etag": f'"{digest}"', "accept-ranges": "bytes"}
            if not with_body:
                return self._send(200, content, headers, with_body)
            asked = self.headers.get("range", "")
            hub.asked.append((name, asked))
            unchanged = self.headers.get("if-range", headers["etag"]) == headers["etag"]
            first = int(asked.removeprefix("bytes=").split("-")[0]) if asked and unchanged else 0
            part = content[first:]
            if first:
                headers["content-range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            most = None
            if hub.breaks_at is not None and len(content) > hub.breaks_at:
                most = max(0, hub.breaks_at - first)
            self._send(206 if first else 200, part, headers, with_body, most)

        def _send(
            self, status: int, body: bytes, headers: Mapping[str, str], with_body: bool, most: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body if most is None else body[:most])
            if most is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
