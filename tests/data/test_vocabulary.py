"""The bytes of tokens, read from how each tokenizer says it marks them, and the matching."""

import json

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ot_merge_jax.data import calibration, tokenizers
from ot_merge_jax.data import vocabulary as spelling
from ot_merge_jax.errors import InputError

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def wrapped(tokenizer, added=()):
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(list(added))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def byte_level(words, *, added=(), where="pre_tokenizer"):
    """``<s>`` and these tokens, in this order."""
    tokenizer = Tokenizer(
        models.BPE(vocab={word: row for row, word in enumerate(words)}, merges=[])
    )
    parts = {
        "pre_tokenizer": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "normalizer": normalizers.ByteLevel(),
        "decoder": decoders.ByteLevel(),
    }
    setattr(tokenizer, where, parts[where])
    return wrapped(tokenizer, added)


def marked(words, *, where="normalizer", byte_fallback=True, mark="▁", added=()):
    """The same with a mark of space that one part says."""
    vocabulary = {word: row for row, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=byte_fallback))
    parts = {
        "normalizer": normalizers.Sequence(
            [normalizers.Prepend(mark), normalizers.Replace(" ", mark)]
        ),
        "pre_tokenizer": pre_tokenizers.Metaspace(replacement=mark),
        "decoder": decoders.Sequence([decoders.Replace(mark, " "), decoders.Fuse()]),
    }
    setattr(tokenizer, where, parts[where])
    return wrapped(tokenizer, added)


def spelled(tokenizer, size=10_000):
    return spelling.token_bytes(tokenizer, size=size)


# ------------------------------------------------------------------------ one tokenizer


@pytest.mark.parametrize("kind", ["bpe", "qwen", "metaspace"])
def test_every_token_spells_what_it_decodes_to(kind, tokenizer_folder):
    """The decoder of the tokenizer as the judge, wherever the bytes are whole characters."""
    tokenizer = tokenizers.load_tokenizer(tokenizer_folder(kind))
    special = set(tokenizer.all_special_ids)
    found = {row: word for word, row in spelled(tokenizer).items()}
    # after a word, so that no leading space is stripped
    word = tokenizer("river", add_special_tokens=False)["input_ids"]
    checked = 0
    for row in range(len(tokenizer)):
        decoded = tokenizer.decode([*word, row]).removeprefix("river")
        if row in special or row not in found or "\ufffd" in decoded:
            continue
        assert found[row].decode() == decoded
        checked += 1
    assert checked > 150 + (kind == "metaspace") * 50
    assert not special & found.keys()


def test_all_256_bytes_are_spelled(tokenizer_folder):
    """By the alphabet of byte-level tokens as by byte tokens."""
    for kind in ("bpe", "metaspace"):
        found = spelled(tokenizers.load_tokenizer(tokenizer_folder(kind)))
        assert {bytes([byte]) for byte in range(256)} <= found.keys()


@pytest.mark.parametrize("where", ["pre_tokenizer", "normalizer", "decoder"])
def test_byte_level_is_read_from_any_part(where):
    found = spelled(byte_level(["<s>", "Ġthe", "é", "Ã©", "Ċ"], where=where))
    assert found == {b" the": 1, b"\xe9": 2, "é".encode(): 3, b"\n": 4}


@pytest.mark.parametrize("mark", ["▁", "_"])
@pytest.mark.parametrize("where", ["normalizer", "pre_tokenizer", "decoder"])
def test_the_mark_of_space_is_read_from_any_part(where, mark):
    words = ["<s>", f"{mark}the", "é", f"a{mark}b", mark]
    found = spelled(marked(words, where=where, mark=mark))
    assert found == {b" the": 1, "é".encode(): 2, b"a b": 3, b" ": 4}


def test_nothing_is_guessed_from_the_vocabulary():
    """Marks of the other kind are ordinary characters."""
    assert spelled(byte_level(["<s>", "▁the", "<0xE4>"])) == {"▁the".encode(): 1, b"<0xE4>": 2}
    plain = marked(["<s>", "Ġthe", "<0xE4>"], byte_fallback=False)
    assert spelled(plain) == {"Ġthe".encode(): 1, b"<0xE4>": 2}
    nothing = wrapped(Tokenizer(models.WordLevel({"<s>": 0, "▁the": 1, "Ġthe": 2}, "<s>")))
    assert spelled(nothing) == {"▁the".encode(): 1, "Ġthe".encode(): 2}


def test_what_a_normalizer_turns_into_a_space_is_no_mark():
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "a_b": 1}, merges=[]))
    tokenizer.normalizer = normalizers.Replace("_", " ")
    assert spelled(wrapped(tokenizer)) == {b"a_b": 1}


def test_byte_tokens_are_bytes():
    found = spelled(marked(["<s>", "<0xE4>", "<0x0A>", "<0xe4", "▁ä"]))
    assert found == {b"\xe4": 1, b"\n": 2, b"<0xe4": 3, " ä".encode(): 4}


def test_of_tokens_that_spell_alike_the_lowest_row_is_taken():
    """``Ġthe`` and an added `` the``; but an ordinary token before the byte token it repeats."""
    added = [AddedToken(" the", normalized=False), AddedToken("Ġx", normalized=False)]
    found = spelled(byte_level(["<s>", "Ġthe", "x"], added=added))
    assert found == {b" the": 1, b"x": 2, "Ġx".encode(): 4}
    found = spelled(marked(["<s>", "<0x61>", "<0x62>", "a", "▁the"], added=[" the"]))
    assert found == {b"a": 3, b"b": 2, b" the": 4}


def test_special_tokens_and_padded_rows_are_left_out():
    """Added tokens marked special are, named by the tokenizer or not."""
    tokenizer = byte_level(["<s>", "a", "b"])
    tokenizer.backend_tokenizer.add_special_tokens(["<|header|>"])
    assert tokenizer.convert_tokens_to_ids("<|header|>") == 3
    assert 3 not in tokenizer.all_special_ids
    assert spelled(tokenizer) == {b"a": 1, b"b": 2}
    assert spelling.vocabulary(tokenizer, size=10) == {"a": 1, "b": 2}
    assert spelled(tokenizer, size=2) == {b"a": 1}
    [one] = calibration.encode(tokenizer, ["a<|header|>b"], max_length=9)
    assert (one.ids, one.is_special) == ([1, 3, 2], [False, True, False])


# ------------------------------------------------------------------------ two tokenizers


def pairs(target, source, *, is_one=False, sizes=(10_000, 10_000)):
    found = spelling.matched_vocabulary(
        target, source, target_size=sizes[0], source_size=sizes[1], is_one=is_one
    )
    assert found.weights is None
    return list(zip(found.target_ids.tolist(), found.source_ids.tolist(), strict=True))


def test_byte_level_and_sentence_piece_tokens_match():
    target = byte_level(["<s>", "Ġthe", "the", "Ã¤", "ä", "Ċ", "▁x", "only"])
    source = marked(["<s>", *BYTE_TOKENS, "the", "▁the", "ä", "n", "▁x"])
    row = source.convert_tokens_to_ids
    expected = [(1, row("▁the")), (2, row("the")), (3, row("ä")), (4, row("<0xE4>")),
                (5, row("<0x0A>"))]  # fmt: skip
    assert pairs(target, source) == expected
    assert pairs(source, target) == sorted((s, t) for t, s in expected)


def test_no_row_is_matched_twice(tokenizer_folder):
    for a, b in (("bpe", "metaspace"), ("metaspace", "qwen"), ("qwen", "bpe")):
        target, source = (tokenizers.load_tokenizer(tokenizer_folder(kind)) for kind in (a, b))
        found = pairs(target, source)
        assert len(found) >= 256
        for side in zip(*found, strict=True):
            assert len(set(side)) == len(side)


def test_one_tokenizer_is_matched_by_id():
    """Tokens that spell alike included: nothing has to be told apart."""
    tokenizer = marked(["<s>", "<0x61>", "a", "▁the"])
    assert pairs(tokenizer, tokenizer, is_one=True) == [(1, 1), (2, 2), (3, 3)]
    assert pairs(tokenizer, tokenizer) == [(2, 2), (3, 3)]


@pytest.mark.parametrize(("words", "count"), [(["x"], "0 tokens"), (["a", "x"], "1 token,")])
def test_too_few_matches_are_refused(words, count):
    with pytest.raises(InputError, match=rf"share {count}.*leave them out of weights"):
        pairs(byte_level(["<s>", "a", "b"]), byte_level(["<s>", *words]))


def test_rows_beyond_a_table_are_not_matched():
    tokens = byte_level(["<s>", "a", "b", "c"]), byte_level(["<s>", "c", "a", "b"])
    assert pairs(*tokens) == [(1, 2), (2, 3), (3, 1)]
    assert pairs(*tokens, sizes=(3, 10)) == [(1, 2), (2, 3)]
    assert pairs(*tokens, sizes=(10, 3)) == [(1, 2), (3, 1)]


@pytest.mark.catalogue("broken-tokenizer")
def test_slow_tokenizers_are_refused_by_name():
    slow = transformers.ByT5Tokenizer()
    slow.name_or_path = "some/slow-model"
    with pytest.raises(InputError, match=r"some/slow-model has no tokenizer\.json"):
        pairs(byte_level(["<s>", "a", "b"]), slow)


def test_the_fixture_tokenizers_differ(tokenizer_folder):
    """What the tests above rest on."""
    states = [
        json.loads((tokenizer_folder(kind) / "tokenizer.json").read_text())
        for kind in ("bpe", "metaspace")
    ]
    assert "ByteLevel" in json.dumps(states[0]["pre_tokenizer"])
    assert "ByteLevel" not in json.dumps(states[1])
