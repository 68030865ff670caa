"""The search page over HTTP: what is answered, what is refused, how it ends. Real sockets on loopback."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.page_server import ASSETS, HEADERS, PageServer
from rankdistill.evaluation.search_page import Column, SearchPage

Reply = tuple[int, dict[str, str], bytes]
MakePage = Callable[..., SearchPage]


def ask(server: PageServer, path: str, method: str = "GET", headers: Any = None, body: bytes | None = None) -> Reply:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def error(reply: Reply) -> tuple[int, str]:
    """Status and message of an error, which is JSON with every safety header."""
    status, headers, body = reply
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers.items() >= HEADERS.items() and ("Retry-After" in headers) == (status == 503)
    return status, json.loads(body)["error"]["what"]


def connected(server: PageServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


@contextmanager
def running(page: SearchPage, host: str = "127.0.0.1", **limits: Any) -> Iterator[PageServer]:
    """A server with limits of its own."""
    server: PageServer = type("Limited", (PageServer,), limits)(host, 0)
    server.start(page)
    try:
        yield server
    finally:
        server.stop()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# -- what is answered -------------------------------------------------------------------------------------------------


def test_a_search_answers_what_the_page_answers(served: PageServer, search_page: SearchPage) -> None:
    status, headers, body = ask(served, "/api/search?q=what+gas+fills+balloons&k=4&teacher=all")
    assert status == 200 and headers["Content-Type"] == "application/json; charset=utf-8"
    answer, expected = json.loads(body), search_page.search("what gas fills balloons", 4, "all")
    for one in [*answer["columns"], *expected["columns"]]:
        one["times"] = sorted(one["times"])
    assert answer == expected and answer["judged"]["query_id"] == "q-helium"
    assert json.loads(ask(served, "/api/about")[2]) == search_page.about()


@pytest.mark.parametrize(
    "query",
    ["金 不會", "كيف حال", "🐋 🏳️‍🌈", "e\u0301", "a\0b", "a\nb", "<script>", "'; DROP TABLE --", "%+", "&k=3", "\u200b"],
)
def test_a_query_in_any_script_arrives_as_it_is(served: PageServer, query: str) -> None:
    status, _, body = ask(served, f"/api/search?q={quote(query, safe='')}")
    assert status == 200 and json.loads(body)["query"] == " ".join(query.replace("\0", " ").split())
    assert all(not one["error"] for one in json.loads(body)["columns"])


@pytest.mark.parametrize("path", [*ASSETS, "/?q=iron&against=bm25", "/api/about"])
def test_pages_have_the_safety_headers_and_nothing_from_elsewhere(served: PageServer, path: str) -> None:
    status, headers, body = ask(served, path)
    assert status == 200 and headers.items() >= HEADERS.items()
    assert "Access-Control-Allow-Origin" not in headers and "unsafe" not in headers["Content-Security-Policy"]
    assert int(headers["Content-Length"]) == len(body) > 0
    if not path.endswith(("svg", "about")):
        assert not any(word in body.decode() for word in ("http://", "https://", "innerHTML", " style="))
    status, head, nothing = ask(served, path, "HEAD")
    assert status == 200 and nothing == b"" and head["Content-Length"] == headers["Content-Length"]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_only_the_fixed_routes_are_there(served: PageServer) -> None:
    near = "/nothing /api /api/search/ /search.html /page/search.js //evil.example/ /favicon.ico"
    outside = "/../pyproject.toml /%2e%2e/%2e%2e/etc/passwd /search.js%00 /search.js/../search.css"
    for path in [*near.split(), *outside.split()]:
        assert error(ask(served, path)) == (404, "there is nothing here"), path


@pytest.mark.parametrize(
    ("query", "what"),
    [
        ("", "the query is empty"),
        ("q=%00%20%0a%09%1b", "the query is empty"),
        ("q=" + "x" * 1001, "the query has 1,001 characters"),
        ("q=" + "x" * 50_000, "the query is longer than 1,000"),
        ("q=iron&k=0", "0 documents a column"),
        ("q=iron&k=51", "51 documents a column"),
        ("q=iron&k=-1", "'-1' is no number"),
        ("q=iron&k=1e9", "'1e9' is no number"),
        ("q=iron&k=%D9%A3", "is no number"),
        ("q=iron&k=99999999", "is no number"),
        ("q=iron&teacher=gpt", "there is no column 'gpt'"),
        ("q=iron&q=gold", "q is given twice"),
        ("q=iron&path=/etc/passwd", "there is no parameter 'path'"),
        ("q=%ff%fe", "not UTF-8"),
        ("&".join(["q=x"] * 20), "cannot be read"),
    ],
)
def test_wrong_questions_get_400(served: PageServer, query: str, what: str) -> None:
    status, said = error(ask(served, f"/api/search?{query}"))
    assert status == 400 and what in said


def test_only_get_and_head_without_a_body(served: PageServer) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"):
        reply = ask(served, "/api/search?q=iron", method, body=b"q=iron" * 1000)
        assert error(reply)[0] == 405 and reply[1]["Allow"] == "GET, HEAD"
        assert "Access-Control-Allow-Methods" not in reply[1]
    for headers in ({}, {"Content-Length": "99999999999"}, {"Transfer-Encoding": "chunked"}):
        assert error(ask(served, "/api/search?q=iron", headers=headers, body=b"0\r\n\r\n"))[0] == 413


def test_only_names_of_this_machine_are_served(served: PageServer) -> None:
    """A page of another site whose name now points here must learn nothing."""
    for host in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST:8080", "127.0.0.1:1"):
        assert ask(served, "/api/about", headers={"Host": host})[0] == 200, host
    foreign = "evil.example evil.example:8080 localhost.evil.example 127.0.0.1.evil.example 10.0.0.1 0.0.0.0"
    for host in [*foreign.split(), "evil@localhost", "localhost/evil", "[", ""]:
        for path in ("/", "/api/search?q=iron"):
            assert error(ask(served, path, headers={"Host": host})) == (403, "this name is not served here"), host


def test_other_sites_may_not_ask(served: PageServer) -> None:
    for site in ("cross-site", "same-site"):
        headers = {"Sec-Fetch-Site": site}
        assert error(ask(served, "/api/search?q=iron", headers=headers))[0] == 403
        assert ask(served, "/", headers=headers)[0] == 200  # following a link to the page is fine
    assert ask(served, "/api/search?q=iron", headers={"Sec-Fetch-Site": "same-origin"})[0] == 200


LOCAL = "HTTP/1.1\r\nHost: localhost\r\n"
LENGTHS = ("Content-Length: 0\r\nContent-Length: 5", "Content-Length: 0, 5", "Content-Length: +0", "Content-Length: ")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        *((f"{method} /api/about {LOCAL}{lines}", 400) for method in ("GET", "POST") for lines in LENGTHS),
        (f"GET / {LOCAL}Transfer-Encoding: gzip", 501),
        ("GET / HTTP/1.1", 400),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example", 400),
        (f"GET / {LOCAL}X: {'x' * 70_000}", 431),
        (f"GET / {LOCAL}" + "\r\n".join(f"X-{n}: {'x' * 60_000}" for n in range(97)), 431),
        (f"GET /{'x' * 70_000} {LOCAL}", 431),
        (f"GET /api/search?q=\xe9 {LOCAL}", 400),
        (f"GET nowhere {LOCAL}", 400),
        ("\x16\x03\x01\x02\x00 what is this", 400),
    ],
    ids=lambda value: str(value)[:60].encode("unicode_escape").decode(),
)
def test_malformed_requests_are_refused_in_json(served: PageServer, request_: str, status: int) -> None:
    with connected(served) as client:
        client.sendall(request_.encode("latin-1") + b"\r\n\r\n")
        head, _, body = b"".join(iter(lambda: client.recv(65_536), b"")).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status and json.loads(body)["error"]["what"] and b"Traceback" not in body


class Engine:
    """Answers when it is told to; what it raises is to stay inside."""

    def __init__(self) -> None:
        self.go, self.entered, self.most, self.inside = threading.Event(), threading.Semaphore(0), 0, 0
        self.broken = False
        self.go.set()

    def search(self, queries: Any, k: int) -> Any:
        if self.broken:
            raise ZeroDivisionError("the secret of /home/user")
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.release()
        assert self.go.wait(20)
        self.inside -= 1
        return [type("Hits", (), {"rows": [0], "scores": [1.0]})]

    def block(self) -> None:
        while self.entered.acquire(blocking=False):
            pass
        self.go.clear()


def test_what_fails_inside_stays_inside(make_page: MakePage, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine()
    with running(make_page(Column("broken", engine))) as server:
        engine.broken = True
        assert error(ask(server, "/api/search?q=iron")) == (500, "the search failed")
    assert "warning: a search failed: ZeroDivisionError: the secret" in capsys.readouterr().err


# -- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "waits", "what"),
    [
        ({"waiting": 1, "patience": 15.0}, 1, "too many searches are waiting"),
        ({"patience": 0.1}, 0, "the search before takes too long"),
    ],
)
def test_one_search_at_a_time_and_few_wait_or_long(make_page: MakePage, limits: Any, waits: int, what: str) -> None:
    engine = Engine()
    page = make_page(Column("slow", engine), teacher=False)
    with running(page, **limits) as server, ThreadPoolExecutor(2) as threads:
        engine.block()
        first = threads.submit(ask, server, "/api/search?q=one")
        assert engine.entered.acquire(timeout=10)
        second = [threads.submit(ask, server, "/api/search?q=two") for _ in range(waits)]
        until(lambda: server._asked == 1 + waits)
        assert error(ask(server, "/api/search?q=three")) == (503, what)
        assert ask(server, "/api/about")[0] == ask(server, "/")[0] == 200  # the page itself is still there
        engine.go.set()
        assert [each.result(30)[0] for each in (first, *second)] == [200] * (1 + waits)
        assert ask(server, "/api/search?q=four")[0] == 200  # its place is free again
    assert engine.most == 1


def test_slow_clients_are_cut_off(search_page: SearchPage) -> None:
    with running(search_page, request_seconds=0.4) as server:
        started = time.monotonic()
        with connected(server) as silent:
            assert silent.recv(100) == b""
        with connected(server) as dripping:
            dripping.settimeout(0.1)
            ended = False
            while not ended and time.monotonic() - started < 10:
                try:
                    dripping.sendall(b"G")
                    ended = dripping.recv(100) == b""
                except TimeoutError:
                    pass
                except ConnectionError:
                    ended = True
        assert ended and time.monotonic() - started < 5
        assert ask(server, "/api/about")[0] == 200


def test_connections_are_bounded(search_page: SearchPage) -> None:
    with running(search_page, connections=2) as server:
        idle = [connected(server) for _ in range(2)]
        until(lambda: server._open == 2)
        assert error(ask(server, "/api/about")) == (503, "too many connections")
        for connection in idle:
            connection.close()
        until(lambda: server._open == 0)
        assert ask(server, "/api/about")[0] == 200


# -- addresses, and the end -------------------------------------------------------------------------------------------


def test_an_answer_in_the_making_is_finished_at_the_end(make_page: MakePage) -> None:
    engine = Engine()
    server = PageServer(port=0)
    server.start(make_page(Column("slow", engine), teacher=False))
    engine.block()
    with ThreadPoolExecutor(2) as threads, connected(server):  # idle: nothing waits for it
        request = threads.submit(ask, server, "/api/search?q=one")
        assert engine.entered.acquire(timeout=10)
        ending = threads.submit(server.stop)
        with pytest.raises(TimeoutError):
            ending.result(0.5)
        with pytest.raises(ConnectionError):
            ask(server, "/api/about")
        engine.go.set()
        ending.result(10)
        assert request.result(10)[0] == 200
    PageServer(port=server.port).close()


def test_a_taken_port_is_said_with_the_way_out(served: PageServer) -> None:
    with pytest.raises(RankdistillError, match=f"port {served.port} is taken") as caught:
        PageServer(port=served.port)
    assert caught.value.fix == "--port 0 picks a free one" and caught.value.where == f"127.0.0.1:{served.port}"


@pytest.mark.parametrize(
    ("host", "port", "kind", "words"),
    [
        ("no.such.name.invalid", 0, RankdistillError, "no address|cannot be used"),
        ("192.0.2.1", 0, RankdistillError, "no address|cannot be used"),
        ("127.0.0.1", -1, UsageError, "no port -1"),
        ("127.0.0.1", 65_536, UsageError, "no port 65536"),
    ],
)
def test_an_address_that_is_not_ours_is_an_error(host: str, port: int, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        PageServer(host, port)


def test_bound_to_all_addresses_it_serves_addresses_and_its_own_name() -> None:
    """Names are what a foreign page can re-point; an address typed into the browser is its user's own doing."""
    server = PageServer("0.0.0.0", 0)
    assert not server.loopback and server.url == f"http://127.0.0.1:{server.port}/"
    for host in ("192.168.1.7:8080", "[fe80::1]", socket.gethostname(), "localhost"):
        assert server.allows_host(host), host
    for host in ("evil.example", f"{socket.gethostname()}.evil.example", None):
        assert not server.allows_host(host), host
    server.close()


def test_ipv6_loopback(search_page: SearchPage) -> None:
    try:
        with running(search_page, "::1") as server:
            assert server.loopback and server.url == f"http://[::1]:{server.port}/"
            assert ask(server, "/api/about")[0] == 200
    except RankdistillError as unusable:
        pytest.skip(f"no IPv6 here: {unusable.what}")
