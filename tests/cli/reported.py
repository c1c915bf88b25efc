"""A run folder made of numbers alone, as `ot-merge run --controls all --seeds 2` would leave it."""

import json

import numpy as np

DIGEST = "ab" * 32


def difference(middle, metric="nll_per_token", **more):
    found = {"metric": metric, "difference": middle, "low": middle - 0.01, "high": middle + 0.01}
    return found | more


def tried(best, values=(0.0, 0.4, 0.8, 1.2)):
    return [{"strength": one, "loss": 4.0 + (one - best) ** 2} for one in values]


def control(middle, **more):
    return {
        "documents": 9, "tokens": 90, "nll_per_token": 4.2, "bits_per_byte": 2.1,
        "strength": {"chosen": 0.4, "tried": tried(0.4)}, "against_target": difference(-0.01),
        "merge_minus_control": difference(middle),
        "seeds": [difference(middle, seed=seed) for seed in (0, 1)], **more,
    }  # fmt: skip


def site(rng, target_layers, source_layers):
    plan = rng.random((target_layers, source_layers))
    return {
        "layer_cost": (1 - plan).tolist(),
        "layer_plan": (plan / plan.sum()).tolist(),
        "mass_curve": {
            "k": [3, 30, 300], "share": np.sort(rng.random((target_layers, 3))).tolist(),
        },
        "r2": rng.random(target_layers).tolist(),
        "r2_permuted": (-rng.random(target_layers)).tolist(),
        "sorted_heat": (np.eye(12, 16) + 0.1 * rng.random((12, 16))).tolist(),
        "largest_error": 1e-7, "most_iterations": 20, "converged": 1.0, "in_log_form": 0.0,
    }  # fmt: skip


def weight(rng, layers, *, by_token=False):
    count = 1 if by_token else layers
    return {
        "ratio_transported": rng.random(count).tolist(),
        "ratio_change": rng.random(count).tolist(),
        "source_layer": [-1] if by_token else list(range(count)),
        "neighbours_out": [2.0] * count, "neighbours_in": [2.5] * count, "error": [1e-7] * count,
        "iterations": [20] * count, "converged": [True] * count,
    }  # fmt: skip


def report(target_layers=3, source_layers=5, *, sites=("mlp_in", "gate_out", "down_in")):
    """``report.json`` with every key there is."""
    rng = np.random.default_rng(0)
    target = {"documents": 9, "tokens": 90, "nll_per_token": 4.4, "bits_per_byte": 2.2}
    merge = target | {
        "nll_per_token": 4.25, "kl_to_base": 0.125, "against_target": difference(-0.15)
    }  # fmt: skip
    source = target | {
        "nll_per_token": 3.3, "against_target": difference(-0.7, metric="bits_per_byte")
    }  # fmt: skip
    beyond = difference(-0.05, merge_gamma=0.5, seeds=[difference(-0.05, seed=0)])
    noise = {f"noise {number}": control(-0.2 - number / 100) for number in range(1, 6)}
    return {
        "verdict": "improved: -0.1500 nats per token, 95 % interval [-0.1600, -0.1400].",
        "outcome": "improved",
        "warnings": ["The chosen strength 1.2 is the largest that was tried."],
        "seeds": [0, 1],
        "pooled": difference(-0.15),
        "per_seed": [difference(-0.15, seed=seed, strength=0.8) for seed in (0, 1)],
        "controls": {
            "target": target, "source": source, "shrink": {"not_applicable": "it equals the base"},
            **noise, "permuted": control(-0.14), "wrong-layer": control(-0.003),
            "wrong-source": control(-0.1),
            "unigram": {
                "documents": 9, "tokens": 90, "nll_per_token": 4.3, "bits_per_byte": 2.15,
                "against_target": difference(-0.1), "gamma": 0.5, "beyond": beyond,
            },
        },
        "evaluation": {"target": target, "merge": merge, "source": source},
        "strength": {
            "chosen": {"projections": 0.8, "vocabulary": 1.2},
            "tried": [
                *tried(1.2),
                {"strength": {"projections": 0.4, "vocabulary": 1.2}, "loss": 3.95},
                {"strength": {"projections": 0.8, "vocabulary": 1.2}, "loss": 3.9},
                {"strength": {"projections": 0.8, "vocabulary": 0.4}, "loss": 3.97},
            ],
            "split": {"dev_documents": 2, "train_documents": 8, "fraction": 0.2, "seed": 0},
        },
        "weights": {
            **{name: weight(rng, target_layers) for name in ("gate", "up", "down") if sites},
            "embed": weight(rng, 1, by_token=True),
        },
        "sites": {name: site(rng, target_layers, source_layers) for name in sites},
        "samples": [
            {
                "prompt": "Once upon",
                "continuations": {
                    "target": {"text": " a time", "tokens": 2, "ended": False},
                    "merge": {"text": " a hill", "tokens": 2, "ended": True},
                },
            }
        ],
        "calibration": {"documents": 8, "dev_documents": 2, "rows_are": "token"},
        "settings": {"rule": "delta", "seed": 0},
    }  # fmt: skip


def provenance():
    """``provenance.json``."""
    files = {"config.json": DIGEST, "model.safetensors": DIGEST}
    hub = {"repo": "owner/big", "revision": "main", "commit": "c0ffee"}
    return {
        "run": "0a1b2c3d",
        "command": "ot-merge run --preset delta",
        "inputs": {
            "target": {"name": "small", "hub": None, "files": files, "adapter": None},
            "source": {"name": "big", "hub": hub, "files": files, "adapter": {
                "hub": None, "files": files}},
        },
        "texts": {"calibration": {
            "hub": hub | {"split": "en/train"}, "files": [{"name": "t.jsonl", "sha256": DIGEST}]}},
        "seed": 0,
        "output": files,
        "packages": {"jax": "0.10.2"}, "python": "3.11.9", "devices": ["cpu:cpu"],
        "precision": "float32", "wall_seconds": 61.7, "peak_memory_bytes": 3 * 2**30,
    }  # fmt: skip


def write(folder, *, found=None, made=None, recipe="preset: delta\n"):
    """A run folder; returns its ``ot_merge``."""
    details = folder / "ot_merge"
    details.mkdir(parents=True)
    files = {
        "report.json": json.dumps(report() if found is None else found),
        "provenance.json": json.dumps(provenance() if made is None else made),
        "recipe.yaml": recipe,
    }
    for name, text in files.items():
        (details / name).write_text(text, encoding="utf-8")
    return details
