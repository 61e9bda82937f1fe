"""The page that shows results: every number, nothing unescaped, what was published beside it."""

import base64
import html
import json
import re

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from eval.report import main, make_report, read_published, to_blocks


CLI = typer.Typer()
CLI.command()(main)
EASY_VQA = {
    "benchmark": "easy-VQA, test split",
    "settings": {"model": "tiny", "guidance": 3.25, "limit": None},
    "versions": {"torch": "2.99.1"},
    "parts": {
        "reconstruction": {
            "settings": {"digest": "abc"},
            "images": 1000,
            "psnr_db": 31.48231,
            "each": [99.5, 12.0625],
        },
        "vqa": {
            "prompt": "USER: {question}\nASSISTANT:",
            "accuracy": {"all": {"accuracy": 0.98912, "right": 9567}, "color": {"accuracy": 0.99931, "right": 2811}},
            "first_mistakes": [{"image": "7.png", "given": "red"}, {"image": "8.png", "given": "a < b"}],
        },
    },
}
CLAIMS = {
    "benchmark": "sub-codebooks under one total vocabulary",
    "rows": [
        {"codebooks": 1, "metrics": {"PSNR (dB)": {"mean": 21.123456, "std": 0.654321, "values": [20.5, 21.7]}}},
        {"codebooks": 8, "metrics": {"PSNR (dB)": {"mean": 25.5, "std": None, "values": [25.5]}}},
    ],
}
LMMS = {
    "results": {
        "gqa": {"alias": "gqa", "exact_match,none": 0.4321987},
        "mme": {"alias": "mme", "mme_score,none": 1234.5},
    },
    "configs": {"gqa": {"num_fewshot": 0}},
    "n-shot": {"gqa": 0, "mme": 0},
}


def numbers(value) -> list[str]:
    """All numbers in a JSON value, as Python writes them."""
    if isinstance(value, dict | list):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in numbers(item)]
    return [str(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def write(path, result):
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def text_of(page: str) -> str:
    return html.unescape(page)


@pytest.mark.parametrize("result", [EASY_VQA, CLAIMS, LMMS, [[1.5, {"deep": [{"deeper": {"x": 7.0625}}]}]], 41.5])
def test_every_number_given_is_on_the_page_and_every_name(tmp_path, result):
    page = text_of(make_report([write(tmp_path / "some.json", result)], "title"))
    measured = page[: page.find("Published, and not measured here")]
    measured = re.sub(r"<h4>As published</h4>.*?</div></div>", "", measured.replace("\n", ""), flags=re.DOTALL)
    for number in numbers(result):
        assert re.search(rf"(?<![\w.]){re.escape(number)}(?![\w.])", measured), number
    for text in ("reconstruction", "psnr_db", "a < b", "2.99.1", "USER: {question}ASSISTANT:") * (result is EASY_VQA):
        assert text in measured


def test_values_are_rounded_and_stand_in_full_in_the_tooltip():
    (block,) = to_blocks({"a": 0.98912345, "b": 12345.678, "c": 1448, "d": None, "e": [0.123456, True], "f": False})
    assert [(row[0].text, row[1].text, row[1].full) for row in block.rows] == [
        ("a", "0.9891", "0.98912345"),
        ("b", "12346", "12345.678"),
        ("c", "1448", ""),
        ("d", "-", ""),
        ("e", "0.1235, True", "0.123456, True"),
        ("f", "False", ""),
    ]


def test_alike_dicts_are_rows_of_one_table_and_others_have_tables_of_their_own():
    seen, held_out = {"psnr": 30.5, "top": [{"name": "x"}]}, {"psnr": 25.5, "top": [{"name": "y"}]}
    table, first, second = to_blocks({"seen": seen, "held_out": held_out}, "emoji")
    assert table.columns == ["", "psnr"]
    assert [[cell.text for cell in row] for row in table.rows] == [["seen", "30.5"], ["held_out", "25.5"]]
    assert [first.title, second.title] == ["emoji · seen · top", "emoji · held_out · top"]
    blocks = to_blocks({"a": {"x": 1, "y": 2, "z": 3}, "b": {"x": 1, "u": 2, "v": 3}})
    assert [block.title for block in blocks] == ["a", "b"]
    (block,) = to_blocks([{f"n{i}": i for i in range(13)}, {f"n{i}": -i for i in range(13)}])
    assert block.columns == [] and [cell.text for cell in block.rows[12]] == ["n12", "12", "-12"]
    (block,) = to_blocks(CLAIMS["rows"])
    assert block.columns == ["codebooks", "metrics · PSNR (dB)"]
    assert [row[1].text for row in block.rows] == ["21.12 ± 0.6543", "25.5"]


def test_what_comes_is_escaped_and_nothing_is_loaded_from_elsewhere(tmp_path):
    evil = "<script>alert('x')</script>\"&"
    result = {
        "benchmark": evil,
        "settings": {evil: evil},
        evil: {evil: [{evil: evil}]},
        "link": "https://example.org/a.js",
    }
    page = make_report([write(tmp_path / "r.json", result)], evil)
    assert "<script" not in page and page.count("&lt;script&gt;") >= 7
    assert '"&"' not in page
    assert set(re.findall(r'(?:src|href)="([^"]{5})', page)) == {"#resu"}
    assert "@import" not in page and "url(" not in page


def test_published_numbers_stand_with_their_source_beside_what_they_belong_to_and_else_at_the_end(tmp_path):
    claims, speed = write(tmp_path / "claims.json", CLAIMS), tmp_path / "speed.json"
    speed.write_text(
        '{"job": "encode", "batch": 1, "seconds": 0.0101}\n{"job": "decode", "batch": 1, "seconds": 0.039}\n',
        encoding="utf-8",
    )
    page = text_of(make_report([claims, speed], "title"))
    first, second = page.split("<h2")[1:3]
    rest = page.split("<h2")[3]
    assert "sub-codebooks under one total vocabulary" in first and "8 x 2048" in first and "46.1" in first
    assert "the paper, Table 8" in first and "0.72" in first and "the paper, Table 6" in first
    assert ">speed<" in second and "0.0101" in second and "As published" not in second
    assert "8 x 2048" not in rest
    for text in ("SD-VAE", "0.87", "70.8", "UniTok's README; the paper, Table 1", "https://arxiv.org/abs/2509.14476"):
        assert text in rest
    drawn = {"benchmark": "geneval", "drawn_with": {"model": "tiny"}, "pictures": 8}
    drawn = text_of(make_report([write(tmp_path / "results.json", drawn)], "title")).split("<h2")[1]
    assert ">text to image, geneval<" in drawn and "0.59" in drawn and "the paper, Table 4" in drawn
    lmms = text_of(make_report([write(tmp_path / "lmms.json", LMMS)], "title")).split("<h2")[1]
    assert "lmms-eval: gqa, mme" in lmms and "76.8" in lmms and "the paper, Table 3" in lmms


def test_every_published_row_has_a_name_numbers_and_a_source():
    for words, block in read_published():
        assert words and block.columns[-1] == "source"
        for row in block.rows:
            assert len(row) == len(block.columns) and not row[-1].number and row[-1].text != "-", row
            assert any(cell.number for cell in row[1:-1]), row


def test_published_tables_are_found_by_whole_words(tmp_path):
    page = make_report([write(tmp_path / "x.json", {"benchmark": "programmes on a hommage"})], "t")
    assert "As published" not in page  # "mme" is in both words


def test_pictures_that_a_result_names_or_has_beside_it_are_embedded(tmp_path):
    for name in ("run.png", "run-grid.png", "run2.png", "sheet.png", "named.png"):
        Image.new("RGB", (2, 2), "red" if name == "run.png" else "blue").save(tmp_path / name)
    path = write(
        tmp_path / "run.json", {"benchmark": "b", "parts": {"x": {"sheet": "named.png", "other": "gone.png"}}}
    )
    page = make_report([path], "t")
    uris = re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page)
    assert [name for _, name in uris] == ["run.png", "sheet.png", "run-grid.png", "named.png"]
    assert base64.b64decode(uris[0][0]) == (tmp_path / "run.png").read_bytes()
    (tmp_path / "run.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="run.png is no PNG"):
        make_report([path], "t")


def test_the_command_writes_a_page_or_says_which_file_is_wrong(tmp_path):
    good, page = write(tmp_path / "good.json", EASY_VQA), tmp_path / "out" / "page.html"
    outcome = CliRunner().invoke(CLI, [str(good), str(good), "--output", str(page), "--title", "Ours & theirs"])
    assert outcome.exit_code == 0 and "<h1>Ours &amp; theirs</h1>" in page.read_text(encoding="utf-8")
    broken = tmp_path / "broken.json"
    for content, message in (
        (None, f"there is no result file {broken}"),
        ('{"a": 1', f"{broken} is not JSON"),
        ('{"a": 1}\n{"b"', f"{broken} is not JSON"),
        ("", f"{broken} is not JSON"),
    ):
        if content is not None:
            broken.write_text(content, encoding="utf-8")
        outcome = CliRunner().invoke(CLI, [str(good), str(broken), "--output", str(tmp_path / "none.html")])
        assert outcome.exit_code == 1 and message in str(outcome.exception) + outcome.output
        assert not (tmp_path / "none.html").exists()
