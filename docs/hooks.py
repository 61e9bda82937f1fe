"""Hooks of mkdocs: add pages of documents outside of docs/, of scripts' helps, and of linked source files.

mkdocs calls `on_config` first, `on_files` before it reads the pages, and `on_page_markdown` for each of them.
"""

import json
import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
HELPS = ROOT / "build" / "helps.json"
HELP_SECONDS = 300  # for all scripts together; some import torch
PLAIN_TEXT = {"COLUMNS": "84", "TERMINAL_WIDTH": "84", "NO_COLOR": "1", "TYPER_USE_RICH": "0", "OMP_NUM_THREADS": "1"}
DOCUMENTS = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "training/README.md": "training.md",
    "training/launch/README.md": "launch.md",
    "eval/README.md": "evaluation.md",
    "unitok_mllm/checkpoints/tiny/README.md": "tiny.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".cff": "yaml"}
LINK = re.compile(r"""(\]\(|src=")([^)#:"\s]+)(#[^)\s]*)?(?=[)"])""")
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def scripts() -> list[str]:
    """List the modules that are run with `python -m`, and `unitok-mllm`."""
    sources = sorted(path for folder in ("training", "eval") for path in (ROOT / folder).glob("*.py"))
    modules = [path for path in sources if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    return ["unitok-mllm", *(f"{path.parent.name}.{path.stem}" for path in modules)]


def help_texts() -> dict[str, dict[str, str]]:
    """Return the helps of all scripts, by command line. They are printed again if any source is newer."""
    sources = [
        path for folder in ("training", "eval", "unitok_mllm", "docs") for path in (ROOT / folder).rglob("*.py")
    ]
    if not HELPS.is_file() or HELPS.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        command = [sys.executable, ROOT / "docs" / "script_helps.py", *scripts()]
        environment = os.environ | PLAIN_TEXT
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, timeout=HELP_SECONDS
        )
        HELPS.parent.mkdir(exist_ok=True)
        HELPS.write_bytes(done.stdout)
    return json.loads(HELPS.read_text(encoding="utf-8"))


def target_page(link: str, source: str) -> tuple[str, str]:
    """Return the file of the repository that a link in the document `source` leads to, and the page that shows it."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if path in DOCUMENTS:
        return path, DOCUMENTS[path]
    if path.startswith("docs/"):
        return path, path.removeprefix("docs/")
    return path, f"source/{path}.md"


def linked_sources(documents: list[str]) -> Iterator[str]:
    """Yield the files of the repository, other than documents, that these documents link to."""
    for document in documents:
        for _, link, _ in LINK.findall((ROOT / document).read_text(encoding="utf-8")):
            path, page = target_page(link, document)
            if page.startswith("source/"):
                yield path


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the scripts to the navigation, before its last part."""
    config.nav.insert(-1, {"Scripts": [f"scripts/{name}.md" for name in scripts()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {}
    for document, page in DOCUMENTS.items():
        pages[page] = FRONT_MATTER.sub("", (ROOT / document).read_text(encoding="utf-8"))
    for name, texts in help_texts().items():
        blocks = [f"## {command}\n\n```text\n{text}\n```\n" for command, text in texts.items()]
        pages[f"scripts/{name}.md"] = "\n".join([f"# {name}\n", "What `--help` prints.\n", *blocks])
    guides = [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
    for path in linked_sources([*DOCUMENTS, *guides]):
        language, text = LANGUAGES.get(Path(path).suffix, "text"), (ROOT / path).read_text(encoding="utf-8")
        pages[f"source/{path}.md"] = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n````{language}\n{text}````\n"
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point the links of a document, which are relative to the repository, to the pages of the site."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    source = {page: document for document, page in DOCUMENTS.items()}.get(here, f"docs/{here}")

    def lead(match: re.Match) -> str:
        _, target = target_page(match[2], source)
        return f"{match[1]}{os.path.relpath(target, posixpath.dirname(here) or '.')}{match[3] or ''}"

    return LINK.sub(lead, markdown)
