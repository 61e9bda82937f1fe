"""Two styles of the Unicode emoji, from the npm packages `emoji-datasource-google` and `emoji-datasource-twitter`.

Each has 1911 base emoji of 64x64 pixels: Noto (Apache 2.0) and Twemoji (graphics CC-BY 4.0). A tenth of the names is
held out in the `twitter` style: these pictures are never trained on, but the same names in the other style are.

https://github.com/iamcal/emoji-data
"""

import io
import json
import os
import random
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


VERSION = "16.0.0"
STYLES = ("google", "twitter")
HELD_OUT_STYLE, HELD_OUT_SHARE = "twitter", 0.1
QUESTION = "what is this?"
TABLE = "emoji.json"


@dataclass
class Emoji:
    """One picture of an emoji.

    Attributes:
        file: file name in the package, such as "1f339.png".
        name: name in lower case, such as "rose".
        style: "google" or "twitter".
        category: Unicode category, such as "Animals & Nature".
        held_out: whether the picture must never be trained on.
    """

    file: str
    name: str
    style: str
    category: str
    held_out: bool

    @property
    def caption(self) -> str:
        return f"{self.name} emoji, {self.style} style"

    @property
    def image(self) -> str:
        """Path of the picture in the folder of `write_images`."""
        return f"images/{self.style}/{self.file}"


def package(style: str, folder: str | os.PathLike) -> Path:
    """Return the path of a style's package in the folder; download it with `npm pack` if it is missing.

    Raises:
        FileNotFoundError: the package is missing, and npm is not installed.
    """
    folder = Path(folder)
    path = folder / f"emoji-datasource-{style}-{VERSION}.tgz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"emoji-datasource-{style}@{VERSION}"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} is not there, and there is no npm to fetch it with.") from error
    return path


def load(packages: str | os.PathLike, categories: list[str] | None = None) -> list[Emoji]:
    """Load every base emoji that has a name of its own, style by style, in the order of the package's table.

    Args:
        packages: folder of the npm packages.
        categories: categories to load; None for all. The choice of held-out emoji depends on them.

    Raises:
        ValueError: one of the categories has no emoji.
    """
    packages = Path(packages)
    with tarfile.open(package(STYLES[0], packages)) as archive:
        rows = json.load(archive.extractfile("package/emoji.json"))
    named = {row["name"].lower(): row for row in rows if all(row[f"has_img_{style}"] for style in STYLES)}
    if categories:
        known = {row["category"] for row in named.values()}
        if unknown := set(categories) - known:
            raise ValueError(f"No emoji is of {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}.")
        named = {name: row for name, row in named.items() if row["category"] in categories}
    held_out = set(random.Random(0).sample(sorted(named), round(HELD_OUT_SHARE * len(named))))
    return [
        Emoji(row["image"], name, style, row["category"], style == HELD_OUT_STYLE and name in held_out)
        for style in STYLES
        for name, row in named.items()
    ]


def read_table(folder: str | os.PathLike) -> list[Emoji]:
    """Read the list of emoji that `training.prepare_data` has written to a folder.

    Raises:
        ValueError: the file is not a list of emoji.
    """
    path = Path(folder) / TABLE
    try:
        return [Emoji(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no table of emoji ({error}): write it anew with training.prepare_data") from error


def write_images(emoji: list[Emoji], packages: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Write every emoji as a PNG on a white background to `folder / emoji.image`."""
    packages, folder = Path(packages), Path(folder)
    for style in STYLES:
        wanted = {f"package/img/{style}/64/{e.file}": folder / e.image for e in emoji if e.style == style}
        with tarfile.open(package(style, packages)) as archive:
            for member in archive:
                if path := wanted.pop(member.name, None):
                    picture = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGBA")
                    white = Image.new("RGBA", picture.size, "white")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.alpha_composite(white, picture).convert("RGB").save(path)
        if wanted:
            raise FileNotFoundError(f"The {style} package lacks {len(wanted)} pictures, {next(iter(wanted))} first.")
