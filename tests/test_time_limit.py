"""The time limit for Python code that may loop."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from unitok_mllm.time_limit import time_limit


pytestmark = pytest.mark.attack


def loop() -> None:
    while True:
        try:
            sum(range(100))
        except Exception:  # what is ended cannot hold on
            pass


def test_a_loop_ends_in_any_thread():
    def limited() -> str:
        with pytest.raises(ValueError, match="^took too long$"), time_limit(0.1, "took too long"):
            loop()
        return "went on"

    started = time.monotonic()
    assert limited() == "went on"
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: limited(), range(8))) == ["went on"] * 8
    assert time.monotonic() - started < 30


def test_what_ends_in_time_is_left_alone():
    for _ in range(200):
        with time_limit(60, "took too long"):
            pass
    for _ in range(300):  # the limit falls on the end of the block
        try:
            with time_limit(0.001, "took too long"):
                time.sleep(0.001)
        except ValueError as error:
            assert str(error) == "took too long"
        sum(range(1000))  # nothing is raised later
    with pytest.raises(KeyError, match="own"), time_limit(60, "took too long"):
        raise KeyError("own")
