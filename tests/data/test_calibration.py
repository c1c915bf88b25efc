"""Tokenising, batching and row alignment of texts."""

import contextlib
import json

import numpy as np
import pytest

from ot_merge_jax.data import tokenizers as tokenizers_module
from ot_merge_jax.data import vocabulary
from ot_merge_jax.data.batching import batches
from ot_merge_jax.data.calibration import align
from ot_merge_jax.errors import InputError


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folder):
    """Kind -> tokenizer; ``bpe`` adds a BOS, ``qwen`` adds nothing."""
    return {
        kind: tokenizers_module.load_tokenizer(tokenizer_folder(kind)) for kind in ("bpe", "qwen")
    }


# ------------------------------------------------------------------------ batches


def random_rows(rng, count):
    """Sequences of many lengths, each with its rows; some have none."""
    sequences = [
        rng.integers(1, 99, int(n)).tolist() for n in rng.choice([1, 5, 17, 40, 200, 513], count)
    ]
    rows, start = [], 0
    for sequence in sequences:
        wanted = int(rng.integers(0, min(len(sequence), 9) + 1))
        positions = sorted(rng.choice(len(sequence), wanted, replace=False).tolist())
        rows.append((positions, list(range(start, start + wanted))))
        start += wanted
    return sequences, rows


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_batches_hold_every_row_once(rng, count):
    sequences, rows = random_rows(rng, count)
    rows[0] = ([0], [10_000])
    made = batches(sequences, rows)
    found = np.concatenate([batch.row_id.ravel() for batch in made])
    expected = sorted(i for _, ids in rows for i in ids)
    assert sorted(found[found >= 0].tolist()) == expected


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_batches_read_the_tokens_the_rows_name(rng, count):
    sequences, rows = random_rows(rng, count)
    rows[0] = ([0], [10_000])
    expected = {
        row: sequence[position]
        for sequence, (positions, ids) in zip(sequences, rows, strict=True)
        for position, row in zip(positions, ids, strict=True)
    }
    found = {}
    for batch in batches(sequences, rows):
        for place, row in zip(*np.nonzero(batch.row_id >= 0), strict=True):
            position = batch.row_position[place, row]
            assert batch.mask[place, position]
            found[int(batch.row_id[place, row])] = int(batch.tokens[place, position])
    assert found == expected


def test_masks_cover_exactly_the_sequences(rng):
    sequences, rows = random_rows(rng, 60)
    wanted = sorted(tuple(s) for s, (_, ids) in zip(sequences, rows, strict=True) if ids)
    found = []
    for batch in batches(sequences, rows):
        assert batch.tokens.shape == batch.mask.shape
        assert batch.row_id.shape == batch.row_position.shape
        for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
            length = int(mask.sum())
            assert mask[:length].all()  # right padding
            if length:
                found.append(tuple(tokens[:length].tolist()))
    assert sorted(found) == wanted


def test_batches_have_few_shapes_of_bounded_size(rng):
    sequences, rows = random_rows(rng, 200)
    made = batches(sequences, rows)
    shapes = {(batch.tokens.shape, batch.row_id.shape) for batch in made}
    lengths = {batch.tokens.shape[1] for batch in made}
    assert len(shapes) == len(lengths) <= 6
    assert all(length & (length - 1) == 0 for length in lengths)
    assert max(batch.tokens.size for batch in made) <= 4096


def test_the_mean_row_is_kept():
    [batch] = batches([[5, 6, 7]], [([-1], [0])])
    assert batch.row_position.tolist() == [[-1]]
    assert batch.row_id.tolist() == [[0]]


# ------------------------------------------------------------------------ alignment


def row_tokens(made, tokenizer):
    """Row id -> (token string, whether it is special)."""
    found = {}
    for batch in made:
        for place, row in zip(*np.nonzero(batch.row_id >= 0), strict=True):
            token = int(batch.tokens[place, batch.row_position[place, row]])
            is_special = token in tokenizer.all_special_ids
            found[int(batch.row_id[place, row])] = (
                tokenizer.convert_ids_to_tokens(token),
                is_special,
            )
    return found


def test_token_rows_are_the_tokens_that_are_not_special(texts, tokenizers):
    tokenizer = tokenizers["bpe"]
    data = align(texts, tokenizer, tokenizer, rows="token")
    found = row_tokens(data.target, tokenizer)
    assert not any(special for _, special in found.values())
    ids = [tokenizer(text)["input_ids"] for text in texts]
    expected = [t for one in ids for t in tokenizer.convert_ids_to_tokens(one[1:])]
    assert [found[row][0] for row in range(data.rows)] == expected
    assert data.rows == len(expected)
    assert data.target_tokens == data.source_tokens == sum(map(len, ids))
    assert data.documents == len(texts)


def test_special_tokens_written_in_a_text_give_no_row(tokenizers):
    """They are attention sinks wherever they come from."""
    tokenizer = tokenizers["bpe"]
    data = align(["river<|end|> sungai", "market"], tokenizer, tokenizer, rows="token")
    assert tokenizer.eos_token_id in np.concatenate([b.tokens[b.mask] for b in data.target])
    assert not any(special for _, special in row_tokens(data.target, tokenizer).values())


@pytest.mark.parametrize("max_rows", [2, 33, 100_000])
def test_token_rows_of_the_two_models_correspond(texts, tokenizers, max_rows):
    tokenizer = tokenizers["bpe"]
    data = align(texts, tokenizer, tokenizer, rows="token", max_rows=max_rows)
    target, source = (row_tokens(side, tokenizer) for side in (data.target, data.source))
    assert target == source
    assert sorted(target) == list(range(data.rows))
    assert data.rows <= max_rows


def test_max_rows_is_a_seeded_sample_of_the_rows(texts, tokenizers):
    tokenizer = tokenizers["bpe"]

    def positions(seed):
        data = align(texts, tokenizer, tokenizer, rows="token", max_rows=50, seed=seed)
        assert data.rows == 50
        return [batch.row_position[batch.row_id >= 0].tolist() for batch in data.target]

    assert positions(0) == positions(0)
    assert positions(0) != positions(1)
    assert len({p for batch in positions(0) for p in batch}) > 10  # not the first tokens only


def test_sample_rows_are_one_mean_for_each_text(texts, tokenizers):
    """Across tokenizers; special tokens are part of the mean."""
    target, source = tokenizers["bpe"], tokenizers["qwen"]
    data = align(texts, target, source, rows="sample")
    assert data.rows == data.documents == len(texts)
    for side, tokenizer in ((data.target, target), (data.source, source)):
        seen = {}
        for batch in side:
            wanted = batch.row_id >= 0
            assert (batch.row_position[wanted] == -1).all()
            for place in np.flatnonzero(wanted.any(1)):
                tokens = batch.tokens[place][batch.mask[place]].tolist()
                seen[int(batch.row_id[place].max())] = tokens
        assert [seen[row] for row in range(len(texts))] == [
            tokenizer(text)["input_ids"] for text in texts
        ]
    assert data.target_tokens == sum(len(target(text)["input_ids"]) for text in texts)
    assert data.source_tokens == sum(len(source(text)["input_ids"]) for text in texts)


def test_long_texts_are_cut(texts, tokenizers):
    tokenizer = tokenizers["bpe"]
    data = align(texts, tokenizer, tokenizer, rows="token", max_length=5)
    assert data.rows == 4 * len(texts)  # one of the five is the BOS
    assert data.target_tokens == 5 * len(texts)


def test_token_rows_need_one_tokenizer(texts, tokenizers):
    with pytest.raises(InputError, match="identical tokenizers"):
        align(texts, tokenizers["bpe"], tokenizers["qwen"], rows="token")


def test_token_rows_need_tokenizers_that_cut_alike(texts, tokenizers, tokenizer_folder, tmp_path):
    """The same vocabulary is not enough: here the other one does not add a BOS."""
    files = json.loads((tokenizer_folder("bpe") / "tokenizer.json").read_text())
    files["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(files))
    config = (tokenizer_folder("bpe") / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    other = tokenizers_module.load_tokenizer(tmp_path)
    assert other.get_vocab() == tokenizers["bpe"].get_vocab()
    with pytest.raises(InputError, match="identical tokenizers"):
        align(texts, tokenizers["bpe"], other, rows="token")


@pytest.mark.catalogue("too-few-tokens")
@pytest.mark.parametrize(
    ("documents", "rows"), [([], "sample"), (["one text"], "sample"), ([], "token")]
)
def test_fewer_than_two_rows_raise(tokenizers, documents, rows):
    with pytest.raises(InputError, match="at least 2"):
        align(documents, tokenizers["bpe"], tokenizers["bpe"], rows=rows)


def test_a_text_dropped_for_one_model_is_dropped_for_both(tokenizers):
    """A text without a token of its own (the BOS alone): here the empty one."""
    documents = ["one text", "", "another text"]
    data = align(documents, tokenizers["bpe"], tokenizers["qwen"], rows="sample")
    assert data.rows == data.documents == 2
    for side in (data.target, data.source):
        assert sum(int(batch.mask.any(1).sum()) for batch in side) == 2


def test_vocabulary_leaves_out_special_and_padded_rows(tokenizers):
    tokenizer = tokenizers["bpe"]
    tokens = vocabulary.vocabulary(tokenizer, size=290)
    assert max(tokens.values()) == 289
    assert not set(tokens.values()) & set(tokenizer.all_special_ids)
    assert len(tokens) == 290 - 2
    assert all(tokenizer.convert_tokens_to_ids(token) == row for token, row in tokens.items())


@pytest.mark.catalogue("broken-tokenizer")
@pytest.mark.parametrize("what", ["nothing", "broken"])
def test_a_folder_without_a_usable_tokenizer_raises(tmp_path, what):
    if what == "broken":
        (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer"):
        tokenizers_module.load_tokenizer(tmp_path)


@pytest.mark.catalogue("remote-code")
def test_a_tokenizer_never_runs_code(tmp_path, tokenizer_folder):
    """``auto_map`` names a Python file of the folder; it must stay unread."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer_folder("bpe") / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(InputError):
        tokenizers_module.load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
