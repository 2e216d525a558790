"""A server that answers with any bytes, in its thread."""

import json
from http.server import BaseHTTPRequestHandler

from threaded_server import ThreadedServer


def response(content, status="200 OK", headers=(), length=None):
    """The bytes of an HTTP response: ``content`` as it is, or as JSON; ``length``: what it says of its own."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.0 {status}", f"Content-Length: {len(data) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


class RawServer(ThreadedServer):
    """Answers each request with ``answer(path)``; ``requests`` has (path, headers) of all."""

    def __init__(self, answer):
        self.requests = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, dict(self.headers)))
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.wfile.write(answer(self.path))

            do_POST = do_GET

        super().__init__(Handler)
