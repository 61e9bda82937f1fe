"""The documentation site: its navigation, pages and API; built as a whole in a slow test."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import unitok_mllm


pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture
def hooks(monkeypatch):
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("hooks")


def pages(nav: object) -> list[str]:
    """The pages that a part of `nav` in mkdocs.yml names."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def test_the_navigation_has_every_page_once(hooks):
    nav = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    expected = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    expected |= set(hooks.DOCUMENTS.values())
    assert set(nav) == expected and len(nav) == len(expected)


def test_as_many_attacks_are_run_as_the_page_says(capfd):
    page = (DOCS / "robustness.md").read_text(encoding="utf-8")
    stated = {
        name: int(count) for name, count in re.findall(r"^\| `(tests/\w+\.py)` \| (\d+) \|$", page, re.MULTILINE)
    }
    (total,) = re.findall(r"(\d+) attacks", page)
    assert sum(stated.values()) == int(total) and len(stated) > 30
    pytest.main(["--collect-only", "-qq", "-m", "attack", "-p", "no:cacheprovider", *(str(ROOT / f) for f in stated)])
    counted = dict(re.findall(r"^(tests/\w+\.py): (\d+)$", capfd.readouterr().out, re.MULTILINE))
    assert [name for name in stated if stated[name] > int(counted.get(name, 0))] == []


def test_every_script_has_a_page(hooks):
    config = SimpleNamespace(nav=["index.md", "security.md"])
    (_, scripts, _) = hooks.on_config(config).nav
    assert {"scripts/unitok-mllm.md", "scripts/training.train_mllm.md", "scripts/eval.speed.md"} <= set(
        scripts["Scripts"]
    )
    assert "scripts/eval.protocol.md" not in scripts["Scripts"]  # a module that no one runs


def test_the_api_pages_show_every_public_class():
    shown = set()
    for path in (DOCS / "api").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert importlib.util.find_spec(name) is not None, name
            shown.add(name)
    assert {getattr(unitok_mllm, name).__module__ for name in unitok_mllm.__all__} <= shown


@pytest.mark.parametrize(
    ("link", "source", "page"),
    [
        ("docs/speed.md", "README.md", "speed.md"),
        ("../training/README.md", "docs/many_gpus.md", "training.md"),
        ("launch/README.md", "training/README.md", "launch.md"),
        ("../unitok_mllm/guard.py", "docs/robustness.md", "source/unitok_mllm/guard.py.md"),
        ("../../training/README.md", "docs/api/training.md", "training.md"),
    ],
)
def test_links_of_the_repository_lead_to_pages_of_the_site(hooks, link, source, page):
    assert hooks.target_page(link, source)[1] == page


@pytest.mark.slow  # runs every script's help and renders every page
def test_the_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    assert "UniTokModel" in (tmp_path / "site/api/tokenizer/index.html").read_text(encoding="utf-8")
    assert "--num_train_epochs" in (tmp_path / "site/scripts/training.train_mllm/index.html").read_text(
        encoding="utf-8"
    )


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["make"]
    targets = re.findall(r"^make (.+)$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    assert job["strategy"]["matrix"]["target"] == targets
    assert {"run": "make ${{ matrix.target }}"} in job["steps"]


def test_a_bug_report_asks_for_the_environment():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text(encoding="utf-8"))
    (field,) = (part for part in form["body"] if "unitok-mllm env" in part["attributes"].get("label", ""))
    assert field["validations"]["required"]
