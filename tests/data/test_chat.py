"""Chats: reading them, and writing them out with the template of each model."""

import json
import time

import pytest

from ot_merge_jax.data import calibration, tokenizers
from ot_merge_jax.data import chat as chat_module
from ot_merge_jax.data.chat import Chat, Turn, render
from ot_merge_jax.data.documents import read_documents
from ot_merge_jax.errors import InputError
from ot_merge_jax.evaluation import nll

#: Writes its own BOS and trims, as Llama 3 does; names the roles, one of which is also said.
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}"
    "<|end|>{% endfor %}"
)
#: Keeps every blank and writes no BOS, as Qwen does.
KEEPING = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT = Chat((Turn("system", "user"), Turn("user", "  user "), Turn("assistant", "Ya, sungai.\n")))


@pytest.fixture(scope="module")
def chatty(tokenizer_folder, tmp_path_factory):
    """``chatty(template, kind="bpe")`` -> tokenizer with this template (None: without)."""

    def make(template, kind="bpe"):
        folder = tmp_path_factory.mktemp("chatty")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tokenizer_folder(kind) / name).read_bytes())
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return tokenizers.load_tokenizer(folder)

    return make


def lines(tmp_path, *records):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


# ---- reading ----


def test_messages_are_a_chat(tmp_path):
    said = [{"role": "user", "content": "a", "id": 3}, {"role": "assistant", "content": "b"}]
    path = lines(tmp_path, {"messages": said, "text": "no"})
    [chat] = read_documents(path, field="messages")
    assert chat == Chat((Turn("user", "a"), Turn("assistant", "b")))


def test_prompt_and_response_are_a_chat(tmp_path):
    path = lines(tmp_path, {"q": "a", "a": "b"}, {"q": " ", "a": ""}, {"q": "", "a": "c"})
    found = list(read_documents(path, field=["q", "a"]))
    assert found == [
        Chat((Turn("user", "a"), Turn("assistant", "b"))),
        Chat((Turn("user", ""), Turn("assistant", "c"))),
    ]


def test_chats_without_words_are_skipped(tmp_path):
    path = lines(tmp_path, {"m": []}, {"m": [{"role": "user", "content": " "}]})
    assert list(read_documents(path, field="m")) == []


@pytest.mark.parametrize(
    ("field", "record", "message"),
    [
        ("m", {"m": ["hi"]}, "message 1 has no 'role'"),
        ("m", {"m": [{"role": "user"}]}, "message 1 has no 'content'"),
        ("m", {"m": [{"role": "user", "content": None}]}, "message 1 has no 'content'"),
        ("m", {"m": [{"role": "user", "content": [{"type": "text"}]}]}, "no 'content'"),
        ("m", {"m": [{"from": "human", "value": "a"}]}, "no 'role'"),
        ("m", {"m": [{"role": "user", "content": "a\0"}]}, "no 'content'"),
        ("m", {"m": {"role": "user"}}, "not a string, nor a list of messages"),
        ("m", {"m": "a\0b"}, "NUL"),
        (["q", "a"], {"q": "a", "a": 3}, "'a' is not a string"),
        (["q", "a"], {"q": ["a"], "a": "b"}, "'q' is not a string"),
        (["q", "a"], {"q": "a", "b": "b"}, r"no field 'a'.*it has q, b"),
    ],
)
def test_a_malformed_chat_names_its_line(tmp_path, field, record, message):
    good = {"m": [{"role": "user", "content": "a"}], "q": "a", "a": "b"}
    path = lines(tmp_path, good, record)
    with pytest.raises(InputError, match=message) as caught:
        list(read_documents(path, field=field))
    assert f"{path}, line 2" in str(caught.value)


# ---- rendering ----


def test_a_chat_is_written_by_the_models_own_template(chatty):
    assert render(CHAT, chatty(TRIMMING)).text == (
        "<|begin|><|system|>\nuser<|end|><|user|>\nuser<|end|><|assistant|>\nYa, sungai.<|end|>"
    )
    assert render(CHAT, chatty(KEEPING, "qwen")).text == (
        "<|im_start|>system\nuser<|im_end|>\n<|im_start|>user\n  user <|im_end|>\n"
        "<|im_start|>assistant\nYa, sungai.\n<|im_end|>\n"
    )


@pytest.mark.parametrize("template", [TRIMMING, KEEPING])
def test_contents_are_where_the_messages_stand(chatty, template):
    """Not in the headers, although two messages say the word ``user``; alike in every template."""
    text, contents, has_special = render(CHAT, chatty(template))
    assert has_special
    assert [text[start:stop] for start, stop in contents] == ["user", "user", "Ya, sungai."]
    for start, _ in contents:
        assert text[:start].rstrip(" ").endswith(("|>\n", "system\n", "user\n", "assistant\n"))


def test_a_message_that_a_template_leaves_out_has_an_empty_range(chatty):
    """Ranges of two models correspond by their place."""
    template = KEEPING.replace("in messages", "in messages if m.role != 'system'")
    text, contents, _ = render(CHAT, chatty(template))
    assert contents[0][0] == contents[0][1]
    assert [text[start:stop] for start, stop in contents] == ["", "user", "Ya, sungai."]
    assert text[: contents[1][0]] == "<|im_start|>user\n  "


def test_a_template_that_changes_a_message_still_has_the_others(chatty):
    template = KEEPING.replace("m.content", "m.content.split('</think>')[-1]")
    chat = Chat((Turn("user", "river"), Turn("assistant", "hm</think>yes"), Turn("user", "why")))
    text, contents, _ = render(chat, chatty(template))
    assert [text[start:stop] for start, stop in contents] == ["river", "", "why"]


def test_a_template_that_asks_the_date_is_told_one(chatty):
    template = "{% if not date_string is defined %}{{ strftime_now('%d') }}{% endif %}" + KEEPING
    assert render(CHAT, chatty(template)).text == render(CHAT, chatty(KEEPING)).text
    shown = render(CHAT, chatty("{{ date_string }}" + KEEPING)).text
    assert shown.startswith("26 Jul 2024<|im_start|>")


def test_a_plain_text_is_one_range():
    assert render("naïve", None) == ("naïve", [(0, 5)], False)


def test_a_model_without_a_template_is_named(chatty):
    tokenizer = chatty(None)
    with pytest.raises(InputError, match="no chat template") as caught:
        render(CHAT, tokenizer)
    assert str(tokenizer.name_or_path) in str(caught.value)
    assert "chat_template.jinja" in str(caught.value)


HOSTILE = {
    "raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "dunder": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "range": ("{% for i in range(10**9) %}a{% endfor %}", "\\*\\*"),
    "long range": ("{% for i in range(1000000000) %}a{% endfor %}", "[Rr]ange"),
    "power": ("{{ 10 ** 10 ** 10 }}", "\\*\\*"),
    "syntax": ("{% if %}", "Expected"),
    "undefined": ("{{ messages[9]['content'] }}", "no element"),
    "mutation": ("{{ messages.append(1) }}", "unsafe"),
    "long": ("{{ 'a' * 90000000 }}", "far more"),
}


@pytest.mark.catalogue("hostile-template")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_is_an_input_error(chatty, case):
    template, message = HOSTILE[case]
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        render(CHAT, chatty(template))
    assert "chat template of" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 60  # it ends; how soon depends on what else runs


def test_a_template_that_never_ends_is_stopped(chatty, monkeypatch):
    monkeypatch.setattr(chat_module, "RENDER_SECONDS", 0.3)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(InputError, match=r"more than 0\.3 seconds"):
        render(CHAT, chatty(loops))
    assert time.monotonic() - started < 60  # it ends; how soon depends on what else runs


# ---- tokenising and scoring ----


def test_the_bos_is_not_doubled(chatty):
    tokenizer = chatty(TRIMMING)
    ids = tokenizers.tokenize(tokenizer, CHAT)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizers.tokenize(tokenizer, "a")["input_ids"][0] == tokenizer.bos_token_id


def test_two_templates_are_two_tokenizers(chatty):
    """One vocabulary that writes chats in two ways cuts plain texts alike, and chats not."""
    both = chatty(TRIMMING), chatty(KEEPING)
    assert tokenizers.is_same_tokenizer(*both, ["one text"])
    assert not tokenizers.is_same_tokenizer(*both, [CHAT])


def test_chats_give_rows_that_correspond(chatty):
    tokenizer = chatty(TRIMMING)
    data = calibration.align([CHAT, "plain", CHAT], tokenizer, tokenizer, rows="token")
    other = calibration.align([CHAT, "plain"], tokenizer, chatty(KEEPING, "qwen"), rows="sample")
    assert data.documents == 3
    assert other.rows == 2
    assert other.target_tokens != other.source_tokens


def test_scored_chats_have_one_prefix_and_the_bytes_of_what_is_said(chatty):
    sizes = []
    for tokenizer in (chatty(TRIMMING), chatty(KEEPING, "qwen")):
        cut = nll.windows([CHAT], tokenizer, max_positions=512)
        [tokens] = cut.batches[0].tokens[cut.batches[0].mask.any(1)]
        used = tokens[cut.batches[0].mask[0]].tolist()
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else used[0]
        assert used.count(prefix) == 1
        assert cut.tokens.tolist() == [len(used) - 1]
        sizes += cut.bytes.tolist()
    assert sizes == [len("useruserYa, sungai.")] * 2
