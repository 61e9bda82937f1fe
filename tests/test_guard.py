"""The guard in front of a toy application that echoes what it has read."""

import asyncio
from collections.abc import Callable

import httpx
import pytest

from unitok_mllm import guard
from unitok_mllm.guard import Guard, Refused, host_name, own_hosts, proxy_addresses, served_host, url_of, visitor_of


pytestmark = [pytest.mark.full, pytest.mark.attack]


ROUTES = (r"(GET|HEAD) /", "GET /file/.*", "POST /(job|upload)")


async def toy(scope, receive, send):
    body, message = b"", {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-toy", b"1")]})
    await send({"type": "http.response.body", "body": f"{scope['path']} {len(body)}".encode()})


def guarded(
    app=toy, hosts=frozenset({"here"}), further=(), make_room=lambda size: None, admit=lambda *_: None, **options
) -> Guard:
    return Guard(app, {*hosts}, {*further}, ROUTES, 1000, make_room, admit, **options)


def ask(app: Guard, method="GET", path="/", address="10.0.0.1", **options) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://here:70") as client:
            return await client.request(method, path, **options)

    return asyncio.run(asked())


def answers(app: Guard, scope: dict) -> list[dict]:
    """What a request that no client of ours would send is answered with."""
    sent = []

    async def receive() -> dict:
        return {"type": "http.request"}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


def test_hosts_are_names_and_addresses_alone():
    assert host_name("Example.org") == "example.org" and host_name("::1") == served_host("::1") == "::1"
    for text in ("", "http://example.org", "example.org:80", "example.org/a", "[::1]", "a b", "*"):
        with pytest.raises(ValueError, match="without scheme, port or path"):
            host_name(text)
    assert served_host("*") == "*"
    assert proxy_addresses("10.0.0.1, 10.1.0.0/16,::1") == "10.0.0.1, 10.1.0.0/16,::1" and proxy_addresses("*") == "*"
    for text in ("", "nginx", "10.0.0.1:80", "10.0.0.1/8", "10.0.0.1,"):
        with pytest.raises(ValueError, match="expected an IP address or network"):
            proxy_addresses(text)
    assert (url_of("::1", 80), url_of("0.0.0.0", 8000)) == ("http://[::1]:80", "http://0.0.0.0:8000")


def test_what_is_let_through_is_answered_by_the_application_with_headers_added():
    response = ask(guarded(), "POST", "/job", content=b"12345")
    assert (response.status_code, response.text, response.headers["x-toy"]) == (200, "/job 5", "1")
    assert response.headers["content-security-policy"] == "frame-ancestors 'none'"
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "listens_on, host, status",
    [
        ("127.0.0.1", "localhost:70", 200),
        ("127.0.0.1", "LOCALHOST", 200),
        ("127.0.0.1", "[::1]:70", 200),
        ("::1", "127.0.0.1", 200),
        ("127.0.0.1", "evil.example", 403),
        ("127.0.0.1", "127.0.0.1.evil.example", 403),
        ("127.0.0.1", "localhost.evil.example:70", 403),
        ("127.0.0.1", "10.0.0.5", 403),
        ("127.0.0.1", "", 403),
        ("127.0.0.1", "[", 400),
        ("0.0.0.0", "10.0.0.5:70", 200),
        ("0.0.0.0", "[fe80::1]:70", 200),
        ("0.0.0.0", "evil.example", 403),
        ("::", "localhost", 200),
        ("10.0.0.5", "10.0.0.5", 200),
        ("10.0.0.5", "localhost", 403),
        ("box.example", "box.example:70", 200),
        ("box.example", "other.example", 403),
        ("127.0.0.1", "further.example", 200),
    ],
)
def test_hosts(listens_on, host, status):
    app = guarded(hosts=own_hosts(listens_on), further={"Further.example"})
    assert ask(app, headers={"host": host}).status_code == status


def test_two_hosts_or_none_are_refused():
    app = guarded()
    for headers in ([], [(b"host", b"here"), (b"host", b"here")]):
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": ("1.2.3.4", 1)}
        assert answers(app, scope)[0]["status"] == 400


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"origin": "http://here:70"}, 200),
        ({"origin": "https://HERE:70"}, 200),
        ({"origin": "http://here:71"}, 403),
        ({"origin": "http://here"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "https://further.example"}, 200),
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
    ],
)
@pytest.mark.parametrize("method, path", [("GET", "/"), ("POST", "/job")])
def test_origins(headers, status, method, path):
    assert ask(guarded(further={"further.example"}), method, path, headers=headers).status_code == status


def test_routes():
    app = guarded()
    for method, path in (("GET", "/file/a/b"), ("HEAD", "/"), ("POST", "/job")):
        assert ask(app, method, path).status_code == 200
    for method, path in (
        *(("GET", path) for path in ("/job", "/file", "/other", "/job/", "/%0a")),
        *((method, "/") for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE")),
    ):
        assert ask(app, method, path).status_code == 404


def chunks(count: int, size: int) -> Callable:
    async def each():
        for _ in range(count):
            yield bytes(size)

    return each()


def test_bodies_have_a_limit_whether_they_say_their_length_or_not(monkeypatch):
    monkeypatch.setattr(guard, "MAX_BODY", 100)
    app, multipart = guarded(), {"content-type": "multipart/form-data; boundary=x"}
    assert ask(app, "POST", "/job", content=bytes(100)).text == "/job 100"
    assert ask(app, "POST", "/job", content=chunks(10, 10)).text == "/job 100"
    for content in (bytes(101), chunks(11, 10)):
        response = ask(app, "POST", "/job", content=content)
        assert (response.status_code, response.text) == (413, "the request is longer than 100 bytes")
    assert ask(app, "POST", "/upload", content=bytes(1000), headers=multipart).text == "/upload 1000"
    assert ask(app, "POST", "/upload", content=bytes(1001), headers=multipart).status_code == 413
    response = ask(app, "POST", "/upload", content=chunks(1, 10), headers=multipart)
    assert (response.status_code, response.text) == (411, "an upload must state its length")


def test_a_request_that_trickles_in_ends(monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)

    async def slow():
        yield b"1"
        await asyncio.sleep(60)

    response = ask(guarded(), "POST", "/job", content=slow())
    assert (response.status_code, response.text) == (408, "the request did not arrive in 0.2 seconds")


def test_room_is_made_before_an_upload_and_admission_asked_before_any_other_post():
    seen = []
    app = guarded(make_room=seen.append, admit=lambda *args: seen.append(args))
    ask(app, "POST", "/upload", files={"files": b"1234"})
    ask(app, "POST", "/job", content=b"12", address="fe80:0:0:7::9")
    ask(app, "GET", "/")
    size, asked = seen
    assert size > 4 and asked == ("fe80:0:0:7::", "/job", b"12")

    def refuse(*_):
        raise Refused(429, "not now")

    response = ask(guarded(admit=refuse), "POST", "/job")
    assert (response.status_code, response.text, response.headers["retry-after"]) == (429, "not now", "60")


def test_a_visitor_has_so_many_posts_and_others_theirs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
    app = guarded()

    def post(address: str) -> int:
        return ask(app, "POST", "/job", address=address).status_code

    assert [post("10.0.0.1") for _ in range(62)] == [200] * 60 + [429] * 2
    assert post("10.0.0.2") == 200 and ask(app).status_code == 200
    now[0] += 1
    assert [post("10.0.0.1") for _ in range(3)] == [200, 200, 429]
    assert [post(f"fe80::{i:x}") for i in range(1, 62)] == [200] * 60 + [429]  # one network


def test_no_more_visitors_are_remembered_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(guard, "MAX_VISITORS", 10)
    app = guarded()
    for number in range(30):
        ask(app, "POST", "/job", address=f"10.0.0.{number}")
    assert [*app._posts] == [f"10.0.0.{number}" for number in range(20, 30)] and not app._open


def test_a_visitor_holds_so_many_requests_open():

    async def held() -> tuple[list[int], int]:
        release = asyncio.Event()

        async def holding(scope, receive, send):
            await release.wait()
            await toy(scope, receive, send)

        app = guarded(holding, max_open=3)
        transport = httpx.ASGITransport(app=app, client=("10.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://here:70") as client:
            waiting = [asyncio.create_task(client.get("/")) for _ in range(5)]
            await asyncio.sleep(0.1)
            release.set()
            return [(await each).status_code for each in waiting], (await client.get("/")).status_code

    assert asyncio.run(held()) == ([200, 200, 200, 429, 429], 200)


def test_posts_are_admitted_one_at_a_time():
    """So that what `admit` counts is not passed by requests that come together."""
    admitted, done = [], []

    def admit(*_):
        admitted.append(len(done))
        if len(done) >= 2:
            raise Refused(429, "two are enough")

    async def slow(scope, receive, send):
        await asyncio.sleep(0.01)
        done.append(1)
        await toy(scope, receive, send)

    async def together() -> list[int]:
        transport = httpx.ASGITransport(app=guarded(slow, admit=admit), client=("10.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://here:70") as client:
            answers = await asyncio.gather(*(client.post("/job") for _ in range(20)))
        return sorted(answer.status_code for answer in answers)

    assert asyncio.run(together()) == [200] * 2 + [429] * 18 and admitted == [0, 1, *[2] * 18]


def test_only_http():
    assert answers(guarded(), {"type": "websocket", "headers": [], "client": None})[0]["status"] == 403


def test_visitors():
    assert visitor_of("10.0.0.1") == "10.0.0.1"
    assert visitor_of("2001:db8:1:2:3:4:5:6") == visitor_of("2001:db8:1:2::") == "2001:db8:1:2::"
    assert visitor_of("fe80::1%eth0") == "fe80::"
