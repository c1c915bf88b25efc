"""The presets: what each of them fills."""

from __future__ import annotations

from typing import Any

#: Preset -> every setting it fills (method: Presets); any of them can be overridden.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "weights": ["q", "k", "v", "o"],
        "rows": "sample",
        "epsilon": 0.1,
        "layer_cost": "plain",
        "layers": "soft",
        "max_iterations": 200,
        "form": "joint",
        "rule": "interpolate",
        "strength": 0.1,
        "k": 128,
    },
    "barycentric": {
        "weights": ["q", "k", "v", "o", "gate", "up", "down"],
        "rows": "sample",
        "epsilon": 0.02,
        "layer_cost": "median",
        "layers": "top1",
        "max_iterations": 2000,
        "form": "barycentric",
        "rule": "interpolate",
        "strength": "auto",
        "k": "all",
    },
    "delta": {
        "weights": ["gate", "up", "down", "embed", "head"],
        "rows": "auto",
        "epsilon": 0.02,
        "layer_cost": "median",
        "layers": "top1",
        "max_iterations": 2000,
        "form": "barycentric",
        "rule": "delta",
        "strength": "auto",
        "k": "all",
    },
}
