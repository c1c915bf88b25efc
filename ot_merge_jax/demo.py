"""The demo: the real pipeline on the small trained models that ship with the package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ot_merge_jax import assets, pipeline, recipe
from ot_merge_jax.io import publish


def run(out: Path, *, seed: int = 0, overwrite: bool = False) -> dict[str, pipeline.RunResult]:
    """Runs both merges of the demo.

    ``delta`` moves what a source learned on a domain into a smaller sibling. ``paper`` applies the
    published formula to a stranger of another family, where nothing moves.

    Args:
        out: Folder that will hold ``delta`` and ``paper``, two model folders.
        seed: Of every random choice.
        overwrite: Whether existing output folders are replaced.

    Returns:
        The two results by name.
    """
    text = {name: str(assets.path(f"{name}.jsonl")) for name in ("calibration", "heldout")}
    shared = {
        "source": str(assets.path("source")),
        # a fraction of the time of the defaults: few rows, and documents cut to one shape of batch
        "calibration": {"path": text["calibration"], "samples": 100},
        "max_rows": 2048,
        "max_length": 128,
        "evaluation": text["heldout"],
        "seed": seed,
    }
    recipes = {
        "delta": {
            "preset": "delta",
            "target": str(assets.path("sibling")),
            "source_base": str(assets.path("source-base")),
        },
        "paper": {"preset": "paper", "target": str(assets.path("stranger"))},
    }
    for name in recipes:
        publish.check_output(out / name, overwrite=overwrite)
    return {
        name: pipeline.run(
            recipe.resolve({**shared, **own}, where="the demo"),
            out / name,
            command="ot-merge demo",
            overwrite=overwrite,
        )
        for name, own in recipes.items()
    }


def table(results: Mapping[str, pipeline.RunResult]) -> Table:
    """One table of both merges: held-out loss before and after, and what moved."""
    made = Table(
        title="Held-out text of the domain, nats per token",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    made.add_column("merge")
    for name in ("target", "merged", "change", "95 % interval", "source", "|W~|/|W|"):
        made.add_column(name, justify="right", no_wrap=True)
    for name, result in results.items():
        found = result.report["evaluation"]
        change = found["merge"]["against_target"]
        # a source with other tokens has another loss per token: not comparable
        is_comparable = found["source"]["against_target"]["metric"] == "nll_per_token"
        largest = max(max(one["ratio_transported"]) for one in result.report["weights"].values())
        made.add_row(
            f"{name}, {'sibling' if name == 'delta' else 'stranger'}",
            f"{found['target']['nll_per_token']:.3f}",
            f"{found['merge']['nll_per_token']:.3f}",
            f"{change['difference']:+.3f}",
            f"{change['low']:+.3f} {change['high']:+.3f}",
            f"{found['source']['nll_per_token']:.3f}" if is_comparable else "",
            f"{largest:.0e}",
        )
    return made
