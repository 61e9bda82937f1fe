"""lmms-eval with this project's model: its evaluator on easy-VQA with the shipped model, and the rules of VQA."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before lmms-eval and datasets read it

import datasets
import huggingface_hub
import lmms_eval.models
import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val
from PIL import Image, ImageFile
from tenacity import wait_none

import unitok_mllm
from eval import vqa
from eval.easy_vqa import answer_questions, count_right, normalize_answer
from eval.lmms.answers import AnswerLog
from eval.lmms.models.unitok_mllm import (
    GENERATION_OPTIONS,
    StopAfterPrompt,
    UniTokMLLM,
    UniTokMLLMChat,
    generation_options,
    user_content,
)
from eval.lmms.tasks.llava import utils as llava
from eval.protocol import read_published
from training.easy_vqa import COLORS, SHAPES, load


pytestmark = pytest.mark.full


ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval's import turns it on, for all tests of this process


ROOT = Path(__file__).parent.parent
TINY = f"{unitok_mllm.__path__[0]}/checkpoints/tiny"
QUESTIONS = 40


@pytest.fixture(scope="module", autouse=True)
def _own_dataset_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def adapter():
    return UniTokMLLM(TINY, batch_size=8, device="cpu")


@pytest.fixture(scope="module")
def expected(adapter):
    """The first test questions' answers and truths by the project's own count."""
    rows = [(sample.image, *pair) for sample in load("test")[:6] for pair in sample.questions][:QUESTIONS]
    images, questions, truths = zip(*rows)
    pixel_values = adapter.processor.image_processor([str(image) for image in images])["pixel_values"]
    codes = adapter.model.encode_images(pixel_values)
    return answer_questions(adapter.model, adapter.processor, list(questions), codes), list(truths)


def run(tmp_path, *options, limit=QUESTIONS):
    """The JSON of a run, and its answers in the order of the questions."""
    output = tmp_path / "out.json"
    vqa.main(["--model", TINY, "--output", str(output), "--limit", str(limit), "--device", "cpu", *options])
    rows = [
        json.loads(line) for line in (tmp_path / "out.answers.0.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    return json.loads(output.read_text(encoding="utf-8")), [
        row["answer"] for row in sorted(rows, key=lambda row: row["doc_id"])
    ]


@pytest.mark.parametrize("options", [["--batch_size", "1"], ["--batch_size", "8", "--force_simple", "true"]])
def test_easy_vqa_by_lmms_eval_is_that_of_the_own_count(options, expected, tmp_path, capsys):
    answers, truths = expected
    report, given = run(tmp_path, *options)
    assert given == answers
    part, counts = report["parts"]["easy_vqa"], count_right(answers, truths)
    assert counts["all"]["accuracy"] > 0.5
    assert part["questions"] == {"easy_vqa": QUESTIONS}
    assert {name: value for name, value in part["metrics"]["easy_vqa"].items() if "stderr" not in name} == {
        "accuracy": counts["all"]["accuracy"],
        "accuracy_yes_no": counts["yes/no"]["accuracy"],
        "accuracy_color": counts["color"]["accuracy"],
        "accuracy_shape": counts["shape"]["accuracy"],
    }
    (number,) = report["numbers"]
    assert number == {
        "benchmark": "easy-VQA",
        "metric": "answers right",
        "value": pytest.approx(100 * counts["all"]["accuracy"]),
        "unit": "%",
        "protocol": {
            "split": "test, first 40",
            "prompt": "{question}",
            "sampling": "greedy",
            "images": "understand, 64x64",
            "reference": "the split's answers",
            "tool": "exact match",
        },
    }
    assert part["prompt"]["easy_vqa"] == f"USER: <image>\n{load('test')[0].questions[0][0]} ASSISTANT:"
    assert f"accuracy                            {counts['all']['accuracy']:.4f}" in capsys.readouterr().out


def test_all_questions_are_there(expected):
    (task,) = vqa.task_manager().load_task_or_group("easy_vqa").values()
    rows = [pair for sample in load("test") for pair in sample.questions]
    documents = task.eval_docs_no_media
    assert list(zip(documents["question"], documents["answer"])) == rows and len(rows) == 9673


@pytest.mark.attack
def test_the_same_command_goes_on_where_it_was_cut_off(expected, tmp_path, monkeypatch):
    generate, batches = UniTokMLLM._generate, []

    def generate_once(self, prompts, *rest):
        if batches:
            os.kill(os.getpid(), signal.SIGTERM)
        batches.append(len(prompts))
        return generate(self, prompts, *rest)

    def generate_and_count(self, prompts, *rest):
        batches.append(len(prompts))
        return generate(self, prompts, *rest)

    monkeypatch.setattr(UniTokMLLM, "_generate", generate_once)
    with pytest.raises(SystemExit, match="The same command goes on"):
        run(tmp_path, "--batch_size", "5", limit=12)
    with (tmp_path / "out.answers.0.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"key": "half a li')
    monkeypatch.setattr(UniTokMLLM, "_generate", generate_and_count)
    vqa.main(["--model", TINY, "--output", str(tmp_path / "out.json"), "--limit", "12", "--batch_size", "8"])
    assert batches == [5, 7]
    first = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["parts"]["easy_vqa"]
    assert (
        first["metrics"]["easy_vqa"]["accuracy"] == count_right(*(each[:12] for each in expected))["all"]["accuracy"]
    )

    monkeypatch.setattr("lmms_eval.evaluator.simple_evaluate", None)  # a finished task is not run again
    vqa.main(["--model", TINY, "--output", str(tmp_path / "out.json"), "--limit", "12"])
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["parts"]["easy_vqa"] == first


def test_other_tasks_are_added_and_other_settings_refused(expected, tmp_path, stand_ins):
    run(tmp_path, limit=2)
    report, _ = run(tmp_path, "--tasks", "llava_textvqa", limit=2)
    assert list(report["parts"]) == ["easy_vqa", "llava_textvqa"]
    assert [number["benchmark"] for number in report["numbers"]] == ["easy-VQA", "TextVQA"]
    with pytest.raises(SystemExit, match="out.json has easy_vqa of other settings .limit was 2, now 3.: give another"):
        run(tmp_path, limit=3)


def test_generation_settings_of_the_command_are_the_tasks(expected, tmp_path):
    report, given = run(tmp_path, "--gen_kwargs", "until=e,num_beams=2", limit=10)
    assert given == [answer.split("e")[0] for answer in expected[0][:10]]
    assert report["parts"]["easy_vqa"]["generation_kwargs"]["easy_vqa"]["num_beams"] == 2


WORDS = "Answer the question using a single word or phrase."


@pytest.fixture
def stand_ins(monkeypatch) -> dict[str, list[dict]]:
    """A few rows in the place of each benchmark, with the columns of lmms-eval's data; by its name."""
    pictures = [Image.open(sample.image).convert("RGB") for sample in load("test")[:4]]
    ten = [str(n % 3) for n in range(10)]
    rows = {
        "textvqa": [
            {
                "question_id": 34602 + n,
                "question": "what is the brand of this camera?",
                "ocr_tokens": ["DAKOTA", "DIGITAL", "Single-Use"][: 3 * (n == 0)],
                "answers": ["no"] * 10,
                "image": pictures[n],
            }
            for n in range(2)
        ],
        "VQAv2": [
            {"question_id": 10 * n, "question": "Is it red?", "answers": None, "image": pictures[n]} for n in (2, 1)
        ],
        "GQA": [{"id": str(n), "imageId": f"n{3 - n}", "question": "Is it red?", "answer": "no"} for n in range(4)],
        "testdev_balanced_images": [{"id": f"n{n}", "image": picture} for n, picture in enumerate(pictures)],
        "POPE": [
            {
                "question_id": str(n),
                "question": "Is there a circle in the image?",
                "answer": answer,
                "image": pictures[n],
            }
            for n, answer in enumerate(("yes", "no", "yes"))
        ],
        "MME": [
            {
                "question_id": f"color/{n // 2}.png",
                "question": f"Is the shape {color}? Please answer yes or no.",
                "answer": ("Yes", "No")[n % 2],
                "category": "color",
                "image": pictures[n // 2],
            }
            for n, color in enumerate(("red", "blue", "teal", "gray"))
        ],
        "MMVet": [
            {
                "question_id": f"v1_{n}",
                "question": "What is it?",
                "answer": "a circle",
                "image": pictures[n],
                "capability": "rec",
            }
            for n in range(2)
        ],
    }
    rows["textvqa"][1]["answers"] = ten
    splits = {"textvqa": ["validation"], "VQAv2": ["testdev"], "GQA": ["testdev"], "MME": ["test"], "MMVet": ["test"]}
    splits["POPE"] = ["adversarial", "popular", "random"]

    def load_dataset(path, name=None, split=None, **_):
        path = path.removeprefix("lmms-lab-encoder/")
        if split:
            return datasets.Dataset.from_list(rows[name])
        return datasets.DatasetDict({each: datasets.Dataset.from_list(rows[path]) for each in splits[path]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return rows


def test_benchmarks_are_asked_and_counted_as_llava_does(stand_ins, tmp_path, monkeypatch):
    questions = tmp_path / "questions.json"
    asked = [{"image_id": 1, "question": "?", "question_id": number} for number in (10, 7, 20)]
    questions.write_text(json.dumps({"info": {}, "questions": asked}), encoding="utf-8")
    tasks = "llava_textvqa,llava_gqa,llava_pope,llava_mme,llava_mmvet,llava_vqav2_testdev"
    output = tmp_path / "runs" / "vqa.json"
    command = ["--model", TINY, "--output", str(output), "--tasks", tasks, "--device", "cpu"]
    vqa.main([*command, "--vqav2_questions", str(questions)])
    report = json.loads(output.read_text(encoding="utf-8"))
    lines = (output.parent / "vqa.answers.0.jsonl").read_text(encoding="utf-8").split("\n")
    logged = [json.loads(line) for line in lines if line]
    answers = {(row["task"], row["doc_id"]): row["answer"] for row in logged}
    texts = {(row["task"], row["doc_id"]): row["question"] for row in logged}

    brand = "What is the brand of this camera?\nReference OCR token:"
    assert texts["llava_textvqa", 0] == f"{brand} DAKOTA, DIGITAL, Single-Use\n{WORDS}"
    assert texts["llava_textvqa", 1] == f"{brand} \n{WORDS}"
    assert texts["llava_gqa", 0] == texts["llava_vqav2_testdev", 0] == f"Is it red?\n{WORDS}"
    assert texts["llava_pope_popular", 1] == f"Is there a circle in the image?\n{WORDS}"
    assert texts["llava_mme", 2] == f"Is the shape teal?\n{WORDS}"
    assert texts["llava_mmvet", 1] == "What is it?"
    template = report["parts"]["llava_textvqa"]["prompt"]["llava_textvqa"]
    assert template == f"USER: <image>\n{texts['llava_textvqa', 0]} ASSISTANT:"

    submission = json.loads((output.parent / "vqa.vqav2.json").read_text(encoding="utf-8"))
    expected = [answers["llava_vqav2_testdev", 1], "", answers["llava_vqav2_testdev", 0]]
    assert submission == [
        {"question_id": number, "answer": EvalAIAnswerProcessor()(answer)}
        for number, answer in zip((10, 7, 20), expected)
    ]
    mmvet = json.loads((output.parent / "vqa.mmvet.json").read_text(encoding="utf-8"))
    assert mmvet == {f"v1_{n}": answers["llava_mmvet", n].strip() for n in range(2)}

    values = {
        (number["benchmark"], number["protocol"]["split"]): number["value"]
        for number in report["numbers"]
        if number["benchmark"] != "MME"
    }
    said = [answers["llava_gqa", n].strip().rstrip(".").lower() for n in range(4)]
    assert values["GQA", "testdev"] == 100 * said.count("no") / 4
    f1 = llava.pope_f1([(llava.says_yes(answers["llava_pope_random", n]), n != 1) for n in range(3)])
    assert values["POPE", "adversarial, popular, random"] == pytest.approx(100 * f1)
    published = {one.benchmark: one for one in read_published()}
    for number in report["numbers"]:
        if number["protocol"]["split"] in ("adversarial", "popular", "random"):
            continue
        theirs = published[number["benchmark"]]
        assert number["metric"] == theirs.metric
        assert {**number["protocol"], "images": "understand, 256x256"} == theirs.protocol
    assert {number["benchmark"] for number in report["numbers"]} == {"TextVQA", "GQA", "POPE", "MME"}

    questions.write_text(json.dumps({"questions": asked[:2]}), encoding="utf-8")
    options = ["--tasks", "llava_vqav2_testdev", "--vqav2_questions", str(questions), "--output"]
    with pytest.raises(SystemExit, match="error: task llava_vqav2_testdev: .*questions.json has no question 20"):
        vqa.main([*command, *options, str(tmp_path / "other.json")])


@pytest.mark.parametrize("task", ["llava_vqav2_testdev", "llava_mmvet"])
def test_published_protocols_of_files_for_servers_are_those_of_their_tasks(task, stand_ins):
    (loaded,) = vqa.task_manager().load_task_or_group(task).values()
    config = loaded.dump_config()
    benchmark = {"llava_vqav2_testdev": "VQAv2", "llava_mmvet": "MM-Vet"}[task]
    (published,) = [one for one in read_published() if one.benchmark == benchmark]
    assert published.protocol == {
        "split": config["test_split"],
        "prompt": vqa.prompt(config),
        "sampling": vqa.sampling(config),
        "images": "understand, 256x256",
        "reference": "the split's answers",
        "tool": config["metadata"]["tool"],
    }


def test_tasks_of_lmms_eval_itself_are_told_from_the_published_ones(stand_ins, tmp_path):
    report, _ = run(tmp_path, "--tasks", "textvqa_val", limit=2)
    protocol = report["numbers"][0]["protocol"]
    assert protocol["prompt"] == f"{{question}}\n{WORDS}" and protocol["split"] == "validation, first 2"
    assert protocol["tool"] == "lmms-eval's exact_match of textvqa_val"


@pytest.mark.parametrize(
    "answer, is_yes",
    [("Yes", True), ("yes.", True), ("no", False), ("No, it is", False), ("There is not.", False)]
    + [("Yes, there is. No doubt", True), ("nothing", True), ("", True)],
)
def test_no_is_read_out_of_longer_answers(answer, is_yes):
    assert llava.says_yes(answer) is is_yes


def test_f1_of_yes():
    pairs = [(True, True)] * 3 + [(True, False)] * 1 + [(False, True)] * 2 + [(False, False)] * 9
    assert llava.pope_f1(pairs) == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))
    assert llava.pope_f1([(False, True)]) == llava.pope_f1([(False, False)]) == 0


def test_stop_strings_are_looked_for_after_the_prompt(adapter):
    tokenizer = adapter.processor.tokenizer
    prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in ("is it red?", " yes"))
    ids = torch.tensor([prompt + answer])
    for until, stops in (("red?", False), ("ye", True), ("?", False), ("no", False), ("? ye", False)):
        assert StopAfterPrompt(tokenizer, [until], len(prompt))(ids, None).tolist() == [stops]


def test_generation_options():
    assert set(vqa.GEN_KWARGS) == {*GENERATION_OPTIONS, "max_gen_toks"}
    vqa.check_gen_kwargs("do_sample=true,early_stopping=never,top_p=0.5,length_penalty=-1,top_k=0,until=e")
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    assert generation_options({"until": ["\n\n", ""], "image_aspect_ratio": "pad", "temperature": 0}) == (
        {"max_new_tokens": 1024, **greedy},
        ["\n\n"],
    )
    settings = {"max_new_tokens": 16, "temperature": 0.2, "top_p": 1.0, "num_beams": 3, "do_sample": False}
    assert generation_options(settings) == ({"max_new_tokens": 16, "num_beams": 3, **greedy}, [])
    assert generation_options({"temperature": 0.7, "max_gen_toks": 9, "until": "x"}) == (
        {"temperature": 0.7, "max_new_tokens": 9, "do_sample": True},
        ["x"],
    )


def test_images_go_where_the_text_has_their_tokens():
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    text, image = ({"type": "text", "text": "compare "}, {"type": "image", "image": first})
    assert user_content("compare <image>", [first], "<image>") == [text, image]
    assert user_content("compare ", [first], "<image>") == [image, text]
    assert user_content("compare <image>", [first, second], "<image>") == [
        image,
        {"type": "image", "image": second},
        text,
    ]
    assert user_content("a <image> tag", [], "<image>") == [{"type": "text", "text": "a  tag"}]


def request(kind, arguments, doc_id, idx=0):
    metadata = {"task": "some_task", "doc_id": doc_id, "repeats": 1}
    return Instance(kind, (*arguments, doc_id, "some_task", "test"), idx=idx, metadata=metadata)


def messages(*turns):
    """Turns of alternating roles, each a list of texts and images."""
    return [
        {
            "role": ("user", "assistant")[n % 2],
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part}
                for part in turn
            ],
        }
        for n, turn in enumerate(turns)
    ]


def test_conversations_of_unlike_form_in_one_batch_are_answered_as_alone(adapter):
    images = [Image.open(sample.image) for sample in load("test")[:3]]
    documents = [
        messages([images[0], "what color is the shape?"]),
        messages(["what shape is in the image?"]),
        messages([images[1], "what shape is present?"], ["circle"], [images[2], "and what color is this <image>?"]),
    ]
    chat = UniTokMLLMChat(TINY, batch_size=3, device="cpu")
    chat.task_dict = {"some_task": {"test": documents}}
    gen_kwargs = {"max_new_tokens": 6, "until": []}
    requests = [request("generate_until", (f"{n}", lambda doc: doc, gen_kwargs), n) for n in range(3)]
    answers = chat.generate_until(requests)
    for document, answer in zip(documents, answers):
        conversation = [
            {
                "role": message["role"],
                "content": [
                    {"type": "text", "text": part["text"].replace("<image>", "")}
                    if part["type"] == "text"
                    else {"type": "image", "image": part["url"]}
                    for part in message["content"]
                ],
            }
            for message in document
        ]
        inputs = adapter.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        alone = adapter.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        length = inputs["input_ids"].shape[1]
        assert answer == adapter.processor.decode(alone[0, length:], skip_special_tokens=True)
    chat.task_dict = {"some_task": {"test": [[{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]]}}
    with pytest.raises(ValueError, match="some_task has videos or sounds"):
        chat.generate_until([request("generate_until", ("new", lambda doc: doc, gen_kwargs), 0)])


def test_sampled_answers_depend_on_seed_and_not_on_batch():
    gen_kwargs = {"do_sample": True, "temperature": 4.0, "max_new_tokens": 4}
    requests = [request("generate_until", ("what is it?", gen_kwargs, lambda doc: doc), n) for n in range(3)]
    answers = []
    for batch_size, fingerprint in ((1, "seed 0"), (3, "seed 0"), (3, "seed 1")):
        model = UniTokMLLM(TINY, batch_size, device="cpu", fingerprint=fingerprint)
        model.task_dict = {"some_task": {"test": [None, None, None]}}
        answers.append(model.generate_until([*requests, requests[0]]))  # one of them twice
    assert answers[0] == answers[1] != answers[2] and len(set(answers[0])) == 4


def test_likelihood_of_a_choice_is_the_models_own_loss(adapter, expected):
    sample = load("test")[0]
    question = sample.questions[0][0]
    choices = [" rectangle", " red circle in the image", " no"]
    adapter.task_dict = {"some_task": {"test": [[Image.open(sample.image)]]}}
    requests = [
        request("loglikelihood", (question, choice, lambda doc: doc), 0, idx)
        for idx, choice in enumerate([*choices, f" {expected[0][0].strip()}"])
    ]
    results = adapter.loglikelihood(requests)
    for choice, (loss, _) in zip(choices, results):
        content = user_content(question, [Image.open(sample.image)], "<image>")
        prompt = adapter.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = adapter.processor(images=[Image.open(sample.image)], text=[prompt + choice])
        labels = inputs["input_ids"].clone()
        labels[:, : len(adapter.processor(images=[Image.open(sample.image)], text=[prompt])["input_ids"][0])] = -100
        with torch.no_grad():
            assert loss == pytest.approx(adapter.model(**inputs, labels=labels).text_loss.item(), rel=1e-4)
    greedy_loss, is_greedy = results[-1]
    assert is_greedy and not results[1][1]
    assert greedy_loss == min(loss for loss, _ in results)


def test_answer_logs_of_all_processes_are_read(tmp_path):
    AnswerLog(tmp_path / "log", rank=0).add([{"key": "a", "answer": "yes"}])
    AnswerLog(tmp_path / "log", rank=1).add([{"key": "b", "answer": [0.5, True]}])
    assert AnswerLog(tmp_path / "log").answers == {"a": "yes", "b": [0.5, True]}


def by_vqa_rules(text):
    """As VQAv2's evaluation compares an answer, by lmms-eval."""
    processor = EvalAIAnswerProcessor()
    return processor.process_digit_article(processor.process_punctuation(text))


@pytest.mark.parametrize(
    "given, compared",
    [
        ("Black.", "black"),
        ("the cat", "cat"),
        ("A man and an owl", "man and owl"),
        ("two", "2"),
        ("None", "0"),
        ("ten", "10"),
        ("dont know", "don't know"),
        ("wheres", "where's"),
        ("it's", "it's"),
        ("red, white", "red white"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("(left)", "left"),
        ("yes!", "yes"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("U.S.", "us"),
        ("3:15", "3:15"),
    ],
)
def test_answers_are_compared_by_the_official_rules(given, compared):
    assert by_vqa_rules(given) == compared


@pytest.mark.parametrize("agreeing, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_is_the_mean_over_nine_of_ten_people(agreeing, accuracy):
    answers = ["the Cat."] * agreeing + ["dog"] * (10 - agreeing)
    left_out = [min(1, (agreeing - (n < agreeing)) / 3) for n in range(10)]
    assert sum(left_out) / 10 == pytest.approx(accuracy)
    rows = [{"answer": answer, "answer_id": n} for n, answer in enumerate(answers)]
    assert vqav2_process_results_val({"question_id": 1, "answers": rows}, ["cat"])["exact_match"] == pytest.approx(
        accuracy
    )
    document = {"question_id": 1, "answers": list(answers)}
    assert textvqa_process_results(document, ["a cat"])["exact_match"] == pytest.approx(accuracy)


def test_own_normalization_agrees_with_the_official_one_on_easy_vqa():
    words = ("yes", "no", *COLORS, *SHAPES)
    given = [
        form.format(change(word)) for word in words for form in ("{}", " {}", "{}. ") for change in (str, str.title)
    ]
    assert [by_vqa_rules(text) for text in given] == [normalize_answer(text) for text in given]
    assert by_vqa_rules("a circle") == "circle" != normalize_answer("a circle")  # there, articles count


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "easy_vqa,vqa2_val"], "lmms-eval has no task 'vqa2_val'; see vqav2_val"),
        (["--tasks", "qqqqqqqqq"], "see python -m lmms_eval --tasks list"),
        (["--model", "no/such/folder"], "no model in no/such/folder"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (
            ["--tasks", "llava_vqav2_testdev"],
            "llava_vqav2_testdev needs --vqav2_questions v2_OpenEnded_mscoco_test2015",
        ),
        (["--vqav2_questions", "no.json"], "there is no file no.json (--vqav2_questions)"),
        (["--gen_kwargs", "beams"], "gen_kwargs must be NAME=VALUE, separated by commas, got 'beams'"),
        (["--gen_kwargs", "max_new_token=3"], "gen_kwargs has no 'max_new_token': did you mean 'max_new_tokens'?"),
        (
            ["--gen_kwargs", "num_beams=1.5"],
            "num_beams of gen_kwargs must be an integer from 1 to 2.14748e+09, got 1.5",
        ),
        (
            ["--gen_kwargs", "do_sample=True,temperature=nan"],
            "temperature of gen_kwargs must be a number from 0 to 1e+06, got nan",
        ),
        (["--gen_kwargs", "until=5"], "until of gen_kwargs must be a text, got 5"),
    ],
)
def test_errors_take_one_line(options, message):
    with pytest.raises(SystemExit) as error:
        vqa.main(["--model", TINY, *options])
    assert str(error.value).startswith("error: ") and message in str(error.value) and "\n" not in str(error.value)


def test_data_that_cannot_be_had_are_named_and_finished_tasks_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(ConfigurableTask.download.retry, "wait", wait_none())
    with pytest.raises(SystemExit, match="error: task pope: .*lmms-lab-encoder/POPE"):
        run(tmp_path, "--tasks", "easy_vqa,pope", limit=2)
    assert list(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["parts"]) == ["easy_vqa"]


def test_lmms_eval_finds_the_plug_in(monkeypatch):
    monkeypatch.setenv("LMMS_EVAL_PLUGINS", "eval.lmms")
    models = dict(lmms_eval.models.AVAILABLE_SIMPLE_MODELS)  # which a plug-in is added to
    monkeypatch.setattr(lmms_eval.models, "AVAILABLE_SIMPLE_MODELS", models)
    with pytest.warns(DeprecationWarning, match="LMMS_EVAL_PLUGINS"):
        registry = lmms_eval.models._initialize_model_registry()
    assert registry.get_model_class("unitok_mllm") is UniTokMLLM
    (folder,) = find_spec("eval.lmms.tasks").submodule_search_locations
    own = TaskManager(include_path=folder, include_defaults=False).all_tasks
    assert {"easy_vqa", "llava_pope", "llava_textvqa", "llava_vqav2_testdev"} <= set(own)


def test_the_package_does_not_know_lmms_eval():
    sources = list((ROOT / "unitok_mllm").glob("*.py"))
    assert len(sources) > 5 and not any("lmms" in path.read_text(encoding="utf-8") for path in sources)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    one, answers = run(tmp_path / "one", limit=11)
    (tmp_path / "two").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29731"]
    command += ["-m", "eval.vqa", "--model", TINY, "--output", str(tmp_path / "two" / "out.json")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    subprocess.run([*command, "--limit", "11", "--device", "cpu"], cwd=ROOT, env=environment, check=True, timeout=600)
    two = json.loads((tmp_path / "two" / "out.json").read_text(encoding="utf-8"))
    assert two["processes"] == 2
    assert {**two["parts"]["easy_vqa"], "seconds": 0} == {**one["parts"]["easy_vqa"], "seconds": 0}
    rows = [
        json.loads(line)
        for rank in range(2)
        for line in (tmp_path / "two" / f"out.answers.{rank}.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]
    assert [row["answer"] for row in sorted(rows, key=lambda row: row["doc_id"])] == answers
