"""What models write: the beginnings of documents, continued greedily. Imports models and data.

Every model reads the same beginning, in its own tokens and, for a chat, with its own template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ot_merge_jax import progress
from ot_merge_jax.data import chat
from ot_merge_jax.data.chat import Chat, Document
from ot_merge_jax.errors import InputError
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.generation import generate
from ot_merge_jax.types import Params

_PROMPT_TOKENS = 32
_MAX_CHARACTERS = 4096  # read of a document: more than its prompt can need
_PROMPTS_AT_ONCE = 16
_WIDTH = 16  # prompts are padded to a multiple of it, so that few programs are compiled


class SampledText(NamedTuple):
    """The continuation of one prompt by one model.

    Attributes:
        text: The continuation alone, without the token that ended it.
        tokens: Ids of the continuation, also without that token.
        has_ended: Whether the model ended it, rather than the limit.
    """

    text: str
    tokens: list[int]
    has_ended: bool


def prompts(documents: Sequence[Document], tokenizer: Any) -> list[Document]:
    """The first half of each document, at most 32 tokens; for a chat, of its first answer.

    Args:
        documents: Texts and chats.
        tokenizer: Counts the tokens; other tokenizers may need more or fewer for the same text.

    Returns:
        Texts, and chats that end in the middle of an answer.
    """
    beginnings: list[Document] = []
    for document in documents:
        if isinstance(document, str):
            beginnings.append(_beginning(document, tokenizer))
            continue
        roles = [turn.role for turn in document.turns]
        last = roles.index("assistant") if "assistant" in roles else len(roles) - 1
        *before, answer = document.turns[: last + 1]
        cut = answer._replace(content=_beginning(answer.content, tokenizer))
        beginnings.append(Chat((*before, cut)))
    return beginnings


def _beginning(text: str, tokenizer: Any) -> str:
    """The characters of the first half of a text's tokens."""
    text = text[:_MAX_CHARACTERS]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids = encoding["input_ids"]
    count = min(_PROMPT_TOKENS, max(1, len(ids) // 2))
    if not tokenizer.is_fast:  # a slow tokenizer cannot say where tokens end
        return text[: max(1, len(text) * count // max(1, len(ids)))]
    ends = [stop for _, stop in encoding["offset_mapping"][:count]]
    return text[: max(ends, default=0)] or text


def written(prompt: Document) -> str:
    """A prompt as people read it."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.role}: {turn.content}" for turn in prompt.turns)


def encode(prompt: Document, tokenizer: Any) -> list[int]:
    """A prompt as tokens of a model, never empty, without the token that ends a text."""
    text, contents, has_special = chat.render(prompt, tokenizer)
    if has_special:  # what the template writes after the answer would end it
        text = text[: contents[-1][1]] or text
    ids = list(tokenizer(text, add_special_tokens=not has_special)["input_ids"])
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # some tokenizers end every text
    if not ids:
        raise InputError(f"The prompt {text[:40]!r} has no tokens; add text to its document.")
    return ids


def sample(
    params: Params,
    cfg: ModelConfig,
    tokenizer: Any,
    prompts: Sequence[Document],
    *,
    stop: Sequence[int] = (),
    max_new_tokens: int = 32,
) -> list[SampledText]:
    """Continues prompts with the likeliest token, one after the other.

    Args:
        params: Parameters, in the dtype to compute in.
        cfg: The model.
        tokenizer: The model's tokenizer.
        prompts: Texts, and chats that end in an answer (`prompts`).
        stop: Ids that end a text.
        max_new_tokens: How many tokens are added at most.

    Returns:
        One sample for each prompt.

    Raises:
        InputError: if a prompt has no tokens, prompt and continuation exceed the model's context,
            or a chat cannot be rendered.

    Example:
        >>> from ot_merge_jax.demo import assets
        >>> from ot_merge_jax.data.tokenizers import load_tokenizer
        >>> from ot_merge_jax.io.hf import load_hf
        >>> cfg, params = load_hf(assets.path("sibling"), dtype="float32")
        >>> tokenizer = load_tokenizer(assets.path("sibling"))
        >>> [text] = sample(params, cfg, tokenizer, ["import unittest"], max_new_tokens=4)
        >>> len(text.tokens), text.has_ended
        (4, False)
    """
    if not prompts:
        return []
    encoded = [encode(prompt, tokenizer) for prompt in prompts]
    longest = max(map(len, encoded))
    if longest + max_new_tokens > cfg.max_positions:
        raise InputError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
            f"{cfg.max_positions} tokens of {tokenizer.name_or_path}; ask for fewer new tokens."
        )
    width = min(-(-longest // _WIDTH) * _WIDTH, cfg.max_positions - max_new_tokens)
    size = min(len(encoded), _PROMPTS_AT_ONCE)
    samples = []
    starts = range(0, len(encoded), _PROMPTS_AT_ONCE)
    for start in progress.track(starts, "continue prompts (batches)"):
        part = encoded[start : start + size]
        tokens, mask = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
        for row in range(size):
            ids = part[min(row, len(part) - 1)]  # the last batch is filled with its last prompt
            tokens[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
        new = generate(
            params, jnp.asarray(tokens), jnp.asarray(mask),
            cfg=cfg, max_new_tokens=max_new_tokens, stop=stop,
        )  # fmt: skip
        rows = np.asarray(new)[: len(part)].tolist()
        samples += [_cut(ids, row, tokenizer, stop) for ids, row in zip(part, rows, strict=True)]
    return samples


def _cut(ids: list[int], new: list[int], tokenizer: Any, stop: Sequence[int]) -> SampledText:
    """A continuation up to its end, as text."""
    place = next((place for place, token in enumerate(new) if token in stop), len(new))
    tokens = new[:place]
    before, whole = (
        tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for part in (ids, ids + tokens)
    )
    # by difference: at the beginning of a text some decoders drop a space
    is_prefix = whole.startswith(before)
    text = (
        whole[len(before) :] if is_prefix else tokenizer.decode(tokens, skip_special_tokens=False)
    )
    return SampledText(text, tokens, place < len(new))


def summary(prompts: Sequence[Document], texts: Mapping[str, Sequence[SampledText]]) -> list[dict]:
    """Prompts and their continuations by every model, as JSON values.

    Args:
        prompts: The prompts.
        texts: Model -> a sample for each prompt.

    Returns:
        For each prompt ``{prompt, continuations: {model: {text, tokens, ended}}}``, where
        ``tokens`` is their number.
    """
    return [
        {
            "prompt": written(prompt),
            "continuations": {
                model: {
                    "text": samples[place].text,
                    "tokens": len(samples[place].tokens),
                    "ended": samples[place].has_ended,
                }
                for model, samples in texts.items()
            },
        }
        for place, prompt in enumerate(prompts)
    ]
