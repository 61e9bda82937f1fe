"""Throughput and latency of the API server, compared with one that takes requests in turn.

    python -m eval.serving
    python -m eval.serving --preset smollm2 --clients 1 16 --requests 32
    python -m eval.serving --model FOLDER --peer        # beside `transformers serve`
    python -m eval.serving --soak 10000                 # memory over 10,000 requests

Starts `unitok-mllm api` twice: with its default batch, and with rows for only one guided drawing, so that it takes one
request after another; on a GPU a third time, without CUDA graphs. For each number of clients, every client sends its
next request as soon as the last one is answered, over the loopback interface. `plain` is `generate` in this process,
without a server, on ten requests one after another. Run it while nothing else runs on the machine, and compare only
ratios between figures of one run.
"""

import argparse
import asyncio
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import httpx
import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from eval._common import versions
from eval.timing.subjects import SMOLLM2
from training.errors import CommandLine, one_line_errors
from training.files import write_atomically
from unitok_mllm import UniTokMLLMForConditionalGeneration
from unitok_mllm.configuration_unitok import check_ranges
from unitok_mllm.devices import find_device
from unitok_mllm.drawing_unitok import IMAGE_GENERATION
from unitok_mllm.inference import SHIPPED_MODEL, check_model, load
from unitok_mllm.outputs import check_output_file


PROMPT = "a red circle"
ANSWER_TOKENS = 16
DRAWING = {"prompt": PROMPT, "stream": True}
REQUESTS = {
    "draw": ("/v1/images/generations", DRAWING),
    "draw, 3 partial images": ("/v1/images/generations", DRAWING | {"partial_images": 3}),
    "answer": (
        "/v1/completions",
        {"prompt": PROMPT, "stream": True, "max_tokens": ANSWER_TOKENS, "temperature": 1},
    ),
}


PROGRAM = (sys.executable, "-m", "unitok_mllm.cli")


def start_server(
    model: Path, port: int, *options: str, program: tuple[str, ...] = PROGRAM, **kwargs
) -> subprocess.Popen:
    """Start the API server, and wait until it answers.

    Args:
        model: folder of the MLLM.
        port: port to listen on.
        options: further options of the server.
        program: command that runs `unitok-mllm`.
        kwargs: options of `subprocess.Popen`.

    Raises:
        ValueError: the server ends, or does not answer within five minutes.
    """
    return wait_for([*program, "api", "--model", str(model), "--port", str(port), *options], port, **kwargs)


def start_peer(model: Path, port: int) -> subprocess.Popen:
    """Start `transformers serve` with its default options."""
    device = find_device().type
    options = ["--trust-remote-code", "--device", device, "--host", "127.0.0.1", "--port", str(port)]
    return wait_for([str(Path(sys.executable).parent / "transformers"), "serve", str(model), *options], port)


def wait_for(command: list[str], port: int, **kwargs) -> subprocess.Popen:
    """Run the command of a server, and wait until `/health` answers; see `start_server`."""
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **kwargs)
    for _ in range(3000):
        if server.poll() is not None:
            raise ValueError(f"The server ended: {server.stderr.read()[-500:]}")
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).raise_for_status()
            return server
        except httpx.HTTPError:
            time.sleep(0.1)
    server.kill()
    raise ValueError("The server did not start within five minutes.")


async def ask(client: httpx.AsyncClient, path: str, body: dict) -> tuple[float, float]:
    """Measure the seconds until the first event (picture or token) of a streamed response, and until its end."""
    start, first = time.perf_counter(), None
    async with client.stream("POST", path, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if first is None and line.startswith("data: "):
                first = time.perf_counter() - start
    return first, time.perf_counter() - start


async def load_with(port: int, kind: str, num_clients: int, num_requests: int, model: str) -> dict:
    """Measure the throughput of one kind of request (see `REQUESTS`), and percentiles of the latency, in seconds.

    Args:
        port: port of the server.
        kind: kind of request.
        num_clients: number of concurrent clients.
        num_requests: number of requests over all clients.
        model: name of the model in the server's API.
    """
    path, body = REQUESTS[kind]
    body = body | {"model": model}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client:
        await ask(client, path, body | {"seed": 0})
        seeds = iter(tqdm(range(1, num_requests + 1), desc=f"{kind}, {num_clients} clients", leave=False))
        times: list[tuple[float, float]] = []

        async def one() -> None:
            for seed in seeds:
                times.append(await ask(client, path, body | {"seed": seed}))

        start = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(num_clients)))
        seconds = time.perf_counter() - start
    firsts, wholes = zip(*times)
    return {
        "requests_per_second": num_requests / seconds,
        **percentiles(wholes),
        **{f"first_{name}": seconds for name, seconds in percentiles(firsts).items()},
    }


LAUNCHED = "without CUDA graphs"
TIMES = ("p50", "p95", "p99", "first_p50", "first_p95", "first_p99")


def percentiles(times: list[float]) -> dict[str, float]:
    """Return the 50th, 95th and 99th percentile of the times."""
    ordered = sorted(times)
    return {f"p{share}": ordered[min(len(ordered) - 1, share * len(ordered) // 100)] for share in (50, 95, 99)}


def plain_times(model: Path) -> dict[str, dict[str, float]]:
    """Time ten of the same drawings and answers with `generate`, one after another, in seconds."""
    mllm, processor = load(model)
    inputs = processor(text=[PROMPT], generation_mode="image").to(mllm.device)
    text, times = processor(text=[PROMPT]).to(mllm.device), {"draw": [], "answer": []}
    for seed in range(11):  # the first is not counted
        start = time.perf_counter()
        codes = mllm.generate(**inputs, generation_mode="image", seed=seed)
        processor.post_process_multimodal_output(mllm.decode_images(codes), generation_mode="image")
        times["draw"].append(time.perf_counter() - start)
        start = time.perf_counter()
        torch.manual_seed(seed)
        mllm.generate(**text, max_new_tokens=ANSWER_TOKENS, do_sample=True)
        times["answer"].append(time.perf_counter() - start)
    plain = {kind: percentiles(row[1:]) | {"mean": statistics.mean(row[1:])} for kind, row in times.items()}
    return plain | {kind: plain["draw"] for kind in REQUESTS if kind not in plain}


def memory_of(server: subprocess.Popen) -> int:
    """Return the resident memory of a server in bytes, from /proc."""
    status = Path(f"/proc/{server.pid}/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def soak(model: Path, port: int, max_rows: int, num_requests: int) -> list[tuple[int, int]]:
    """Send all kinds of requests in turn from 16 concurrent clients, and record the server's memory.

    Returns:
        The number of answered requests and the resident memory in bytes, at the start and after each tenth.
    """
    server = start_server(model, port, "--max-rows", str(max_rows), "--queue-size", "1000")
    try:
        memory, count = [(0, memory_of(server))], num_requests // (10 * len(REQUESTS))
        for tenth in range(10):
            for kind in REQUESTS:
                asyncio.run(load_with(port, kind, 16, count, model.name))
            memory.append(((tenth + 1) * count * len(REQUESTS), memory_of(server)))
            print(f"{memory[-1][0]} requests: {memory[-1][1] / 2**20:.0f} MiB", flush=True)
    finally:
        stop(server)
    return memory


def stop(server: subprocess.Popen) -> None:
    """Terminate a server, and wait until it has ended."""
    server.terminate()
    server.wait()


def table(results: dict) -> str:
    """Format the results as Markdown, times in milliseconds."""
    lines = [
        "| | clients | requests a second | times one after another | p50 | p95 | p99 | first event p50 | p95 | p99 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in REQUESTS:
        plain = results["plain"][kind]
        times = " | ".join(f"{plain[name] * 1e3:.0f}" for name in ("p50", "p95"))
        lines.append(f"| {kind}, `generate` alone | | {1 / plain['mean']:.1f} | | {times} | | | | |")
        for server in ("batched", LAUNCHED, "transformers serve"):
            name = kind if server == "batched" else f"{kind}, {server}"
            for clients, row in results.get(server, {}).get(kind, {}).items():
                in_turn = results["in turn"][kind].get(clients)
                ratio = f"{row['requests_per_second'] / in_turn['requests_per_second']:.1f}" if in_turn else ""
                times = " | ".join(f"{row[time] * 1e3:.0f}" for time in TIMES)
                lines.append(f"| {name} | {clients} | {row['requests_per_second']:.1f} | {ratio} | {times} |")
    return "\n".join(lines)


def smollm2_folder(folder: Path) -> Path:
    """Save an LLM of SmolLM2-135M's size, with random weights and the shipped model's tokenizers (16 positions)."""
    torch.manual_seed(0)
    shipped, processor = load(SHIPPED_MODEL)
    llm = LlamaForCausalLM(copy.deepcopy(SMOLLM2))
    model = UniTokMLLMForConditionalGeneration.from_parts(
        llm, shipped.visual, image_generation=IMAGE_GENERATION, **processor.config_token_ids()
    )
    model.save_pretrained(folder), processor.save_pretrained(folder)
    return folder


@one_line_errors()
def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=SHIPPED_MODEL, help="folder of an MLLM (default: the shipped one)"
    )
    parser.add_argument("--preset", choices=["smollm2"], help="an LLM of SmolLM2-135M's size, with random weights")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of clients at once")
    parser.add_argument("--requests", type=int, default=128, help="requests for each number of clients and kind")
    parser.add_argument("--max_rows", type=int, default=128, help="rows of the batching server")
    parser.add_argument("--peer", action="store_true", help="also time the answers of `transformers serve`")
    parser.add_argument("--soak", type=int, metavar="REQUESTS", help="only send that many requests, and print memory")
    parser.add_argument("--port", type=int, default=8765, help="a free port")
    parser.add_argument("--output", type=Path, help="also write all figures to this JSON file")
    options = parser.parse_args(arguments)
    check_ranges(
        options,
        clients=(1, 2**16),
        requests=(1, 2**40),
        max_rows=(2, 2**16),
        port=(1, 65535),
        soak=(10 * len(REQUESTS), 2**40),
    )
    check_model(options.model)
    if options.output:
        check_output_file(options.output)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        model = smollm2_folder(Path(folder)) if options.preset else options.model
        if options.soak:
            results = {"memory": soak(model, options.port, options.max_rows, options.soak)}
        else:
            results = measure(model, options)
            print(table(results))
            before, after = results["batched"]["memory"]
            print(f"\nMemory of the batching server: {before >> 20} MiB when started, {after >> 20} MiB at the end.")
    if options.output:
        write_atomically(options.output, json.dumps(results | {"versions": versions()}, indent=2).encode())


def measure(model: Path, options: argparse.Namespace) -> dict:
    """Time the plain calls, both servers and, if requested, the peer."""
    results = {"plain": plain_times(model)}
    flags = {"in turn": ["--max-rows", "2"], "batched": ["--max-rows", str(options.max_rows)]}
    if find_device().type == "cuda":
        flags[LAUNCHED] = [*flags["batched"], "--no-cuda-graph"]
    servers = {
        name: partial(start_server, model, options.port, "--queue-size", "1000", *own) for name, own in flags.items()
    }
    if options.peer:
        servers["transformers serve"] = partial(start_peer, model, options.port)
    for name, start in servers.items():
        kinds = ["answer"] if name == "transformers serve" else list(REQUESTS)
        known_as = str(model) if name == "transformers serve" else model.name
        server = start()
        try:
            before = memory_of(server)
            results[name] = {
                kind: {
                    n: asyncio.run(load_with(options.port, kind, n, options.requests, known_as))
                    for n in options.clients
                }
                for kind in kinds
            }
            results[name]["memory"] = before, memory_of(server)
        finally:
            stop(server)
    return results


if __name__ == "__main__":
    main()
