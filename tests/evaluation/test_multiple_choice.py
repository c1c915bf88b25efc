"""Multiple choice: likelihoods by hand, biases that must cancel, questions that cannot be asked."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.data import tokenizers
from ot_merge_jax.errors import InputError
from ot_merge_jax.evaluation import loglikelihood, multiple_choice
from ot_merge_jax.evaluation.multiple_choice import Question
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models.decoder import forward
from ot_merge_jax.types import Batch

QUESTIONS = [
    Question("the small river", ("old songs", "market", "1984"), 1),
    Question("песня", ("mountains and rivers", "café"), 0),
    Question("nobody counts hours", ("don't", "harbours", "улица", "3.14"), 3),
]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    cfg, params = load_hf(folder, dtype="float32")
    return params, cfg, tokenizers.load_tokenizer(folder)


def write(tmp_path, *lines, name="q.jsonl"):
    path = tmp_path / name
    said = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(said) + "\n", encoding="utf-8")
    return path


# ---- scoring ----


_run = jax.jit(forward, static_argnames=("cfg",))


def likelihood(model, prompt, end):
    """Log-probability of an answer behind a prompt, by a softmax over one padded sequence."""
    params, cfg, tokenizer = model
    ids = tokenizer(prompt + end, add_special_tokens=False)["input_ids"]
    count = len(ids) - len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = [tokenizer.bos_token_id, *ids]
    padded, no_rows = np.zeros((1, 128), np.int32), np.zeros((1, 1), np.int32)
    padded[0, : len(ids)] = ids
    batch = Batch(padded, np.arange(128)[None] < len(ids), no_rows, no_rows - 1)
    logits = np.asarray(_run(params, batch, cfg=cfg)[0], np.float64)[0, : len(ids) - 1]
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log[range(len(ids) - 1), ids[1:]][-count:].sum()


def test_plain_is_the_likeliest_text(model):
    found = multiple_choice.answer(*model, QUESTIONS)
    for index, question in enumerate(QUESTIONS):
        log = np.array([
            likelihood(model, f"Question: {question.text}\nAnswer:", f" {one}")
            for one in question.choices
        ])  # fmt: skip
        size = [len(one.encode()) for one in question.choices]
        assert found.chosen["plain"][index] == log.argmax()
        assert found.chosen["plain_per_byte"][index] == (log / size).argmax()


def test_lettered_is_the_mean_over_all_orders(model):
    """Every order by hand: which option stands behind which letter, and what is chosen there."""
    found = multiple_choice.answer(*model, QUESTIONS)
    counts = {"lettered": np.zeros(4, int), "letter": np.zeros(4, int)}
    for index, question in enumerate(QUESTIONS):
        n = len(question.choices)
        sums = {"lettered": np.zeros(n), "letter": np.zeros(n)}
        for first in range(n):
            order = [(first + place) % n for place in range(n)]
            listed = "\n".join(
                f"{'ABCD'[place]}. {question.choices[option]}" for place, option in enumerate(order)
            )
            prompt = f"Question: {question.text}\n{listed}\nAnswer:"
            ends = {
                "lettered": [f" {question.choices[option]}" for option in order],
                "letter": [f" {'ABCD'[place]}" for place in range(n)],
            }
            for name, answers in ends.items():
                log = [likelihood(model, prompt, end) for end in answers]
                counts[name][np.argmax(log)] += 1
                sums[name][order] += log
        size = [len(one.encode()) for one in question.choices]
        assert found.chosen["letter"][index] == sums["letter"].argmax()
        assert found.chosen["lettered"][index] == sums["lettered"].argmax()
        assert found.chosen["lettered_per_byte"][index] == (sums["lettered"] / size).argmax()
    for name, expected in counts.items():
        assert found.letters[name].tolist() == expected.tolist()
        assert found.letters[name].sum() == 9  # orders of 3 + 2 + 4 options


def test_a_pure_letter_bias_shows_in_the_histogram(model, rng):
    """A model that likes the letter A, whatever it is asked: A in each of the three orders."""
    params, cfg, tokenizer = model
    letter_a = tokenizer(" A", add_special_tokens=False)["input_ids"]
    ids = {one: tokenizer(f" {one}", add_special_tokens=False)["input_ids"] for one in "ABC"}
    assert ids["A"] == letter_a
    zero = np.zeros((cfg.hidden_size, cfg.vocab_size), np.float32)
    for place, letter in enumerate("ABC"):
        zero[:, ids[letter][-1]] = [3.0, 1.0, 0.0][place]
    biased = dict(params)
    biased["lm_head"] = {"kernel": jnp.asarray(zero)}
    # the residual stream becomes the same positive vector everywhere
    biased["embed_tokens"] = {"embedding": jnp.ones_like(params["embed_tokens"]["embedding"])}
    biased["layers"] = {
        key: {name: {k: 0 * v for k, v in leaf.items()} for name, leaf in one.items()}
        if key in ("self_attn", "mlp")
        else one
        for key, one in params["layers"].items()
    }
    biased["norm"] = {"scale": jnp.ones_like(params["norm"]["scale"])}
    questions = [
        Question(f"number {n}", ("x" * (n + 1), "y", "zz"), int(rng.integers(3))) for n in range(5)
    ]
    found = multiple_choice.answer(biased, cfg, tokenizer, questions)
    assert found.letters["letter"].tolist() == [15, 0, 0]
    prompt = loglikelihood.Request([1, 2, *ids["A"]], len(ids["A"]))
    other = loglikelihood.Request([1, 2, *ids["B"]], len(ids["B"]))
    log = loglikelihood.score(biased, [prompt, other], cfg=cfg).log
    assert log[0] > log[1] + 1


def test_answers_longer_than_the_context_are_asked_all_the_same(model):
    params, cfg, tokenizer = model
    question = Question("word " * 900, ("old songs", "market"), 0)
    found = multiple_choice.answer(params, cfg, tokenizer, [question])
    assert found.chosen["plain"].shape == (1,)


def test_a_token_over_the_border_belongs_to_every_answer(model):
    """Where an answer changes the last token of the prompt, all of them are scored from there."""
    _, cfg, tokenizer = model
    before, tokenizer.chat_template = tokenizer.chat_template, "{{ messages[0]['content'] }}"
    try:
        requests = multiple_choice._requests(
            "the old so", ["ngs", "urce", "!"], tokenizer, 0, cfg, is_chat=True
        )
    finally:
        tokenizer.chat_template = before
    [kept] = {tuple(one.tokens[: -one.scored]) for one in requests}
    assert kept[0] == 0
    assert tokenizer.decode(kept[1:]) == "the old s"  # the o is part of other tokens in two of them
    said = [tokenizer.decode(one.tokens[-one.scored :]) for one in requests]
    assert said == ["ongs", "ource", "o!"]


def test_as_a_chat(model):
    """By the template; the fixture's writes the message and nothing else."""
    params, cfg, tokenizer = model
    found = multiple_choice.answer(params, cfg, tokenizer, QUESTIONS, is_chat=True)
    question = QUESTIONS[0]
    rendered = f"Question: {question.text}\nAnswer:\r\n\n"
    log = [likelihood(model, rendered, one) for one in question.choices]
    assert found.chosen["plain"][0] == np.argmax(log)


def test_a_chat_without_a_template_is_refused(model):
    params, cfg, tokenizer = model
    before, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(InputError, match="no chat template"):
            multiple_choice.answer(params, cfg, tokenizer, QUESTIONS, is_chat=True)
    finally:
        tokenizer.chat_template = before


# ---- reading ----


def test_answers_by_index_and_by_letter(tmp_path):
    record = {"question": "q", "choices": ["a", "b", "c"]}
    path = write(tmp_path, *({**record, "answer": one} for one in (0, 2, "A", "c", " B ")))
    assert [one.answer for one in multiple_choice.read(path)] == [0, 2, 0, 2, 1]
    assert multiple_choice.read(path)[0] == Question("q", ("a", "b", "c"), 0)
    assert len(multiple_choice.read(path, limit=2)) == 2


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"answer": None}, "there is no 'answer'"),
        ({"answer": ...}, "there is no 'answer'"),
        ({"answer": 3}, "'answer' is '3' and not an index from 0 to 2 or a letter from A to C"),
        ({"answer": -1}, "'answer' is '-1'"),
        ({"answer": "D"}, "'answer' is 'D'"),
        ({"answer": "apple"}, "'answer' is 'apple'"),
        ({"answer": ""}, "'answer' is ''"),
        ({"answer": True}, "'answer' is 'True'"),
        ({"answer": 1.0}, "'answer' is '1.0'"),
        ({"choices": ["a"]}, "'choices' is not a list of 2 to 26 texts"),
        ({"choices": ["a", ""]}, "'choices'"),
        ({"choices": ["a", 3]}, "'choices'"),
        ({"choices": "ab"}, "'choices'"),
        ({"choices": ["a"] * 27}, "'choices'"),
        ({"question": " "}, "no 'question'"),
        ({"question": ...}, "no 'question'"),
    ],
)
def test_a_question_that_cannot_be_asked_names_file_and_line(broken, message, tmp_path):
    good = {"question": "q", "choices": ["a", "b", "c"], "answer": 1}
    bad = {key: one for key, one in (good | broken).items() if one is not ...}
    path = write(tmp_path, good, "", bad)
    with pytest.raises(InputError) as error:
        multiple_choice.read(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert message in str(error.value)


def test_a_line_that_is_no_object(tmp_path):
    with pytest.raises(InputError, match=r"line 1: there is no 'question'"):
        multiple_choice.read(write(tmp_path, "[1, 2]"))
    with pytest.raises(InputError, match="line 2, is not JSON"):
        multiple_choice.read(
            write(tmp_path, {"question": "q", "choices": ["a", "b"], "answer": 0}, "{")
        )


def test_no_question(tmp_path):
    with pytest.raises(InputError, match="0 questions"):
        multiple_choice.read(write(tmp_path, ""))


def test_a_file_of_another_kind(tmp_path):
    with pytest.raises(InputError, match=r"is not a \.jsonl file"):
        multiple_choice.read(write(tmp_path, "text", name="q.txt"))


# ---- facts ----


def answers(chosen):
    """Answers that choose the same in every scoring."""
    return multiple_choice.Answers(
        {name: np.array(chosen) for name in multiple_choice.SCORINGS},
        {"lettered": np.array([3, 1]), "letter": np.array([2, 2])},
    )


def test_facts():
    """Two files: McNemar on each, and Holm over both."""
    questions = [Question(f"q{n}", ("yes", "no"), 0) for n in range(12)]
    asked = {"one.jsonl": questions, "two.jsonl": questions}
    said = {
        "one.jsonl": {"a": answers([0] * 12), "b": answers([0] * 3 + [1] * 9)},
        "two.jsonl": {"a": answers([0] * 12), "b": answers([0] * 11 + [1])},
    }
    found = multiple_choice.summary(asked, said)
    one = found["one.jsonl"]
    assert one["questions"] == 12
    assert one["models"]["b"]["plain"]["accuracy"] == 0.25
    assert one["models"]["b"]["plain"]["low"] < 0.25 < one["models"]["b"]["plain"]["high"]
    assert one["models"]["a"]["letters"] == {
        "lettered": {"A": 3, "B": 1},
        "letter": {"A": 2, "B": 2},
    }
    assert [pair["scoring"] for pair in one["pairs"]] == list(multiple_choice.SCORINGS)
    first, second = one["pairs"][0], found["two.jsonl"]["pairs"][0]
    assert (first["a"], first["b"], first["only_a"], first["only_b"]) == ("a", "b", 9, 0)
    assert first["difference"] == 0.75
    assert first["low"] < 0.75 < first["high"]
    assert (first["p"], second["p"]) == (pytest.approx(2 / 2**9), 1)
    assert (first["p_holm"], second["p_holm"]) == (pytest.approx(4 / 2**9), 1)
