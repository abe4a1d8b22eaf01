"""A small OpenAI-like server for what no real one can be made to do: refuse, fail, say nothing."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, "str | bytes | dict[str, Any] | Callable[[BaseHTTPRequestHandler], None]"]
PROMPT_TOKENS, COMPLETION_TOKENS = 100, 10


class ChatServer(BaseHTTPRequestHandler):
    """Answers as told, and remembers what it was asked.

    ``answer`` maps the last message to a status and a text, an object to send in place of a chat
    completion, the bytes of a whole body, or a function that sends something itself.
    """

    url: str
    answer: Callable[[str], Answer]
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request["path"], request["key"] = self.path, self.headers["Authorization"]
        type(self).asked.append(request)
        status, said = type(self).answer(request["messages"][-1]["content"])
        if callable(said):
            with suppress(OSError):
                said(self)
            return
        body = said if isinstance(said, bytes) else json.dumps(_body(status, said)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        # A client that lost patience is gone.
        with suppress(BrokenPipeError):
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Half a reply, then the connection is reset."""
    half(handler)
    # Closed with bytes to send, it is not ended in peace.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def half(handler: BaseHTTPRequestHandler) -> None:
    """Half of the body that the header promises, and the end of the connection."""
    body = json.dumps(_body(200, "yes")).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, for longer than anybody waits."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    for _ in range(600):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def busy(handler: BaseHTTPRequestHandler) -> None:
    """Rate limiting that says when to come again, in seconds."""
    body = json.dumps(_body(429, "rate limit")).encode()
    handler.send_response(429)
    handler.send_header("Retry-After", "0.9")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def _body(status: int, said: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(said, dict):
        return said
    if status != 200:
        return {"error": {"message": said}}
    message = {"role": "assistant", "content": said}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": COMPLETION_TOKENS,
            "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
        },
    }


@contextmanager
def serving() -> Iterator[type[ChatServer]]:
    mine = type("Mine", (ChatServer,), {"asked": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), mine)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    mine.url = f"http://127.0.0.1:{running.server_port}/v1"
    try:
        yield mine
    finally:
        running.shutdown()
        thread.join()
        running.server_close()
