"""`ot-merge eval` on questions and tasks: JSON, sentences, what is refused."""

import json

import pytest
import yaml

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def questions(tmp_path_factory, documents):
    """Two files of questions; few, so that all sequences share a shape and little is compiled."""
    folder = tmp_path_factory.mktemp("questions")
    files = []
    for part in range(2):
        lines = []
        for number, text in enumerate(documents[2 * part : 2 * part + 2]):
            words = text.split()
            choices = [words[-1], "market", "river"]
            lines.append({"question": words[0], "choices": choices, "answer": "ABC"[number % 3]})
        path = folder / f"next{part}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files.append(path)
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory, documents):
    """A folder of one task."""
    folder = tmp_path_factory.mktemp("tasks")
    records = [{"question": text[:20], "choices": ["song", "rivers"], "answer": n % 2}
               for n, text in enumerate(documents[:2])]  # fmt: skip
    (folder / "next.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    task = {
        "task": "next_word", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "next.jsonl")}, "cache_dir": str(folder / "cache"),
        },
        "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "next.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def asked(models, questions, folder):
    """Two models with tokenizers of their own, on two files and a task, without any text."""
    flags = [word for file in questions for word in ("--choices", file)]
    names = (models["llama-target"], models["qwen2-target"])
    return ("eval", *names, *flags, "--tasks", "next_word", "--include-path", folder, "--offline")


def test_json(asked, models, questions, cli):
    called = cli(*asked, "--json")
    assert called.code == 0, called.err
    found = called.json
    names = [str(models[name]) for name in ("llama-target", "qwen2-target")]
    assert found["models"] == {name: {} for name in names}
    assert found["pairs"] == []
    assert set(found) == {"models", "pairs", "choices", "tasks"}
    assert list(found["choices"]) == [str(file) for file in questions]
    for one in found["choices"].values():
        assert one["questions"] == 2
        for model in one["models"].values():
            assert sum(model["letters"]["letter"].values()) == 2 * 3
        assert {(pair["a"], pair["b"]) for pair in one["pairs"]} == {tuple(names)}
        for pair in one["pairs"]:
            assert pair["low"] <= pair["difference"] <= pair["high"]
            assert pair["p"] <= pair["p_holm"] <= 1
            a, b = (one["models"][pair[key]][pair["scoring"]]["accuracy"] for key in "ab")
            assert pair["difference"] == pytest.approx(a - b)
    task = found["tasks"]["next_word"]
    assert task["documents"] == 2
    [pair] = task["pairs"]
    assert pair["metric"] == "acc"
    values = [one["acc"] for one in task["models"].values()]
    assert pair["difference"] == pytest.approx(values[0] - values[1])
    assert cli(*asked, "--json").json == found


def test_sentences_have_intervals(asked, questions, cli):
    """Every difference that is printed."""
    called = cli(*asked, columns=120)
    assert called.code == 0, called.err
    lines = [line for line in called.out.splitlines() if " minus " in line]
    assert len(lines) == 2 * 5 + 1
    assert all("95 % interval [" in line and ", p = " in line for line in lines)
    assert "accuracy, lettered_per_byte" in called.out
    assert "letters chosen" in called.out
    assert "(2 questions)" in called.out
    assert "next_word (2 documents)" in called.out


def test_questions_as_chats(models, questions, cli):
    words = ("eval", models["llama-target"], "--choices", questions[0], "--json")
    plain, chat = cli(*words), cli(*words, "--apply-chat-template")
    assert chat.code == 0, chat.err
    assert chat.json["choices"] != plain.json["choices"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--tasks", "next_wrod", "--include-path", "{folder}"), 2, "did you mean 'next_word'"),
        (("--tasks", "next_word", "--include-path", "nowhere"), 3, "There is no folder nowhere"),
        (("--choices", "{bad}"), 3, "bad.jsonl, line 1: there is no 'answer'"),
        (("--choices", "{empty}"), 3, "empty.jsonl has 0 questions"),
        (("--tasks", ",", ), 2, "--tasks"),
    ],
)  # fmt: skip
def test_refused(words, code, message, models, folder, tmp_path, cli):
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "choices": ["a", "b"]}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    files = {"folder": folder, "bad": tmp_path / "bad.jsonl", "empty": tmp_path / "empty.jsonl"}
    called = cli("eval", models["llama-target"], *(word.format(**files) for word in words))
    assert called.code == code, called.err
    assert message in called.err
    assert "load" not in called.err  # before any weight is read


def test_without_lm_eval_questions_work_and_tasks_name_the_extra(asked, cli, monkeypatch):
    import sys

    for name in [one for one in sys.modules if one.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    called = cli(*asked)
    assert called.code == 3
    assert 'pip install "ot_merge_jax[eval]"' in called.err
    without = asked[: asked.index("--tasks")]
    assert cli(*without).code == 0
