"""Loss and bits per byte of documents, each scored alone. Imports models.

A document is scored after one prefix token (BOS, else EOS) that is not scored itself, so every
token and every byte of it counts. Documents longer than the context are read in windows that
overlap by half; every token is counted once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax import progress
from ot_merge_jax.data import batching, chat
from ot_merge_jax.data.chat import Document
from ot_merge_jax.distributed import sharding
from ot_merge_jax.errors import InputError, NonFiniteError
from ot_merge_jax.models import decoder, offload, specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.decoder import token_nll
from ot_merge_jax.types import BUDGET, Batch, Params

#: Longest window: attention needs memory in proportion to its square.
LONGEST_WINDOW = 2048


class Scores(NamedTuple):
    """Losses of one model on a set of documents, an entry for each document.

    Attributes:
        nll: Sum of the negative log-likelihood of its tokens, in nats.
        tokens: How many tokens are counted.
        bytes: Length of its UTF-8 text; for a chat, of the contents of its messages, which do not
            depend on the model's template.
    """

    nll: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @property
    def nll_per_token(self) -> float:
        """Mean over all tokens of all documents, in nats."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, comparable between tokenizers."""
        return float(self.nll.sum() / self.bytes.sum() / math.log(2))

    @property
    def totals(self) -> dict[str, Any]:
        """The whole text in numbers, for reports."""
        return {
            "documents": len(self.tokens),
            "tokens": int(self.tokens.sum()),
            "nll_per_token": self.nll_per_token,
            "bits_per_byte": self.bits_per_byte,
        }


class Windows(NamedTuple):
    """Documents cut into padded windows, ready to be scored many times.

    Attributes:
        batches: Tokens and masks.
        scored: For each batch ``[b, s - 1]``: 1 where the next token counts.
        document: For each batch ``[b]``: the document that a sequence belongs to.
        tokens: Tokens of each document.
        bytes: Bytes of each document.
    """

    batches: list[Batch]
    scored: list[np.ndarray]
    document: list[np.ndarray]
    tokens: np.ndarray
    bytes: np.ndarray


def windows(documents: Sequence[Document], tokenizer: Any, *, max_positions: int) -> Windows:
    """Tokenises documents for `score`.

    Args:
        documents: Texts and chats.
        tokenizer: The model's tokenizer.
        max_positions: The model's context, in tokens; more than `LONGEST_WINDOW` is not used.

    Returns:
        Padded windows of few shapes.

    Raises:
        InputError: if there is no document, the tokenizer has neither BOS nor EOS, or the context
            holds only the prefix.
    """
    if max_positions < 2:
        raise InputError("The model's context is 1 token, so no text can be scored; check config.")
    max_positions = min(max_positions, LONGEST_WINDOW)
    prefix = prefix_token(tokenizer)
    pieces: list[tuple[int, list[int], int]] = []  # document, tokens, how many of them count
    counts, sizes = [], []
    for index, document in enumerate(documents):
        text, contents, has_special = chat.render(document, tokenizer)
        sizes.append(sum(len(text[start:stop].encode()) for start, stop in contents))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if has_special and ids[:1] == [prefix]:
            ids = ids[1:]  # the template wrote the prefix itself
        counts.append(len(ids))
        for start, stop, context in _spans(len(ids), max_positions):
            sequence = [prefix, *ids[:stop]] if start == 0 else ids[context:stop]
            pieces.append((index, sequence, stop - start))
    if not sum(counts):
        raise InputError("The evaluation text has 0 documents with tokens; add text.")
    cut = Windows([], [], [], np.array(counts), np.array(sizes))
    lengths = {place: len(sequence) for place, (_, sequence, _) in enumerate(pieces)}
    for group in batching.grouped(lengths, longest=max_positions):
        shape = (group.size, group.length)
        tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        counted, owner = np.zeros(shape, np.float32), np.zeros(group.size, np.int32)
        for place, piece in enumerate(group.members):
            owner[place], sequence, scored = pieces[piece]
            tokens[place, : len(sequence)], mask[place, : len(sequence)] = sequence, True
            counted[place, len(sequence) - scored : len(sequence)] = 1
        no_rows = np.full((group.size, 1), -1, np.int32)
        batch = Batch(tokens, mask, no_rows, no_rows)  # pyright: ignore[reportArgumentType]
        cut.batches.append(batch)
        cut.scored.append(counted[:, 1:])
        cut.document.append(owner)
    return cut


def prefix_token(tokenizer: Any) -> int:
    """The token before every text that is scored: BOS, else EOS.

    Raises:
        InputError: if the tokenizer has neither.
    """
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    if first is None and last is None:
        raise InputError(
            "The tokenizer has neither a BOS nor an EOS token, so no text can be scored."
        )
    return last if first is None else first


def _spans(length: int, max_positions: int) -> list[tuple[int, int, int]]:
    """(first scored token, end, first token of context) of the windows of one document."""
    spans, start = [], 0
    while start < length:
        # the first window spends a position on the prefix; later ones keep half a context before
        # them
        context = 0 if start == 0 else start - max_positions // 2
        stop = min(length, context + max_positions - (start == 0))
        spans.append((start, stop, context))
        start = stop
    return spans


@functools.partial(jax.jit, static_argnames=("cfg", "logits_at_once"))
def _sequence_nll(
    params: Params,
    batch: Batch,
    scored: jax.Array,
    bias: jax.Array | None,
    *,
    cfg: ModelConfig,
    logits_at_once: int,
) -> jax.Array:
    """Summed loss of the scored positions of each sequence ``[b]``."""
    x = decoder.hidden_states(params, batch, cfg=cfg)[0]
    return _head_nll(params, x, batch, scored, bias, cfg=cfg, logits_at_once=logits_at_once)


@functools.partial(jax.jit, static_argnames=("cfg", "logits_at_once"))
def _head_nll(
    params: Params,
    x: jax.Array,
    batch: Batch,
    scored: jax.Array,
    bias: jax.Array | None,
    *,
    cfg: ModelConfig,
    logits_at_once: int,
) -> jax.Array:
    """The same from the residual stream after the last layer, a few sequences at a time."""

    def sequence_loss(args: tuple[jax.Array, Batch, jax.Array]) -> jax.Array:
        x, sequence, counted = jax.tree.map(lambda leaf: leaf[None], args)
        logits = decoder.head(params, x, cfg=cfg)
        losses, _ = token_nll(logits if bias is None else logits + bias, sequence)
        return jnp.sum(losses * counted)

    size, length = batch.tokens.shape
    at_once = sequences_at_once(size, length * cfg.vocab_size, logits_at_once)
    return jax.lax.map(sequence_loss, (x, batch, scored), batch_size=at_once)


def sequences_at_once(size: int, logits: int, logits_at_once: int) -> int:
    """How many of ``size`` sequences, of ``logits`` each, fit into ``logits_at_once``; at least 1.

    Example:
        >>> sequences_at_once(8, 100, 450), sequences_at_once(8, 100, 10)
        (4, 1)
    """
    return max(1, min(size, logits_at_once // logits))


def _losses(
    params: Params,
    cut: Windows,
    bias: jax.Array | None,
    *,
    cfg: ModelConfig,
    text: str,
    logits_at_once: int,
    hidden_at_once: int,
) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """(documents, summed losses) of each batch; layer by layer where parameters are on disk."""
    parts = list(zip(cut.batches, cut.scored, cut.document, strict=True))
    if specs.is_resident(params):
        mesh = sharding.mesh_of(params)
        for batch, scored, document in progress.track(parts, f"score {text} (batches)"):
            split = sharding.split_batch(batch, mesh)
            yield (
                document,
                _sequence_nll(params, split, scored, bias, cfg=cfg, logits_at_once=logits_at_once),
            )
        return
    for part in offload.chunks(cut.batches, cfg=cfg, hidden_at_once=hidden_at_once):
        batches = cut.batches[part]
        hidden = offload.hidden_states(params, batches, cfg=cfg, what=f"score {text}")
        last = offload.of_head(params, cfg=cfg)
        for x, (batch, scored, document) in zip(hidden, parts[part], strict=True):
            yield (
                document,
                _head_nll(last, x, batch, scored, bias, cfg=cfg, logits_at_once=logits_at_once),
            )


def score(
    params: Params,
    cut: Windows,
    *,
    cfg: ModelConfig,
    text: str = "held-out text",
    bias: jax.Array | None = None,
    logits_at_once: int = BUDGET.logits,
    hidden_at_once: int = BUDGET.hidden,
) -> Scores:
    """Scores every document.

    Args:
        params: Parameters, in the dtype to compute in. If they are `specs.LazyParams`, one layer at
            a time is in memory.
        cut: From `windows`.
        cfg: The model.
        text: What the documents are, for the progress line.
        bias: ``[v]`` added to the logits, in nats; None: nothing.
        logits_at_once: How many logits are in memory, at least those of one sequence.
        hidden_at_once: Bytes of hidden states in memory where parameters are lazy, at least those
            of one batch.

    Returns:
        Loss, tokens and bytes of each document.

    Raises:
        NonFiniteError: if a loss is not finite.
    """
    nll = np.zeros(len(cut.tokens))
    for document, losses in _losses(
        params, cut, bias,
        cfg=cfg, text=text, logits_at_once=logits_at_once, hidden_at_once=hidden_at_once,
    ):  # fmt: skip
        np.add.at(nll, document, np.asarray(losses, np.float64))
    if not np.isfinite(nll).all():
        raise NonFiniteError(
            f"The loss of document {int(np.argmin(np.isfinite(nll)))} of the {text} is not finite: "
            "the model's weights overflow there; check the checkpoint."
        )
    return Scores(nll, cut.tokens, cut.bytes)


def peak_bytes(
    cfg: ModelConfig,
    scored: Sequence[int],
    *,
    is_resident: bool = True,
    logits_at_once: int = BUDGET.logits,
    hidden_at_once: int = BUDGET.hidden,
) -> int:
    """Bytes of `score` at its peak, without the parameters: a batch of the longest windows.

    Args:
        cfg: The model.
        scored: How many tokens each document has at most.
        is_resident: Whether the parameters are in memory.
        logits_at_once: As for `score`.
        hidden_at_once: As for `score`.

    Returns:
        The larger of two: the layers on a batch; or, after the layers, the hidden states of the
        batch with, for some sequences, the logits and what the loss computes from them.
    """
    size, length = largest_window(cfg, scored)
    at_once = sequences_at_once(size, length * cfg.vocab_size, logits_at_once)
    logits = 4 * (3 * at_once * length * cfg.vocab_size + size * length * cfg.hidden_size)
    peak = max(logits, decoder.peak_bytes(cfg, size=size, length=length))
    if is_resident:
        return peak
    tokens = max(size * length, 2 * sum(scored))  # padded
    return peak + offload.peak_bytes(
        cfg, tokens=tokens, batch=size * length, hidden_at_once=hidden_at_once
    )


def largest_window(cfg: ModelConfig, scored: Sequence[int]) -> tuple[int, int]:
    """Sequences and length of the batch of the longest windows, for documents of so many tokens."""
    most = min(cfg.max_positions, LONGEST_WINDOW, max(scored, default=0) + 1)
    length = 1 << max(0, most - 1).bit_length()
    return max(1, batching.TOKENS_PER_BATCH // length), length
