"""`ot-merge eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from ot_merge_jax.cli import compile_cache, early
from ot_merge_jax.cli.console import (
    OUT,
    Encoding,
    Field,
    Json,
    NoCompileCache,
    Offline,
    Quiet,
    Seed,
    Verbose,
    guarded,
    print_json,
    say,
    session,
)
from ot_merge_jax.evaluation import request
from ot_merge_jax.recipes import loading


@guarded
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Model folders, or hub ids as OWNER/NAME@REVISION.")
    ],
    text: Annotated[
        str | None, typer.Option(help="Held-out text: .txt, .jsonl, .parquet, or hub:...")
    ] = None,
    choices: Annotated[
        list[str] | None,
        typer.Option(help="Multiple-choice questions: .jsonl of {question, choices, answer}."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, e.g. arc_easy,piqa.")
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(help="Folder of task files, used instead of lm-eval's own.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Model that the others' KL divergence is taken from [the first]."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Documents or questions read of each.", min=1)
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put questions and tasks as chats.")
    ] = False,
    generate: Annotated[
        int, typer.Option(help="Documents whose beginning every model continues.", min=0)
    ] = 0,
    new_tokens: Annotated[int, typer.Option(help="Tokens of a continuation.", min=1)] = 32,
    field: Field = None,
    encoding: Encoding = None,
    seed: Seed = 0,
    offline: Offline = False,
    no_compile_cache: NoCompileCache = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Score models on texts, questions and tasks, with intervals for their differences."""
    ask = request.EvalRequest(
        text=None if text is None else loading.text(text, field=field, encoding=encoding),
        questions=choices or (),
        tasks=[task.strip() for task in (tasks or "").split(",") if task.strip()],
        include_path=include_path,
        limit=limit,
        is_chat=apply_chat_template,
        continued=generate,
        new_tokens=new_tokens,
        encoding=encoding or "utf-8",
    )
    request.check(ask, base=base)
    early.look_for(models=[*models, base], texts=[text])
    early.look_for_questions(ask.questions)
    from ot_merge_jax.evaluation import evaluate as evaluation
    from ot_merge_jax.reports import eval_tables

    with session(verbose=verbose, quiet=quiet):
        compile_cache.enable(is_wanted=not no_compile_cache)
        results = evaluation.evaluate(models, ask, base=base, seed=seed, offline=offline)
    if as_json:
        print_json(results)
        return
    for part in eval_tables.parts(results):
        if isinstance(part, str):
            say(part, OUT)
        else:
            OUT.print(part)
