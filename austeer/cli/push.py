"""``austeer push``: a plan -> a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import PROMPT, Json, console, emit, model_word, next_line


def push(
    plan: Annotated[str, typer.Argument(help="A plan's folder, of austeer select.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch. [default: the main one]")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, for example apache-2.0.")] = None,
    card: Annotated[Path | None, typer.Option(help="A README.md of your own, instead of the one made.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card; upload nothing.")] = False,
    json: Json = False,
) -> None:
    """Upload a plan to the Hugging Face Hub, with a model card filled in.

    Example: `austeer push plans/kind USER/kind --private`

    The account is that of `hf auth login`, or of `HF_TOKEN`. Afterwards `USER/kind` stands wherever a plan's folder
    does, and `USER/kind@REVISION` for one branch, tag or commit.
    """
    from huggingface_hub.utils import disable_progress_bars

    from ..errors import FileFormatError, count_of
    from ..plans.hub import CARD_NAME
    from ..plans.plan import Plan
    from ..plans.repository import contents_of

    disable_progress_bars()
    try:
        text = None if card is None else card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{card}: cannot be read as text ({error}); expected a Markdown file") from error
    loaded = Plan.from_pretrained(plan)
    contents = contents_of(loaded, repo, license=license, card=text)
    written = contents[CARD_NAME].decode()
    sizes = {name: len(content) for name, content in contents.items()}
    if dry_run:
        if json:
            emit({"repo": repo, "files": sizes, "card": written, "commit": None, "url": None})
        else:
            print(written)
        return
    commit = loaded.push_to_hub(repo, private=private or None, revision=revision, card=written)
    if json:
        emit({"repo": repo, "files": sizes, "card": written, "commit": commit.oid, "url": commit.commit_url})
        return
    console.print(
        f"{count_of(len(loaded), 'AU')}, {loaded.operation}\nwrote {commit.commit_url}\n"
        + next_line(
            *("austeer", "generate", f"{repo}@{commit.oid}", "--model", model_word(loaded)),
            *("--alpha", 1, "--prompt", PROMPT),
        ),
        markup=False,
    )
