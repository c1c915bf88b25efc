"""Samples: greedy tokens are those of `generate`, one prompt for all models, ends are ends."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.data import tokenizers
from ot_merge_jax.data.chat import Chat, Turn
from ot_merge_jax.errors import InputError
from ot_merge_jax.evaluation import samples
from ot_merge_jax.io.folder import eos_token_ids, open_folder
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models.generation import generate

NEW = 7


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    """(params, cfg, tokenizer) of a tiny llama."""
    folder = tiny_checkpoint("llama", layers=2)
    cfg, params = load_hf(folder)
    return params, cfg, tokenizers.load_tokenizer(folder)


def alone(model, prompt, **more):
    """The continuation of one prompt, unpadded, by `generate`."""
    params, cfg, tokenizer = model
    ids = jnp.array([tokenizer(prompt)["input_ids"]])
    return np.asarray(
        generate(params, ids, ids >= 0, cfg=cfg, max_new_tokens=NEW, **more)
    )[0].tolist()  # fmt: skip


def test_tokens_are_those_of_generate_one_by_one(model, texts):
    """More prompts than a batch holds, of many lengths."""
    prompts = samples.prompts(texts[:19], model[2])
    found = samples.sample(*model, prompts, max_new_tokens=NEW)
    assert len({len(one) for one in prompts}) > 5
    for place in (0, 7, 15, 16, 18):
        assert found[place].tokens == alone(model, prompts[place])
        assert not found[place].has_ended
    for prompt, one in zip(prompts, found, strict=True):
        ids = model[2](prompt)["input_ids"]
        assert model[2].decode(ids) + one.text == model[2].decode(ids + one.tokens)


def test_a_stop_token_ends_a_text_and_is_not_shown(model, texts):
    prompts = samples.prompts(texts[:3], model[2])
    free = samples.sample(*model, prompts, max_new_tokens=NEW)
    stop = free[1].tokens[3]
    ended = samples.sample(*model, prompts, stop=[stop], max_new_tokens=NEW)
    for before, after in zip(free, ended, strict=True):
        assert after.has_ended == (stop in before.tokens)
        kept = before.tokens.index(stop) if after.has_ended else NEW
        assert after.tokens == before.tokens[:kept]
        assert before.text.startswith(after.text)
    assert ended[1].has_ended


def test_prompts_are_the_first_half_at_most_32_tokens(model, texts):
    tokenizer = model[2]
    documents = [texts[0], " ".join(texts[:20]), "a", "山河流 песня " * 4]
    for document, prompt in zip(documents, samples.prompts(documents, tokenizer), strict=True):
        assert document.startswith(prompt)
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        count = min(32, max(1, len(ids) // 2))
        # an end inside a character takes the whole of it
        assert 0 <= len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) - count <= 3
    assert samples.prompts([], tokenizer) == []
    assert samples.sample(*model, [], max_new_tokens=10_000) == []


def test_a_chat_is_continued_inside_its_first_answer(tiny_checkpoint, writable_copy):
    """By the template, without what it writes after the answer; and without a second BOS."""
    folder = writable_copy(tiny_checkpoint("llama", layers=2))
    (folder / "chat_template.jinja").write_text(
        "<|begin|>{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"
    )
    tokenizer = tokenizers.load_tokenizer(folder)
    turns = ("user", "Which river?"), ("assistant", "The old river of songs"), ("user", "More?")
    [prompt] = samples.prompts([Chat(tuple(Turn(*one) for one in turns))], tokenizer)
    [question, answer] = prompt.turns
    assert question == Turn("user", "Which river?")
    assert "The old river of songs".startswith(answer.content)
    assert 0 < len(answer.content) < 20
    assert samples.written(prompt) == f"user: Which river?\nassistant: {answer.content}"
    ids = samples.encode(prompt, tokenizer)
    text = f"<|begin|>[user] Which river?<|end|>[assistant] {answer.content.strip()}"
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_end_that_the_tokenizer_adds_is_taken_off(model, monkeypatch):
    tokenizer = model[2]
    plain = tokenizer("old songs")["input_ids"]

    class Ending:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [*plain, self.eos_token_id]}

    assert samples.encode("old songs", Ending()) == plain


def test_context_that_is_too_short_is_an_input_error(model, texts):
    with pytest.raises(InputError, match="exceed the context of 512 tokens"):
        samples.sample(*model, texts[:1], max_new_tokens=512)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6, 99_999]}, 1, [5, 6]),
        ({"eos_token_id": 7}, 1, [7]),
        ({}, [3, 4], [3, 4]),
        (None, 2, [2]),
        ({"eos_token_id": None}, None, []),
    ],
)
def test_stop_ids(generation, config, expected, tiny_checkpoint, writable_copy):
    folder = writable_copy(tiny_checkpoint("llama"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": config}))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_ids(open_folder(folder)) == expected


@pytest.mark.parametrize("value", ["2", True, [1.5]])
def test_stop_ids_that_are_none(value, tiny_checkpoint, writable_copy):
    folder = writable_copy(tiny_checkpoint("llama"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InputError, match="not a token id"):
        eos_token_ids(open_folder(folder))


def test_facts(model):
    one = samples.SampledText("text", [1, 2], True)
    chat = Chat((Turn("user", "x"),))
    found = samples.summary(["p", chat], {"a": [one, one], "b": [one, one._replace(text="other")]})
    assert found[0] == {
        "prompt": "p",
        "continuations": {
            name: {"text": "text", "tokens": 2, "ended": True} for name in ("a", "b")
        },
    }
    assert found[1]["prompt"] == "user: x"
    assert found[1]["continuations"]["b"]["text"] == "other"
