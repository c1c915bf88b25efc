"""The demo's small trained checkpoints and texts, made by ``scripts/train_demo_models.py``. Imports nothing."""

from pathlib import Path


def path(name: str) -> Path:
    """The folder or file of an asset: ``source-base``, ``source``, ``sibling``, ``stranger``, ``heldout.jsonl``...

    Example:
        >>> path("sibling").is_dir()
        True
    """
    return Path(__file__).parent / name
