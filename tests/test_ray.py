"""On a local Ray of two cores: jobs of Ray Data, and the server as an application of Ray Serve (extra `ray`)."""

import base64
import io
import json
import math
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from eval import text_to_image
from training.extract_codes import app
from unitok_mllm.inference import SHIPPED_MODEL, draw_images, load


pytestmark = pytest.mark.slow  # starts Ray, and a process with torch for each worker
ray = pytest.importorskip("ray", reason="needs ray: pip install 'unitok_mllm[ray]'")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


def files(folder: Path, suffix: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob(f"*{suffix}"))}


def test_workers_draw_the_pictures_of_one_process_and_go_on_with_what_is_missing(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green triangle\n", encoding="utf-8")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--samples", "2", "--batch_size", "2", "--device", "cpu"]
    text_to_image.main([*options, "--output", str(tmp_path / "alone")])
    alone = files(tmp_path / "alone/images", ".png")
    for workers in ("1", "2"):
        output = tmp_path / workers
        text_to_image.main([*options, "--output", str(output), "--ray_workers", workers])
        assert files(output / "images", ".png") == alone and len(alone) == 6
    some = sorted((output / "images").glob("*.png"))
    times = {path: path.stat().st_mtime_ns for path in some[1:]}
    some[0].unlink()
    text_to_image.main([*options, "--output", str(output), "--ray_workers", "2"])
    assert files(output / "images", ".png") == alone
    assert {path: path.stat().st_mtime_ns for path in some[1:]} == times
    report = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert (report["drawing"]["drawn"], report["drawing"]["processes"]) == (1, 2)


def test_workers_extract_the_codes_of_one_process(tmp_path, visual_tokenizer):
    visual_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number in range(7):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"images/{number}.png")
    (tmp_path / "images/broken.png").write_bytes(b"no picture")

    def extract(out: str, *options: str):
        arguments = [str(tmp_path / "images"), str(tmp_path / out), "--visual-model", str(tmp_path / "model")]
        arguments += ["--variants", "2", "--max-shift", "1", "--shard-size", "3", "--batch-size", "2", *options]
        arguments += ["--workers", "0", "--device", "cpu"]
        return CliRunner().invoke(app, arguments)

    assert extract("alone", "--max-broken-share", "0.5").exit_code == 0
    alone = files(tmp_path / "alone", "")
    done = extract("two", "--max-broken-share", "0.5", "--ray-workers", "2")
    assert "2 workers: 8 images, 1 of them broken" in done.stdout
    assert files(tmp_path / "two", "") == alone and len(alone) == 4
    (tmp_path / "two/000001.parquet").unlink()
    done = extract("two", "--max-broken-share", "0.5", "--ray-workers", "1")
    assert "1 workers: 3 images" in done.stdout and files(tmp_path / "two", "") == alone
    refused = extract("none", "--max-broken-share", "0", "--ray-workers", "1")
    assert isinstance(refused.exception, ValueError) and "broken" in str(refused.exception)


def test_arguments_that_no_replica_could_serve_with_are_refused():
    from unitok_mllm.ray_serving import Arguments

    assert Arguments(allow_host=["*", "Example.org"]).allow_host == ["*", "example.org"]
    impossible = {"max_rows": 0, "timeout": math.inf, "allow_url": ["http://a.org"], "max_replicas": 0}
    for name, value in impossible.items():
        with pytest.raises(ValueError, match=name):
            Arguments(**{name: value})


def test_a_replica_that_is_killed_costs_no_client_an_answer_without_an_error():
    from ray import serve

    from unitok_mllm.ray_serving import Arguments, build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(Arguments(max_rows=4, max_replicas=2)))
    address, seeds = f"http://127.0.0.1:{port}", range(60)

    def drawn(seed: int) -> httpx.Response:
        body = {"prompt": "a red circle", "seed": seed}
        return httpx.post(f"{address}/v1/images/generations", json=body, timeout=300)

    def replicas() -> dict:
        (deployment,) = serve.status().applications["default"].deployments.values()
        return deployment.replica_states

    try:
        with ThreadPoolExecutor(16) as pool:
            begun = [pool.submit(drawn, seed) for seed in seeds]
            deadline = time.monotonic() + 240
            while replicas().get("RUNNING", 0) < 2:  # by the queue
                assert time.monotonic() < deadline
                begun += [pool.submit(drawn, 0) for _ in range(8)]
                time.sleep(2)
            under_load = [pool.submit(drawn, seed) for seed in seeds]
            while sum(future.done() for future in under_load) < 8:
                time.sleep(0.05)
            processes = [one for one in replica_processes() if one != os.getpid()]
            os.kill(processes[0], signal.SIGKILL)
            responses = [future.result() for future in under_load]
        assert {future.result().status_code for future in begun} == {200}
        statuses = [response.status_code for response in responses]
        assert set(statuses) <= {200, 500, 503} and statuses.count(200) > 30
        again = drawn(0)
        assert again.status_code == 200  # of the other replica, or of a new one
        model, processor = load(SHIPPED_MODEL)
        for seed, response in zip(seeds, responses):
            if response.status_code != 200:
                assert response.text
            elif seed % 10 == 0:
                (expected,) = draw_images(model, processor, ["a red circle"], 1, progress=False, seed=seed)
                (row,) = response.json()["data"]
                picture = Image.open(io.BytesIO(base64.b64decode(row["b64_json"])))
                assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1
    finally:
        serve.shutdown()


def replica_processes() -> list[int]:
    """The processes of the replicas."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"UniTokServer" in path.read_bytes().split(b"\0")[0]
    ]
