"""`Model` and `Models`: a configuration with its parameters, and the models that a merge joins."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.types import Params

#: What the models of a merge are called in messages and in the files that a run writes.
TARGET, SOURCE, BASE = "target", "source", "source base"


class Model(NamedTuple):
    """A model; a pytree whose configuration is static, so that a model crosses ``jit``.

    Attributes:
        cfg: Its configuration.
        params: Its parameters; lazy ones (`ot_merge_jax.models.specs.LazyParams`) do not cross
            ``jit``.
    """

    cfg: ModelConfig
    params: Params


# a NamedTuple is a pytree of all its fields; registered, its configuration is static
jax.tree_util.register_pytree_node(
    Model, lambda model: ((model.params,), model.cfg), lambda cfg, leaves: Model(cfg, leaves[0])
)


class DeferredModel:
    """A model whose parameters are loaded when they are first asked for, and held until released.

    A run that goes on from finished stages does not load what no stage needs.
    """

    def __init__(self, cfg: ModelConfig, load: Callable[[], Params]):
        """The configuration, and what loads the parameters."""
        self.cfg, self._load, self._params = cfg, load, None

    @property
    def params(self) -> Params:
        """The parameters, loaded now unless they are in memory."""
        if self._params is None:
            self._params = self._load()
        return self._params

    def release(self) -> None:
        """Lets the parameters go; they are loaded again if they are asked for again."""
        self._params = None


#: A model that is there, or is loaded when its parameters are asked for.
AnyModel = Model | DeferredModel


class Models(NamedTuple):
    """The models of a merge.

    Attributes:
        target: Whose architecture, tokenizer and configuration the result has.
        source: Whose knowledge moves; of any other width, depth or family.
        base: What the source was fine-tuned from; None if it is not known.
        stand_in: What takes the place of ``reference`` in a control; None elsewhere.
    """

    target: AnyModel
    source: AnyModel
    base: AnyModel | None = None
    stand_in: AnyModel | None = None

    @property
    def reference(self) -> AnyModel:
        """The model that the target is aligned with: the source's base, or the source."""
        return next(x for x in (self.stand_in, self.base, self.source) if x is not None)

    @property
    def reference_role(self) -> str:
        """What the reference is called."""
        if self.stand_in is not None:
            return "random source"
        return BASE if self.base is not None else SOURCE
