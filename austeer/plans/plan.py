"""Plan: which AUs, how strongly; its files and the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import files, hub
from .repository import contents_of
from .table import PlanTable

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class Plan(PlanTable):
    """The AUs to steer, most important first, so that ``top(k)`` is a prefix.

    Attributes:
        site: the site's name, one an AU.
        layer, index: int32 [k], the decoder layer from 0, and the AU within the site.
        beta: float32 [k], the signed rate of consistent pairs (paper), in -1 .. 1.
        delta: float32 [k], the mean of positive minus negative activation, in the activation's own unit.
        operation: what steering does to the activation x of an AU, with the strength alpha:
            "scale": x + alpha * beta * x (the paper); "push": x + alpha * beta * |x|; "shift": x + alpha * delta.
            "ablate" is of the AUs of one site and layer together: x - alpha * d (d . x), d their delta at length 1 (of
            those in use, where k is smaller). alpha = 1 removes the direction, 2 mirrors it.
        model: what the plan was measured on. pairs: how many pairs. ties: the tie rule, "effect" or "public".
        chat_template: whether the prompts went through one, with its options if it had any.
        rank: what the AUs are ranked by: "momentum" (the paper: |beta|), "difference" (|delta|) or "effect" (what a
            shift does to the wanted log-odds, for what it does to neutral text). step: what ``delta`` is: "difference",
            or "newton", the shifts of the largest effect for their side effect.
        dose: of "shift", what its strengths do (:class:`austeer.plans.dose.Dose`), where a profile says.
        evidence: what is known of its effect and cost, of this very plan: a part of it, a sum or another operation has
            none.

    Raises:
        PlanError: rows of unequal length, none, repeated, out of range or not finite; a field of another kind.
    """

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes ``austeer_plan.safetensors`` into ``folder`` (made if missing) and returns the file's path.

        The file is there whole or not at all; one that is there already is replaced.

        Example:
            >>> plan.save_pretrained("plans/kind").as_posix()
            'plans/kind/austeer_plan.safetensors'

        Raises:
            PlanError: more AUs, or longer names, than a file may hold.
            FileFormatError: it cannot be written.
        """
        return files.write(self, Path(folder) / files.FILE_NAME)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Plan:
        """Reads a plan from a folder, from the file itself, or from the Hugging Face Hub.

        Example:
            >>> file = plan.save_pretrained("plans/kind")
            >>> austeer.Plan.from_pretrained("plans/kind") == plan  # or "USER/kind", "USER/kind@COMMIT"
            True

        Args:
            source: a folder or file if there is one of that name; otherwise, if it has the form ``USER/NAME`` or
                ``USER/NAME@REVISION``, a repository of the Hub. A ``Path`` is never looked for on the Hub.
            revision: a branch, tag or commit of the repository; by default its main branch.
            token: for a private or gated repository; by default the one of ``hf auth login`` or ``HF_TOKEN``.
            cache_dir: where the Hub's files are kept; by default where its client keeps them.
            local_files_only: take it from that cache, and ask nobody.

        Raises:
            HubError: no such repository or revision, no access, no plan in it, or no connection and not in the cache.
            FileFormatError: no such file; or it is damaged, foreign, too large, or of a newer version.
            PlanError: its content is not a valid plan.
        """
        where = hub.locate(
            source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        return files.read(where, cls)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        license: str | None = None,
        card: str | None = None,
        commit_message: str = "Upload an austeer plan",
    ) -> CommitInfo:
        """Uploads the plan and its model card (README.md), in one commit; makes the repository where there is none.

        Args:
            repo_id: ``USER/NAME``.
            private: make the repository private; an existing one must be so already. By default a new one is public,
                or as its organisation says.
            revision: a branch, made where there is none; by default the main one.
            token: by default the one of ``hf auth login`` or ``HF_TOKEN``.
            license: what the card's metadata shall say, for example "apache-2.0"; by default nothing.
            card: another README.md than :func:`austeer.plans.card.model_card` writes.

        Returns:
            The commit; ``.oid`` is what ``revision`` takes to get exactly this plan.

        Raises:
            HubError: not a repository's name, not allowed, or no connection; the repository holds something else, or
                is public and should be private.
            PlanError: more than a file may hold.
        """
        return hub.push(
            contents_of(self, repo_id, license=license, card=card),
            repo_id,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
        )
