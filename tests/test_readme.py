"""The README's Python runs as it stands, on the models that ship with the package."""

import re
import shutil
from pathlib import Path

import pytest

from ot_merge_jax import assets
from ot_merge_jax.io.hf import load_hf

README = Path(__file__).parents[1] / "README.md"


def test_python_quick_start(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    for name, model in (("SMALL", "sibling"), ("BIG", "source"), ("BIG_BASE", "source-base")):
        shutil.copytree(assets.path(model), tmp_path / name)
    documents = assets.path("calibration.jsonl").read_text().splitlines()[:3]
    (tmp_path / "texts.txt").write_text("\n".join(line[10:200] for line in documents) + "\n")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks[0], names)
    assert names["report"].rows > 2
    cfg, merged = load_hf(tmp_path / "MERGED")
    assert cfg == names["target"][0]
    moved = merged["layers"]["mlp"]["up_proj"]["kernel"]
    assert (moved != load_hf(tmp_path / "SMALL")[1]["layers"]["mlp"]["up_proj"]["kernel"]).any()


@pytest.mark.parametrize("word", ["--preset", "--source-base", "--eval-text"])
def test_flags_the_readme_shows_exist(word):
    import typer.testing

    from ot_merge_jax.cli import app

    assert word in README.read_text()
    shown = typer.testing.CliRunner(env={"COLUMNS": "200"}).invoke(app, ["run", "--help"])
    assert word in shown.output
