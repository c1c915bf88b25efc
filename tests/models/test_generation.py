"""Generation: greedy tokens are those of torch, the cache changes nothing, sampling samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import decoder
from ot_merge_jax.models.families import FAMILIES
from ot_merge_jax.models.generation import generate
from ot_merge_jax.types import Batch

NEW = 9


def prompts(cfg, lengths=(6, 3, 5)):
    """Left-padded random prompts."""
    rng = np.random.default_rng(3)
    width = max(lengths)
    tokens, mask = np.zeros((len(lengths), width), np.int32), np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        tokens[row, width - length :] = rng.integers(3, cfg.vocab_size, length)
        mask[row, width - length :] = True
    return jnp.asarray(tokens), jnp.asarray(mask)


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_torch(family, torch_checkpoint):
    """Windows are shorter than prompt and continuation together, so that they matter."""
    import torch

    folder, model = torch_checkpoint(family, layers=2)
    cfg, params = load_hf(folder)
    tokens, mask = prompts(cfg)
    ours = generate(params, tokens, mask, cfg=cfg, max_new_tokens=NEW)
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor(np.asarray(tokens), dtype=torch.long),
            attention_mask=torch.tensor(np.asarray(mask), dtype=torch.long),
            max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    np.testing.assert_array_equal(ours, theirs[:, tokens.shape[1] :].numpy())
    assert len(np.unique(np.asarray(ours))) > 3


def by_hand(cfg, params, tokens, mask):
    """Greedy continuation without a cache: the whole text again for every token."""
    step = jax.jit(decoder.forward, static_argnames="cfg")
    total = tokens.shape[1] + NEW
    room = jnp.zeros((len(tokens), total), jnp.int32).at[:, : tokens.shape[1]].set(tokens)
    seen = jnp.zeros(room.shape, bool).at[:, : tokens.shape[1]].set(mask)
    none = jnp.full((len(tokens), 1), -1, jnp.int32)
    for place in range(tokens.shape[1], total):
        logits = step(params, Batch(room, seen, none, none), cfg=cfg)[0]
        chosen = jnp.argmax(logits[:, place - 1], -1)
        room, seen = room.at[:, place].set(chosen), seen.at[:, place].set(True)
    return np.asarray(room[:, tokens.shape[1] :])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_cache_changes_nothing(family, tiny_checkpoint):
    cfg, params = load_hf(tiny_checkpoint(family))
    tokens, mask = prompts(cfg)
    ours = generate(params, tokens, mask, cfg=cfg, max_new_tokens=NEW)
    np.testing.assert_array_equal(ours, by_hand(cfg, params, tokens, mask))


def test_a_text_ends_at_its_stop_token_and_others_go_on(tiny_checkpoint):
    cfg, params = load_hf(tiny_checkpoint())
    tokens, mask = prompts(cfg)
    free = np.asarray(generate(params, tokens, mask, cfg=cfg, max_new_tokens=NEW))
    stop = int(free[0, 2])
    ended = np.asarray(generate(params, tokens, mask, cfg=cfg, max_new_tokens=NEW, stop=[stop]))
    for before, after in zip(free, ended, strict=True):
        place = list(before).index(stop) if stop in before else NEW
        np.testing.assert_array_equal(after[:place], before[:place])
        assert (after[place:] == stop).all()
    assert not (ended == free).all()


def test_sampling_follows_the_key_and_the_temperature(tiny_checkpoint):
    cfg, params = load_hf(tiny_checkpoint())
    tokens, mask = prompts(cfg)

    def draw(seed, **settings):
        given = {"temperature": 2.0, "key": jax.random.key(seed)} | settings
        return np.asarray(generate(params, tokens, mask, cfg=cfg, max_new_tokens=NEW, **given))

    greedy = np.asarray(generate(params, tokens, mask, cfg=cfg, max_new_tokens=NEW))
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
    np.testing.assert_array_equal(draw(0, temperature=1e-4), greedy)
    np.testing.assert_array_equal(draw(0, top_p=1e-6), greedy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 600}, "exceed the context of 512"),
        ({"temperature": 1.0}, "needs a key"),
    ],
)
def test_refused(changes, words, tiny_checkpoint):
    cfg, params = load_hf(tiny_checkpoint())
    tokens, mask = prompts(cfg)
    with pytest.raises(ValueError, match=words):
        generate(params, tokens, mask, cfg=cfg, **{"max_new_tokens": 2, **changes})


def test_right_padding_is_refused(tiny_checkpoint):
    cfg, params = load_hf(tiny_checkpoint())
    tokens, mask = prompts(cfg)
    with pytest.raises(ValueError, match="on the left"):
        generate(params, tokens, mask[:, ::-1], cfg=cfg, max_new_tokens=2)
