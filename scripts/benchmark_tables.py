"""Fills the tables of docs/benchmarks.md from benchmarks/*.json, so that no figure is typed twice.

A table stands between two comments that name it, ``<!-- table:NAME -->`` and ``<!-- /table -->``;
what lies between them is replaced. Every table has its place, and every place a table.

    python scripts/benchmark_tables.py
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_GIB = 2**30
_PLACE = re.compile(r"<!-- table:([a-z-]+) -->\n.*?<!-- /table -->", re.DOTALL)
#: Who was measured in transport.json -> the heading of its column.
_CONTESTANTS = {
    "ours": "ours",
    "ott log": "ott-jax log domain",
    "ott kernel": "ott-jax kernel form",
    "pot sinkhorn": "POT",
    "pot sinkhorn_log": "POT log domain",
    "torch": "the paper's loop in torch",
}
_RUNTIMES = {
    "ours": "ours",
    "ours_remat": "ours, `--remat`",
    "torch": "torch, eager",
    "torch_compiled": "torch, compiled",
}


def main() -> None:
    """Fills the tables in place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    asked = parser.parse_args()
    page = asked.page.read_text(encoding="utf-8")
    asked.page.write_text(filled(page, tables(asked.results)), encoding="utf-8")


def filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with the text of every table in its place.

    Args:
        page: Markdown with places for tables.
        tables: Name -> Markdown, without a line end.

    Returns:
        The page; what lies outside of the places is untouched.

    Raises:
        ValueError: if places and tables are not the same names, each once.
    """
    places = _PLACE.findall(page)
    if sorted(places) != sorted(tables) or page.count("<!-- table:") != len(places):
        raise ValueError(f"The page has places {sorted(places)}; the tables are {sorted(tables)}.")
    return _PLACE.sub(lambda m: f"<!-- table:{m[1]} -->\n{tables[m[1]]}\n<!-- /table -->", page)


def tables(results: Path) -> dict[str, str]:
    """Every table, from the results of all benchmarks.

    Args:
        results: The folder that the benchmarks write to.

    Returns:
        Name -> Markdown.
    """
    read = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    return {
        "machines": _machines(read),
        **_of_transport(read["transport"]),
        "vmap": _vmap(read["vmap"]),
        "fusion": _fusion(read["fusion"]),
        "merge": _merge(read["merge"]),
        "memory": _memory(read["memory"]),
        **_of_gather(read["forward"]),
        "adapt": _adapt(read["adapt"]),
        "readout": _readout(read["readout"]),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _machines(read: Mapping[str, Any]) -> str:
    """What each benchmark ran on, and with which versions."""
    rows = []
    for name, results in read.items():
        where = results["machine"]
        versions = ", ".join(f"{package} {said}" for package, said in where["versions"].items())
        cores = f"{where['cores']} cores, {where['device']}"
        rows.append([f"`scripts/bench_{name}.py`", cores, where["python"], versions])
    return table(["benchmark", "machine", "Python", "versions"], rows)


def _of_transport(read: Mapping[str, Any]) -> dict[str, str]:
    """One neuron transport, how it compares, a wide one, and whole grids of layer pairs."""
    inner, wide = read["inner"], read["wide"]
    epsilons = {key.split()[1]: inner[key] for key in inner if key.startswith("epsilon ")}
    times = [
        [epsilon, *(_timed(one["runs"][name]) for name in _CONTESTANTS)]
        for epsilon, one in epsilons.items()
    ]
    ratios = [
        [
            epsilon,
            f"{one['faster_than_best_other']:.1f}",
            f"{one['faster_than_torch']:.0f}",
            f"{1000 * one['seconds_per_iteration']:.2f} ms",
            f"{one['over_floor']:.1f}",
        ]
        for epsilon, one in epsilons.items()
    ]
    shape = f"{_by(inner['shape'])}, {inner['rows']} rows"
    cost, at_rate = inner["cost_seconds"], inner["cost_seconds"] / inner["cost_over_floor"]
    grid = [
        [
            _by(one["layers"]),
            f"{one['seconds']:.0f} s",
            f"{one['seconds'] / (one['layers'][0] * one['layers'][1]):.2f} s",
            f"{one['peak_gib']:.1f} GiB",
            f"{1024 * one['potentials_gib']:.1f} MiB",
            f"{one['largest_l1_error']:.1e}",
        ]
        for one in read["grid"]
    ]
    return {
        "transport": table(["epsilon", *_CONTESTANTS.values()], times),
        "transport-ratios": table(
            [
                "epsilon",
                "faster than the best other by",
                "than the paper's loop by",
                "an iteration",
                "over one read of the kernel",
            ],
            ratios,
        ),
        "transport-cost": table(
            ["neurons", "the cost", "its products alone, at the machine's matrix rate"],
            [[shape, f"{cost:.2f} s", f"{at_rate:.2f} s"]],
        ),
        "transport-wide": table(
            [
                "neurons",
                "epsilon",
                "ours",
                "with compilation",
                "memory, cost and kernel included",
                "the paper's loop",
                "faster by",
            ],
            [
                [
                    _by(wide["shape"]),
                    str(wide["epsilon"]),
                    _timed(wide),
                    f"{wide['seconds_with_compilation']:.1f} s",
                    f"{wide['working_set_gib']:.1f} GiB",
                    _timed(wide["torch"]),
                    f"{wide['faster_than_torch']:.0f}",
                ]
            ],
        ),
        "transport-grid": table(
            [
                "layer pairs",
                "all, with their costs",
                "a pair",
                "peak",
                "potentials",
                "largest L1 error",
            ],
            grid,
        ),
    }


def _vmap(read: Mapping[str, Any]) -> str:
    """A vmap over epsilon beside the Python loop over the same."""
    rows = [
        [
            f"{one['target']} x {one['source']}",
            str(one["pairs"]),
            f"{1000 * one['loop_seconds']:.1f} ms",
            f"{1000 * one['vmap_seconds']:.1f} ms",
            f"{one['vmap_over_loop']:.2f}",
            ", ".join(map(str, one["iterations"])),
            "the same" if one["iterations"] == one["iterations_of_vmap"] else "others",
        ]
        for one in read["compared"]
    ]
    head = ["neurons", "pairs", "loop", "vmap", "vmap / loop", "iterations", "those of vmap"]
    return table(head, rows)


def _fusion(read: Mapping[str, Any]) -> str:
    """One weight transported from the source's sites into the target's."""
    shape = read["shape"]
    rows = [
        ["both plans rebuilt, then the products", f"{read['dense_seconds']:.2f} s"],
        ["share of the measured matrix rate", f"{read['dense_share_of_matmul_rate']:.0%}"],
        ["share of that rate, products alone", f"{read['product_share_of_matmul_rate']:.0%}"],
        [f"with a mask of {shape['kept']} neurons", f"{read['masked_seconds']:.2f} s"],
        ["time with the mask / without", f"{read['masked_over_dense']:.2f}"],
        ["the same ratio, products alone", f"{read['masked_over_dense_product_alone']:.3f}"],
    ]
    return table([f"{_by([shape['source']] * 2)} into {_by([shape['target']] * 2)}", ""], rows)


def _merge(read: Mapping[str, Any]) -> str:
    """What a merge at the shapes of real models would take."""
    rows, size = [], 0.0
    for preset in ("delta", "paper"):
        one = read[preset]
        would = one["extrapolated"]
        size += would["coupling_bytes"]
        counts = [n for site in one["iterations"].values() for layer in site for n in layer]
        rows.append(
            [
                f"`{preset}`",
                f"{_by(one['layers_run'])} ({one['share_of_pairs_run']:.1%})",
                " to ".join(map(str, sorted({min(counts), max(counts)}))),
                f"{would['couple_seconds'] / 60:.0f} min",
                f"{would['carry_seconds'] / 60:.0f} min",
                f"{would['fuse_seconds']:.1f} s",
                f"{one['peak_gib']:.1f} GiB",
                f"{would['coupling_bytes'] / 1e6:.0f} MB",
            ]
        )
    rows.append(["all seven projections", *[""] * 6, f"{size / 1e6:.0f} MB"])
    head = ["preset", "layer pairs run", "iterations", "to couple", "to transport"]
    return table([*head, "to fuse", "peak", "size of the coupling"], rows)


def _memory(read: Mapping[str, Any]) -> str:
    """Peaks of whole runs beside what they announced."""
    sizes = read["parameters"]
    rows = []
    for one in read["cases"]:
        announced = re.search(r"about ([\d.]+ GiB)", one["said"])
        if announced is None:
            raise ValueError(f"No size in {one['said']!r}.")
        rows.append(
            [
                one["weights"],
                f"`--memory-limit {one['limit']}`",
                "layer by layer" if "layer by layer" in one["said"] else "whole models",
                announced[1],
                f"{one['peak_gib']:.1f} GiB",
                f"{one['seconds'] / 60:.0f} min",
            ]
        )
    parameters = f"{sizes['source'] / 1e9:.1f} billion into {sizes['target'] / 1e6:.0f} million"
    return table([f"moved ({parameters})", "limit", "source", "announced", "peak", "time"], rows)


def _of_gather(read: Mapping[str, Any]) -> dict[str, str]:
    """Speed, compile time and memory of gathering activations."""
    speed, memory = read["speed"], read["memory"]
    per_second = speed["tokens_per_second"]
    layers = read["compile_seconds_by_layers"]
    modes = {"whole": "whole model in memory", "by_layer": "layer by layer from its file"}
    return {
        "gather": table(
            ["ours", "torch with hooks", "ours / torch", "largest difference"],
            [
                [
                    f"{per_second['ours']:.0f} tokens/s",
                    f"{per_second['torch']:.0f} tokens/s",
                    f"{speed['ours_over_torch']['median']:.2f}",
                    f"{speed['largest_difference']:.1e}",
                ]
            ],
        ),
        "gather-compile": table(
            ["layers", *layers],
            [["compile time", *(f"{seconds:.2f} s" for seconds in layers.values())]],
        ),
        "gather-memory": table(
            [f"{memory['parameters'] / 1e6:.0f} million parameters", "peak", "time"],
            [
                [
                    words,
                    f"{memory[mode]['peak_bytes'] / _GIB:.1f} GiB",
                    f"{memory[mode]['seconds']:.0f} s",
                ]
                for mode, words in modes.items()
            ],
        ),
    }


def _adapt(read: Mapping[str, Any]) -> str:
    """Training steps beside those of torch."""
    step = read["step"]
    rows = []
    for name, words in _RUNTIMES.items():
        ratio = step["ours_over"].get(name)
        rows.append(
            [
                words,
                f"{step['tokens_per_second'][name]:.0f}",
                f"{ratio['median']:.2f}" if ratio else "",
                f"{step['first_step_seconds'][name]:.1f} s",
            ]
        )
    return table(["", "tokens per second", "ours over it", "first step"], rows)


def _readout(read: Mapping[str, Any]) -> str:
    """Fits of the output head beside torch's L-BFGS."""
    rows = []
    for case in read["cases"]:
        ours, theirs = case["ours"], case["torch"]
        rows.append(
            [
                _by([case["vocabulary"], case["width"], case["positions"]]),
                f"{case['rows']}",
                f"{ours['seconds']:.1f} s ({ours['passes']})",
                f"{ours['peak_bytes'] / _GIB:.1f} GiB",
                f"{ours['share_of_matmul_rate']:.0%}",
                f"{theirs['seconds']:.1f} s ({theirs['passes']})",
                f"{theirs['peak_bytes'] / _GIB:.1f} GiB",
                f"{case['torch_seconds_over_ours']:.2f}",
            ]
        )
    head = [
        "V x d x N", "rows", "ours (passes)", "peak", "of the matrix rate",
        "torch (passes)", "peak",
        "torch / ours",
    ]  # fmt: skip
    return table(head, rows)


def _by(sizes: Sequence[int]) -> str:
    """Two sizes as ``16 x 32``."""
    return " x ".join(map(str, sizes))


def _timed(run: Mapping[str, Any]) -> str:
    """Seconds and iterations, as many digits as they are worth."""
    seconds = run["seconds"]
    digits = 3 if seconds < 0.2 else 2 if seconds < 2 else 1
    return f"{seconds:.{digits}f} s ({run['iterations']})"


if __name__ == "__main__":
    main()
