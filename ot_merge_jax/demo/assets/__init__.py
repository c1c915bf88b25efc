"""The demo's small trained checkpoints and texts; ``scripts/train_demo_models.py`` makes them."""

from pathlib import Path


def path(name: str) -> Path:
    """The folder or file of an asset: ``source-base``, ``sibling``, ``heldout.jsonl``...

    Example:
        >>> path("sibling").is_dir()
        True
    """
    return Path(__file__).parent / name
