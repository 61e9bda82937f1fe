"""Fetch a picture for a server, from hosts that its operator has allowed.

A client that names a URL makes the server send a request to it. The host must therefore be listed, and its address must
be public: someone else may own a listed name and point it into the machine's own network. The request goes to the
address that was checked. Redirects are not followed, and proxies of the environment are not used.
"""

import ipaddress
import socket
import time
from collections.abc import Collection
from urllib.parse import urlsplit, urlunsplit

import httpx


MAX_BYTES = 10 * 2**20
SECONDS = 10


def fetch(url: str, hosts: Collection[str], max_bytes: int = MAX_BYTES, seconds: float = SECONDS) -> bytes:
    """Return the content of a URL.

    Args:
        url: an http or https URL.
        hosts: allowed names. An IP address among them may be a private one, since it cannot point elsewhere.
        max_bytes: largest response, in bytes.
        seconds: longest time for the whole response.

    Raises:
        ValueError: another host or scheme, a private address, no response, a redirect or an error, or a response that is
            too large or too slow; the message names the URL's host.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or host not in hosts:
        raise ValueError(f"pictures are not fetched from {parts.scheme}://{host[:100]} here")
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ValueError(f"{host} cannot be found: {error}") from error
    addresses = [ipaddress.ip_address(address[4][0].partition("%")[0]) for address in found]
    if str(addresses[0]) != host and not all(address.is_global for address in addresses):
        raise ValueError(f"{host} is an address of a private network")
    address = f"[{addresses[0]}]" if addresses[0].version == 6 else str(addresses[0])
    target = urlunsplit((parts.scheme, f"{address}:{port}", parts.path, parts.query, ""))
    deadline, content = time.monotonic() + seconds, b""
    try:
        with (
            httpx.Client(trust_env=False, timeout=seconds) as client,
            client.stream(
                "GET", target, headers={"Host": parts.netloc.rpartition("@")[2]}, extensions={"sni_hostname": host}
            ) as response,
        ):
            if response.status_code != 200:
                raise ValueError(f"{host} answers with status {response.status_code}")
            for chunk in response.iter_raw():
                content += chunk
                if len(content) > max_bytes:
                    raise ValueError(f"{host} sends more than {max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise ValueError(f"{host} takes longer than {seconds:g} seconds")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{host} cannot be read: {error or type(error).__name__}") from error
    return content


__all__ = ["fetch"]
