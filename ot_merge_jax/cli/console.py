"""What every command shares: two consoles, flags of the same meaning, errors as one sentence.

Tables go to stdout, progress and messages to stderr; with ``--json`` stdout holds the JSON alone.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

# before the libraries read them: no advice on stderr
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console
from rich.text import Text as Words

from ot_merge_jax import progress
from ot_merge_jax.errors import OtMergeError, is_out_of_memory
from ot_merge_jax.io.redaction import redacted, visible

OUT = Console()
ERR = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more; show tracebacks.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say only errors and results.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.", min=0)]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing output folder.")]
Encoding = Annotated[str | None, typer.Option(help="Encoding of the text files [utf-8].")]
Field = Annotated[
    str | None,
    typer.Option(help="Field of a record: a text [text], or messages; or PROMPT,RESPONSE."),
]
MemoryLimit = Annotated[
    str | None, typer.Option(help="Host memory to stay within, e.g. 8GiB [the machine's].")
]
Mesh = Annotated[str | None, typer.Option(help="Devices, e.g. data=2,model=4.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the same run where it was interrupted.")
]
Offline = Annotated[bool, typer.Option(help="Never use the network; the hub's cache is used.")]

NoCompileCache = Annotated[
    bool, typer.Option("--no-compile-cache", help="Compile everything anew, and keep none of it.")
]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turns errors into one sentence on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except OtMergeError as error:
            if kwargs.get("verbose"):
                say(traceback.format_exc())
            say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:
            raise  # click ends quietly when the reader of a pipe has gone
        except OSError as error:
            if kwargs.get("verbose"):
                say(traceback.format_exc())
            where = f"{error.filename or 'a file'} cannot be used ({error.strerror})"
            say(f"error: {error if error.errno is None else f'{where}; check rights and disk.'}")
            is_input = isinstance(error, PermissionError | FileNotFoundError)
            raise typer.Exit(3 if is_input else 4) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            say("error: out of memory; use smaller models or fewer texts, or a larger machine.")
            raise typer.Exit(4) from None
        except KeyboardInterrupt as error:
            say(str(error) or "interrupted; nothing unfinished was left behind.")
            raise typer.Exit(130) from None

    return wrapped


def typed() -> str:
    """The command as it was typed; without ``--resume``, since a resumed run publishes the same."""
    return shlex.join(["ot-merge", *(word for word in sys.argv[1:] if word != "--resume")])


def say(sentence: str, console: Console = ERR) -> None:
    """One plain line, never wrapped; without secrets, because paths and names are the user's."""
    console.print(Words(redacted(sentence)), soft_wrap=True)


class _Lines(logging.Handler):
    """Log records on stderr, above the progress: the time and the message, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Says a record."""
        say(visible(self.format(record)))


def print_json(value: Any) -> None:
    """The one thing on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def session(*, verbose: bool, quiet: bool) -> Iterator[None]:
    """Logging and progress on stderr."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    handler = _Lines()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "[%X]"))
    logger = logging.getLogger("ot_merge_jax")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    logging.getLogger("absl").setLevel(logging.ERROR)
    if quiet:
        yield
    else:
        with progress.shown(ERR):
            yield
