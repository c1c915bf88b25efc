"""What README and docs promise: their Python runs as it stands, on the models that ship with the
package; their links lead somewhere; their flags exist.
"""

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

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]


def anchors(page):
    """What a link into a page may name: its headings, as they are written in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_python_page(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            name, _, heading = link.partition("#")
            there = page.parent / name if name else page
            assert there.is_file(), link
            assert not heading or heading in anchors(there), link


def test_every_page_is_listed():
    names = {page.name for page in DOCS.glob("*.md")} - {"index.md"}
    index, readme = (page.read_text(encoding="utf-8") for page in (DOCS / "index.md", README))
    assert set(re.findall(r"^- \[.+\]\((.+)\): \S", index, re.MULTILINE)) == names
    assert set(re.findall(r"\(docs/(.+?\.md)\)", readme)) == names


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("word", ["--preset", "--source-base", "--eval-text"])
def test_flags_the_readme_shows_exist(word):
    import typer.testing

    from ot_merge_jax.cli.main import app

    assert word in README.read_text()
    shown = typer.testing.CliRunner(env={"COLUMNS": "200"}).invoke(app, ["run", "--help"])
    assert word in shown.output
