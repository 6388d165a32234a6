"""A web server on loopback that answers requests for parts of files, and can be made to fail."""

import http.server
import re
import threading
import time
from collections import Counter
from pathlib import Path


class RangeServer:
    """Serves the files of a folder; what it does wrong is set by attributes.

    Attributes:
        is_down: closes every connection without an answer.
        cut: of so many requests to come, only half of the answer is sent.
        ranges: answers with the whole file if False.
        forbidden: answers 403.
        gets: requests of parts that were answered, by path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_down, self.cut, self.ranges, self.missed, self.forbidden = False, 0, True, 0, False
        self.gets: Counter[str] = Counter()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                owner.answer(self, False)

            def do_GET(self) -> None:
                owner.answer(self, True)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def answer(self, to: http.server.BaseHTTPRequestHandler, with_body: bool) -> None:
        if self.is_down:
            self.missed += 1
            to.close_connection = True
            return
        if self.forbidden:
            to.send_error(403)
            return
        file = self.folder / to.path.lstrip("/")
        if not file.is_file():
            to.send_error(404)
            return
        content, status = file.read_bytes(), 200
        etag = f'"{file.stat().st_size}-{file.stat().st_mtime_ns}"'
        asked = re.fullmatch(r"bytes=(\d*)-(\d+)", to.headers.get("Range", ""))
        if asked and self.ranges:
            self.gets[to.path.lstrip("/")] += with_body
            first, last = asked.groups()
            content, status = content[int(first) : int(last) + 1] if first else content[-int(last) :], 206
        to.send_response(status)
        to.send_header("Content-Length", str(len(content)))
        to.send_header("ETag", etag)
        to.end_headers()
        if not with_body:
            return
        if self.cut:
            self.cut -= 1
            content, to.close_connection = content[: len(content) // 2], True
        to.wfile.write(content)

    def fails_for(self, requests: int) -> threading.Thread:
        """Goes down until so many requests have failed."""
        self.is_down, self.missed = True, 0

        def wait() -> None:
            while self.missed < requests:
                time.sleep(0.02)
            self.is_down = False

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
