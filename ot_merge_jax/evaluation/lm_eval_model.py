"""Our models with the interface of lm-evaluation-harness. Imports models and data.

lm-eval is the extra ``eval``: it is imported when `model_class` is called and not before. lm-eval
decides what is asked and how it is scored; tokens, lengths and windows follow its own class for
torch, so that the same checkpoint gets the same scores.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ot_merge_jax import progress
from ot_merge_jax.data import batching, chat
from ot_merge_jax.errors import InputError
from ot_merge_jax.evaluation import loglikelihood, nll
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.generation import generate
from ot_merge_jax.types import Params

#: The name in lm-eval's registry, once `model_class` has been called.
NAME = "ot-merge-jax"
#: New tokens where a task does not say how many, as in lm-eval's class for torch.
MAX_NEW_TOKENS = 256
#: Settings of generation that greedy generation ignores.
_OF_SAMPLING = {"do_sample", "temperature", "top_k", "top_p"}


class Scorer(NamedTuple):
    """A model that answers.

    Attributes:
        params: Parameters in memory, in the dtype to compute in.
        cfg: The model.
        tokenizer: The model's tokenizer.
        stop: Ids that end a text.
    """

    params: Params
    cfg: ModelConfig
    tokenizer: Any
    stop: Sequence[int] = ()


def imported() -> Any:
    """The package lm_eval.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import lm_eval.evaluator  # noqa: PLC0415, an extra that takes seconds to import
        import lm_eval.tasks  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            f"Tasks need lm-evaluation-harness, which cannot be imported ({error}); run pip "
            'install "ot_merge_jax[eval]".'
        ) from error
    return lm_eval


@functools.cache
def model_class() -> type:
    """The class that lm-eval runs, registered there as ``ot-merge-jax``.

    Returns:
        A subclass of ``lm_eval.api.model.TemplateLM``, made from a `Scorer`.

    Raises:
        InputError: if lm-eval is not installed.

    Example:
        >>> model_class().__mro__[2].__name__
        'TemplateLM'

    Source: lm-evaluation-harness 0.4.13, ``lm_eval.models.huggingface.HFLM``. Differs: greedy
    generation only; shapes are padded to powers of two.
    """
    imported()
    from lm_eval.api.model import TemplateLM  # noqa: PLC0415
    from lm_eval.api.registry import register_model  # noqa: PLC0415

    lm_class = types.new_class("OtMergeLM", (Answering, TemplateLM))
    lm_class.__module__ = __name__
    return register_model(NAME)(lm_class)


class Answering:
    """What lm-eval asks of a model; `model_class` adds what lm-eval's own base class does."""

    backend = "causal"
    max_gen_toks = MAX_NEW_TOKENS

    def __init__(self, model: Scorer):
        """A model that is in memory."""
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return nll.prefix_token(self.tokenizer)

    @property
    def max_length(self) -> int:
        """The model's context, in tokens."""
        return self.model.cfg.max_positions

    @property
    def tokenizer_name(self) -> str:
        """The name by which lm-eval tells rendered requests of different tokenizers apart."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat written with the model's template, without system messages if it refuses them."""
        turns = [chat.Turn(message["role"], message["content"]) for message in chat_history]
        is_begun = not add_generation_prompt
        try:
            return chat.before_answer(turns, self.tokenizer, is_begun=is_begun)
        except InputError:
            without_system = [turn for turn in turns if turn.role != "system"]
            if len(without_system) == len(turns):
                raise
            return chat.before_answer(without_system, self.tokenizer, is_begun=is_begun)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text; a BOS that the text begins with is not added again."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether it is greedy) of each continuation after its context."""
        cut = [
            loglikelihood.cut(before, after, max_positions=self.max_length)
            for _, before, after in requests
        ]
        likelihoods = loglikelihood.score(
            self.model.params, cut, cfg=self.model.cfg, what="requests"
        )
        return list(zip(likelihoods.log.tolist(), likelihoods.is_greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-probability of whole texts, in windows of the context; every token counts once."""
        from lm_eval import utils  # noqa: PLC0415

        windows, owner = [], []
        for index, request in enumerate(requests):
            (text,) = request.args
            cut = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in cut:
                windows.append((None, *utils.make_disjoint_window(window)))
                owner.append(index)
        totals = np.zeros(len(requests))
        np.add.at(totals, owner, [log for log, _ in self._loglikelihood_tokens(windows)])
        return totals.tolist()

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Greedy continuations, each up to the first of its stop strings."""
        alike: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[self._settings(request.args[1])].append(index)
        texts = [""] * len(requests)
        for (until, count), members in alike.items():
            prompts = [requests[index].args[0] for index in members]
            written = self._written(prompts, until, count)
            for index, text in zip(members, written, strict=True):
                texts[index] = text
        return texts

    def _settings(self, requested: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """Stop strings and the number of new tokens of a request."""
        from lm_eval.models import utils  # noqa: PLC0415

        settings: dict[str, Any] = {**utils.normalize_gen_kwargs(requested, self.max_gen_toks)}
        count, until = settings.pop("max_gen_toks"), settings.pop("until")
        if settings.get("do_sample"):
            raise InputError("A task asks for sampled text, and generation here is greedy; set "
                             "do_sample: false in its generation_kwargs.")  # fmt: skip
        if unknown := sorted(set(settings) - _OF_SAMPLING):
            raise InputError(
                f"A task sets {unknown[0]!r} in its generation_kwargs, which is not known here; "
                "leave it out."
            )
        if not 0 < count < self.max_length:
            raise InputError(
                f"A task asks for {count} new tokens, and the context of the model is "
                f"{self.max_length}; set fewer as max_gen_toks in its generation_kwargs."
            )
        end = self.eot_token_id
        eos = None if end is None else self.tokenizer.decode(end, skip_special_tokens=False)
        return tuple(utils.handle_stop_sequences(list(until), eos=eos)), count

    def _written(self, prompts: Sequence[str], until: Sequence[str], count: int) -> list[str]:
        """Continuations of prompts; prompts of similar length run together."""
        from lm_eval.models import utils  # noqa: PLC0415

        params, cfg, tokenizer, _ = self.model
        longest = self.max_length - count
        encoded = [self.tok_encode(prompt)[-longest:] for prompt in prompts]
        if empty := [prompt for prompt, ids in zip(prompts, encoded, strict=True) if not ids]:
            raise InputError(f"The prompt {empty[0][:40]!r} of a task has no tokens; fix it.")
        ends = self._ending(until)
        groups = batching.grouped(
            {index: len(ids) for index, ids in enumerate(encoded)}, longest=longest
        )
        texts = [""] * len(prompts)
        for group in progress.track(groups, "answer (batches)"):
            shape = (group.size, group.length)
            tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
            for row in range(group.size):  # the last batch is filled with its last prompt
                ids = encoded[group.members[min(row, len(group.members) - 1)]]
                tokens[row, -len(ids) :], mask[row, -len(ids) :] = ids, True
            new = generate(
                params, jnp.asarray(tokens), jnp.asarray(mask),
                cfg=cfg, max_new_tokens=count, stop=ends,
            )  # fmt: skip
            for index, row in zip(group.members, np.asarray(new).tolist(), strict=False):
                last = next((place for place, token in enumerate(row) if token in ends), count)
                text = tokenizer.decode(row[: last + 1], skip_special_tokens=True)
                texts[index] = utils.postprocess_generated_text(text, list(until), None)
        return texts

    def _ending(self, until: Sequence[str]) -> list[int]:
        """Tokens after which a text is cut off: its ends, and those that contain a stop string."""
        ends = set(self.model.stop)
        ends |= {
            token
            for token, piece in enumerate(self._pieces)
            if any(text and text in piece for text in until)
        }
        # padded to few lengths, since each length is compiled anew
        room = 1 << max(3, len(ends) - 1).bit_length()
        return (sorted(ends) + [max(ends)] * room)[:room] if ends else []

    @functools.cached_property
    def _pieces(self) -> list[str]:
        """The text of each token on its own."""
        return [self.tokenizer.decode([token]) for token in range(len(self.tokenizer))]
