"""Rows across tokenizers: where tokens end, against decoded prefixes, on several scripts."""

import json

import numpy as np
import pytest
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ot_merge_jax.data import alignment, tokenizers
from ot_merge_jax.data.calibration import align, encode
from ot_merge_jax.errors import InputError
from ot_merge_jax.io import hf
from ot_merge_jax.models.gather import gather

ENGLISH = [
    "The rivers  carried old songs, and the markets counted nothing.",
    "She didn't say (twice!) what the harbour\n\n  had learned: 3.14 of naïve cafés.",
    "Nobody counts hours near the mountain; the rivers do not either 🌋🌋 .",
]
THAI = [
    "แม่น้ำไหลผ่านภูเขาและตลาดเก่า",
    "ไม่มีใครนับชั่วโมงใกล้แม่น้ำ และตลาดก็ไม่นับ",
    "ภูเขาเก่าเรียนรู้เพลงจากแม่น้ำ",
]
CHINESE = [
    "河流穿过群山,古老的市场里没有人数时间。",
    "山和河流学会了古老的歌。没有人在市场里唱歌!",
    "市场旁边的河流 没有山\u3000高。",
]
SCRIPTS = {"english": ENGLISH, "thai": THAI, "chinese": CHINESE}


def _with_bos(tokenizer):
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False
    )


def _byte_level(texts, size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return _with_bos(tokenizer)


def _sentence_piece(texts, size):
    """As Llama 2: marks of space in the normalizer, bytes for what the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    first = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=first, limit_alphabet=40, show_progress=False
        ),
    )
    state = json.loads(tokenizer.to_str())  # byte tokens must be ordinary, or decoding skips them
    state["added_tokens"] = [one for one in state["added_tokens"] if one["id"] < 2]
    return _with_bos(Tokenizer.from_str(json.dumps(state)))


@pytest.fixture(scope="module")
def readers():
    """Three tokenizers that cut alike almost nowhere: other kinds, sizes and training texts."""
    return {
        "small": _byte_level([*ENGLISH, *CHINESE], 330),
        "large": _byte_level([*ENGLISH[::-1], *THAI, *CHINESE[1:]], 600),
        "marked": _sentence_piece([*ENGLISH[1:], *THAI[:2], *CHINESE[:2]], 420),
    }


PAIRS = [("small", "large"), ("marked", "small"), ("large", "marked")]


def oracle(tokenizer, text):
    """``{characters: token}`` from decoding every prefix of the ids; tokens of white space left
    out.
    """
    ids = tokenizer(text)["input_ids"]
    found, whole = {}, 0
    for token in range(len(ids)):
        decoded = tokenizer.decode(ids[: token + 1], skip_special_tokens=True)
        if not decoded or not text.startswith(decoded):
            continue  # the pieces of a character so far are no character
        if text[whole : len(decoded)].strip():
            found[len(decoded)] = token
        whole = len(decoded)
    assert whole == len(text)
    return found


def read_at(batches):
    """Row id -> (tokens of its sequence, position)."""
    return {
        int(batch.row_id[place, row]): (
            batch.tokens[place][batch.mask[place]].tolist(),
            int(batch.row_position[place, row]),
        )
        for batch in batches
        for place, row in zip(*np.nonzero(batch.row_id >= 0), strict=True)
    }


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("pair", PAIRS, ids="<-".join)
def test_rows_are_where_both_decode_the_same_prefix(readers, pair, script):
    """Every such place and no other, each with the token that ends there."""
    target, source = (readers[name] for name in pair)
    texts = SCRIPTS[script]
    data = align(texts, target, source, rows="span")
    expected = []
    for text in texts:
        t, s = oracle(target, text), oracle(source, text)
        ids = target(text)["input_ids"], source(text)["input_ids"]
        expected += [((ids[0], t[place]), (ids[1], s[place])) for place in t if place in s]
    assert data.rows == len(expected) > 10
    found = read_at(data.target), read_at(data.source)
    assert [(found[0][row], found[1][row]) for row in range(data.rows)] == expected


def test_the_tokenizers_of_these_tests_cut_apart(readers):
    """Characters in pieces, several tokens between two rows: the cases that matter occur."""
    for pair in PAIRS:
        target, source = (encode(readers[name], THAI, max_length=512) for name in pair)
        assert all(len(t.ids) != len(s.ids) for t, s in zip(target, source, strict=True))
    for name in ("small", "marked"):
        [one] = encode(readers[name], ["🏔"], max_length=512, has_ends=True)
        assert len(one.ids) >= 4
        assert list(one.ends) == [(0, 1)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_tokenizer_gives_its_whole_characters(readers, script):
    """With itself, a row is every token that ends a character and is not white space."""
    tokenizer = readers["small"]
    data = align(SCRIPTS[script], tokenizer, tokenizer, rows="span")
    assert data.rows == sum(len(oracle(tokenizer, text)) for text in SCRIPTS[script])
    assert read_at(data.target) == read_at(data.source)


# ------------------------------------------------------------------------ by hand


def _by_hand(merges, added=()):
    """A byte-level tokenizer with these merges, special tokens ``<s>`` and ``added``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", *added, *alphabet, *("".join(merge) for merge in merges)]
    vocabulary = {word: row for row, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", *added])
    return _with_bos(tokenizer)


def test_matched_fraction_is_the_hand_count():
    """ab|c| |de| |f  against  a|bc| de| | |f : rows end after c, e and f."""
    target = _by_hand([("a", "b"), ("d", "e")])
    source = _by_hand([("b", "c"), ("d", "e"), ("Ġ", "de")])
    words = [["<s>", "ab", "c", "Ġ", "de", "Ġ", "Ġ", "f"], ["<s>", "a", "bc", "Ġde", "Ġ", "Ġ", "f"]]
    text = "abc de  f"
    for tokenizer, expected in zip((target, source), words, strict=True):
        assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == expected
    data = align([text], target, source, rows="span")
    assert data.rows == 3
    assert (data.target_matched, data.source_matched) == (3 / 7, 3 / 6)
    assert [read_at(data.target)[row][1] for row in range(3)] == [2, 4, 7]
    assert [read_at(data.source)[row][1] for row in range(3)] == [2, 3, 6]
    # a subsample keeps fewer rows and has matched no less
    fewer = align([text, text], target, source, rows="span", max_rows=2)
    assert (fewer.rows, fewer.target_matched) == (2, 3 / 7)


def test_matched_fraction_of_the_other_rows(readers):
    same = align(ENGLISH, readers["small"], readers["small"], rows="token")
    assert (same.target_matched, same.source_matched) == (1.0, 1.0)
    mean = align(ENGLISH, readers["small"], readers["large"], rows="sample")
    assert (mean.target_matched, mean.source_matched) == (None, None)


def test_special_tokens_give_no_row_on_either_side():
    """``<end>`` is one special token of the source and five characters of the target."""
    target, source = _by_hand([]), _by_hand([], added=["<end>"])
    data = align(["a<end>b"], target, source, rows="span")
    assert [read_at(data.target)[row][1] for row in range(data.rows)] == [1, 7]
    assert [read_at(data.source)[row][1] for row in range(data.rows)] == [1, 3]


@pytest.mark.parametrize("length", [3, 4, 5, 6])
def test_truncated_documents_align_over_what_both_read(length):
    """A character whose last bytes are cut off has not been read."""
    bytewise = _by_hand([])
    merged = _by_hand([("æ", "²"), ("æ²", "³")])  # 河 is one token
    [cut] = encode(bytewise, ["河河"], max_length=length, has_ends=True)
    characters = (length - 1) // 3
    assert cut.ends == {(0, place): 3 * place for place in range(1, characters + 1)}
    data = align(["河河", "河河"], bytewise, merged, rows="span", max_length=7)
    assert data.rows == 4
    if characters:
        data = align(["河河", "河河"], bytewise, merged, rows="span", max_length=length)
        assert data.rows == 2 * characters
        assert data.source_matched == pytest.approx(characters / 2)


def test_a_character_cut_across_two_tokens_ends_nowhere_else():
    """Bytes of one character in one token with the first bytes of the next."""
    # 河 is æ ² ³ and 泰 is æ ³ °: ² ³ æ is one token
    tokenizer = _by_hand([("²", "³"), ("²³", "æ")])
    words = tokenizer.convert_ids_to_tokens(tokenizer("河泰")["input_ids"])
    assert words == ["<s>", "æ", "²³æ", "³", "°"]
    [one] = encode(tokenizer, ["河泰"], max_length=9, has_ends=True)
    assert one.ends == {(0, 2): 4}


# ------------------------------------------------------------------------ several ranges


def test_ranges_of_differently_rendered_texts_correspond(readers):
    """Two templates around the same two messages."""
    messages = ["The rivers carried songs.", "没有人在市场里唱歌!"]
    places = []
    for name, before, after in (("small", "[INST] ", " [/INST]"), ("marked", "user:\n", "\n\n")):
        text, contents = "", []
        for message in messages:
            text += before
            contents.append((len(text), len(text) + len(message)))
            text += message + after
        one = readers[name](text, return_offsets_mapping=True)
        is_special = [token == 0 for token in range(len(one["input_ids"]))]
        found = alignment.token_ends(
            text, one["offset_mapping"], is_special=is_special, contents=contents
        )
        for (content, count), token in found.items():
            decoded = readers[name].decode(one["input_ids"][: token + 1], skip_special_tokens=True)
            assert decoded == text[: contents[content][0] + count]
            assert 0 < count <= len(messages[content])
        assert {(0, len(messages[0])), (1, len(messages[1]))} <= found.keys()
        places.append(found)
    both = alignment.common_boundaries(*places)
    assert len(both) == len(places[0].keys() & places[1].keys()) > 8


def test_a_token_that_reaches_out_of_a_range_gives_no_row():
    spans = [(0, 3), (3, 6), (6, 9)]
    found = alignment.token_ends(
        "abcdefghi", spans, is_special=[False] * 3, contents=[(1, 5), (6, 9)]
    )
    assert found == {(0, 2): 0, (1, 3): 2}


@pytest.mark.parametrize("max_rows", [2, 17, 10_000])
def test_max_rows_keeps_a_seeded_sample(readers, max_rows):
    pair = readers["small"], readers["large"]
    every = align(ENGLISH, *pair, rows="span")
    kept = [
        read_at(align(ENGLISH, *pair, rows="span", max_rows=max_rows, seed=seed).target)
        for seed in (3, 3, 4)
    ]
    assert len(kept[0]) == min(max_rows, every.rows)
    assert kept[0] == kept[1]
    assert (kept[0] == kept[2]) == (max_rows >= every.rows)
    known = [(tuple(tokens), place) for tokens, place in read_at(every.target).values()]
    assert {(tuple(tokens), place) for tokens, place in kept[0].values()} <= set(known)


def test_slow_tokenizers_are_refused_by_name(readers):
    slow = transformers.ByT5Tokenizer()
    slow.name_or_path = "some/slow-model"
    with pytest.raises(InputError, match=r"some/slow-model has none .*use rows: sample"):
        align(ENGLISH, readers["small"], slow, rows="span")
    assert align(ENGLISH, readers["small"], slow, rows="sample").rows == len(ENGLISH)


# ------------------------------------------------------------------------ activations


def test_activations_are_those_of_the_right_token(tiny_checkpoint, texts):
    """What enters the first layer is the normalised embedding of one token: it names it."""
    sides = []
    for family in ("llama", "qwen2"):
        folder = tiny_checkpoint(family)
        sides.append((tokenizers.load_tokenizer(folder), *hf.load_hf(folder)))
    data = align(texts[:8], sides[0][0], sides[1][0], rows="span", max_rows=60)
    assert data.rows == 60
    ends = []
    for (tokenizer, cfg, params), batches in zip(sides, (data.target, data.source), strict=True):
        found = gather(params, batches, cfg=cfg, sites=["attn_in"]).values["attn_in"][0]
        embedding = np.asarray(params["embed_tokens"]["embedding"], np.float32)
        scale = np.asarray(params["layers"]["input_layernorm"]["scale"][0], np.float32)
        named = embedding / np.sqrt((embedding**2).mean(1, keepdims=True) + cfg.rms_norm_eps)
        distance = np.abs(found[:, None] - named * scale).max(-1)
        assert (distance.min(1) < 1e-4).all()
        rows_read = read_at(batches)
        assert distance.argmin(1).tolist() == [
            rows_read[row][0][rows_read[row][1]] for row in range(data.rows)
        ]
        ends.append(
            [
                tokenizer.decode(tokens[: place + 1], skip_special_tokens=True)
                for tokens, place in (rows_read[row] for row in range(data.rows))
            ]
        )
    assert ends[0] == ends[1]
