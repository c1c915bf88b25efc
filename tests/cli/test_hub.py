"""Models and texts by hub id: from a cache without any network, and once from a hub of our own."""

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading

import huggingface_hub
import pytest
import yaml
from hub_cache import COMMIT, contents, fill, jsonl

from ot_merge_jax.demo import assets

SIBLING = str(assets.path("sibling"))
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache, no HF_HUB_OFFLINE, and a network whose every use is an error."""
    folder = tmp_path / "hub"

    def refuse(*_, **__):
        raise OSError("the network was used")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return folder


@pytest.mark.catalogue("secrets")
def test_a_run_by_hub_ids_offline(cli, cache, models, text_files, tmp_path):
    """Names and commits of everything are recorded; the token is nowhere."""
    calibration, heldout = (path.read_text().splitlines() for path in text_files)
    fill(cache, "o/target", contents(models["llama-target"]), revision="v1.0")
    fill(cache, "o/source", contents(models["llama-source"]))
    texts = {"data/train-0.jsonl": jsonl(*calibration), "data/test-0.jsonl": jsonl(*heldout)}
    fill(cache, "o/texts", texts, kind="dataset")
    out = tmp_path / "out"
    called = cli(
        "run", "--preset", "barycentric", "--strength", "0.1", "--weights", "embed",
        "--target", "o/target@v1.0", "--source", f"o/source@{COMMIT}",
        "--calibration", "hub:o/texts", "--eval-text", "hub:o/texts@main:test", "--out", out,
        "--offline",
    )  # fmt: skip
    assert called.code == 0, called.err
    found = json.loads((out / "ot_merge" / "provenance.json").read_text())
    target = {"repo": "o/target", "revision": "v1.0", "commit": COMMIT}
    assert found["inputs"]["target"]["hub"] == target
    assert found["inputs"]["target"]["name"] == "o/target"
    assert found["inputs"]["target"]["files"]["model.safetensors"]
    assert found["texts"]["evaluation"]["hub"] == {
        "repo": "o/texts", "revision": "main", "commit": COMMIT, "split": "test",
    }  # fmt: skip
    assert [one["name"] for one in found["texts"]["evaluation"]["files"]] == ["test-0.jsonl"]
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == ["o/target", "o/source"]
    assert f"o/target at {COMMIT}" in card
    written = [path for path in out.rglob("*") if path.is_file()]
    assert all(TOKEN.encode() not in path.read_bytes() for path in written)
    evaluated = cli("eval", "o/target@v1.0", out, "--text", "hub:o/texts:test", "--offline",
                    "--json")  # fmt: skip
    assert evaluated.code == 0, evaluated.err
    assert set(evaluated.json["models"]) == {"o/target@v1.0", str(out)}


def test_chats_are_scored(cli, models, tmp_path, documents):
    """Prompt and response by flag, messages by flag: the same chats, the same numbers."""
    pairs = list(zip(documents[:8:2], documents[1:8:2], strict=True))
    flat = [{"q": q, "a": a} for q, a in pairs]
    said = [
        {"m": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]
    found = []
    for name, records, field in (("flat", flat, "q,a"), ("said", said, "m")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        called = cli("eval", models["llama-target"], "--text", path, "--field", field, "--json")
        assert called.code == 0, called.err
        found.append(called.json["models"][str(models["llama-target"])])
    assert found[0] == found[1]
    assert found[0]["documents"] == len(pairs)
    bad = cli("eval", models["llama-target"], "--text", path, "--field", "a,b,c")
    assert bad.code == 2
    assert "a prompt and a response field" in bad.err


def test_inspect_by_hub_id(cli, cache, models):
    fill(cache, "o/target", contents(models["llama-target"]))
    called = cli("inspect", "o/target@main", "--offline", "--json")
    assert called.code == 0, called.err
    assert called.json == cli("inspect", models["llama-target"], "--json").json


def test_a_directory_wins(cli, cache, models, tmp_path, monkeypatch):
    """Also when its name looks like a hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "target@main").symlink_to(models["llama-target"])
    assert cli("inspect", "o/target@main").code == 0


@pytest.mark.catalogue("broken-dataset")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "o/other@main", "--offline"], "cache does not hold the model o/other at"),
        (["inspect", "o/other@main"], "hub cannot be reached for the model o/other at"),
        (["inspect", "o/other"], "There is no directory o/other; .* OWNER/NAME@main"),
        (["inspect", "./o/other@main"], "There is no directory o/other@main"),
        (["inspect", "o/other@../main"], "There is no directory"),
        (["inspect", "o/o--ther@main"], "cannot have the model o/o--ther"),
        (["eval", SIBLING, "--text", "hub:o/texts", "--offline"], "dataset o/texts at"),
        (["inspect", f"https://me:{TOKEN}@huggingface.co/o/n"], "There is no directory"),
    ],
)
def test_what_is_not_there_is_one_sentence(cli, cache, words, message):
    called = cli(*words)
    assert called.code == 3
    [sentence] = called.err.strip().split("\n")
    assert re.search(message, sentence)
    assert TOKEN not in called.err + called.out


def test_secrets_are_not_shown_with_tracebacks(cli, cache):
    called = cli("inspect", f"https://me:{TOKEN}@huggingface.co/o/n", "-v")
    assert called.code == 3
    assert "Traceback" in called.err
    assert TOKEN not in called.err


def test_the_demo_takes_the_flag(cli, tmp_path):
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "file").touch()
    assert "--overwrite" in cli("demo", "--out", tmp_path, "--offline").err


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of a hub that a download needs; one model, whose files are ``files``."""

    files: dict[str, bytes]
    tokens: set[str]
    downloads: list[str]

    def do_GET(self):
        self.tokens.add(self.headers.get("Authorization", ""))
        path = self.path.split("?")[0]
        if path == "/api/models/o/n/revision/v1":
            return self.answer(json.dumps({"id": "o/n", "sha": COMMIT}).encode())
        if path == f"/api/models/o/n/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{index:040x}"}
                for index, (name, content) in enumerate(self.files.items())
            ]
            return self.answer(json.dumps(tree).encode())
        name = path.removeprefix(f"/o/n/resolve/{COMMIT}/")
        if name in self.files:
            if self.command == "GET":
                self.downloads.append(name)
            return self.answer(self.files[name])
        return self.answer(b"{}", 404)

    do_HEAD = do_GET

    def answer(self, body, code=200):
        self.send_response(code)
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(models):
    """A running hub on this machine."""
    Hub.files = contents(models["llama-target"])
    Hub.files |= {"onnx/model.safetensors": b"no", "consolidated.safetensors": b"no", "a.py": b""}
    Hub.tokens, Hub.downloads = set(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_and_then_offline(hub, models, tmp_path):
    """Only what is needed is downloaded, with the user's token, which is never shown."""
    left_out = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy")
    env = {key: value for key, value in os.environ.items() if key not in left_out}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip

    def inspect(name, *more):
        words = [sys.executable, "-m", "ot_merge_jax.cli.main", "inspect", name, "--json", *more]
        return subprocess.run(
            words, env=env, capture_output=True, text=True, timeout=120, check=False
        )

    first = inspect("o/n@v1")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["config"]["family"] == "llama"
    assert f"Bearer {TOKEN}" in Hub.tokens
    assert sorted(Hub.downloads) == sorted(contents(models["llama-target"]))
    missing = inspect("o/other@v1")
    assert missing.returncode == 3
    assert "The hub does not have the model o/other at revision v1" in missing.stderr
    requests = len(Hub.downloads)
    hub.shutdown()
    second = inspect("o/n@v1", "--offline")
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    assert len(Hub.downloads) == requests
    assert TOKEN not in first.stderr + missing.stderr + second.stderr
