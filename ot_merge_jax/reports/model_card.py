"""The model card of a written folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCard, ModelCardData

from ot_merge_jax.io import hub
from ot_merge_jax.reports.schema import Entry

_MAX_CARD_BYTES = 5_000_000


_DONE = {"merge": "Merged across architectures", "finetune": "Adapted"}


def licence_of(folder: Path) -> str | None:
    """The licence a model's own card states, or None."""
    card = folder / "README.md"
    try:
        if card.stat().st_size > _MAX_CARD_BYTES:
            return None
        value = ModelCard.load(card).data.get("license")
    except Exception:  # a card may contain anything
        return None
    return value if isinstance(value, str) else None


def fenced(text: str) -> str:
    """A code block that its own content cannot end."""
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def losses(
    evaluation: Mapping[str, Entry],
) -> list[tuple[str, float | None, float | None]]:
    """(model, nats per token, bits per byte) of the models of a report, for the card.

    Where a model has other tokens than the target, its loss per token cannot be compared and is
    None.

    Example:
        >>> from ot_merge_jax.reports.schema import Difference
        >>> target = Entry(nll_per_token=4.0, bits_per_byte=2.0)
        >>> in_bytes = {"against_target": Difference(metric="bits_per_byte")}
        >>> source = Entry(nll_per_token=3.0, bits_per_byte=1.0, **in_bytes)
        >>> losses({"target": target, "source": source})
        [('target', 4.0, 2.0), ('source', None, 1.0)]
    """
    return [
        (name, None if entry.has_own_tokens else entry.nll_per_token, entry.bits_per_byte)
        for name, entry in evaluation.items()
    ]


def model_card(
    *,
    name: str,
    models: Mapping[str, tuple[Path, hub.Origin | None]],
    verdict: str,
    evaluation: Sequence[tuple[str, float | None, float | None]],
    command: str,
    recipe: str,
    relation: Literal["merge", "finetune"] = "merge",
) -> str:
    """The README.md of a merged or adapted model.

    Args:
        name: Title.
        models: Role (``target``, ``source``, ``source base``) -> folder, and where on the hub it
            was fetched from.
        verdict: One sentence.
        evaluation: From `losses`.
        command: The exact command.
        recipe: The resolved recipe.
        relation: What was done to the models, in the words of the hub.

    Returns:
        Markdown with front matter. A licence is stated only if all models agree on one.

    Example:
        >>> models = {"target": (Path("a"), None),
        ...           "source": (Path("b"), hub.Origin("owner/name", "main", "1f"))}
        >>> card = model_card(name="m", models=models, verdict="v.", evaluation=[],
        ...                   command="ot-merge run", recipe="rule: delta")
        >>> "base_model_relation: merge" in card, "license: other" in card, "- owner/name" in card
        (True, True, True)
    """
    licences = {role: licence_of(folder) for role, (folder, _) in models.items()}
    stated = set(licences.values())
    agreed = stated.pop() if len(stated) == 1 else None
    data = ModelCardData(
        # not escaped: to_yaml quotes what needs it, but not on one line if the name has several
        base_model=[
            " ".join(folder.resolve().name.split()) if origin is None else origin.repo
            for folder, origin in models.values()
        ],
        base_model_relation=relation,
        tags=[relation, "ot-merge", "optimal-transport"],
        library_name="transformers",
        pipeline_tag="text-generation",
        license=agreed or "other",
    )
    lines = ["---", data.to_yaml(), "---", "", f"# {_plain(name)}", "", _plain(verdict), ""]
    lines += ["| role | model | licence stated in its card |", "|---|---|---|"]
    lines += [
        f"| {role} | {_plain(_called(*model))} | {_plain(licences[role] or 'unknown')} |"
        for role, model in models.items()
    ]
    if evaluation:
        lines += ["", "Held-out text (see `ot_merge/report.json`):", ""]
        lines += ["| model | nats per token | bits per byte |", "|---|---|---|"]
        lines += [
            f"| {_plain(who)} | {'other tokens' if loss is None else f'{loss:.4f}'} "
            f"| {'unknown' if bits is None else f'{bits:.4f}'} |"
            for who, loss, bits in evaluation
        ]
    lines += [
        "",
        f"{_DONE[relation]} with `ot_merge_jax`, after Transport and Merge "
        "([arXiv:2602.05495](https://arxiv.org/abs/2602.05495)).",
        "",
        fenced(command),
        "",
        fenced(recipe.rstrip()),
        "",
    ]
    return "\n".join(lines)


def _called(folder: Path, origin: hub.Origin | None) -> str:
    """A model's name, with the commit if it is from the hub."""
    return folder.resolve().name if origin is None else f"{origin.repo} at {origin.commit}"


def _plain(text: str) -> str:
    """Text that cannot break out of a table cell or start Markdown or HTML."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    for character in "\\`*_[]<>|#&":
        plain = plain.replace(character, f"\\{character}" if character not in "<>&" else " ")
    return plain
