"""Which tokens count, blocks, batches by their number, pairs of tokens of two vocabularies."""

import re

import numpy as np
import pytest

from ot_merge_jax.data import tokenizers
from ot_merge_jax.data.chat import Chat, Turn
from ot_merge_jax.errors import InputError
from ot_merge_jax.training import packing

TEMPLATE = "{% for m in messages %}<|begin|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def readers(tokenizer_folder):
    """kind -> tokenizer; those of ``bpe`` read chats."""
    made = {kind: tokenizers.load_tokenizer(tokenizer_folder(kind)) for kind in ("bpe", "qwen")}
    made["bpe"].chat_template = TEMPLATE
    return made


# ---- which tokens count ----


def test_a_text_counts_behind_its_prefix(readers, texts):
    one = packing.tokenize_for_training(texts[0], readers["bpe"])
    assert one.ids == readers["bpe"](texts[0])["input_ids"]
    assert one.loss_mask == [False] + [True] * (len(one.ids) - 1)


def test_an_eos_that_stands_for_a_bos_ends_the_document_before(readers, texts):
    """Tokenizers without BOS: the prefix is the one that evaluation uses, and it is learned."""
    qwen = readers["qwen"]
    one = packing.tokenize_for_training(texts[0], qwen)
    assert one.ids == [qwen.eos_token_id, *qwen(texts[0])["input_ids"]]
    assert all(one.loss_mask)


CHAT = Chat((
    Turn("user", "where is the river"), Turn("assistant", "the river is old"),
    Turn("user", "is the river old"), Turn("assistant", "songs"),
))  # fmt: skip


def test_of_a_chat_the_answers_count_with_their_ends(readers):
    reader = readers["bpe"]
    one = packing.tokenize_for_training(CHAT, reader)
    said = [token for token, counts in zip(one.ids, one.loss_mask, strict=True) if counts]
    assert reader.decode(said) == " the river is old<|end|> songs<|end|>"


def test_all_of_a_chat_counts_if_asked(readers):
    one = packing.tokenize_for_training(CHAT, readers["bpe"], responses_only=False)
    assert one.loss_mask == [False] + [True] * (len(one.ids) - 1)


def test_chats_without_an_answer_are_refused(readers):
    marked = [
        packing.tokenize_for_training(Chat((Turn("user", "the river " * 9),)), readers["bpe"])
    ]
    with pytest.raises(InputError, match="no words of an assistant to learn from"):
        packing.pack(marked, 4)


# ---- blocks ----


def marked(lengths):
    """Documents of distinct tokens whose first does not count."""
    start, made = 1, []
    for n in lengths:
        ids = list(range(start, start + n))
        made.append(packing.TrainingTokens(ids, [False] + [True] * (n - 1), [False] * n, {}))
        start += n
    return made


@pytest.mark.parametrize("length", [4, 5, 7, 19])
@pytest.mark.parametrize("has_tail", [False, True])
def test_blocks_hold_the_stream(length, has_tail):
    blocks = packing.pack(marked([5, 7, 7]), length, has_tail=has_tail)
    whole = 19 // length + (has_tail and 19 % length > 0)
    assert blocks.tokens.shape == (whole, length)
    real = blocks.tokens[blocks.mask]
    assert real.tolist() == list(range(1, (19 if has_tail else whole * length) + 1))
    first = {1, 6, 13}
    assert {int(x) for x in blocks.tokens[blocks.mask & ~blocks.loss_mask]} == first & set(real)


@pytest.mark.parametrize("lengths", [[], [3]])
def test_too_little_text_is_refused(lengths):
    with pytest.raises(InputError, match=r"tokens to learn from, and one block has 4"):
        packing.pack(marked(lengths), 4)


def test_blocks_without_anything_to_learn_go():
    silent = packing.TrainingTokens([1] * 8, [False] * 8, [False] * 8, {})
    blocks = packing.pack([silent, *marked([8])], 4)
    assert len(blocks.tokens) == 2
    assert blocks.count == 3 + 3  # the first of a block has nothing before it


# ---- batches ----


@pytest.fixture
def blocks():
    return packing.pack(marked([60]), 5)


def test_an_epoch_shows_every_block_once_and_each_in_another_order(blocks):
    taken = [packing.batch_at(blocks, step, batch_size=4, seed=1).tokens for step in range(6)]
    epochs = [np.concatenate(taken[:3]), np.concatenate(taken[3:])]
    for epoch in epochs:
        np.testing.assert_array_equal(epoch[np.argsort(epoch[:, 0])], blocks.tokens)
    assert (epochs[0] != epochs[1]).any()


def test_a_batch_follows_from_its_number_and_the_seed(blocks):
    one, same, other = (
        packing.batch_at(blocks, 7, batch_size=4, seed=seed).tokens for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_weights_are_those_of_a_mean(blocks):
    made = packing.batch_at(blocks, 0, batch_size=4, seed=0)
    assert made.weight.sum() == pytest.approx(1)
    assert (made.weight[:, 0] == 0).all()
    assert len(np.unique(made.weight)) == 2


def test_parts_are_the_batch_in_pieces(blocks):
    whole = packing.batch_at(blocks, 2, batch_size=4, seed=0)
    parts = packing.batch_at(blocks, 2, batch_size=4, seed=0, parts=2)
    assert parts.tokens.shape == (2, 2, 5)
    np.testing.assert_array_equal(parts.weight.reshape(4, 5), whole.weight)
    with pytest.raises(ValueError, match="3 parts do not divide a batch of 4"):
        packing.batch_at(blocks, 0, batch_size=4, seed=0, parts=3)


# ---- pairs ----


def decoded(reader, ids):
    return reader.decode(ids, skip_special_tokens=True)


def test_pairs_end_at_the_same_characters(readers, texts):
    """Of every place, student and teacher have read the same text since the block began."""
    made = packing.pair(texts, readers["bpe"], readers["qwen"], length=48)
    pairs = made.pairs
    assert pairs.tokens.shape[1] == made.tokens.shape[1] == 48
    count = 0
    for row, (here, there) in enumerate(zip(pairs.position, pairs.source_position, strict=True)):
        for mine, other in zip(here[here >= 0], there[here >= 0], strict=True):
            one = decoded(readers["bpe"], made.tokens[row, : mine + 1])
            assert one == decoded(readers["qwen"], pairs.tokens[row, : other + 1])
            count += 1
    assert count > 300
    assert 0.3 < min(pairs.target_matched, pairs.source_matched) < 1


def test_long_documents_are_cut_and_none_of_them_is_lost(readers, texts):
    long = " ".join(texts[:12])
    made = packing.pair([long], readers["bpe"], readers["qwen"], length=48)
    said = "".join(
        decoded(readers["bpe"], row[mask]) for row, mask in zip(made.tokens, made.mask, strict=True)
    )
    assert said == long


def test_the_demos_two_families_share_most_ends():
    """Its stranger as a student of its source, as in `ot-merge adapt --objective kd`."""
    from ot_merge_jax.data.documents import read_documents
    from ot_merge_jax.demo import assets

    documents = list(read_documents(assets.path("calibration.jsonl")))[:60]
    student, teacher = (
        tokenizers.load_tokenizer(assets.path(name)) for name in ("stranger", "source")
    )
    made = packing.pair(documents, student, teacher, length=128)
    assert made.pairs.target_matched > 0.6
    assert made.pairs.source_matched > 0.6
    assert (made.pairs.position >= 0).sum() > 0.5 * made.count


@pytest.fixture
def words_and_letters(texts):
    """Tokenizers that read whole words and single letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = []
    for pieces in (r"\S+", r"\S"):
        splitter = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
        found = {one for text in texts for one, _ in splitter.pre_tokenize_str(text)}
        known = {one: place for place, one in enumerate(["</s>", *sorted(found)])}
        tokenizer = Tokenizer(models.WordLevel(known, unk_token="</s>"))
        tokenizer.pre_tokenizer = splitter
        made.append(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))
    return made


@pytest.mark.parametrize("turned", [False, True])
def test_too_few_common_places_are_refused(turned, words_and_letters, texts):
    """Words end where letters do, but few letters end where a word does; whoever reads which."""
    both = words_and_letters[::-1] if turned else words_and_letters
    with pytest.raises(InputError, match="few common places for universal distillation") as found:
        packing.pair(texts, *both, length=256)
    student, teacher, needed = map(int, re.findall(r"(\d+) %", str(found.value)))
    words, letters = (teacher, student) if turned else (student, teacher)
    assert letters < needed < words
