"""The search page on a local address: a small HTTP server for one person on one machine.

    /                                   the page, with its style and script beside it
    /api/about                          collection, columns, limits, example queries
    /api/search?q=TEXT&k=10&teacher=all what `SearchPage.search` answers; `k` and `teacher` may be left out

Errors are JSON, {"error": {"what", "where", "fix"}}: 400 wrong question, 403 asked through another name or site, 404,
405, 413 a body, 431 a long request, 500, 503 busy (with Retry-After).

What keeps it safe: a fixed set of routes and no file access; only GET and HEAD; the Host header must name this machine
(a foreign page that re-points its name at 127.0.0.1 gets 403), and no other site may ask; one search at a time, few
waiting, few connections, a deadline and a size for every request, and h11's one reading of where it ends; a content
policy that runs nothing but the page's script. The usual ASGI servers have no deadline for a request that drips in.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import h11

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.search_page import SearchPage
from rankdistill.progress import warn

PAGE = Path(__file__).parent / "page"
JSON = "application/json; charset=utf-8"
FILES = ("base.css", "base.js", "search.css", "search.js", "search.svg")
ASSETS = {"/": "search.html", **{f"/{name}": name for name in FILES}}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PARAMETERS = {"/api/about": (), "/api/search": ("q", "k", "teacher")}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "rankdistill",
    "Connection": "close",
}
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
LARGEST_REQUEST = 65_536  # bytes of a request's head
LINGER = 1.0  # seconds that a refused client is read on: closing with bytes unread would cut off the answer


class _Answer(NamedTuple):
    status: int
    body: dict[str, Any] | bytes
    kind: str = JSON
    allow: str = ""


class PageServer:
    """Takes its port at once, so that a taken one is known before models are loaded; answers once `run` is called.

    Args:
        host: an address or name of this machine.
        port: 0 picks a free one.

    Raises:
        RankdistillError: the port is taken or not allowed, or the host is no address of this machine.
        UsageError: a port that is none.
    """

    connections = 32  # open at once
    waiting = 8  # searches that wait for the one before
    patience = 20.0  # seconds a search waits for its turn
    request_seconds = 10.0  # a request must have arrived by then
    grace = 30.0  # seconds that answers in the making are given at the end

    def __init__(self, host: str = "127.0.0.1", port: int = 8080) -> None:
        if not 0 <= port <= 65_535:
            raise UsageError(f"there is no port {port}", where="--port", fix="0 to 65535; 0 picks a free one")
        self.host = host
        self.page: SearchPage | None = None
        self.assets = {path: _asset(PAGE / name) for path, name in ASSETS.items()}
        self._loop, self._end = asyncio.new_event_loop(), asyncio.Event()
        self._turn, self._asked, self._open = asyncio.Lock(), 0, 0
        self._answering: set[asyncio.Task[Any]] = set()
        with self._bind_errors(port):
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self._socket = socket.socket(found[0], found[1])
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(found[4])
        name, self.port = self._socket.getsockname()[:2]
        self.address = ipaddress.ip_address(name.split("%")[0])
        self.loopback = self.address.is_loopback  # only this machine can reach it

    @contextmanager
    def _bind_errors(self, port: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            what, fix = f"this address cannot be used: {error.strerror}", "--host 127.0.0.1"
            if isinstance(error, PermissionError):
                what, fix = f"port {port} may not be used", "--port 8080, or any above 1023"
            elif isinstance(error, socket.gaierror):
                what = f"{self.host!r} is no address"
            elif error.errno == errno.EADDRINUSE:
                what, fix = f"port {port} is taken by another program", "--port 0 picks a free one"
            raise RankdistillError(what, where=f"{self.host}:{port}", fix=fix) from None

    @property
    def url(self) -> str:
        host = self.host
        if self.address.is_unspecified:
            host = "127.0.0.1" if self.address.version == 4 else "::1"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    def run(self, page: SearchPage, ready: Callable[[str], None] | None = None) -> None:
        """Answer until Ctrl-C or SIGTERM; answers in the making are finished first, a second signal ends at once.

        `ready` is called with the address once it answers. RankdistillError: another program took the port meanwhile.
        """
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask_to_stop(number: int, frame: Any) -> None:
            for each in before:
                signal.signal(each, signal.SIG_DFL)
            self._loop.call_soon_threadsafe(self._end.set)

        for number in before:
            signal.signal(number, ask_to_stop)
        try:
            self._listen(page)
            if ready is not None:
                ready(self.url)
            self._serve()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, page: SearchPage) -> None:
        """Answer in a thread of its own, until `stop`."""
        self._listen(page)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests, finish those that are being answered, and free the port."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def close(self) -> None:
        """Free the port of a server that was not started."""
        self._loop.close()
        if hasattr(self, "_socket"):
            self._socket.close()

    def _listen(self, page: SearchPage) -> None:
        self.page = page
        with self._bind_errors(self.port):
            self._socket.listen(32)

    def _serve(self) -> None:
        async def serve() -> None:
            server = await asyncio.start_server(self._connected, sock=self._socket)
            await self._end.wait()
            server.close()  # and no `wait_closed`: idle connections are cut off
            _, unfinished = await asyncio.wait(self._answering, timeout=self.grace) if self._answering else ((), ())
            if unfinished:
                warn(f"{len(unfinished)} requests were not finished after {self.grace:.0f} s")

        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(serve())

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, then the connection is closed; a client that went away is no failure."""
        self._open += 1
        try:
            with suppress(OSError, TimeoutError):
                head, answer = b"", _refused(503, "too many connections", fix="try again in a second")
                if self._open <= self.connections:
                    async with asyncio.timeout(self.request_seconds):
                        request = await _read(reader)
                    if request is None:
                        return
                    if isinstance(request, _Answer):
                        answer = request
                    else:
                        self._answering.add(asyncio.current_task())  # type: ignore[arg-type]
                        head, answer = request.method, await self._answer(request)
                async with asyncio.timeout(self.request_seconds):
                    writer.write(_written(answer, head == b"HEAD"))
                    await writer.drain()
                if answer.status >= 400:
                    writer.write_eof()
                    async with asyncio.timeout(LINGER):
                        while await reader.read(LARGEST_REQUEST):
                            pass
        finally:
            self._open -= 1
            self._answering.discard(asyncio.current_task())
            writer.close()

    async def _answer(self, request: h11.Request) -> _Answer:
        try:
            return await self._found(request)
        except RankdistillError as error:
            return _refused(400 if isinstance(error, UsageError) else 500, error.what, error.where, error.fix)
        except Exception as error:
            # Whatever went wrong inside is said here, not to whoever asked.
            warn(f"a search failed: {type(error).__name__}: {error}")
            return _refused(500, "the search failed", fix="see the terminal it was started in")

    async def _found(self, request: h11.Request) -> _Answer:
        headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
        address = request.target.decode()
        path, _, query = address.partition("?")
        if request.method not in (b"GET", b"HEAD"):
            refused = _refused(405, f"{request.method.decode()} is not answered here", fix="GET or HEAD")
            return refused._replace(allow="GET, HEAD")
        if not self.allows_host(headers.get("host")):
            return _refused(403, "this name is not served here", "Host", f"open {self.url}")
        if headers.get("content-length", "0").strip("0") or "transfer-encoding" in headers:
            return _refused(413, "no body is read here", fix="put the question into the address")
        if not address.startswith("/"):
            return _refused(400, "this is no address", fix="percent-encode it as UTF-8")
        if path in self.assets:
            return self.assets[path]
        if path not in PARAMETERS:
            return _refused(404, "there is nothing here", path[:100], ", ".join([*ASSETS, *PARAMETERS]))
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return _refused(403, "another site may not ask here", "Sec-Fetch-Site", f"open {self.url}")
        return await self._ask(path, _parameters(query, PARAMETERS[path]))

    async def _ask(self, path: str, given: dict[str, str]) -> _Answer:
        assert self.page is not None
        if path == "/api/about":
            return _Answer(200, self.page.about())
        if self._asked > self.waiting:
            return _refused(503, "too many searches are waiting", fix="try again in a second")
        self._asked += 1
        try:
            async with asyncio.timeout(self.patience):
                await self._turn.acquire()
            try:
                arguments = given.get("q", ""), _number(given.get("k")), given.get("teacher")
                return _Answer(200, await _in_thread(self.page.search, *arguments))
            finally:
                self._turn.release()
        except TimeoutError:
            return _refused(503, "the search before takes too long", fix="try again in a second")
        finally:
            self._asked -= 1

    def allows_host(self, header: str | None) -> bool:
        """Whether a Host header names this machine: a loopback name, the name it was bound to, or (bound to more than
        loopback) an address or this machine's own name. Any other name is a foreign page's, re-pointed at us."""
        try:
            name = urlsplit(f"//{header or ''}").hostname
            if not name or "@" in str(header) or "/" in str(header):
                return False
            if name in LOOPBACK_NAMES or name == self.host.lower():
                return True
            # The last raises where the name is no address.
            return not self.loopback and (name == socket.gethostname().lower() or bool(ipaddress.ip_address(name)))
        except ValueError:
            return False


def _asset(path: Path) -> _Answer:
    return _Answer(200, path.read_bytes(), f"{KINDS[path.suffix]}; charset=utf-8")


async def _read(reader: asyncio.StreamReader) -> h11.Request | _Answer | None:
    """The head of a request; what refuses a malformed one; None where the client went away."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=LARGEST_REQUEST)
    try:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await reader.read(4096))
    except h11.RemoteProtocolError as error:
        return _refused(error.error_status_hint, str(error)[:200])
    return event if isinstance(event, h11.Request) else None


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a thread that does not hold up the program's end, unlike `asyncio.to_thread`'s."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def work() -> None:
        try:
            settle, outcome = future.set_result, function(*arguments)
        except Exception as error:
            settle, outcome = future.set_exception, error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=work, daemon=True).start()
    return await future


def _written(answer: _Answer, head_alone: bool) -> bytes:
    body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body, ensure_ascii=False).encode()
    headers = {**HEADERS, "Date": formatdate(usegmt=True), "Content-Type": answer.kind, "Content-Length": len(body)}
    if answer.status == 503:
        headers["Retry-After"] = "1"
    if answer.allow:
        headers["Allow"] = answer.allow
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}", *(f"{n}: {v}" for n, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if head_alone else body)


def _parameters(query: str, known: tuple[str, ...]) -> dict[str, str]:
    """The parameters of an address; none that is unknown, given twice, or not UTF-8."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=16)
    except ValueError as error:
        text = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise UsageError(f"the address cannot be read: {text}", fix="percent-encode it as UTF-8") from None
    names = [name for name, _ in pairs]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no parameter {name[:50]!r}", fix=f"known: {', '.join(known) or 'none'}")
        if names.count(name) > 1:
            raise UsageError(f"{name} is given twice", where=name, fix="give it once")
    return dict(pairs)


def _number(text: str | None) -> int | None:
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 6):
        raise UsageError(f"{text[:20]!r} is no number of documents", where="k", fix="k=10")
    return None if text is None else int(text)


def _refused(status: int, what: str, where: str | None = None, fix: str | None = None) -> _Answer:
    return _Answer(status, {"error": {"what": what, "where": where, "fix": fix}})
