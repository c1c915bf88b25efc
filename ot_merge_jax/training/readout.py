"""The readout fit: the output head that predicts what a source predicts (method: Readout fit).

A convex problem in function space. The target's final states ``h_t`` stay as they are; a change
``D`` of its output head is fitted so that ``softmax((W + D) h_t)`` comes near a mixture of the
teacher's distribution and the next token. Only the rows of tokens that matter move; the logits of
all others enter as one exact log-sum, so that the work and the memory are those of the moving rows.

Everything streams in blocks of positions; nothing of size ``[positions, vocabulary]`` is kept.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from ot_merge_jax.training import head_survey
from ot_merge_jax.training.head_survey import FinalStates, HeadSurvey, OutputHead, TopTokens

#: Gradients that L-BFGS remembers, and trials of a step length.
_MEMORY, _TRIALS = 8, 12


class ReadoutProblem(NamedTuple):
    """A fit in the basis of its states, where the ridge and the preconditioner are diagonal.

    Attributes:
        states: ``[N, r]`` in the basis ``U`` of the eigenvectors of ``A = H^T H / N``; ``r`` is the
            rank of the states.
        fixed: ``[N]`` log-sum of the logits that do not move.
        mass: ``[N]`` the target's probability of content.
        start: ``[R, r]`` moving rows of the head before the fit.
        by_teacher: ``[R, r]`` ``1/N sum_t mass_t q_t h_t``: all the fit needs of the teacher where
            logits are linear in the head.
        by_label: ``[R, r]`` the same of the next tokens.
        variance: ``[r]`` eigenvalues of ``A``.
        usage: ``[R]`` the larger of both mean probabilities.
        place: ``[N]`` the moving row of the next token.
        teacher: The teacher over moving rows, -1 for tokens that stay; needed with a soft cap.
        content: ``[N]`` log-sum of content before the fit; needed with a soft cap.
        spread: As in `HeadSurvey`; needed with a soft cap.
        basis: ``[d, r]`` the eigenvectors.
        rows: ``[R]`` the tokens that move.
        softcap: As in `OutputHead`.
    """

    states: jax.Array
    fixed: jax.Array
    mass: jax.Array
    start: jax.Array
    by_teacher: jax.Array
    by_label: jax.Array
    variance: jax.Array
    usage: jax.Array
    place: jax.Array
    teacher: TopTokens
    content: jax.Array
    spread: jax.Array
    basis: jax.Array
    rows: np.ndarray
    softcap: float | None


class DevStates(NamedTuple):
    """Positions on which a fit is judged, with what stays fixed there.

    Attributes:
        states: ``[n, d]``, as in `FinalStates`.
        place: ``[n]`` the moving row of the next token, or -1.
        stays: ``[n]`` logit of the next token where its row stays.
        fixed: ``[n]`` log-sum of the logits of content that do not move.
    """

    states: jax.Array
    place: jax.Array
    stays: jax.Array
    fixed: jax.Array


class HeadIteration(NamedTuple):
    """One iteration of a fit.

    Attributes:
        objective: ``J`` minus its value for the unchanged head.
        dev: Mean loss of content on the dev positions, in nats.
        passes: Products with all states so far: a line search makes more than one an iteration.
    """

    objective: float
    dev: float
    passes: int


class FittedHead(NamedTuple):
    """A fitted change of the head.

    Attributes:
        change: ``[R, r]`` in the basis of the problem; `difference` is it in that of the model.
        curve: The start and every iteration.
        best: Index in ``curve`` of the iteration that ``change`` is of; 0: nothing changed.
    """

    change: jax.Array
    curve: tuple[HeadIteration, ...]
    best: int


def problem(
    head: OutputHead,
    positions: FinalStates,
    teacher: TopTokens,
    is_content: Bool[Array, " v"],
    surveyed: HeadSurvey,
    rows: np.ndarray,
) -> ReadoutProblem:
    """What a fit needs, computed once for all values of kappa and the ridge.

    Args:
        head: Of the target, from which the fit starts.
        positions: Of the calibration text; every label is one of ``rows``.
        teacher: At the same positions.
        is_content: ``[V]``.
        surveyed: From `survey`, with the same head.
        rows: From `moving_rows`.

    Raises:
        ValueError: if there is no position, or a label does not move.
    """
    count = len(positions.states)
    if not count:
        raise ValueError("There is no position to fit to.")
    place = head_survey.places_of(rows, len(is_content))
    of_label = place[np.asarray(positions.label)]
    if of_label.min() < 0:
        raise ValueError("A label is not among the rows that move.")
    variance, basis = _basis(positions.states)
    start = jnp.asarray(head.table[rows], jnp.float32)
    teacher = TopTokens(jnp.asarray(place)[teacher.token], teacher.probability)
    fixed = _of_staying(head, positions, is_content, rows)
    mass = jnp.exp(surveyed.content - jnp.logaddexp(surveyed.content, surveyed.special))
    of_label = jnp.asarray(of_label)
    size = head_survey.block_size(count, len(rows))
    rotated = positions.states @ basis
    parts = (positions.states, rotated, teacher, surveyed.content, surveyed.spread, mass)
    blocks, weight = head_survey.blocked(parts, size)
    by_teacher = _means(blocks, weight / count, start, softcap=head.softcap)
    by_label = (
        jnp.zeros((len(rows), rotated.shape[1])).at[of_label].add((mass / count)[:, None] * rotated)
    )
    usage = jnp.maximum(surveyed.mean_target, surveyed.mean_teacher)[rows]
    return ReadoutProblem(
        rotated, jnp.logaddexp(fixed, surveyed.special), mass, start @ basis, by_teacher, by_label,
        variance, usage, of_label, teacher, surveyed.content, surveyed.spread, basis, rows,
        head.softcap,
    )  # fmt: skip


def dev_states(
    head: OutputHead, positions: FinalStates, is_content: Bool[Array, " v"], rows: np.ndarray
) -> DevStates:
    """Other positions, ready to be scored with any change of the same rows.

    Args:
        head: From which the fit starts.
        positions: Of the dev split; a label that does not move keeps its logit.
        is_content: ``[V]``.
        rows: The rows that move.
    """
    place = jnp.asarray(head_survey.places_of(rows, len(is_content)))[positions.label]
    own = jnp.einsum("nd,nd->n", positions.states, head.table[positions.label].astype(jnp.float32))
    return DevStates(
        positions.states,
        place,
        head_survey.capped(own, head.softcap),
        _of_staying(head, positions, is_content, rows),
    )


def _of_staying(
    head: OutputHead, positions: FinalStates, is_content: jax.Array, rows: np.ndarray
) -> jax.Array:
    """Log-sum of the logits of content that does not move."""
    return head_survey.log_sums(head, positions.states, is_content.at[rows].set(False))


def losses(
    moving: Float[Array, "r d"], at: DevStates, *, softcap: float | None
) -> Float[Array, " n"]:
    """Loss of content at each position, in nats, with these moving rows.

    Args:
        moving: ``[R, d]`` rows of the head, in the order of the problem's.
        at: From `dev_states`.
        softcap: As in `OutputHead`.
    """
    blocks, _ = head_survey.blocked(tuple(at), head_survey.block_size(len(at.states), len(moving)))
    return _losses(blocks, moving, softcap=softcap).reshape(-1)[: len(at.states)]


def ridge_of(variance: Float[Array, " r"], count: int, ridge: float) -> float:
    """The factor ``mu`` of ``|D|^2 / 2``: ``ridge * tr(A) / N``.

    In this scale ``1 / ridge`` is the variance that a change of a logit has before anything is
    seen, so that one value means the same for any number of positions and any width.

    Example:
        >>> round(ridge_of(jnp.ones(4), 100, 0.5), 6)
        0.02
    """
    return ridge * float(jnp.sum(variance)) / count


def fit(
    task: ReadoutProblem,
    dev: DevStates,
    *,
    kappa: float,
    ridge: float,
    start: Float[Array, "r k"] | None = None,
    iterations: int = 16,
    patience: int = 3,
) -> FittedHead:
    """Minimises ``1/N sum_t KL(kappa q_t + (1 - kappa) y_t || p_t) + mu/2 |D|^2``.

    Special tokens keep the target's own probability in the goal, and content has the rest, so that
    a model that ended its answers still does.

    Args:
        task: From `problem`.
        dev: Positions that end the fit and choose its iteration, from `dev_states`.
        kappa: 1: the teacher alone; 0: the next tokens alone.
        ridge: In the scale of `ridge_of`; infinite: nothing changes.
        start: A change to begin from, e.g. that of a neighbouring ridge; None: 0.
        iterations: At most so many.
        patience: Iterations without a better dev loss after which it ends.

    Returns:
        The change with the lowest dev loss, and the curve.

    Raises:
        ValueError: if ``kappa`` is outside [0, 1] or ``ridge`` is not above 0.

    Source: ours (method: Readout fit). L-BFGS, preconditioned by the states' covariance and by how
    often a token is predicted: with the curvature of the softmax itself a step diverges where the
    target predicts a token far too rarely.
    """
    if not 0 <= kappa <= 1:
        raise ValueError(f"kappa is {kappa}; it must be from 0 to 1.")
    if not ridge > 0:
        raise ValueError(f"The ridge is {ridge}; it must be above 0.")
    change = jnp.zeros_like(task.start)
    moving = task.start @ task.basis.T

    def on_dev(change: jax.Array) -> float:
        rows = moving + change @ task.basis.T
        return float(jnp.mean(losses(rows, dev, softcap=task.softcap)))

    curve = [HeadIteration(0.0, on_dev(change), 0)]  # two more are made for the first step
    if math.isinf(ridge):
        return FittedHead(change, tuple(curve), 0)
    given = _given(task, kappa, ridge)
    size = head_survey.block_size(len(task.states), len(task.rows))
    data = _data(task, given, size)
    at_zero = float(_objective(change, data, softcap=task.softcap)[0])
    best, least = change, 0
    if start is not None:
        change = start
    theta = change / given.scale
    # its leaves share memory, which is donated; and a number of weak type would compile twice
    state = jax.tree.map(
        lambda leaf: jnp.copy(leaf) if leaf.ndim else jnp.array(np.asarray(leaf)),
        _solver().init(theta),
    )
    for _ in range(iterations):
        theta, state, value = _iterate(theta, state, data, softcap=task.softcap)
        change = theta * given.scale
        passes = curve[-1].passes + int(_trials(state)) + 2 * (len(curve) == 1)
        curve.append(HeadIteration(float(value) - at_zero, on_dev(change), passes))
        if not math.isfinite(curve[-1].objective):
            break
        if curve[-1].dev < curve[least].dev:
            best, least = change, len(curve) - 1
        if len(curve) - 1 - least >= patience:
            break
    return FittedHead(best, tuple(curve), least)


def difference(task: ReadoutProblem, change: Float[Array, "r k"]) -> Float[Array, "r d"]:
    """A change as rows of the model's head; its rank is at most that of the states."""
    return change @ task.basis.T


# ---- the objective ----


class _Given(NamedTuple):
    """What kappa and the ridge make of a problem."""

    kappa: jax.Array
    mu: jax.Array
    goal: jax.Array
    scale: jax.Array


class _Data(NamedTuple):
    """A problem in blocks of positions, with what kappa and the ridge make of it."""

    blocks: Any
    weight: jax.Array
    start: jax.Array
    given: _Given


def _given(task: ReadoutProblem, kappa: float, ridge: float) -> _Given:
    mu = jnp.float32(ridge_of(task.variance, len(task.states), ridge))
    goal = kappa * task.by_teacher + (1 - kappa) * task.by_label
    scale = (task.usage[:, None] * task.variance + mu) ** -0.5
    return _Given(jnp.float32(kappa), mu, goal, scale)


def _data(task: ReadoutProblem, given: _Given, size: int) -> _Data:
    parts = (task.states, task.fixed)
    if task.softcap is not None:
        parts += (task.mass, task.place, task.teacher, task.content, task.spread)
    blocks, weight = head_survey.blocked(parts, size)
    return _Data(blocks, weight / len(task.states), task.start, given)


@functools.partial(jax.jit, static_argnames="softcap")
def _objective(
    change: jax.Array, data: _Data, *, softcap: float | None
) -> tuple[jax.Array, jax.Array]:
    """The objective up to a constant, and its gradient with respect to the change.

    One product for the logits and one for the gradient, both made block by block.
    """
    kernel, given = data.start + change, data.given

    def linear(carry: Any, block: Any) -> tuple[Any, None]:
        (states, fixed), weight = block
        logits = states @ kernel.T
        largest = jnp.maximum(logits.max(-1), fixed)
        odds = jnp.exp(logits - largest[:, None])  # the only pass of exponentials
        total = odds.sum(-1) + jnp.exp(fixed - largest)
        value = jnp.sum((largest + jnp.log(total)) * weight)
        return (carry[0] + value, carry[1] + odds.T @ (states * (weight / total)[:, None])), None

    def capped(carry: Any, block: Any) -> tuple[Any, None]:
        (states, fixed, mass, place, teacher, content, spread), weight = block
        raw = states @ kernel.T
        logits, slope = head_survey.capped(raw, softcap), 1 - jnp.tanh(raw / softcap) ** 2
        total = jnp.logaddexp(jax.nn.logsumexp(logits, -1), fixed)
        before = head_survey.capped(states @ data.start.T, softcap)
        goal = given.kappa * head_survey.dense(teacher, before, content, spread)
        goal = goal.at[jnp.arange(len(place)), place].add(1 - given.kappa)
        goal = goal * mass[:, None]
        value = jnp.sum((total - jnp.sum(goal * logits, -1)) * weight)
        likely = (jnp.exp(logits - total[:, None]) - goal) * slope * weight[:, None]
        return (carry[0] + value, carry[1] + likely.T @ states), None

    step = linear if softcap is None else capped
    (value, gradient), _ = jax.lax.scan(
        step, (jnp.zeros(()), jnp.zeros_like(kernel)), (data.blocks, data.weight)
    )
    if softcap is None:
        value, gradient = value - jnp.sum(given.goal * kernel), gradient - given.goal
    return value + given.mu / 2 * jnp.sum(change**2), gradient + given.mu * change


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _value(theta: jax.Array, data: _Data, softcap: float | None) -> jax.Array:
    """The objective in preconditioned coordinates; its gradient is made on the way."""
    return _objective(theta * data.given.scale, data, softcap=softcap)[0]


def _value_forward(theta: jax.Array, data: _Data, softcap: float | None) -> tuple[Any, Any]:
    value, gradient = _objective(theta * data.given.scale, data, softcap=softcap)
    return value, gradient * data.given.scale


def _value_backward(softcap: float | None, gradient: jax.Array, above: jax.Array) -> Any:
    del softcap
    return above * gradient, None


_value.defvjp(_value_forward, _value_backward)


def _solver() -> optax.GradientTransformationExtraArgs:
    line_search = optax.scale_by_zoom_linesearch(
        max_linesearch_steps=_TRIALS, initial_guess_strategy="one"
    )
    return optax.lbfgs(memory_size=_MEMORY, linesearch=line_search)


@functools.partial(jax.jit, static_argnames="softcap", donate_argnums=(0, 1))
def _iterate(
    theta: jax.Array, state: Any, data: _Data, *, softcap: float | None
) -> tuple[jax.Array, Any, jax.Array]:
    """One step of L-BFGS with its line search; the value after it."""

    def value_of(theta: jax.Array) -> jax.Array:
        return _value(theta, data, softcap)

    solver = _solver()
    value, gradient = optax.value_and_grad_from_state(value_of)(theta, state=state)
    updates, state = solver.update(
        gradient, state, theta, value=value, grad=gradient, value_fn=value_of
    )
    theta = jnp.asarray(optax.apply_updates(theta, updates))
    return theta, state, optax.tree.get(state, "value")


def _trials(state: Any) -> Any:
    """How often the last line search evaluated the objective."""
    return optax.tree.get(state, "num_linesearch_steps")


# ---- in blocks of positions ----


@functools.partial(jax.jit, static_argnames="softcap")
def _means(blocks: Any, weight: jax.Array, start: jax.Array, *, softcap: Any) -> jax.Array:
    """``sum_t weight_t mass_t q_t h_t`` over moving rows, ``h`` in the basis of the problem."""

    def step(total: jax.Array, block: Any) -> tuple[jax.Array, None]:
        (states, rotated, teacher, content, spread, mass), weight = block
        probability = head_survey.dense(
            teacher, head_survey.capped(states @ start.T, softcap), content, spread
        )
        return total + (probability * (mass * weight)[:, None]).T @ rotated, None

    zero = jnp.zeros((len(start), blocks[1].shape[-1]))
    return jax.lax.scan(step, zero, (blocks, weight))[0]


@functools.partial(jax.jit, static_argnames="softcap")
def _losses(blocks: Any, moving: jax.Array, *, softcap: Any) -> jax.Array:
    def of_block(block: Any) -> jax.Array:
        states, place, stays, fixed = block
        logits = head_survey.capped(states @ moving.T, softcap)
        total = jnp.logaddexp(jax.nn.logsumexp(logits, -1), fixed)
        own = jnp.take_along_axis(logits, jnp.maximum(place, 0)[:, None], 1)[:, 0]
        return total - jnp.where(place >= 0, own, stays)

    return jax.lax.map(of_block, blocks)


def _basis(states: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues of ``H^T H / N``, largest first, and eigenvectors, up to the rank of ``H``."""
    count, width = states.shape
    if count < width:  # an orthonormal basis of the rows: eigenvectors near 0 would not span them
        within = jnp.linalg.qr(states.T)[0]
        variance, basis = _basis(states @ within)
        return variance, within @ basis
    variance, basis = jnp.linalg.eigh(states.T @ states / count)
    return jnp.maximum(variance[::-1], 0.0), basis[:, ::-1]
