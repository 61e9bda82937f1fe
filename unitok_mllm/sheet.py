"""The questions of `unitok-mllm demo`, and its picture, laid out with Pillow."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont


RGB = {  # easy-VQA's eight colours, flat
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "green": (0, 255, 0),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
}
COLORS = tuple(RGB)
SHAPES = ("circle", "rectangle", "triangle")
EMOJI = (
    *("rose", "sunflower", "red apple", "strawberry", "slice of pizza", "hamburger", "dog face", "cat face"),
    *("penguin", "octopus", "face with tears of joy", "heavy black heart"),
)
EMOJI_STYLES = ("google", "twitter")
QUESTIONS_PER_IMAGE = 3

BACKGROUND, CARD, RULE = "#f4f5f7", "#ffffff", "#e1e4e8"
INK, FAINT, GREEN, RED = "#1c2127", "#69727d", "#1a9850", "#d73027"
MARGIN, PADDING, GAP = 64, 20, 28
PICTURE = 128  # side of every picture on the sheet, in pixels
PAIR_GAP = 8
DRAWING_COLUMNS = 6
CELL = 2 * PICTURE + PAIR_GAP
CELL_HEIGHT = PICTURE + 44
WIDTH = 2 * MARGIN + DRAWING_COLUMNS * CELL + (DRAWING_COLUMNS - 1) * GAP
HEADING_HEIGHT = 76
CARD_WIDTH = (WIDTH - 2 * MARGIN - GAP) // 2
LINE_HEIGHT = 60  # of a question and its answer
CARD_HEIGHT = QUESTIONS_PER_IMAGE * LINE_HEIGHT + 2 * PADDING


@dataclass
class Answer:
    """A question, the model's answer, and the benchmark's answer."""

    question: str
    answer: str
    truth: str

    @property
    def is_right(self) -> bool:
        return self.answer == self.truth


@dataclass
class Reading:
    """An image as the model sees it, its reconstruction (PSNR in dB), and the answers about it."""

    original: Image.Image
    reconstruction: Image.Image
    psnr: float
    answers: list[Answer]


Drawing = tuple[str, tuple[Image.Image, Image.Image]]  # a caption and two pictures


@dataclass
class Section:
    """Drawings under a heading with a note."""

    heading: str
    note: str
    drawings: list[Drawing]


def question_kind(answer: str) -> str:
    """Return the kind of an easy-VQA question by its answer: "yes/no", "color" or "shape"."""
    return "color" if answer in COLORS else "shape" if answer in SHAPES else "yes/no"


def choose_questions(easy_vqa: Any, num_images: int, seed: int) -> dict[str, list[tuple[str, str]]]:
    """Choose random test images of the easy-VQA package, each with a few of its (question, answer) pairs.

    The questions are random too, of different kinds (answered by a colour, a shape, yes or no) if possible.
    """
    paths, rng = easy_vqa.get_test_image_paths(), random.Random(seed)
    chosen = {number: [] for number in rng.sample(sorted(paths), num_images)}
    for question, answer, number in zip(*easy_vqa.get_test_questions()):
        if number in chosen:
            chosen[number].append((question, answer))
    result = {}
    for number, rows in chosen.items():
        rng.shuffle(rows)
        seen, ranked = Counter(), []
        for row in rows:
            kind = question_kind(row[1])
            ranked.append((seen[kind], row))
            seen[kind] += 1
        ranked.sort(key=lambda pair: pair[0])
        result[paths[number]] = [row for _, row in ranked[:QUESTIONS_PER_IMAGE]]
    return result


def count_right(readings: list[Reading]) -> str:
    """Count right answers, as text: "17 of 18"."""
    answers = [answer for reading in readings for answer in reading.answers]
    return f"{sum(answer.is_right for answer in answers)} of {len(answers)}"


def summary(readings: list[Reading], sections: list[Section], num_codes: int) -> str:
    """Describe the demo's outcome, with a line for each answer; `num_codes` is the number of codes of an image."""
    lines = [f"answers: {count_right(readings)} right"]
    for answer in (answer for reading in readings for answer in reading.answers):
        correction = "" if answer.is_right else f" [{answer.truth}]"
        lines.append(f"  {'right' if answer.is_right else 'WRONG'}  {answer.question} {answer.answer}{correction}")
    mean_psnr = sum(reading.psnr for reading in readings) / len(readings)
    lines.append(f"reconstructions: {len(readings)}, {num_codes} codes each, mean PSNR {mean_psnr:.1f} dB")
    lines += [f"{section.heading.lower()}: {len(section.drawings)} pairs of pictures" for section in sections]
    return "\n".join(lines)


def make_sheet(title: str, subtitle: str, readings: list[Reading], sections: list[Section]) -> Image.Image:
    """Make one picture of the whole demo.

    Args:
        title: its first line.
        subtitle: its second line.
        readings: the images read, two cards a row.
        sections: the drawings.
    """
    cards_top = MARGIN + 190
    top, tops = cards_top + -(-len(readings) // 2) * (CARD_HEIGHT + GAP) + 32, []
    for section in sections:
        tops.append(top)
        top += HEADING_HEIGHT + -(-len(section.drawings) // DRAWING_COLUMNS) * (CELL_HEIGHT + GAP) + 24
    sheet = Image.new("RGB", (WIDTH, top + MARGIN - GAP), BACKGROUND)

    _text(sheet, (MARGIN, MARGIN), title, 46)
    _text(sheet, (MARGIN, MARGIN + 62), subtitle, 22, FAINT)
    _heading(sheet, cards_top - 64, "It reads", f"{count_right(readings)} answers agree with the benchmark's")
    for index, reading in enumerate(readings):
        row, column = divmod(index, 2)
        _card(sheet, MARGIN + column * (CARD_WIDTH + GAP), cards_top + row * (CARD_HEIGHT + GAP), reading)
    for top, section in zip(tops, sections):
        _heading(sheet, top, section.heading, section.note)
        for index, (caption, pictures) in enumerate(section.drawings):
            row, column = divmod(index, DRAWING_COLUMNS)
            left, row_top = MARGIN + column * (CELL + GAP), top + HEADING_HEIGHT + row * (CELL_HEIGHT + GAP)
            for i, picture in enumerate(pictures):
                _picture(sheet, left + i * (PICTURE + PAIR_GAP), row_top, picture)
            _text(sheet, (left + CELL // 2, row_top + PICTURE + 14), caption, 20, anchor="ma")
    return sheet


def contact_sheet(pictures: list[Image.Image], captions: list[str], columns: int = 8) -> Image.Image:
    """Lay out pictures in rows, each above its caption."""
    columns, cell = min(columns, len(pictures)), PICTURE + 2 * GAP
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (GAP + columns * cell, GAP + rows * CELL_HEIGHT), BACKGROUND)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        left, top = GAP + i % columns * cell, GAP + i // columns * CELL_HEIGHT
        _picture(sheet, left, top, picture)
        _text(sheet, (left, top + PICTURE + 8), caption, 14, room=cell - 8)
    return sheet


def _card(sheet: Image.Image, left: int, top: int, reading: Reading) -> None:
    ImageDraw.Draw(sheet).rounded_rectangle(
        (left, top, left + CARD_WIDTH, top + CARD_HEIGHT), radius=14, fill=CARD, outline=RULE
    )
    x, y = left + PADDING, top + PADDING + 12
    for picture, caption in ((reading.original, "original"), (reading.reconstruction, "from its codes")):
        _picture(sheet, x, y, picture)
        _text(sheet, (x + PICTURE // 2, y + PICTURE + 10), caption, 16, FAINT, anchor="ma")
        x += PICTURE + PAIR_GAP
    x += PADDING
    for i, answer in enumerate(reading.answers):
        middle = top + PADDING + i * LINE_HEIGHT + LINE_HEIGHT // 2
        _mark(sheet, x, middle - 12, answer.is_right)
        text_left = x + 40
        room = left + CARD_WIDTH - PADDING - text_left
        _text(sheet, (text_left, middle - 6), answer.question, 19, INK, "ls", room)
        color, correction = (GREEN, "") if answer.is_right else (RED, f"benchmark: {answer.truth}")
        room -= _font(18).getlength(correction) + 16
        end = _text(sheet, (text_left, middle + 19), answer.answer or "(nothing)", 22, color, "ls", room)
        _text(sheet, (end + 16, middle + 19), correction, 18, FAINT, anchor="ls")


def _heading(sheet: Image.Image, top: int, text: str, note: str) -> None:
    end = _text(sheet, (MARGIN, top + 32), text, 32, anchor="ls")
    _text(sheet, (end + 18, top + 32), note, 20, FAINT, anchor="ls")
    ImageDraw.Draw(sheet).line((MARGIN, top + 48, WIDTH - MARGIN, top + 48), fill=RULE, width=2)


def _picture(sheet: Image.Image, left: int, top: int, picture: Image.Image) -> None:
    sheet.paste(picture.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS), (left, top))
    ImageDraw.Draw(sheet).rectangle((left - 1, top - 1, left + PICTURE, top + PICTURE), outline=RULE)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _text(
    sheet: Image.Image,
    position: tuple[float, float],
    text: str,
    size: int,
    color: str = INK,
    anchor: str = "la",
    room: float = WIDTH,
) -> float:
    """Draw one line of text, cut to `room` pixels. Returns its right end for a left-aligned text."""
    font, text = _font(size), " ".join(text.split())
    if font.getlength(text) > room:
        while text and font.getlength(text + "...") > room:
            text = text[:-1]
        text += "..."
    ImageDraw.Draw(sheet).text(position, text, fill=color, font=font, anchor=anchor)
    return position[0] + font.getlength(text)


def _mark(sheet: Image.Image, left: int, top: int, is_right: bool) -> None:
    """Draw a tick on green or a cross on red, 24 pixels wide; it is drawn large and then shrunk for smooth edges."""
    mark = Image.new("RGBA", (96, 96))
    draw = ImageDraw.Draw(mark)
    draw.ellipse((1, 1, 94, 94), fill=GREEN if is_right else RED)
    strokes = [[(26, 50), (42, 66), (70, 34)]] if is_right else [[(32, 32), (64, 64)], [(64, 32), (32, 64)]]
    for stroke in strokes:
        draw.line(stroke, fill="white", width=10, joint="curve")
    mark = mark.resize((24, 24), Image.Resampling.LANCZOS)
    sheet.paste(mark, (left, top), mark)
