"""Models as values: through jit, lazily loaded, and which of them the target is aligned with."""

import jax
import numpy as np

from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import specs
from ot_merge_jax.models.model import DeferredModel, Model, Models


def test_a_model_crosses_jit_with_its_configuration_static(tiny_checkpoint):
    model = load_hf(tiny_checkpoint())
    seen = []

    @jax.jit
    def doubled(model):
        seen.append(model.cfg)  # while it is traced: a value, not a tracer
        return model._replace(params=jax.tree.map(lambda leaf: 2 * leaf, model.params))

    once = doubled(model)
    assert isinstance(once, Model)
    assert once.cfg == model.cfg
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), once.params, model.params)
    doubled(once)
    assert seen == [model.cfg]  # the same configuration: not traced again
    assert len(jax.tree.leaves(model)) == len(jax.tree.leaves(model.params))


def test_a_model_of_another_configuration_is_another_program(tiny_checkpoint):
    names = []
    trace = jax.jit(lambda model: names.append(model.cfg.family) or 0)
    for family in ("llama", "gemma2"):
        trace(load_hf(tiny_checkpoint(family)))
    assert names == ["llama", "gemma2"]


def test_a_deferred_model_is_loaded_when_asked_for_and_let_go(tiny_checkpoint):
    cfg, params = load_hf(tiny_checkpoint())
    loads = []
    model = DeferredModel(cfg, lambda: loads.append(1) or params)
    models = Models(model, model, model)
    assert models.base is not None
    assert models.reference.cfg == cfg
    assert loads == []
    assert model.params is params
    assert model.params is params
    assert loads == [1]
    model.release()
    assert loads == [1]
    assert model.params is params
    assert loads == [1, 1]


def test_the_reference_is_the_stand_in_the_base_or_the_source(tiny_checkpoint):
    cfg, _ = load_hf(tiny_checkpoint())
    target, source, base, other = (Model(cfg, {"norm": {"scale": n}}) for n in range(4))
    for models, reference, role in (
        (Models(target, source), source, "source"),
        (Models(target, source, base), base, "source base"),
        (Models(target, source, base, other), other, "random source"),
        (Models(target, source, stand_in=other), other, "random source"),
    ):
        assert models.reference is reference
        assert models.reference_role == role


def test_lazy_parameters_are_told_by_their_protocol_alone():
    class Computed:
        def leaf(self, path):
            return {"norm/scale": 3, "layers/mlp/up_proj/kernel": [4, 5]}[path]

        def layer(self, l):
            return {"mlp": {"up_proj": {"kernel": 4 + l}}}

    lazy = Computed()
    assert not specs.is_resident(lazy)
    assert specs.get(lazy, "norm/scale") == 3
    assert specs.get(lazy, "layers/mlp/up_proj/kernel")[1] == 5
    assert specs.layer(lazy, 1)["mlp"]["up_proj"]["kernel"] == 5
    assert specs.has(lazy, "norm/scale")
    assert not specs.has(lazy, "norm/bias")
    assert specs.is_resident({"norm": {"scale": 3}})
