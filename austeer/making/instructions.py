"""Pairs that a model writes itself: each prompt answered under one instruction and under another."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import AusteerError, PairsError, check_count
from ..forward.generation import continue_prompts
from ..forward.tokens import encode
from ..measuring.arguments import tokenizer_signature
from ..models.structure import name_of
from ..models.weights import signature
from ..pairs.chat import render_chat
from ..pairs.pair import Pair
from ..pairs.pairs import Pairs
from ..utils.progress import Progress
from .instruction_forms import drops_blank, instructed, instruction_form, join
from .made_pairs import Made, check_out, write_pairs
from .truncation import even, whole_words
from .unfinished_run import Partial

#: Why a pair is left out.
EMPTY, EQUAL, NO_LENGTH, REPEATED = "empty side", "equal sides", "no common length at a word's end", "repeated"


def pairs_from_instructions(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    positive: str,
    negative: str,
    out: str | Path,
    *,
    samples: int = 1,
    max_new_tokens: int = 32,
    temperature: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    same_length: bool = True,
    chat: bool | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Made:
    """The model answers each prompt under either instruction; the pair keeps the prompt alone, without instruction.

    Whole batches are put into ``OUT.partial`` as they come; the result is written at the end, and that file goes.
    Each batch has a seed of its own, so a run that was interrupted gives what an uninterrupted one gives.

    Args:
        prompts: what to answer, see :func:`austeer.making.prompts.read_prompts`.
        positive, negative: the instructions, for example "Answer kindly." and "Answer rudely.".
        out: the file of pairs to write (``.jsonl``). The caller sees to it that none is lost there.
        samples: how many pairs of each prompt; several need a temperature.
        max_new_tokens: of an answer. temperature: sample at it; greedy if None.
        batch_size: prompts that are answered at a time; the result depends on it where rounding does.
        same_length: cut both sides of a pair to one number of tokens, so that length does not tell them apart.
        chat: put the instruction into the chat template; by default if the tokenizer has one. Momentum is then
            measured with the template, too.
        resume: go on from ``OUT.partial``, if it is there.
        progress: on standard error; by default a bar on a terminal, and elsewhere a line now and then.

    Raises:
        PairsError: an instruction that is empty, two equal ones, no prompt, another suffix, an unfinished run that
            ``resume`` was not asked for, or fewer than 2 pairs that are left.
        FileFormatError: the unfinished run is damaged or of other settings.
        KeyboardInterrupt: with a message that says how to go on.
    """
    out = check_out(out)
    form = instruction_form(tokenizer, (positive, negative), chat)
    check_count("samples", samples, 1000, "pairs of each prompt", PairsError)
    check_count("batch_size", batch_size, 2**16, "prompts at a time", PairsError)
    check_count("max_new_tokens", max_new_tokens, 2**16, "tokens", PairsError)
    if samples > 1 and temperature is None:
        raise PairsError(f"samples: found {samples} with greedy decoding, expected 1, or a temperature to sample at")
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise PairsError("prompts: found none, or an empty one; expected texts to answer")
    settings = {
        "model": name_of(model),
        "weights": signature(model),
        "tokenizer": tokenizer_signature(tokenizer),
        "prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        "positive": positive,
        "negative": negative,
        "form": form,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
        "same_length": same_length,
    }
    partial = Partial(out, settings)
    done = partial.open(resume)
    writer = _Writer(model, tokenizer, (positive, negative), form, max_new_tokens, temperature, seed, same_length)
    jobs = [prompt for prompt in prompts for _ in range(samples)]
    starts = range(0, len(jobs), batch_size)
    with Progress("writing pairs", len(jobs), "pairs", progress) as bar:
        bar.advance(min(len(done) * batch_size, len(jobs)))
        for number in range(len(done), len(starts)):
            batch = jobs[starts[number] : starts[number] + batch_size]
            try:
                rows, dropped = writer.write(batch, number)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted; {number} of {len(starts)} batches are in {partial.path}: run the same with --resume"
                ) from None
            done.append({"batch": number, "rows": rows, "dropped": dropped})
            partial.add(done[-1])
            bar.advance(len(batch))
    made = _made(done, str(out), form)
    write_pairs(out, made.pairs)
    partial.remove()
    return made


@dataclass
class _Writer:
    """Answers batches of prompts under both instructions."""

    model: nn.Module
    tokenizer: Any
    instructions: tuple[str, str]
    form: str
    max_new_tokens: int
    temperature: float | None
    seed: int
    same_length: bool

    def __post_init__(self) -> None:
        self.chat = self.form != "plain"
        self.blank = not self.chat and drops_blank(self.tokenizer)

    def write(self, prompts: Sequence[str], number: int) -> tuple[list[list[str]], dict[str, int]]:
        """The rows (prompt, positive, negative) of a batch, and why others were left out."""
        positive, negative = (self._side(prompts, side, number) for side in (0, 1))
        if self.same_length:
            read = [render_chat(self.tokenizer, p) for p in prompts] if self.chat else prompts
            cut = even(self.tokenizer, list(zip(read, positive, negative)), special=not self.chat)
        else:
            cut = list(zip(positive, negative))
        rows, dropped = [], Counter[str]()
        for prompt, before, sides in zip(prompts, zip(positive, negative), cut):
            if not all(side.strip() for side in before):
                dropped[EMPTY] += 1
            elif before[0].strip() == before[1].strip():
                dropped[EQUAL] += 1
            elif sides is None:
                dropped[NO_LENGTH] += 1
            elif sides[0].strip() == sides[1].strip():  # they part behind the cut
                dropped[EQUAL] += 1
            else:
                rows.append([prompt, *sides])
        return rows, dict(dropped)

    def _side(self, prompts: Sequence[str], side: int, number: int) -> list[str]:
        """What the model writes under one instruction, without a last word that broke off."""
        key = hashlib.sha256(f"{self.seed} {number} {side}".encode()).digest()
        found = continue_prompts(
            self.model,
            self.tokenizer,
            instructed(self.tokenizer, self.form, self.instructions[side], prompts),
            max_new_tokens=self.max_new_tokens,
            special=not self.chat,
            temperature=self.temperature,
            seed=int.from_bytes(key[:4], "big"),
        )
        counts = map(len, encode(self.tokenizer, found, add_special_tokens=False))
        # A text of fewer tokens than were allowed ended by itself; tokenised again it may be a few shorter.
        full = 0.9 * self.max_new_tokens
        found = [(whole_words(text) if count >= full else text.rstrip()) for text, count in zip(found, counts)]
        return [join(p, text) for p, text in zip(prompts, found)] if self.blank else found


def _made(batches: Sequence[dict[str, Any]], source: str, form: str) -> Made:
    try:
        rows = [Pair(*row) for batch in batches for row in batch["rows"]]
    except (KeyError, TypeError) as error:
        raise AusteerError(f"an unfinished run holds rows of another form ({error}); start anew (--force)") from error
    unique = list(dict.fromkeys(rows))
    dropped: Counter[str] = Counter()
    for batch in batches:
        dropped.update(batch["dropped"])
    if len(unique) < len(rows):
        dropped[REPEATED] += len(rows) - len(unique)
    try:
        pairs = Pairs.of(unique, source)
    except PairsError as error:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none were left out"
        raise PairsError(
            f"{error} ({why}); give more prompts, longer answers, instructions that differ more, or another model"
        ) from error
    notes = {
        "system": "instructions were system messages; measure these pairs with the chat template (--chat)",
        "user": "the chat template takes no system message, so instructions stood before the user's text; measure "
        "these pairs with the chat template (--chat)",
        "plain": "the model has no chat template, or none was wanted, so instructions stood before plain prompts",
    }
    return Made(pairs, dict(dropped), (notes[form],))
