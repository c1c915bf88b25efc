"""The README's Python runs as it stands, on the models that ship with the package."""

import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from ot_merge_jax import AlignedBatches
from ot_merge_jax.demo import assets
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.merging import merge

README = Path(__file__).parents[1] / "README.md"


def test_python_quick_start(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines() if line]) <= 15
    for name, model in (("SMALL", "sibling"), ("BIG", "source"), ("BIG_BASE", "source-base")):
        shutil.copytree(assets.path(model), tmp_path / name)
    documents = assets.path("calibration.jsonl").read_text().splitlines()[:3]
    (tmp_path / "texts.txt").write_text("\n".join(line[10:200] for line in documents) + "\n")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks[0], names)
    models, spec, hparams = (names[name] for name in ("models", "spec", "hparams"))
    cfg, written = load_hf(tmp_path / "MERGED")
    assert cfg == models.target.cfg
    moved = written["layers"]["mlp"]["up_proj"]["kernel"]
    before = load_hf(tmp_path / "SMALL").params["layers"]["mlp"]["up_proj"]["kernel"]
    assert (moved != before).any()
    batches = AlignedBatches(names["data"].target, names["data"].source)
    merged = merge.merge(models, batches, hparams, spec=spec)
    jax.tree.map(np.testing.assert_array_equal, merged.params, names["params"])
    assert merged.report.rows > 2


@pytest.mark.parametrize("word", ["--preset", "--source-base", "--eval-text"])
def test_flags_the_readme_shows_exist(word):
    import typer.testing

    from ot_merge_jax.cli.main import app

    assert word in README.read_text()
    shown = typer.testing.CliRunner(env={"COLUMNS": "200"}).invoke(app, ["run", "--help"])
    assert word in shown.output
