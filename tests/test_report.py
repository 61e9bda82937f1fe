"""The page that shows results: every number, nothing unescaped, what was published in the same way beside it."""

import base64
import html
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from eval._common import DRAWING, DrawingSettings
from eval.protocol import FIELDS, Published, differences, number, read_published
from eval.report import main, make_report, to_blocks


pytestmark = pytest.mark.full


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
    measured = page.replace("\n", "")
    for one in numbers(result):
        assert re.search(rf"(?<![\w.]){re.escape(one)}(?![\w.])", measured), one
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


def test_shares_and_percentages_are_shown_as_percent():
    (block,) = to_blocks({"accuracy": 0.98912, "usage_percent": 99.5, "right": 7, "loss": 0.5, "top1": 1.5})
    assert [(row[1].text, row[1].full) for row in block.rows] == [
        ("98.9%", "0.98912"),
        ("99.5%", "99.5"),
        ("7", ""),
        ("0.5", ""),
        ("1.5", ""),
    ]
    (block,) = to_blocks({"red circle": 0.875, "blue square": 1.0}, "text_to_image · both_by_pair")
    assert [row[1].text for row in block.rows] == ["87.5%", "100.0%"]
    (block,) = to_blocks({"codebook_usage_percent_each": [99.5, 12.0625]})
    assert (block.rows[0][1].text, block.rows[0][1].full) == ("99.5%, 12.1%", "99.5, 12.0625")


PROTOCOL = {
    "split": "validation",
    "prompt": "{question}\nReference OCR token: {OCR tokens}\nAnswer the question using a single word or phrase.",
    "sampling": "greedy",
    "images": "understand, 256x256",
    "reference": "the split's answers",
    "tool": "VQA accuracy over ten answers, as LLaVA's eval_textvqa.py",
}


def textvqa(tmp_path, value: float, **changed: str):
    one = number("TextVQA", "accuracy", value, "%", **{**PROTOCOL, **changed})
    result = {"benchmark": "lmms-eval", "settings": {"model_sha256": "beef"}, "numbers": [one]}
    return write(tmp_path / "vqa.json", result)


def test_published_numbers_stand_beside_those_measured_in_the_same_way(tmp_path):
    page = text_of(make_report([textvqa(tmp_path, 50.126)], "title"))
    results, rest = page.split("<ul>", 1)
    (row,) = re.findall(r"<tr>(<td.*?)</tr>", results, flags=re.DOTALL)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells == [
        "lmms-eval",
        "TextVQA, accuracy",
        "validation",
        "50.1%",
        "51.6%",
        "UniTok, Llama-2-7B",
        "the paper, Table 3",
    ]
    assert 'title="50.126"' in row and "not to be compared" not in page
    assert rest.index("How it was measured") < rest.index("Digests") < rest.index("beef")


def test_published_numbers_of_another_procedure_are_refused_by_the_name_of_what_differs(tmp_path):
    changed = {
        "prompt": "{question}\nAnswer the question using a single word or phrase.",
        "split": "validation, first 9",
    }
    page = text_of(make_report([textvqa(tmp_path, 40.0, **changed)], "title"))
    results, rest = page.split("<ul>", 1)
    assert "40.0%" in results and "51.6" not in results and "published" not in results
    (line,) = re.findall(r"<li>(TextVQA.*?)</li>", rest, flags=re.DOTALL)
    assert line == (
        "TextVQA, accuracy: 51.6%, UniTok, Llama-2-7B (the paper, Table 3). Differs: "
        "split: here 'validation, first 9', published 'validation'; "
        f"prompt: here {changed['prompt']!r}, published {PROTOCOL['prompt']!r}."
    )


@pytest.mark.parametrize("result", [CLAIMS, LMMS, {"benchmark": "geneval", "drawn_with": {"model": "tiny"}}])
def test_results_on_other_data_or_of_no_known_procedure_have_nothing_published_beside_them(result, tmp_path):
    page = make_report([write(tmp_path / "r.json", result)], "t")
    assert "the paper, Table" not in page and "SD-VAE" not in page


def test_fields_that_do_not_apply_are_not_compared_and_unknown_procedures_never_agree():
    known = dict.fromkeys(FIELDS, None) | {"split": "test"}
    one = Published("b", "m", "", 1.0, "a CNN", "its README", known, "its README", "")
    measured = {**PROTOCOL, "split": "test"}
    assert differences(measured, one) == []
    assert differences({**measured, "split": "train"}, one) == ["split: here 'train', published 'test'"]
    unknown = Published("b", "m", "", 1.0, "other", "a paper", None, "the source does not tell it", "")
    assert differences(measured, unknown) == ["its procedure is not known (the source does not tell it)"]


def test_every_published_number_has_a_source_and_a_procedure():
    published = read_published()
    assert len({(one.benchmark, one.metric, one.system) for one in published}) == len(published) >= 19
    for one in published:
        assert one.source and one.procedure and one.system and isinstance(one.value, int | float)
        assert one.protocol is None or one.protocol["split"] and one.protocol["tool"]
        assert (one.protocol is None) <= (not one.command)


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
    with pytest.raises(ValueError, match="run.png is not a PNG"):
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


def test_the_command_of_each_published_number_stands_in_the_guide_and_has_its_protocol():
    guide = (Path(__file__).parents[1] / "docs" / "released_weights.md").read_text(encoding="utf-8")
    for one in read_published():
        assert one.command in guide.splitlines() or not one.command, one.command
        if "eval.text_to_image" in one.command:
            given = shlex.split(one.command)[3:]
            options = dict(zip([name.removeprefix("--") for name in given[::2]], given[1::2]))
            used = DrawingSettings(**{name: float(options[name]) for name in DRAWING if name != "plausibility"})
            assert used.sampling == one.protocol["sampling"]
            assert one.protocol["images"].startswith(f"{options['image_format']} files")
            assert one.protocol["split"].endswith(f"prompts, {options['samples']} a prompt")
            assert one.protocol["tool"] in (options.get("fid_tool"), f"VQAScore by {options.get('vqa_score')}")
