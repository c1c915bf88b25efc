"""Models and datasets of the Hugging Face hub, named with a revision and fetched as snapshots.

The only module that may use the network, through huggingface_hub, whose cache it fills and reads.
A revision is resolved to the commit it stands for. Imports errors only; huggingface_hub is imported
when something is fetched, because names of files are told from hub ids here too, and quickly.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ot_merge_jax.errors import InputError

#: Errors of this machine, not of the hub: no space, no permission.
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
_REPO = r"(?P<repo>\w[\w.-]*/\w[\w.-]*)"
_REVISION = r"@(?P<revision>\w(?:[\w/-]|\.(?!\.))*)"  # never a path with `..`
_MODEL = re.compile(_REPO + _REVISION, re.ASCII)
_DATASET = re.compile(
    rf"hub:{_REPO}(?:{_REVISION})?(?::(?:(?P<config>[\w.-]+)/)?(?P<split>[\w.-]+))?", re.ASCII
)


class Origin(NamedTuple):
    """Where on the hub a snapshot comes from.

    Attributes:
        repo: ``OWNER/NAME``.
        revision: The branch, tag or commit that was asked for.
        commit: The commit that it stood for.
    """

    repo: str
    revision: str
    commit: str


class DatasetId(NamedTuple):
    """One split of a hub dataset.

    Attributes:
        repo: ``OWNER/NAME``.
        revision: Branch, tag or commit.
        config: Which configuration of the dataset; None: its default.
        split: Which split.
    """

    repo: str
    revision: str
    config: str | None
    split: str


def model_id(text: str) -> tuple[str, str] | None:
    """Repository and revision of ``OWNER/NAME@REVISION``, or None for anything else.

    Example:
        >>> model_id("owner/name@main"), model_id("owner/name"), model_id("./owner/name@main")
        (('owner/name', 'main'), None, None)
    """
    match = _MODEL.fullmatch(text)
    return (match["repo"], match["revision"]) if match else None


def dataset_id(text: str) -> DatasetId | None:
    """What ``hub:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT]`` names, or None without ``hub:``.

    Raises:
        InputError: if ``hub:`` is followed by something else.

    Example:
        >>> dataset_id("hub:owner/name")
        DatasetId(repo='owner/name', revision='main', config=None, split='train')
        >>> dataset_id("hub:owner/name@v1:en/test")[1:], dataset_id("owner/name")
        (('v1', 'en', 'test'), None)
    """
    if not text.startswith("hub:"):
        return None
    match = _DATASET.fullmatch(text)
    if not match:
        raise InputError(
            f"{text[:200]!r} is not a dataset of the hub; write "
            "hub:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT]."
        )
    return DatasetId(
        match["repo"], match["revision"] or "main", match["config"], match["split"] or "train"
    )


def snapshot_download(repo: str, **options: Any) -> str:
    """That of huggingface_hub."""
    from huggingface_hub import snapshot_download as download  # noqa: PLC0415

    return download(repo, **options)


def snapshot(
    repo: str,
    revision: str,
    *,
    kind: Literal["model", "dataset"],
    patterns: Sequence[str],
    ignored: Sequence[str] = (),
    offline: bool = False,
) -> tuple[Path, Origin]:
    """A repository at a revision, from the hub's cache or downloaded into it.

    Args:
        repo: ``OWNER/NAME``.
        revision: Branch, tag or commit.
        kind: What the repository is.
        patterns: Names of the files wanted, with ``*``.
        ignored: Names of files that are left out, even if they match ``patterns``.
        offline: Whether the network is forbidden; ``HF_HUB_OFFLINE=1`` forbids it too.

    Returns:
        The folder of the snapshot, and where it comes from.

    Raises:
        InputError: if the hub does not have it, or, when offline, its local cache.
    """
    from huggingface_hub import constants  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = offline or constants.is_offline_mode()
    name = f"the {kind} {repo} at revision {revision}"
    try:
        folder = snapshot_download(
            repo,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(ignored),
            local_files_only=offline,
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if offline:
            raise InputError(
                f"The local hub cache does not hold {name}, or not all of it, and offline nothing "
                "is downloaded; run once without --offline."
            ) from error
        raise InputError(
            f"The hub cannot be reached for {name}, and its local cache does not hold it; check "
            "the network."
        ) from error
    except GatedRepoError as error:
        raise InputError(
            f"The hub gives {name} only to accounts that accepted its terms; accept them on its "
            "page and log in (`hf auth login`)."
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"The hub does not have {name}; check the name, and log in (`hf auth login`) if it is "
            "private."
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"The hub does not have {name}; check the revision.") from error
    except HFValidationError as error:
        raise InputError(f"The hub cannot have {name}; check the name.") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        raise InputError(
            f"The hub answers {code} when asked for {name}; try again later."
        ) from error
    except Exception as error:  # the libraries below may raise any exception
        if isinstance(error, OSError) and error.errno in _LOCAL:
            raise
        raise InputError(
            f"The hub cannot provide {name} ({type(error).__name__}); try again later."
        ) from error
    return Path(folder), Origin(repo, revision, Path(folder).name)
