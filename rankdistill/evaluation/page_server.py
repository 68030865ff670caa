"""The search page on a local address: a small HTTP server for one person on one machine.

    /                                   the page, with its style and script beside it
    /api/about                          collection, columns, limits, example queries
    /api/search?q=TEXT&k=10&teacher=all what `SearchPage.search` answers; `k` and `teacher` may be left out

Errors are JSON, {"error": {"what", "where", "fix"}}: 400 wrong question, 403 asked through another name or site, 404,
405, 413 a body, 414, 431 long headers, 500, 503 busy (with Retry-After).

What keeps it safe: a fixed set of routes and no file access; only GET and HEAD; the Host header must name this machine
(a foreign page that re-points its name at 127.0.0.1 gets 403), and no other site may ask; one search at a time, few
waiting, few connections, a deadline and a size for every request, and one reading of where it ends; a content policy
that runs nothing but the page's script. The usual ASGI servers have no deadline for a request that drips in.
"""

from __future__ import annotations

import errno
import io
import ipaddress
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.search_page import SearchPage
from rankdistill.progress import warn

PAGE = Path(__file__).parent / "page"
JSON = "application/json; charset=utf-8"
ASSETS = {
    "/": ("search.html", "text/html; charset=utf-8"),
    "/base.css": ("base.css", "text/css; charset=utf-8"),
    "/base.js": ("base.js", "text/javascript; charset=utf-8"),
    "/search.css": ("search.css", "text/css; charset=utf-8"),
    "/search.js": ("search.js", "text/javascript; charset=utf-8"),
    "/search.svg": ("search.svg", "image/svg+xml"),
}
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
}
RETRY = {"Retry-After": "1"}
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
LARGEST_BODY = 65_536  # bytes of a body that are read and thrown away before the request is refused
LARGEST_REQUEST = 2 * LARGEST_BODY  # bytes of a request that are read at all: the first line may have 65,536


class PageServer(ThreadingHTTPServer):
    """Takes its port at once, so that a taken one is known before models are loaded; answers once `run` is called.

    Args:
        host: an address or name of this machine.
        port: 0 picks a free one.

    Raises:
        RankdistillError: the port is taken or not allowed, or the host is no address of this machine.
        UsageError: a port that is none.
    """

    daemon_threads = True
    block_on_close = False  # an idle connection must not hold up the end; answers in the making are waited for
    request_queue_size = 32
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
        self.assets = {path: (kind, (PAGE / name).read_bytes()) for path, (name, kind) in ASSETS.items()}
        self._searching = threading.Lock()
        self._places = threading.BoundedSemaphore(self.waiting + 1)
        self._slots = threading.BoundedSemaphore(self.connections)
        self._busy = threading.Condition()
        self._answering = 0
        with self._bind_errors(port):
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
                0
            ]
            self.address_family = family
            super().__init__(address[:2], _Handler, bind_and_activate=False)  # type: ignore[arg-type]
            self.server_bind()
        self.address = ipaddress.ip_address(str(self.server_address[0]).split("%")[0])
        self.port = int(self.server_address[1])
        self.loopback = self.address.is_loopback  # only this machine can reach it

    def server_bind(self) -> None:
        """As the base class, without its look-up of this machine's name, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    @contextmanager
    def _bind_errors(self, port: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if hasattr(self, "socket"):
                self.server_close()
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

        Args:
            ready: called with the address once it answers.

        Raises:
            RankdistillError: another program took the port meanwhile.
        """
        stop = threading.Event()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask_to_stop(number: int, frame: Any) -> None:
            for each in before:
                signal.signal(each, signal.SIG_DFL)
            stop.set()

        for number in before:
            signal.signal(number, ask_to_stop)
        try:
            self.start(page)
            try:
                if ready is not None:
                    ready(self.url)
                while not stop.wait(1.0):
                    pass
            finally:
                self.stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, page: SearchPage) -> None:
        """Answer in a thread of its own, until `stop`."""
        self.page = page
        with self._bind_errors(self.port):
            self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def stop(self) -> None:
        """Take no more requests, finish those that are being answered, and free the port."""
        self.shutdown()
        self.server_close()
        with self._busy:
            if not self._busy.wait_for(lambda: self._answering == 0, self.grace):
                warn(f"{self._answering} requests were not finished after {self.grace:.0f} s")

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        body = json.dumps(_error("too many connections", fix="try again in a second")).encode()
        head = f"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            request.settimeout(1.0)
            request.sendall(head.encode() + body)
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no failure; anything else is said in a line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            warn(f"a request failed: {type(error).__name__}: {error}")

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Counts an answer in the making."""
        with self._busy:
            self._answering += 1
        try:
            yield
        finally:
            with self._busy:
                self._answering -= 1
                self._busy.notify_all()

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

    def ask(self, path: str, given: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an API path."""
        assert self.page is not None
        if path == "/api/about":
            return 200, self.page.about()
        if not self._places.acquire(blocking=False):
            return 503, _error("too many searches are waiting", fix="try again in a second")
        try:
            if not self._searching.acquire(timeout=self.patience):
                return 503, _error("the search before takes too long", fix="try again in a second")
            try:
                return 200, self.page.search(given.get("q", ""), _number(given.get("k")), given.get("teacher"))
            finally:
                self._searching.release()
        finally:
            self._places.release()


class _Handler(BaseHTTPRequestHandler):
    """One request, then the connection is closed."""

    server: PageServer
    protocol_version = "HTTP/1.0"

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.request_seconds)
        self.rfile.close()
        self.rfile = io.BufferedReader(_Deadline(self.connection, time.monotonic() + self.server.request_seconds))

    def parse_request(self) -> bool:
        """As the base class; also refuses what two programs on the way could cut into different requests."""
        if not super().parse_request():
            return False
        lengths = self.headers.get_all("Content-Length") or ["0"]
        plain = len(lengths) == 1 and lengths[0].strip().isascii() and lengths[0].strip().isdigit()
        if plain and "Transfer-Encoding" not in self.headers:
            return True
        self.send_error(400, "one Content-Length or none, and no Transfer-Encoding")
        return False

    def do_GET(self) -> None:
        with self.server.answering():
            try:
                status, kind, body = self._answer()
            except RankdistillError as error:
                status = 400 if isinstance(error, UsageError) else 500
                kind, body = JSON, _error(error.what, error.where, error.fix)
            except Exception as error:
                # Whatever went wrong inside is said here, not to whoever asked.
                warn(f"a search failed: {type(error).__name__}: {error}")
                status, kind, body = 500, JSON, _error("the search failed", fix="see the terminal it was started in")
            self._send(status, body, kind, RETRY if status == 503 else {})

    do_HEAD = do_GET

    def _refuse_method(self) -> None:
        self._drop_body()
        error = _error(f"{self.command} is not answered here", fix="GET or HEAD")
        self._send(405, error, more={"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse_method

    def _answer(self) -> tuple[int, str, dict[str, Any] | bytes]:
        """Status, type and body."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.allows_host(hosts[0]):
            return 403, JSON, _error("this name is not served here", "Host", f"open {self.server.url}")
        if int(self.headers.get("Content-Length") or 0):
            self._drop_body()
            return 413, JSON, _error("no body is read here", fix="put the question into the address")
        if not self.path.startswith("/") or not self.path.isascii():
            return 400, JSON, _error("this is no address", fix="percent-encode it as UTF-8")
        path, _, query = self.path.partition("?")
        if path in self.server.assets:
            return 200, *self.server.assets[path]
        if path not in PARAMETERS:
            return 404, JSON, _error("there is nothing here", path[:100], ", ".join([*ASSETS, *PARAMETERS]))
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            return 403, JSON, _error("another site may not ask here", "Sec-Fetch-Site", f"open {self.server.url}")
        status, answer = self.server.ask(path, _parameters(query, PARAMETERS[path]))
        return status, JSON, answer

    def _send(
        self, status: int, body: dict[str, Any] | bytes, kind: str = JSON, more: dict[str, str] | None = None
    ) -> None:
        if isinstance(body, dict):
            body = json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        about = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"}
        for name, value in {**HEADERS, **(more or {}), **about}.items():
            self.send_header(name, value)
        self.end_headers()
        self.connection.settimeout(self.server.request_seconds)  # reading has used some of it up
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses (a malformed request, headers too long), as JSON too."""
        self.close_connection = True
        try:
            self._send(int(code), _error((message or HTTPStatus(code).phrase)[:200]))
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1.0)
            end = time.monotonic() + 1.0
            while time.monotonic() < end and self.connection.recv(LARGEST_BODY):
                pass  # closing with bytes unread would cut off the answer
        except OSError:
            pass

    def _drop_body(self) -> None:
        """Read a short body away: closing with bytes unread would cut off the answer."""
        left = int(self.headers.get("Content-Length") or 0)
        try:
            self.rfile.read(left if left <= LARGEST_BODY else 0)
        except OSError:
            pass

    def version_string(self) -> str:
        return "rankdistill"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: queries are the user's own."""


class _Deadline(io.RawIOBase):
    """Reads a socket until a point in time and so many bytes: a client that sends a byte now and then is cut off like a
    silent one."""

    def __init__(self, connection: socket.socket, end: float) -> None:
        self._connection, self._end, self._bytes = connection, end, LARGEST_REQUEST

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        if self._bytes <= 0:
            raise HTTPException("the request is too long")  # the base class answers 431
        self._connection.settimeout(left)
        read = self._connection.recv_into(buffer)
        self._bytes -= read
        return read


def _parameters(query: str, known: tuple[str, ...]) -> dict[str, str]:
    """The parameters of an address.

    Raises:
        UsageError: an unknown one, one given twice, or bytes that are not UTF-8.
    """
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


def _error(what: str, where: str | None = None, fix: str | None = None) -> dict[str, Any]:
    return {"error": {"what": what, "where": where, "fix": fix}}
