"""Fetching pictures for a server: only from allowed hosts, within limits of size and time."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from unitok_mllm.fetch import fetch


pytestmark = pytest.mark.attack


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(302 if self.path == "/elsewhere" else 200)
        self.send_header("Location", "http://169.254.169.254/")
        self.end_headers()
        try:
            if self.path == "/slow":
                for _ in range(50):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            self.wfile.write(b"x" * 1000 if self.path == "/large" else self.headers["Host"].encode())
        except OSError:
            pass  # the client has gone

    def log_message(self, *arguments):
        pass


@pytest.fixture
def port():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_an_allowed_host_is_asked_by_its_own_name(port):
    assert fetch(f"http://127.0.0.1:{port}/picture", ["127.0.0.1"]) == f"127.0.0.1:{port}".encode()


@pytest.mark.parametrize(
    "url, hosts, message",
    [
        ("http://127.0.0.1:{port}/", ["example.com"], "not fetched from http://127.0.0.1 here"),
        ("http://localhost:{port}/", ["localhost"], "localhost is an address of a private network"),
        ("http://127.0.0.1@localhost:{port}/", ["127.0.0.1"], "not fetched from http://localhost here"),
        ("file:///etc/passwd", [""], "not fetched from file:// here"),
        ("ftp://127.0.0.1/", ["127.0.0.1"], "not fetched from ftp://127.0.0.1 here"),
        ("http://127.0.0.1:99999/", ["127.0.0.1"], "127.0.0.1 cannot be found"),
        ("http://127.0.0.1:1/", ["127.0.0.1"], "127.0.0.1 cannot be read"),
        ("http://127.0.0.1:{port}/elsewhere", ["127.0.0.1"], "answers with status 302"),
        ("http://127.0.0.1:{port}/large", ["127.0.0.1"], "sends more than 100 bytes"),
        ("http://127.0.0.1:{port}/slow", ["127.0.0.1"], "takes longer than 0.3 seconds"),
    ],
)
def test_what_is_not_allowed_or_too_much_is_refused(port, url, hosts, message):
    with pytest.raises(ValueError, match=message):
        fetch(url.format(port=port), hosts, max_bytes=100, seconds=0.3)
