"""A hub cache folder as huggingface_hub writes it: refs, blobs, and snapshots of links."""

import hashlib
import json
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill(cache, repo, files, *, kind="model", revision="main", commit=COMMIT):
    """Puts a repository into a cache.

    Args:
        cache: The cache folder (``HF_HUB_CACHE``).
        repo: ``OWNER/NAME``.
        files: Name -> bytes.
        kind: ``model`` or ``dataset``.
        revision: The branch that stands for the commit.
        commit: The commit.

    Returns:
        The folder of the snapshot.
    """
    root = Path(cache) / f"{kind}s--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(Path(name).parts) + 1), "blobs", blob.name))
    return snapshot


def contents(folder):
    """Name -> bytes of the files of a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def jsonl(*texts):
    """Lines of JSON with a field ``text``."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
