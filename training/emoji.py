"""The Unicode emoji in up to four styles, from npm packages.

| style | pictures | package | licence of the graphics |
|---|---|---|---|
| google | Noto | `emoji-datasource-google`; above 64 px `@iconify-json/noto` | Apache 2.0 |
| twitter | Twemoji | `emoji-datasource-twitter`; above 64 px `@iconify-json/twemoji` | CC-BY 4.0 |
| fluent | Fluent, flat | `@iconify-json/fluent-emoji-flat` | MIT |
| 3d | Fluent, 3D | `@lobehub/fluent-emoji-3d` | MIT |

The first package has the names, and 1911 base emoji. By default the styles are `google` and `twitter`, and a tenth of the
names is held out in the `twitter` style: these pictures are never trained on, but the same names in the other style are.
With given styles, (name, style) pairs are held out, see `hold_out_pairs`.

https://github.com/iamcal/emoji-data
"""

import io
import itertools
import json
import os
import random
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


VERSION = "16.0.0"
STYLES = ("google", "twitter")
SIZE = 64  # pixels, of the pictures in the emoji-datasource packages
DATASOURCE = {style: (f"emoji-datasource-{style}", VERSION) for style in STYLES}
VECTORS = {
    "google": ("@iconify-json/noto", "1.2.9"),
    "twitter": ("@iconify-json/twemoji", "1.2.5"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
}
LARGE = {"3d": ("@lobehub/fluent-emoji-3d", "1.1.0")}  # pictures of 256x256 pixels
ALL_STYLES = (*VECTORS, *LARGE)
HELD_OUT_STYLE, HELD_OUT_SHARE = "twitter", 0.1
VALIDATION_SHARE = 0.05  # of the (name, style) pairs
QUESTION = "what is this?"
RESTYLE = "draw it in {style} style"
TABLE = "emoji.json"


@dataclass
class Emoji:
    """One picture of an emoji.

    Attributes:
        file: file name, such as "1f339.png".
        name: name in lower case, such as "rose".
        style: one of `ALL_STYLES`.
        category: Unicode category, such as "Animals & Nature".
        held_out: whether the picture must never be trained on.
        validation: whether the picture is in the validation part of those that may be trained on.
    """

    file: str
    name: str
    style: str
    category: str
    held_out: bool
    validation: bool = False

    @property
    def caption(self) -> str:
        return f"{self.name} emoji, {self.style} style"

    @property
    def image(self) -> str:
        """Path of the picture in the folder of `write_images`."""
        return f"images/{self.style}/{self.file}"


def package(name: str, version: str, folder: str | os.PathLike) -> Path:
    """Return the path of an npm package in the folder; download it with `npm pack` if it is missing.

    Raises:
        FileNotFoundError: the package is missing, and npm is not installed.
    """
    folder = Path(folder)
    path = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} is not there, and there is no npm to fetch it with.") from error
    return path


def source(style: str, size: int) -> tuple[str, str]:
    """Return the package, and its version, that has the pictures of a style for a size in pixels."""
    if style in DATASOURCE and size <= SIZE:
        return DATASOURCE[style]
    return VECTORS[style] if style in VECTORS else LARGE[style]


def vector_graphics(archive: tarfile.TarFile) -> dict[str, str]:
    """Read the SVG documents of an `@iconify-json` package by code points, such as "1f339"."""
    characters, icons = (json.load(archive.extractfile(f"package/{name}.json")) for name in ("chars", "icons"))
    documents = {}
    for code_points, name in characters.items():
        if icon := icons["icons"].get(name):
            width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
            documents[code_points] = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
            )
    return documents


def originals(style: str, files: Iterable[str], packages: str | os.PathLike, size: int) -> dict[str, bytes | str]:
    """Read the pictures of a style as its package has them: PNG or WEBP files, or SVG documents.

    Args:
        style: one of `ALL_STYLES`.
        files: file names, such as "1f339.png".
        packages: folder of the npm packages.
        size: height and width of the pictures wanted, in pixels.

    Returns:
        The pictures that the package has, by file name.
    """
    is_vector = source(style, size) == VECTORS.get(style)
    with tarfile.open(package(*source(style, size), packages)) as archive:
        if is_vector:
            documents = vector_graphics(archive)  # some packages leave out the variation selector
            found = {f: documents.get(f[:-4]) or documents.get(f[:-4].replace("-fe0f", "")) for f in files}
            return {file: document for file, document in found.items() if document}
        form = f"package/img/{style}/{SIZE}/{{}}.png" if style in DATASOURCE else "package/assets/{}.webp"
        wanted = {form.format(file.removesuffix(".png")): file for file in files}
        return {wanted[m.name]: archive.extractfile(m).read() for m in archive if m.name in wanted}


def hold_out_pairs(categories: dict[str, str], styles: Sequence[str]) -> dict[tuple[str, str], str]:
    """Choose the (name, style) pairs that are not trained on: a tenth for tests, a twentieth for validation.

    No name is held out in more than one style, and all styles have equal shares, as have all categories. So each name
    and each style is known from other pictures.

    Args:
        categories: category by name.
        styles: the styles, from two to six.

    Returns:
        "test" or "validation" by pair.

    Raises:
        ValueError: there are other numbers of styles.
    """
    if not 2 <= len(styles) <= 1 / (HELD_OUT_SHARE + VALIDATION_SHARE):
        raise ValueError(f"Pairs can be held out of two to six styles, got {len(styles)}: {', '.join(styles)}.")
    rng, pairs, turns = random.Random(0), {}, itertools.cycle(styles)
    for category in sorted(set(categories.values())):
        names = sorted(name for name in categories if categories[name] == category)
        rng.shuffle(names)
        for split, share in (("test", HELD_OUT_SHARE), ("validation", VALIDATION_SHARE)):
            count = round(share * len(styles) * sum(of == category for of in categories.values()))
            pairs |= {(name, next(turns)): split for name in names[:count]}
            names = names[count:]
    return pairs


def load(
    packages: str | os.PathLike,
    categories: list[str] | None = None,
    styles: Sequence[str] | None = None,
    size: int = SIZE,
    limit: int | None = None,
) -> list[Emoji]:
    """Load every base emoji that has a name of its own, style by style, in the order of the package's table.

    Args:
        packages: folder of the npm packages.
        categories: categories to load; None for all. The choice of held-out emoji depends on them.
        styles: styles to load, of which (name, style) pairs are held out; only names with a picture in all of them are
            loaded. None for `STYLES`, of which names are held out in the second.
        size: height and width of the pictures, in pixels.
        limit: number of names, the first ones of the table; None for all.

    Raises:
        ValueError: one of the categories has no emoji; a style is unknown or given twice; see also `hold_out_pairs`.
    """
    packages = Path(packages)
    if unknown := set(styles or ()) - set(ALL_STYLES):
        raise ValueError(f"No style is called {', '.join(sorted(unknown))}; there are {', '.join(ALL_STYLES)}.")
    if styles and len(set(styles)) < len(styles):
        raise ValueError(f"A style is given twice: {', '.join(styles)}.")
    with tarfile.open(package(*DATASOURCE[STYLES[0]], packages)) as archive:
        rows = json.load(archive.extractfile("package/emoji.json"))
    named = {row["name"].lower(): row for row in rows if all(row[f"has_img_{style}"] for style in STYLES)}
    if categories:
        known = {row["category"] for row in named.values()}
        if unknown := set(categories) - known:
            raise ValueError(f"No emoji is of {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}.")
        named = {name: row for name, row in named.items() if row["category"] in categories}
    for style in styles or ():
        files = originals(style, [row["image"] for row in named.values()], packages, size)
        named = {name: row for name, row in named.items() if row["image"] in files}
    named = dict(list(named.items())[:limit])
    if styles:
        split = hold_out_pairs({name: row["category"] for name, row in named.items()}, styles)
    else:
        held_out = random.Random(0).sample(sorted(named), round(HELD_OUT_SHARE * len(named)))
        split = {(name, HELD_OUT_STYLE): "test" for name in held_out}
    return [
        Emoji(
            row["image"],
            name,
            style,
            row["category"],
            split.get((name, style)) == "test",
            split.get((name, style)) == "validation",
        )
        for style in styles or STYLES
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


def decode(original: bytes | str, size: int) -> Image.Image:
    """Decode a picture of `originals`, in RGB on a white background, (size, size)."""
    if isinstance(original, str):
        from resvg_py import svg_to_bytes

        original = bytes(svg_to_bytes(svg_string=original, width=size, height=size, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(original)).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.LANCZOS)


def write_images(emoji: list[Emoji], packages: str | os.PathLike, folder: str | os.PathLike, size: int = SIZE) -> None:
    """Write every emoji as a PNG of `size` pixels on a white background to `folder / emoji.image`.

    Raises:
        FileNotFoundError: a package lacks pictures.
    """
    for style in dict.fromkeys(e.style for e in emoji):
        places = {e.file: Path(folder, e.image) for e in emoji if e.style == style}
        found = originals(style, places, packages, size)
        if missing := sorted(places.keys() - found.keys()):
            raise FileNotFoundError(f"The {style} package lacks {len(missing)} pictures, {missing[0]} first.")
        Path(folder, "images", style).mkdir(parents=True, exist_ok=True)
        for file, original in found.items():
            decode(original, size).save(places[file])
