"""A server that answers with any bytes, in its thread."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def response(content, status="200 OK", headers=(), length=None):
    """The bytes of an HTTP response: ``content`` as it is, or as JSON; ``length``: what it says of its own."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.0 {status}", f"Content-Length: {len(data) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


class RawServer:
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

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
