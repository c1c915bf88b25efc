"""The coupling of a run on disk, by Orbax: potentials, layer plans, standard deviations."""

from __future__ import annotations

from pathlib import Path

import orbax.checkpoint as ocp

from ot_merge_jax.types import Coupling, Potentials


def save_coupling(path: Path, coupling: Coupling) -> None:
    """Writes a coupling into a folder that does not exist yet; returns when it is on disk."""
    tree = coupling._asdict()
    tree["feature"] = {site: one._asdict() for site, one in coupling.feature.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), tree)
        checkpointer.wait_until_finished()
    # orbax needs this file, and signs it with the absolute path it was written under
    (path / "commit_success.txt").write_text("written\n", encoding="utf-8")


def load_coupling(path: Path) -> Coupling:
    """Reads what `save_coupling` wrote.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> layer = {"mlp_in": jnp.full((1, 2), 0.5)}
        >>> folder = Path(tempfile.mkdtemp()) / "coupling"
        >>> save_coupling(folder, Coupling(layer, {}, layer, layer))
        >>> load_coupling(folder).layer["mlp_in"].tolist()
        [[0.5, 0.5]]
    """
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(path.resolve())
    tree["feature"] = {site: Potentials(**one) for site, one in (tree["feature"] or {}).items()}
    return Coupling(**tree)
