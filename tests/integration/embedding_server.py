"""An HTTP server on loopback that speaks OpenAI's /v1/embeddings, with a real model behind it."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

Embed = Callable[[list[str]], np.ndarray]


class EmbeddingServer:
    """What it was asked, and how it shall behave."""

    def __init__(self, embed: Embed, model: str, key: str) -> None:
        self._embed, self.model, self._key = embed, model, key
        self._lock = threading.Lock()
        self.texts: list[str] = []
        """All texts that were answered, in order."""
        self.failures = 0
        """So many next requests get `failure_status`."""
        self.failure_status = 503
        self.requests = 0
        self.hold_after: int | None = None
        """Once so many texts are answered, requests wait until `release`."""
        self._released = threading.Event()
        self.url = ""

    def release(self) -> None:
        """Lets waiting requests go on, and holds none any more."""
        self.hold_after = None
        self._released.set()

    def answer(self, key: str | None, asked: dict) -> tuple[int, dict]:
        """Status and body."""
        with self._lock:
            self.requests += 1
            if key != f"Bearer {self._key}":
                return 401, {"error": {"message": f"Incorrect API key provided: {key}"}}
            if self.failures:
                self.failures -= 1
                return self.failure_status, {"error": {"message": "overloaded"}}
        if asked["model"] != self.model:
            return 404, {"error": {"message": f"no model {asked['model']}"}}
        if self.hold_after is not None and len(self.texts) >= self.hold_after:
            self._released.wait(120)
        with self._lock:
            vectors = self._embed(asked["input"])
            self.texts += asked["input"]
        data = [
            {"object": "embedding", "index": place, "embedding": vector.tolist()}
            for place, vector in enumerate(vectors)
        ]
        # Backwards: a client must go by the index.
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return 200, {"object": "list", "data": data[::-1], "model": self.model, "usage": usage}


@contextmanager
def embedding_server(embed: Embed, *, model: str, key: str) -> Iterator[EmbeddingServer]:
    """Serves until the block ends, on a port of its own."""
    state = EmbeddingServer(embed, model, key)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, body = 404, {"error": {"message": self.path}}
            if self.path == "/v1/embeddings":
                status, body = state.answer(self.headers["Authorization"], asked)
            content = json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client was killed, which is what a test does

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        state.release()
        server.shutdown()
        server.server_close()
