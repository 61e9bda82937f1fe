"""ASGI middleware that protects a server: it passes only requests from the server's own page, and limits them.

A browser sends requests on behalf of any page that the user opens. The guard therefore checks `Host` and `Origin`:
another site's page can neither send requests nor read responses through a name of its own (DNS rebinding). Bytes,
requests and jobs are limited per address, for IPv6 per /64 network.

The guard does not depend on the application, so every server of this package can use it.
"""

import asyncio
import ipaddress
import re
import socket
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit


BODY_SECONDS = 300  # for a whole request to arrive
MAX_BODY = 2**16  # bytes of a request other than an upload
MAX_OPEN = 64  # concurrent requests of one visitor; an open page holds two
POSTS, POSTS_A_SECOND = 60, 2  # token bucket of one visitor: its size and its rate
MAX_VISITORS = 10_000  # whose token buckets are kept
HEADERS = (
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class Refused(Exception):
    """A request was refused; has the status and the text of the response."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def own_hosts(host: str) -> set[str]:
    """Return the names by which browsers reach a server that listens on `host`.

    For a wildcard address ("0.0.0.0", "::") these are the machine's names, and "*" for any IP address. Unlike a name,
    an address cannot be made to resolve to another machine.
    """
    if host in ("0.0.0.0", "::"):
        return {"*", "localhost", socket.gethostname().lower(), socket.getfqdn().lower()}
    if host == "localhost" or _is_address(host) and ipaddress.ip_address(host).is_loopback:
        return {"localhost", "127.0.0.1", "::1", host}
    return {host.lower()}


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def host_name(text: str) -> str:
    """Return a host's name or IP address in lower case.

    Raises:
        ValueError: it is neither, for example since it has a scheme, a port or a path.
    """
    if not _is_address(text) and not re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        raise ValueError("expected a host's name such as example.org, without scheme, port or path")
    return text.lower()


def served_host(text: str) -> str:
    """Return a name for `Guard`: see `host_name`, or "*" for any IP address."""
    return text if text == "*" else host_name(text)


def proxy_addresses(text: str) -> str:
    """Check the addresses of reverse proxies.

    Raises:
        ValueError: it is neither "*" nor IP addresses or networks, separated by commas.
    """
    try:
        for part in text.split(",") if text != "*" else ():
            ipaddress.ip_network(part.strip())
    except ValueError as error:
        raise ValueError("expected an IP address or network, or several with commas between them") from error
    return text


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address of this machine.

    Raises:
        ValueError: the machine has no such address, or the port is taken.
    """
    if not host:
        raise ValueError("the host is empty: 127.0.0.1 is this machine alone, 0.0.0.0 lets others in")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError, TypeError) as error:  # TypeError: a host of undecodable bytes
        raise ValueError(f"cannot listen on host {host}, port {port}: {error}") from error


def url_of(host: str, port: int) -> str:
    """Return the URL of a server that listens on an address."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def visitor_of(address: str) -> str:
    """Return the visitor behind an address: the address itself, or its /64 network for IPv6."""
    if ":" not in address:
        return address
    return str(ipaddress.ip_network(f"{address.partition('%')[0]}/64", strict=False).network_address)


class Guard:
    """ASGI middleware. A refused request gets a 4xx with a line of text and does not reach `app`.

    Args:
        app: the guarded application.
        hosts: names and addresses that are accepted in `Host`, see `own_hosts`.
        further_hosts: other names for `Host`. They are also accepted in `Origin`, for a proxy that puts another name
            into `Host`.
        routes: regular expressions of the served routes: method, space and path, such as "GET /file/.*".
        max_upload: maximum size of a multipart request in bytes; `MAX_BODY` limits all others.
        make_room: called in a thread with the size of an upload, in bytes, before it is read.
        admit: called with the visitor, the path and the body of every other POST; raises `Refused`. The POSTs are
            admitted one at a time: the next one waits until `app` has answered. None if `app` limits its visitors
            itself: then `max_upload` applies to every body, and POSTs are not counted.
        refusal: returns the content type and the body of a refusal.
        max_open: maximum number of concurrent requests of one visitor.
    """

    def __init__(
        self,
        app: Callable,
        hosts: set[str],
        further_hosts: set[str],
        routes: tuple[str, ...],
        max_upload: int,
        make_room: Callable[[int], None] | None,
        admit: Callable[[str, str, bytes], None] | None,
        refusal: Callable[[Refused], tuple[str, str]] = lambda refused: ("text/plain; charset=utf-8", str(refused)),
        max_open: int = MAX_OPEN,
    ):
        self.app = app
        self.further_hosts = {host.lower() for host in further_hosts}
        self.hosts = hosts | self.further_hosts
        self.routes = re.compile("|".join(f"(?:{route})" for route in routes))
        self.max_upload, self.make_room, self.admit, self.refusal = max_upload, make_room, admit, refusal
        self.max_open = max_open
        self._open: Counter[str] = Counter()
        self._posts: OrderedDict[str, tuple[float, float]] = OrderedDict()  # visitor -> tokens left, and when
        self._admission = asyncio.Lock()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def answer(message: dict) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        visitor = visitor_of(scope["client"][0]) if scope["client"] else ""
        self._open[visitor] += 1
        body = _Body(scope, receive)
        try:
            self._check(scope, visitor)
            await self._pass(scope, body, answer, visitor)
        except Refused as refused:
            if refused.status == 413:
                await body.drain(self.max_upload)
            await _respond(answer, refused, *self.refusal(refused))
        finally:
            self._open[visitor] -= 1
            if not self._open[visitor]:
                del self._open[visitor]

    def _check(self, scope: dict, visitor: str) -> None:
        """Check what is known before the body arrives."""
        if scope["type"] != "http":
            raise Refused(403, "only HTTP is served here")
        host, netloc = self._host(scope)
        if host not in self.hosts and not ("*" in self.hosts and _is_address(host)):
            raise Refused(403, f"the host {host[:100]!r} is not served here")
        if self._is_foreign(scope, netloc):
            raise Refused(403, "requests from other sites are refused")
        if not self.routes.fullmatch(f"{scope['method']} {scope['path']}"):
            raise Refused(404, "not found")
        if self._open[visitor] > self.max_open:
            raise Refused(429, f"a visitor may have at most {self.max_open} requests open at once")
        if scope["method"] == "POST" and self.admit is not None:
            self._count_post(visitor)

    @staticmethod
    def _host(scope: dict) -> tuple[str, str]:
        """Return the name in `Host` without its port, and the whole header in lower case."""
        values = _header(scope, b"host")
        if len(values) != 1:
            raise Refused(400, "a request must have exactly one Host header")
        try:
            return (urlsplit(f"//{values[0]}").hostname or "").rstrip("."), values[0].lower()
        except ValueError as error:
            raise Refused(400, "the Host header is malformed") from error

    def _is_foreign(self, scope: dict, netloc: str) -> bool:
        """Return whether another site's page sent the request, other than by a link to this server."""
        for origin in _header(scope, b"origin"):
            try:
                parts = urlsplit(origin)
            except ValueError:
                return True
            if parts.netloc.lower() != netloc and parts.hostname not in self.further_hosts:
                return True
        is_cross_site = _header(scope, b"sec-fetch-site") in (["cross-site"], ["same-site"])
        return is_cross_site and _header(scope, b"sec-fetch-mode") != ["navigate"]

    def _count_post(self, visitor: str) -> None:
        """Take one POST from this visitor's token bucket."""
        now = time.monotonic()
        left, then = self._posts.pop(visitor, (POSTS, now))
        left = min(POSTS, left + (now - then) * POSTS_A_SECOND)
        self._posts[visitor] = (max(0, left - 1), now)
        while len(self._posts) > MAX_VISITORS:
            self._posts.popitem(last=False)
        if left < 1:
            raise Refused(429, "too many requests: wait a minute")

    async def _pass(self, scope: dict, body: "_Body", send: Callable, visitor: str) -> None:
        if scope["method"] != "POST":
            await self.app(scope, body.receive, send)
        elif self.admit is None:
            await self.app(scope, body.again(await body.whole(self.max_upload)), send)
        elif "".join(_header(scope, b"content-type")).startswith("multipart/"):
            if body.length is None:
                raise Refused(411, "an upload must state its length")
            body.check_length(self.max_upload)
            await asyncio.to_thread(self.make_room, body.length)
            await self.app(scope, body.receive, send)
        else:
            whole = await body.whole(MAX_BODY)
            async with self._admission:
                self.admit(visitor, scope["path"], whole)
                await self.app(scope, body.again(whole), send)


class _Body:
    """The body of a request, which must arrive within `BODY_SECONDS`.

    Attributes:
        length: declared length in bytes, or None.
    """

    def __init__(self, scope: dict, receive: Callable):
        lengths = _header(scope, b"content-length")
        self.length = int(lengths[0]) if len(lengths) == 1 and lengths[0].isdecimal() else None
        self._receive = receive
        self._is_whole = False
        self._deadline = time.monotonic() + BODY_SECONDS

    def check_length(self, limit: int) -> None:
        """Check the declared length.

        Raises:
            Refused: it exceeds the limit.
        """
        if self.length is not None and self.length > limit:
            raise Refused(413, f"the request is longer than {limit} bytes")

    async def receive(self) -> dict:
        """Receive the next message. A client that is too slow counts as disconnected."""
        if self._is_whole:
            return await self._receive()  # waits for the client to leave
        try:
            message = await asyncio.wait_for(self._receive(), max(0, self._deadline - time.monotonic()))
        except TimeoutError:
            message = {"type": "http.disconnect"}
        self._is_whole = not message.get("more_body", False)
        return message

    async def whole(self, limit: int) -> bytes:
        """Receive the whole body.

        Raises:
            Refused: the body is longer than `limit` bytes, or did not arrive in time.
        """
        self.check_length(limit)
        body = b""
        while not self._is_whole:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Refused(408, f"the request did not arrive in {BODY_SECONDS} seconds")
            body += message.get("body", b"")
            if len(body) > limit:
                raise Refused(413, f"the request is longer than {limit} bytes")
        return body

    async def drain(self, limit: int) -> None:
        """Read and discard up to `limit` bytes, so that a client that is still sending can read the refusal."""
        num_bytes = 0
        while not self._is_whole and num_bytes <= limit:
            message = await self.receive()
            num_bytes += len(message.get("body", b""))

    def again(self, body: bytes) -> Callable:
        """Return a `receive` that replays a body that was already read."""
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            return pending.pop() if pending else await self._receive()

        return receive


def _header(scope: dict, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def _respond(send: Callable, refused: Refused, content_type: str, body: str) -> None:
    text = body.encode()
    headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(text)).encode())]
    headers.append((b"connection", b"close"))
    if refused.status == 429:
        headers.append((b"retry-after", b"60"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
