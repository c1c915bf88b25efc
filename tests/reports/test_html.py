"""The report: what it says, that nothing in it acts or comes from elsewhere, equal bytes."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import reported

from ot_merge_jax.reports import html, run_folder

HOSTILE = (
    "</svg></style></script><script>alert(1)</script>\"'><img src=x onerror=alert(1)> javascript:x "
    "](javascript:x) {{ 7*7 }} $x^{$ \x1b[31m\x00\u202e &lt; 中文"
)
#: Elements that load, run or send something.
ACTIVE = {
    "script", "link", "img", "image", "iframe", "object", "embed", "form", "input", "button",
    "video", "audio", "source", "base", "a", "foreignobject", "animate", "set", "feimage",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("every_plot")


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split()).replace(" ,", ",").replace(" .", ".")


def assert_nothing_acts(text):
    page = Page(text)
    assert not ACTIVE & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in {"href", "xlink:href", "src", "action", "data", "srcset", "poster"}:
            assert value.startswith("#"), (tag, name, value)
        for part in value.split("url(")[1:]:
            assert part.startswith("#"), (tag, name, value)
    assert "@import" not in text
    assert [value for tag, name, value in page.attributes if "default-src 'none'" in value]
    return page


def built(folder, **given):
    details = reported.write(folder, **given)
    files = html.write(details)
    return details, files, (details / "report.html").read_text(encoding="utf-8")


def without_plots(folder, **given):
    return html.render(run_folder.read(reported.write(folder, **given)), {}, style="")


def test_report_says_what_the_run_found(tmp_path):
    details, files, text = built(tmp_path)
    page = assert_nothing_acts(text)
    for words in (
        "big into small",
        "improved -0.1500 [-0.1600, -0.1400] nats per token merge minus target on held-out text, "
        "2 calibration seeds together",
        "not applicable: it equals the base",
        "wrong-layer the same plans, source layers shuffled; strength 0.4 "
        "-0.0030 [-0.0130, +0.0070] no difference "
        "-0.0100 [-0.0200, +0.0000] no difference 4.2000 2.1000 -",
        "source the ceiling -0.7000 [-0.7100, -0.6900] bits per byte better other tokens 2.2000 -",
        "beyond unigram merge and target, each with a bias of its own per token "
        "-0.0500 [-0.0600, -0.0400] better",
        "merge the result; strength projections 0.8, vocabulary 1.2 ",
        "unigram no merge: one bias per token of the vocabulary; 0.5 of the bias ",
        "Strength: projections 0.8, vocabulary 1.2",
        "2 calibration documents (20%, seed 0), apart from the 8 that gave rows",
        "target (before) a time",
        "merge (after) a hill [end of text]",
        "hub: owner/big, main, commit c0ffee",
        "seeds 0, 1",
        "time 62 s peak memory 3.00 GiB",
        reported.DIGEST,
    ):
        assert words in page.text, words
    plots = {path.name for path in (details / "plots").iterdir()}
    names = ("differences", "strength", "search", "layers", "neurons", "mass", "r2", "norms")
    assert plots == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert {path.relative_to(details).as_posix() for path in files} == {
        "report.html", *(f"plots/{name}" for name in plots)
    }  # fmt: skip
    assert page.tags.count("svg") == page.tags.count("figcaption") == len(names)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    refs = {value for _, name, value in page.attributes if name == "href"}
    assert {ref[1:] for ref in refs} <= set(ids)


@pytest.mark.parametrize("found", [{"verdict": "merged; not evaluated."}, None])
def test_older_and_unevaluated_runs_have_a_report(tmp_path, found):
    if found is None:
        found = reported.report()
        for key in ("outcome", "seeds", "per_seed", "samples", "controls"):
            del found[key]
        del found["strength"]["split"]
        found["evaluation"] = {}
    page = assert_nothing_acts(without_plots(tmp_path, found=found, made={}))
    assert found["verdict"] in page.text
    assert "Not evaluated" in page.text


@pytest.mark.parametrize(
    ("chosen", "tried", "words"),
    [
        (0.0, reported.tried(0.0), "Strength 0 won: what was written is the target, unchanged."),
        ({"projections": 0.0, "vocabulary": 0}, reported.tried(0), "Strength 0 won"),
        (0.1, [], "Strength: 0.1, as it was given; none was tried"),
    ],
)
def test_strength_is_said(tmp_path, chosen, tried, words):
    found = reported.report() | {"strength": {"chosen": chosen, "tried": tried}}
    assert words in Page(without_plots(tmp_path, found=found)).text


def hostile(value):
    """The same with every string replaced, and every key that is no name of ours."""
    if isinstance(value, dict):
        return {key: hostile(one) for key, one in value.items()}
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_names_and_texts_are_shown_and_never_acted_on(tmp_path):
    found, made = hostile(reported.report()), hostile(reported.provenance())
    for parts in (found["controls"], found["weights"], found["sites"], found["calibration"]):
        parts[HOSTILE] = next(iter(parts.values()))
    found["controls"][HOSTILE + "1"] = reported.control(-0.1) | {"not_applicable": HOSTILE}
    found["strength"]["chosen"][HOSTILE] = 0.5
    found["samples"][0]["continuations"][HOSTILE] = {"text": HOSTILE + "\ud800"}
    for parts in (made["packages"], made["output"], made["inputs"]["target"]["files"]):
        parts[HOSTILE] = HOSTILE
    made["inputs"][HOSTILE] = made["inputs"]["target"]
    recipe = HOSTILE.replace("\x00", "")
    details, _, text = built(tmp_path, found=found, made=made, recipe=recipe)
    page = assert_nothing_acts(text)
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert r"\x1b[31m\x00\u202e" in page.text
    assert r"\ud800" in page.text
    assert not [one for one in text if not one.isprintable() and one != "\n"]
    for path in (details / "plots").glob("*.svg"):
        assert_svg_is_inert(path.read_text(encoding="utf-8"))


def assert_svg_is_inert(text):
    page = Page(text)
    assert not ACTIVE & set(page.tags)
    assert "data:" not in text
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_reports_of_one_run_are_the_same_bytes_whatever_the_settings_of_matplotlib(tmp_path):
    import matplotlib

    _, first, _ = built(tmp_path / "a")
    with matplotlib.rc_context({"figure.facecolor": "red", "font.size": 20, "text.usetex": True}):
        _, second, _ = built(tmp_path / "b")
        assert matplotlib.rcParams["font.size"] == 20
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_link_in_place_of_the_plots_is_not_followed(tmp_path):
    details, elsewhere = reported.write(tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (details / "plots").symlink_to(elsewhere)
    with pytest.raises(html.InputError, match="plots is a link"):
        html.write(details)
    assert not list(elsewhere.iterdir())
    assert not (details / "report.html").exists()


def test_nothing_is_said_without_a_home_to_write_to(tmp_path):
    """matplotlib would speak of its caches; and it is loaded when it is needed."""
    details = reported.write(tmp_path)
    code = (
        "import sys, pathlib\n"
        "from ot_merge_jax.reports import html\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"html.write(pathlib.Path({str(details)!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120,
        env={"HOME": "/proc/none", "PATH": "", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads((details / "report.json").read_text())
    assert (details / "report.html").is_file()
