"""The command line `unitok-mllm`: demo, reconstruct, ask, generate, edit, convert, serve, api, env.

Results go to stdout, progress to stderr. An error of the user takes one line `error: ...` and exit code 2; any other
exception is a bug and shows its traceback. Heavy modules are imported where they are needed: help, usage errors and
missing files need neither torch nor transformers, which tests check.
"""

import codecs
import importlib.util
import logging
import math
import os
import random
import re
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from .devices import AUTO, DEVICE_HELP
from .guard import MAX_OPEN, host_name, listen, proxy_addresses, served_host, url_of
from .inference import (
    SHIPPED_MODEL,
    answer_questions,
    check_model,
    choose_answers,
    draw_codes,
    edit_images,
    load,
    picture_area,
    pictures_of,
    psnr,
    reconstruct_images,
    sampling_options,
)
from .interruption import end_at_once
from .outputs import check_output_folder, check_whole_folder
from .typer_apps import OneLineErrors, script_app, show_error


if TYPE_CHECKING:
    from PIL import Image


app = script_app(cls=OneLineErrors, no_args_is_help=True, help="One LLM that reads images and draws them.")

MAX_GUIDANCE = 1e6  # as in drawing_unitok, which imports torch
ModelFolder = Annotated[
    Path, typer.Option("--model", help="Model folder.", show_default="the model shipped in the package")
]
Guidance = Annotated[
    float,
    typer.Option(
        min=1, max=MAX_GUIDANCE, help="Classifier-free guidance scale: how closely to follow the prompt; 1 is none."
    ),
]
Device = Annotated[str, typer.Option(help=f"Where the model runs: {DEVICE_HELP}.")]
Proxy = Annotated[
    str | None,
    typer.Option(
        parser=proxy_addresses,
        help="Address of a reverse proxy whose X-Forwarded-For tells visitors apart.",
        show_default="none",
    ),
]
MaxRows = Annotated[
    int, typer.Option(min=1, max=2**16, help="Rows of the running batch: one for an answer, two for a guided drawing.")
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=2**20,
        help="Positions of a row, prompt and answer or image.",
        show_default="the LLM's, at most 2048",
    ),
]
OwnGuidance = Annotated[
    float | None,
    typer.Option(
        min=1,
        max=MAX_GUIDANCE,
        help="Classifier-free guidance scale: how closely to follow the prompt; 1 is none.",
        show_default="the model's own",
    ),
]

Plausibility = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Leave out codes whose probability without guidance is below this share of the likeliest one's; 0 for none.",
        show_default="the model's own",
    ),
]


def check_finite(**options: float | None) -> None:
    """Check, before any work, that the given options are finite numbers."""
    for name, value in options.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name.replace('_', '-')} must be a finite number, got {value}")


def check_sampling(temperature: float | None, top_p: float | None) -> None:
    """Check, before any work, that codes can be sampled with the given options."""
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}.")


def utf8(argument: str) -> str:
    """Decode an argument: in a locale that cannot decode its bytes, they are read as UTF-8.

    Raises:
        ValueError: they are not UTF-8.
    """
    return os.fsencode(argument).decode() if any("\udc80" <= char <= "\udcff" for char in argument) else argument


def check_output(path: Path) -> None:
    """Check, before any work, that a PNG file can be written to `path`, or beside it if it exists."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"cannot write {path}: the name must end in .png")
    check_output_folder(path.parent)


def save_new(picture: "Image.Image", path: Path, **notes: object) -> Path:
    """Save to `path`, or if that exists to the first free one of `NAME-1.png`, `NAME-2.png`, ...

    Args:
        path: missing parent folders are created.
        notes: text chunks of the PNG file, by name.
    """
    from PIL.PngImagePlugin import PngInfo

    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    info = PngInfo()
    for name, value in notes.items():
        info.add_itxt(name, str(value))
    free.parent.mkdir(parents=True, exist_ok=True)
    picture.save(free, pnginfo=info)
    return free


@app.callback(invoke_without_command=True)
def main_options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False):
    if version:
        from . import __version__

        typer.echo(f"unitok-mllm {__version__}")
        raise typer.Exit()


@app.command()
def demo(
    model: ModelFolder = SHIPPED_MODEL,
    output: Annotated[
        Path, typer.Option(help="PNG file for the picture; gets a number if it exists. Its folder is created.")
    ] = Path("unitok-demo.png"),
    images: Annotated[int, typer.Option(min=1, max=100, help="Number of test images to read.")] = 6,
    guidance: OwnGuidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of test images and of the drawings.")] = 0,
    device: Device = AUTO,
) -> None:
    """Read test images of easy-VQA, answer questions, draw from prompts, recolor: all in one picture."""
    check_output(output)
    check_model(model)
    try:
        import easy_vqa
    except ModuleNotFoundError as error:
        raise ValueError("the demo needs easy-vqa: pip install 'unitok_mllm[demo]'") from error
    from .demo import make_demo

    mllm, processor = load(model, device=device)
    name = f"{model.resolve().name}, {mllm.num_parameters() / 1e6:.0f} M parameters"
    sheet, summary = make_demo(
        mllm, processor, name, easy_vqa, images, guidance, seed, tell=lambda line: typer.echo(line, err=True)
    )
    typer.echo(f"{summary}\npicture: {save_new(sheet, output)}")


@app.command()
def reconstruct(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", exists=True, dir_okay=False, help="Image files, any format.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for NAME_reconstruction.png; created if missing.")] = Path("."),
    model: ModelFolder = SHIPPED_MODEL,
    device: Device = AUTO,
) -> None:
    """Turn images into codes and back, and save original and reconstruction side by side.

    The whole picture is fitted into the model's image size. PSNR does not count the padding around it.
    --model takes a visual tokenizer's folder or an MLLM's.
    """
    check_output_folder(output)
    check_model(model)
    from PIL import Image

    from .image_processing_unitok import load_image

    for source in images:
        load_image(source)
    tokenizer, processor = load(model, tokenizer_only=True, device=device)
    output.mkdir(parents=True, exist_ok=True)
    for source in images:
        picture = load_image(source)
        (original,), (result,), num_codes = reconstruct_images(tokenizer, processor, [picture])
        area = picture_area(picture.size, original.size)
        original, result = original.crop(area), result.crop(area)
        pair = Image.new("RGB", (2 * original.width, original.height))
        pair.paste(original, (0, 0))
        pair.paste(result, (original.width, 0))
        path = save_new(pair, output / f"{source.stem}_reconstruction.png")
        typer.echo(f"{path}  PSNR {psnr(original, result):.2f} dB, {num_codes} codes")


@app.command()
def ask(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", exists=True, dir_okay=False, help="Image file, any format.")
    ],
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", parser=utf8, help='What to ask, such as "what color is the shape?".')
    ],
    model: ModelFolder = SHIPPED_MODEL,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=2**20, help="Maximum length of the answer, in tokens.")
    ] = 64,
    choices: Annotated[
        str | None,
        typer.Option(
            parser=utf8,
            help="Choose the likeliest of these answers, separated by commas: red,blue.",
            show_default="a free answer",
        ),
    ] = None,
    by_length: Annotated[
        bool, typer.Option("--by-length", help="Choose by the mean log-likelihood per token, not by the sum.")
    ] = False,
    device: Device = AUTO,
) -> None:
    """Ask a question about an image; the answer alone goes to stdout, and to stderr the log-likelihoods of choices."""
    if not question.strip():
        raise ValueError("the question is empty")
    if by_length and choices is None:
        raise ValueError("--by-length needs --choices")
    answers = [] if choices is None else [choice.strip() for choice in choices.split(",")]
    if not all(answers):
        raise ValueError(f"one of the choices is empty: {choices!r}")
    check_model(model)
    from .image_processing_unitok import load_image

    picture = load_image(image)
    mllm, processor = load(model, device=device)
    if not answers:
        typer.echo(answer_questions(mllm, processor, [(picture, question)], max_new_tokens)[0])
        return
    (chosen,), scores = choose_answers(mllm, processor, [(picture, question)], answers, by_length)
    for answer, score in zip(answers, scores[0].tolist()):
        typer.echo(f"{answer}: {score:.4f}", err=True)
    typer.echo(chosen)


@app.command()
def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", parser=utf8, help='What to draw, such as "a red circle".')
    ],
    output: Annotated[Path, typer.Option(help="PNG file; gets a number if it exists. Its folder is created.")] = Path(
        "unitok-drawing.png"
    ),
    count: Annotated[
        int, typer.Option(min=1, max=10_000, help="Number of samples to draw, or of candidates to keep.")
    ] = 1,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000,
            help="Number of samples to draw and rank by the tokenizer's text and image embeddings. The best are kept.",
            show_default="the model's own, or no ranking",
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="PNG file for all candidates with their scores, best first.", show_default="none"),
    ] = None,
    guidance: OwnGuidance = None,
    plausibility: Plausibility = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature, above 0; lower is more predictable.", show_default="the model's own"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=0, help="Sample from the k likeliest codes; 0 for all.", show_default="the model's own"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest codes that have this total probability.", show_default="the model's own"
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Seed of the drawing: the same seed gives the same picture.",
            show_default="a new one each time",
        ),
    ] = None,
    model: ModelFolder = SHIPPED_MODEL,
    device: Device = AUTO,
) -> None:
    """Draw images from a prompt; the paths of the files go to stdout, and to stderr the scores of candidates."""
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if candidates is not None and 1 < candidates < count:
        raise ValueError(f"cannot keep {count} of only {candidates} candidates")
    check_finite(plausibility=plausibility, temperature=temperature, top_p=top_p)
    check_sampling(temperature, top_p)
    check_output(output)
    if sheet is not None:
        check_output(sheet)
    mllm, processor = load(model, device=device)
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    typer.echo(f"seed {seed}", err=True)
    given = {"guidance_scale": guidance, "plausibility": plausibility, "candidates": candidates, "seed": seed}
    options = sampling_options(mllm, **given, temperature=temperature, top_k=top_k, top_p=top_p)
    if sheet is not None and options.get("candidates", 1) == 1:
        raise ValueError("--sheet shows candidates: set --candidates to at least 2")
    asked = {"num_return_sequences": count, "progress": True, "return_dict_in_generate": True}
    drawn = draw_codes(mllm, processor, [prompt], **asked, **options)
    notes = [{"sample": f"{number} of {count}"} for number in range(1, count + 1)]
    if drawn.scores is not None:
        scores, order = drawn.candidate_scores[0], drawn.candidate_order[0].tolist()
        captions = [f"sample {i + 1}: {scores[i]:.4f}" for i in order]
        typer.echo("\n".join(captions), err=True)
        notes = [{"sample": f"{i + 1} of {len(order)}", "score": f"{scores[i]:.4f}"} for i in order[:count]]
        if sheet is not None:
            from .sheet import contact_sheet

            ranked = pictures_of(mllm, processor, drawn.candidate_codes[0, order])
            typer.echo(f"all candidates: {save_new(contact_sheet(ranked, captions), sheet)}", err=True)
    for picture, note in zip(pictures_of(mllm, processor, drawn.codes), notes):
        typer.echo(save_new(picture, output, prompt=prompt, **note, **options))


@app.command()
def edit(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", exists=True, dir_okay=False, help="Image file, any format.")
    ],
    instruction: Annotated[
        str, typer.Argument(metavar="INSTRUCTION", parser=utf8, help='What to do, such as "make it blue".')
    ],
    output: Annotated[Path, typer.Option(help="PNG file; gets a number if it exists. Its folder is created.")] = Path(
        "unitok-edit.png"
    ),
    guidance: Guidance = 1.0,
    image_guidance: Annotated[
        float,
        typer.Option(
            min=1, max=MAX_GUIDANCE, help="Guidance scale of the picture: how closely to follow it; 1 is none."
        ),
    ] = 1.0,
    plausibility: Plausibility = None,
    model: ModelFolder = SHIPPED_MODEL,
    device: Device = AUTO,
) -> None:
    """Redraw an image as an instruction says; the path of the file goes to stdout."""
    if not instruction.strip():
        raise ValueError("the instruction is empty")
    check_output(output)
    check_model(model)
    from .image_processing_unitok import load_image

    picture = load_image(image)
    mllm, processor = load(model, device=device)
    scales = {"guidance_scale": guidance, "image_guidance_scale": image_guidance, "plausibility": plausibility}
    (edited,) = edit_images(mllm, processor, [(picture, instruction)], do_sample=False, **scales)
    typer.echo(save_new(edited, output))


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", exists=True, help="An original tokenizer .pth, or an MLLM folder.")
    ],
    to: Annotated[Path, typer.Option(help="Folder to write to; must be new or empty.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The tokenizer .pth that belongs to an MLLM folder."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Execute the file's pickle if it does not load otherwise. Only for files that you trust.",
        ),
    ] = False,
    causal: Annotated[
        bool, typer.Option("--causal", help="The tokenizer is from the first release (February 2025).")
    ] = False,
) -> None:
    """Convert an original checkpoint into a folder that the Auto classes and these commands load."""
    if source.is_dir() != (tokenizer is not None):
        raise ValueError("--tokenizer is required for an MLLM folder, and only for that")
    if source.is_dir() and causal:
        raise ValueError("--causal is only for a tokenizer file")
    if not to.absolute().parent.is_dir():
        raise ValueError(f"cannot write {to}: {to.parent} is not a folder")
    check_whole_folder(to)
    from transformers.utils import logging

    from .convert_unitok import convert_mllm, convert_tokenizer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.absolute().parent) as workspace:
        folder = Path(workspace) / "converted"
        if tokenizer is None:
            report = convert_tokenizer(source, folder, allow_pickle, causal)
        else:
            report = convert_mllm(source, tokenizer, folder, allow_pickle)
        if to.exists():
            to.rmdir()
        folder.rename(to)
    typer.echo(report)


def make_engine(mllm, max_rows: int, max_length: int | None, max_queue: int, cuda_graph: bool = True):
    """Make the engine of a server. A line on stderr says if it does not batch.

    The engine's passes leave one CPU core to the requests and to the decoding of pictures.
    """
    import torch

    from .serving import UniTokEngine

    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - 1)))
    engine = UniTokEngine(mllm, max_rows, max_length, max_queue, cuda_graph=cuda_graph)
    if not engine.is_batched:
        kind = mllm.config.text_config.model_type
        typer.echo(f"{kind} cannot be batched: each step computes its rows one after another", err=True)
    return engine


@app.command()
def serve(
    model: ModelFolder = SHIPPED_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in, without a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    max_rows: MaxRows = 32,
    max_length: MaxLength = None,
    queue_size: Annotated[int, typer.Option(min=1, help="How many requests may wait.")] = 16,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Largest file to take, in MiB.")] = 10,
    max_kept_mb: Annotated[
        int, typer.Option(min=1, help="Most that uploads and drawings take together, in MiB; the oldest go first.")
    ] = 1024,
    allow_host: Annotated[
        list[str],
        typer.Option(parser=served_host, help="A further name by which browsers reach the page; may be given again."),
    ] = [],  # noqa: B006
    proxy: Proxy = None,
    device: Device = AUTO,
) -> None:
    """Show a web page: chat about pictures, draw, look into the tokenizer. Ctrl-C ends it.

    Uploads and drawings lie in a temporary folder: for an hour, or until the end.
    """
    check_model(model)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("serve needs gradio: pip install 'unitok_mllm[web]'")
    listen(host, port).close()  # the model takes a while to load
    from .child import run_in_folder

    def work(folder: str) -> None:
        # gradio reads these when it is imported
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_EXAMPLES_CACHE": f"{folder}/examples"}
        try:
            from . import web
            from .web_model import MAX_COUNT

            mllm, processor = load(model, device=device)
            engine = make_engine(mllm, max_rows, max_length, max_queue=max_rows * MAX_COUNT)
            title = f"{model.resolve().name}, {mllm.num_parameters() / 1e6:.0f} M parameters"
            limits = {"queue_size": queue_size, "max_upload_mb": max_upload_mb, "max_kept_mb": max_kept_mb}
            web.serve(engine, processor, title, folder, host, port, further_hosts=allow_host, proxy=proxy, **limits)
        except (ValueError, OSError) as error:
            show_error(error)
            sys.exit(2)

    raise typer.Exit(run_in_folder(work, prefix="unitok-mllm-"))


@app.command()
def api(
    model: ModelFolder = SHIPPED_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients.", show_default="the folder's")
    ] = None,
    max_rows: MaxRows = 32,
    max_length: MaxLength = None,
    queue_size: Annotated[int, typer.Option(min=1, help="How many requests may wait; then clients get a 429.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 600,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest request to take, in MiB.")] = 32,
    max_open: Annotated[
        int, typer.Option(min=1, help="Requests of one address at the same time; more get a 429.")
    ] = MAX_OPEN,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="A file with the key that clients must send.", show_default="$UNITOK_API_KEY, or no key"),
    ] = None,
    allow_host: Annotated[
        list[str],
        typer.Option(parser=served_host, help="A further name by which clients reach the server; may be given again."),
    ] = [],  # noqa: B006
    allow_url: Annotated[
        list[str],
        typer.Option(
            parser=host_name,
            help="A host that pictures may be fetched from, of a public address; may be given again.",
        ),
    ] = [],  # noqa: B006
    proxy: Proxy = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph/--no-cuda-graph", help="On a GPU, record the batch's steps as CUDA graphs.")
    ] = True,
    device: Device = AUTO,
) -> None:
    """Serve OpenAI's API: chat about pictures, images, edits, many at once. Ctrl-C ends it when all are answered.

    Nothing of a request is kept or logged but counts and times (GET /metrics).
    """
    check_finite(timeout=timeout)
    if name is not None and not name.strip():
        raise ValueError("the name is empty")
    check_model(model)
    for package in ("fastapi", "uvicorn", "multipart"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"api needs {package}: pip install 'unitok_mllm[serve]'")
    listen(host, port).close()  # the model takes a while to load
    from . import api as server

    key = server.read_key(api_key_file)
    mllm, processor = load(model, device=device)
    engine = make_engine(mllm, max_rows, max_length, queue_size, cuda_graph)
    limits = {
        "max_body": max_body_mb * 2**20,
        "timeout": timeout,
        "further_hosts": set(allow_host),
        "url_hosts": allow_url,
        "max_open": max_open,
        "proxy": proxy,
    }
    typer.echo(f"{url_of(host, port)}/v1", err=True)
    server.serve(engine, processor, name or model.resolve().name, host, port, api_key=key, **limits)


@app.command()
def env() -> None:
    """Print what a bug report needs: versions and the machine."""
    import platform
    from importlib.metadata import PackageNotFoundError, requires, version

    import torch

    rows = {"python": platform.python_version(), "platform": platform.platform(), "CPUs": os.cpu_count()}
    names = {re.match(r"[\w.-]+", line)[0] for line in requires("unitok_mllm") or []}
    for name in ("unitok_mllm", *sorted(names - {"unitok_mllm"}, key=str.lower)):
        try:
            rows[name] = version(name)
        except PackageNotFoundError:
            rows[name] = "not installed"
    for index in range(torch.accelerator.device_count()):
        device = torch.device(torch.accelerator.current_accelerator().type, index)
        rows[str(device)] = torch.get_device_module(device).get_device_properties(index)
    rows |= {"CUDA of torch": torch.version.cuda, "threads": torch.get_num_threads()}
    for name, value in rows.items():
        typer.echo(f"{name}: {value}")


def escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode what stdout's encoding cannot: a path's original bytes, or an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def main() -> None:
    """The entry point of `unitok-mllm`."""
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, end_at_once):  # and is not ignored
        signal.signal(signal.SIGINT, interrupt)
    codecs.register_error("unitok_mllm", escape)
    is_ascii = codecs.lookup(sys.stdout.encoding).name == "ascii"
    sys.stdout.reconfigure(encoding="utf-8" if is_ascii else None, errors="unitok_mllm")
    sys.modules.setdefault("wandb", None)  # no command needs it; timm would import it, which takes seconds
    of_torchao = "is an Enum subclass and is now natively supported"  # at import; users can do nothing about it
    logging.getLogger("torch.utils._pytree").addFilter(lambda record: of_torchao not in record.getMessage())
    try:
        app()
    except Exception:
        if not came:
            raise
        end_at_once(came[0], None)  # a library has turned the interrupt, during its import, into an error of its own


if __name__ == "__main__":
    main()
