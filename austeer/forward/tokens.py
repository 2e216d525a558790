"""Token ids of texts and pairs, without what a tokenizer appends of itself, cut so that the answer stays."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import AusteerWarning, PairsError, check_count
from ..models.structure import text_config
from ..pairs.pairs import Pair


@dataclass(frozen=True)
class Tokenised:
    """Token ids of the positive and negative texts of the pairs whose two texts differ.

    Attributes:
        positive, negative: one list of ids a pair. number: the pair's place among those given.
        cut: how many texts were cut to fit.
        together: both texts of each pair, where they were cut by as much each, so that what they share is shared still.
    """

    positive: list[list[int]]
    negative: list[list[int]]
    number: list[int]
    cut: int
    together: list[tuple[list[int], list[int]]]


def encode(tokenizer, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of texts, begun once as the tokenizer begins texts, and without what it ends them with of itself.

    A text that already begins as the tokenizer would begin it (with the beginning-of-text token, from a chat template
    that was rendered elsewhere) gets no second one: models never saw two.
    """
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False)["input_ids"]
    before, after = frame(tokenizer) if add_special_tokens else ([], [])
    for i, tokens in enumerate(ids):
        start = len(before) if before and tokens[: 2 * len(before)] == 2 * before else 0
        stop = len(tokens) - len(after) if after and tokens[-len(after) :] == after else len(tokens)
        ids[i] = tokens[start:stop]
    return ids


def frame(tokenizer) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and behind every text of itself, as token ids."""
    bare, framed = (
        tokenizer(["a"], add_special_tokens=special, return_attention_mask=False)["input_ids"][0]
        for special in (False, True)
    )
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return [], []


def begun(tokenizer, texts: Sequence[str]) -> int:
    """How many texts already begin as the tokenizer begins texts of itself."""
    before = frame(tokenizer)[0]
    if not before or not texts:
        return 0
    ids = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return sum(tokens[: len(before)] == before for tokens in ids)


def tokenise(
    tokenizer, pairs: Sequence[Pair], max_length: int, *, special: bool = True, source: str = "memory", first: int = 0
) -> Tokenised:
    """Token ids of each pair's two texts, cut on the left to ``max_length`` so that the answer stays.

    A leading beginning-of-text token survives the cut, and the last token is the answer's (:func:`encode`).

    Args:
        special: whether the tokenizer adds its special tokens; a rendered chat template holds its own.
        source, first: where the pairs are from, and the first one's number there, for messages.

    Raises:
        PairsError: a text without a token.
    """
    texts = [p.prompt + p.positive for p in pairs] + [p.prompt + p.negative for p in pairs]
    ids = encode(tokenizer, texts, add_special_tokens=special)
    bos = tokenizer.bos_token_id
    cut, whole = 0, list(ids)
    for i, tokens in enumerate(ids):
        if not tokens:
            raise PairsError(f"{source}, pair {first + i % len(pairs)}: found no token in {texts[i]!r:.60}")
        if len(tokens) > max_length:
            cut += 1
            ids[i] = _without(tokens, len(tokens) - max_length, bos, max_length)
    positive, negative = ids[: len(pairs)], ids[len(pairs) :]
    # Equal texts would differ by the rounding of the batches that they happen to be in, and count as evidence.
    number = [i for i in range(len(pairs)) if positive[i] != negative[i]]
    together = []
    for i in number:
        both = whole[i], whole[len(pairs) + i]
        over = max(map(len, both)) - max_length
        if over > 0:
            both = _without(both[0], over, bos, max_length), _without(both[1], over, bos, max_length)
        together.append(both)
    return Tokenised([positive[i] for i in number], [negative[i] for i in number], number, cut, together)


def _without(tokens: list[int], over: int, bos: int | None, max_length: int) -> list[int]:
    """The tokens without so many at the left, where there are as many; a token that begins all texts stays."""
    head = [bos] if bos is not None and tokens[0] == bos and max_length > 1 else []
    return head + tokens[over + len(head) :]


def made_up(count: int, vocabulary: int, start: int = 11) -> list[int]:
    """Tokens for a question to a model: the same each time, and unlike each other."""
    return [(start + 7 * i * i + 5 * i) % vocabulary for i in range(count)]


def check_vocabulary(size: int, token_ids: Sequence[Sequence[int]]) -> None:
    """Raises PairsError if a token is not among the ``size`` of the model: the tokenizer is another one's."""
    largest = max((max(ids, default=0) for ids in token_ids), default=0)
    if largest >= size:
        raise PairsError(
            f"found token {largest}, and the model's vocabulary has {size}; expected the model's own tokenizer"
        )


def length_limit(model: nn.Module, max_length: int | None) -> int:
    """The longest text, in tokens: ``max_length``, within the model's context. Warns where that is lower."""
    context = getattr(text_config(model), "max_position_embeddings", None)
    if max_length is not None:
        max_length = check_count("max_length", max_length, None, "tokens of a text", PairsError)
    limit = within(max_length, context)
    if limit is None:
        raise PairsError("the model's config names no context length; give max_length")
    return limit


def within(max_length: int | None, context: int | None) -> int | None:
    """``max_length``, but at most the context of a model; None where neither is known. Warns where it is lowered."""
    if max_length is not None and context is not None and max_length > context:
        warnings.warn(
            f"max_length: found {max_length}, and the model's context is {context} tokens (max_position_embeddings); "
            f"texts are cut to {context}",
            AusteerWarning,
            stacklevel=3,
        )
    return min((n for n in (max_length, context) if n is not None), default=None)
