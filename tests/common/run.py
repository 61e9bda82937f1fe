"""transformers' own common tests on this package's classes.

    python tests/common/run.py [pytest options]

The library ships these tests in its source distribution alone: that of the installed version is downloaded once, to
`build/`. The testers beside this file become test modules of the library's tree, which they import from.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# What the library's tests need although its source distribution leaves it out.
MISSING = {
    "pytest.ini": "[pytest]",
    "fetch_hub_objects_for_ci.py": """
        import os

        def url_to_local_path(url, return_url_if_not_found=True):
            name = url.rsplit("/", 1)[-1]
            return name if os.path.exists(name) or not return_url_if_not_found else url
        """,
    "tests/generation/test_utils.py": "class GenerationTesterMixin: pass",
    "tests/exporters/test_export.py": """
        class ExportTesterMixin: pass
        class ExportGenerateTesterMixin: pass
        """,
    "tests/utils/test_configuration_utils.py": """
        config_common_kwargs = {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["A"],
            "problem_type": "regression",
        }
        """,
}
PICTURES = ("000000039769.jpg", "000000077595.jpg", "coco_sample.png")  # looked for on the network otherwise


def library_tests() -> Path:
    """The folder that holds the installed version's `tests`, downloaded where it is not there yet."""
    release = version("transformers")
    folder = ROOT / "build" / f"transformers-{release}"
    if folder.exists():
        return folder
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    command = "-m pip download --quiet --no-deps --no-build-isolation --no-binary transformers"
    subprocess.run([sys.executable, *command.split(), f"transformers=={release}", "-d", unfinished], check=True)
    (archive,) = unfinished.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        prefix = archive.name.removesuffix(".tar.gz")
        members = [member for member in files if member.name.startswith(f"{prefix}/tests/")]
        files.extractall(unfinished, members, filter="data")
    (unfinished / prefix / "tests").rename(unfinished / "tests")
    shutil.rmtree(unfinished / prefix)
    archive.unlink()
    unfinished.rename(folder)
    return folder


def prepare(folder: Path) -> None:
    """Adds the testers, what is missing, and the pictures."""
    for name, text in MISSING.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix(" " * 8) for line in text.splitlines()), encoding="utf-8")
    ours = folder / "tests/models/unitok"
    shutil.rmtree(ours, ignore_errors=True)
    ours.mkdir(parents=True)
    for name in ("models", "image_processors", "processor"):
        shutil.copy(HERE / f"{name}.py", ours / f"test_{name}.py")
    for package in ("", "models", "models/unitok", "generation", "exporters", "utils"):
        (folder / "tests" / package / "__init__.py").touch()
    noise = np.random.default_rng(0)
    for name in PICTURES:
        Image.fromarray(noise.integers(0, 255, (480, 640, 3), dtype=np.uint8)).save(folder / name)


def main() -> int:
    folder = library_tests()
    prepare(folder)
    paths = [str(ROOT), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    options = "-q -p no:cacheprovider -W ignore -W always::FutureWarning --timeout 300"
    command = [sys.executable, "-m", "pytest", "tests/models/unitok", *options.split(), *sys.argv[1:]]
    return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
