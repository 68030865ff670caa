"""Language models of tests: a small real HTTP server on loopback that speaks OpenAI's chat protocol, and misbehaves
when it is told to; and engines in this process."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rankdistill.teachers.llm.base import Answer, Backend, Request

Body = dict[str, Any]


class Engine(Backend):
    """Answers a chunk of requests, last first, as `says` tells it; a word is a token."""

    type = "engine"
    decodings = frozenset({"generate", "first", "constrained"})

    def __init__(self, says: Callable[[Request], Answer] | None = None, name: str = "engine") -> None:
        self.says, self.name = says or self.say, name
        self.asked: list[Request] = []

    def say(self, request: Request) -> Answer:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return self.name

    def describe(self) -> dict[str, Any]:
        return {"type": self.type}

    def count_tokens(self, request: Request) -> int:
        return sum(self.count_text([message["content"] for message in request.messages]))

    def count_text(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        for number, request in reversed(list(requests)):  # any order will do
            self.asked.append(request)
            yield number, self.says(request)


# -- the protocol -----------------------------------------------------------------------------------------------------


def completion(text: str, body: Body, logprobs: list[Body] | None = None, finish: str = "stop") -> Body:
    """A chat completion; usage counts words."""
    words = sum(len(message["content"].split()) for message in body["messages"])
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
        "logprobs": {"content": logprobs} if logprobs is not None else None,
    }
    usage = {"prompt_tokens": words, "completion_tokens": len(text.split()), "total_tokens": 0}
    whole = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"]}
    return {**whole, "choices": [choice], "usage": usage}


def step(token: str, top: dict[str, float]) -> Body:
    """One token of an answer with the log-probabilities of its step."""
    entries = [{"token": name, "logprob": value, "bytes": None} for name, value in top.items()]
    return {"token": token, "logprob": top.get(token, -0.1), "bytes": None, "top_logprobs": entries}


def by_number(body: Body) -> Body:
    """Ranks the passages of a listwise prompt ("[3] ... 17") by the last number in each (none: 0), largest first."""
    passages = re.findall(r"^\[(\w+)\] (.*)$", body["messages"][-1]["content"], re.MULTILINE)
    ranked = sorted(passages, key=lambda item: -int((re.findall(r"\d+", item[1]) or ["0"])[-1]))
    if body.get("logprobs"):
        top = {name: -float(place) / 4 - 0.1 for place, (name, _) in enumerate(ranked[: body["top_logprobs"]])}
        return completion(f"[{ranked[0][0]}", body, [step("[", {"[": -0.01}), step(ranked[0][0], top)])
    return completion(" > ".join(f"[{name}]" for name, _ in ranked), body)


def failure(
    status: int, message: str = "no", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """An error as OpenAI's protocol words it."""
    return status, headers or {}, json.dumps({"error": {"message": message, "type": "x"}}).encode()


class Server(ThreadingHTTPServer):
    """Calls `respond(body, number)` for each request, in order of arrival; what it returns is sent.

    `respond` gives a body to send with status 200, or (status, headers, bytes), or None for a connection cut short.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, respond: Callable[[Body, int], Any] = lambda body, _: by_number(body)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond = respond
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        pass  # clients of these tests are killed

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def asked(self) -> Counter[str]:
        """How often each prompt came."""
        return Counter(json.dumps(body["messages"]) for body in self.bodies)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.times.append(time.monotonic())
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            reply = server.respond(body, number)
        finally:
            with server.lock:
                server.at_once -= 1
        try:
            self._send(reply)
        except OSError:
            pass  # the client gave up

    def _send(self, reply: Any) -> None:
        if reply is None:  # more is promised than comes
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
            self.wfile.write(head + b'{"ch')
            self.close_connection = True
            return
        status, headers, content = reply if isinstance(reply, tuple) else (200, {}, json.dumps(reply).encode())
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(respond: Callable[[Body, int], Any] = lambda body, _: by_number(body)) -> Iterator[Server]:
    server = Server(respond)
    try:
        yield server
    finally:
        server.close()
