"""What a plan's repository on the Hub holds: its file and its card."""

from __future__ import annotations

import tempfile
from pathlib import Path

from . import files
from .card import model_card
from .hub import CARD_NAME, HubError, split_id
from .table import PlanTable


def contents_of(
    plan: PlanTable, repo_id: str, *, license: str | None = None, card: str | None = None
) -> dict[str, bytes]:
    """The files that ``Plan.push_to_hub`` uploads, by name; nobody is asked.

    Raises:
        HubError: not a repository's name, or a license beside a card. PlanError: more than a file may hold.
    """
    if split_id(repo_id) != (repo_id, None):
        raise HubError(f"found {repo_id!r}, expected a repository's name as in USER/NAME")
    if card is not None and license is not None:
        raise HubError(f"license: found {license!r} beside a card of your own, expected it in that card's metadata")
    text = str(model_card(plan, repo_id, license=license)) if card is None else card
    with tempfile.TemporaryDirectory() as folder:
        content = files.write(plan, Path(folder) / files.FILE_NAME).read_bytes()
    return {files.FILE_NAME: content, CARD_NAME: text.encode()}
