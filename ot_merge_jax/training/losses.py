"""What training minimises: the next token, distillation, or both. Pure functions. Imports models.

Every loss is a weighted sum. The weights come with the batch and are already divided by their
total, so that the parts of a batch add up to its mean, however it is split.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ot_merge_jax.models import decoder
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.decoder import token_nll
from ot_merge_jax.types import Batch, Params

#: Weight of the Wasserstein term in universal distillation; the next token has weight 1.
UNIVERSAL_WEIGHT = 1.5


class Pairs(NamedTuple):
    """The same texts in the tokens of a teacher with another vocabulary.

    Attributes:
        tokens: The teacher's tokens.
        mask: Which of them are real.
        position: Places in the student's sequence that end where a token of the teacher's ends.
        source_position: Those places in the teacher's sequence.
        weight: How much each place counts, summing to 1 over the whole batch; 0: padding.
    """

    tokens: Int[jax.Array, "b q"]
    mask: Bool[jax.Array, "b q"]
    position: Int[jax.Array, "b r"]
    source_position: Int[jax.Array, "b r"]
    weight: Float[jax.Array, "b r"]


class Examples(NamedTuple):
    """Blocks of tokens to train on.

    Attributes:
        tokens: Token ids of the student.
        mask: Which of them are real.
        weight: How much the prediction OF each token counts, summing to 1 over the whole batch.
        pairs: For a teacher with another vocabulary; else None.
    """

    tokens: Int[jax.Array, "b s"]
    mask: Bool[jax.Array, "b s"]
    weight: Float[jax.Array, "b s"]
    pairs: Pairs | None = None


class Objective(NamedTuple):
    """What is minimised; hashable, so static in jit.

    Attributes:
        kind: ``sft``: the next token. ``kd``: the teacher's distribution. ``mix``: both.
        cfg: The student.
        source_cfg: The teacher; None for ``sft``.
        kd_weight: Share of the distillation in ``mix``; the rest is the next token's.
        is_universal: Whether the vocabularies differ.
        remat: Whether memory is saved by computing layers and logits twice.
    """

    kind: Literal["sft", "kd", "mix"]
    cfg: ModelConfig
    source_cfg: ModelConfig | None = None
    kd_weight: float = 0.5
    is_universal: bool = False
    remat: bool = False

    @property
    def shares(self) -> tuple[float, float]:
        """Weights of the next token and of the distillation in the loss."""
        if self.kind == "sft":
            return 1.0, 0.0
        if self.kind == "mix":
            return 1.0 - self.kd_weight, self.kd_weight
        return (1.0, UNIVERSAL_WEIGHT) if self.is_universal else (0.0, 1.0)


def next_token(logits: Float[Array, "b s v"], examples: Examples) -> Float[Array, ""]:
    r"""Weighted negative log-likelihood of the tokens, in nats.

    .. math:: -\sum_t w_t \log q_{t-1}(x_t)

    Args:
        logits: The student's logits.
        examples: The examples they belong to.

    Returns:
        The sum, which for a whole batch is the mean over counted tokens.
    """
    losses, _ = token_nll(logits, _batch(examples.tokens, examples.mask))
    return jnp.sum(losses * examples.weight[:, 1:])


def divergence(
    logits: Float[Array, "b s v"], source_logits: Float[Array, "b s u"], examples: Examples
) -> Float[Array, ""]:
    r"""Weighted KL(source || target) of the next token's distribution, in nats.

    .. math:: \sum_t w_t \sum_x p_{t-1}(x) \log\frac{p_{t-1}(x)}{q_{t-1}(x)}

    Tables of one vocabulary may be padded to different lengths; rows that only one of them has
    belong to no token and are left out of both distributions.

    Args:
        logits: The student's logits.
        source_logits: The teacher's logits, on the same tokens.
        examples: The examples they belong to.

    Returns:
        The sum, which for a whole batch is the mean over counted tokens.
    """
    width = min(logits.shape[-1], source_logits.shape[-1])
    p = jax.nn.log_softmax(source_logits[:, :-1, :width])
    q = jax.nn.log_softmax(logits[:, :-1, :width])
    return jnp.sum(jnp.sum(jnp.exp(p) * (p - q), -1) * examples.weight[:, 1:])


def sorted_distance(
    logits: Float[Array, "*b v"], source_logits: Float[Array, "*b u"]
) -> Float[Array, "*b"]:
    r"""L1 distance of two distributions over different vocabularies, each sorted.

    .. math:: \sum_i |p_{(i)} - q_{(i)}|

    with the shorter padded with 0: the Wasserstein-1 distance under a uniform cost.

    Args:
        logits: The student's logits.
        source_logits: The teacher's logits.

    Returns:
        A number in [0, 2]; 0 for equal sorted probabilities.

    Example:
        >>> float(sorted_distance(jnp.array([0.0, 5.0]), jnp.array([5.0, 0.0, -jnp.inf])))
        0.0

    Source: Boizard et al. 2024 (arXiv 2402.12030). Differs: compared at positions
    where both tokenizations end a token, not at positions with equal index.
    """
    p, q = (jnp.sort(jax.nn.softmax(values), -1) for values in (source_logits, logits))  # ascending
    missing = p.shape[-1] - q.shape[-1]
    lead = [(0, 0)] * (p.ndim - 1)
    p = jnp.pad(p, [*lead, (max(0, -missing), 0)])
    q = jnp.pad(q, [*lead, (max(0, missing), 0)])
    return jnp.sum(jnp.abs(p - q), -1)


def universal(
    logits: Float[Array, "b s v"], source_logits: Float[Array, "b q u"], pairs: Pairs
) -> Float[Array, ""]:
    """Weighted `sorted_distance` at the places where both tokenizations end a token."""
    at, source_at = (
        jnp.take_along_axis(values, place[..., None], 1)
        for values, place in ((logits, pairs.position), (source_logits, pairs.source_position))
    )
    return jnp.sum(sorted_distance(at, source_at) * pairs.weight)


def loss(
    params: Params, source_params: Params | None, examples: Examples, *, objective: Objective
) -> Float[Array, ""]:
    """What a batch, or a part of one, adds to the loss.

    Logits of student and teacher are computed in the same program; the teacher gets no gradient.

    Args:
        params: The student's parameters, in the dtype to compute in.
        source_params: The teacher's parameters; None for ``sft``.
        examples: Blocks; their weights sum to 1 over the batch.
        objective: What is minimised.

    Returns:
        Nats per counted token; across vocabularies, next token plus `UNIVERSAL_WEIGHT` times a
        distance that has no unit. That distance does not say WHICH token is likely, so it is
        never used alone.

    Source: for different vocabularies Boizard et al. 2024 (arXiv 2402.12030).
    """
    plain, distilled = objective.shares
    x = _residual(params, examples.tokens, examples.mask, objective.cfg, objective.remat)
    y = None
    if distilled and source_params is not None and objective.source_cfg is not None:
        read = examples if examples.pairs is None else examples.pairs
        y = jax.lax.stop_gradient(
            _residual(source_params, read.tokens, read.mask, objective.source_cfg, remat=False)
        )

    def head_loss(x: jax.Array, y: jax.Array | None, examples: Examples) -> jax.Array:
        logits = decoder.head(params, x, cfg=objective.cfg)
        total = plain * next_token(logits, examples) if plain else jnp.zeros(())
        if y is None or source_params is None or objective.source_cfg is None:
            return total
        source_logits = jax.lax.stop_gradient(
            decoder.head(source_params, y, cfg=objective.source_cfg)
        )
        if examples.pairs is not None:
            return total + distilled * universal(logits, source_logits, examples.pairs)
        return total + distilled * divergence(logits, source_logits, examples)

    if not objective.remat:
        return head_loss(x, y, examples)
    # one sequence at a time: the logits of a whole batch are gigabytes where vocabularies are large
    lead = jax.tree.map(lambda leaf: leaf[:, None], (x, y, examples))
    return jnp.sum(jax.lax.map(lambda args: jax.checkpoint(head_loss)(*args), lead))


def _batch(tokens: jax.Array, mask: jax.Array) -> Batch:
    """Tokens as a batch from which no rows are taken."""
    none = jnp.full((tokens.shape[0], 1), -1, jnp.int32)
    return Batch(tokens, mask, none, none)


def _residual(
    params: Params, tokens: jax.Array, mask: jax.Array, cfg: ModelConfig, remat: bool
) -> jax.Array:
    """The residual stream after the last layer."""
    return decoder.hidden_states(params, _batch(tokens, mask), cfg=cfg, remat=remat)[0]
