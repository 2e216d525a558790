"""The two strategies of a measurement: batch by batch through the whole model, or all batches layer by layer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, suppress

import torch

from ..errors import AusteerError, CaptureError, GradientError
from ..forward.capture import LastTokens
from ..forward.packing import Batch
from ..forward.pair_scores import PairBatch, effects_of
from ..models.structure import evaluating, first_layers
from ..pairs.pairs import Pairs
from ..utils.background import ahead
from ..utils.interrupt import Interruption, MeasurementInterrupted
from ..utils.machine import wait_for
from ..utils.progress import Progress
from .blocks import Block
from .measurement import Measurement


def run_resident(m: Measurement) -> None:
    """Counts all blocks of this process; raises what :func:`austeer.measure` does."""
    held = min(m.block_pairs, len(m.pairs)) if isinstance(m.pairs, Pairs) else m.block_pairs
    capture = LastTokens(m.model, m.sites, 2 * held, m.device)
    if m.tree is not None:
        capture.tree = m.tree
    seconds = m.report.seconds
    with (
        first_layers(m.model, m.root, m.depth) if m.gradients is None else m.gradients.attached(),
        evaluating(m.model),
        capture.attached(),
        Progress("measuring", m.total(), "pairs", m.progress) as bar,
        Interruption(m.checkpoint is not None) as interruption,
        closing(ahead(m.blocks)) as blocks,
    ):
        if m.tally.pairs:
            bar.advance(m.tally.pairs)
        try:
            _count(m, blocks, capture, interruption, bar)
        except Exception:
            if m.tally.pairs:  # else there is nothing to go on from, and a file would only be in the way
                with suppress(AusteerError):  # it is the first error that matters
                    m.save()
            raise
        start = time.perf_counter()
        wait_for(m.device)
        seconds.forward += time.perf_counter() - start
        if m.processes.count > 1:  # another one may fail while this one waits for it
            m.save()


def _count(
    m: Measurement, blocks: Iterator[Block], capture: LastTokens, interruption: Interruption, bar: Progress
) -> None:
    seconds, unsaved = m.report.seconds, 0
    while True:
        start = time.perf_counter()
        block = next(blocks, None)
        seconds.wait += time.perf_counter() - start
        if block is None:
            break
        if not _run(m, block, capture, interruption):
            m.save()
            raise MeasurementInterrupted(_how_to_go_on(m, f"{m.tally.pairs} pairs"))
        start = time.perf_counter()
        m.tally.add(block, capture.buffers)
        if m.writer is not None:
            if not block.pairs:
                raise CaptureError(
                    f"save_activations: found pairs {block.offset} to {block.offset + block.size - 1} with equal texts "
                    "all, expected some activations to keep; leave these pairs out"
                )
            buffers = {name: capture.buffers[name] for name in m.sites}
            m.writer.add(buffers, block.numbers, first=block.offset, pairs=block.size, cut=block.cut, half=block.half)
        unsaved += 1
        if unsaved == m.every or block.number == m.processes.index:  # a NaN in the first block should not take long
            m.save()
            unsaved = 0
        seconds.count += time.perf_counter() - start
        note = f"{m.report.tokens_run / max(seconds.wait + seconds.forward, 1e-9):.0f} tokens/s"
        bar.advance(block.size, f"{note}, {m.report.padding:.0%} padding", m.total())


def _run(m: Measurement, block: Block, capture: LastTokens, interruption: Interruption) -> bool:
    """Runs a block's batches; whether it was finished, or an interruption was asked for before."""
    start = time.perf_counter()
    for batch in block.batches:
        if interruption.asked:
            return False
        _run_batch(capture, batch)
    now = time.perf_counter()
    m.report.seconds.forward += now - start
    for found in block.pair_batches:
        if interruption.asked:
            return False
        _run_pairs(m, block, found)
    m.report.seconds.effects += time.perf_counter() - now
    _note(m, block)
    return not interruption.asked


def _run_pairs(m: Measurement, block: Block, found: PairBatch) -> None:
    assert m.gradients is not None
    try:
        m.tally.add_effects(block, found.pairs, effects_of(m.gradients, found, m.tree))
    except CaptureError as error:
        first, last = (block.numbers[int(found.pairs[place])] for place in (0, -1))
        raise type(error)(f"effects, pairs {first} to {last} of {m.pairs.source}: {error}") from error
    except torch.cuda.OutOfMemoryError as error:
        raise GradientError(
            f"effects: {found.batch.ids.numel()} tokens with their activations do not fit into the memory of "
            f"{m.device}; give a smaller batch_tokens, or cut texts with max_length"
        ) from error


def _run_batch(capture: LastTokens, batch: Batch) -> None:
    """A batch, or where it does not fit into a GPU's memory its halves: rows are written again, and nothing is lost."""
    try:
        capture.run(batch)
        return
    except torch.cuda.OutOfMemoryError as error:
        halves = batch.halves()
        if halves is None:
            raise CaptureError(
                f"a row of {batch.ids.shape[1]} tokens does not fit into the memory of {capture.device}; cut texts "
                "with max_length, or give a device map that leaves more memory free"
            ) from error
    torch.cuda.empty_cache()
    for half in halves:
        _run_batch(capture, half)


def run_layerwise(m: Measurement) -> None:
    """Counts all blocks of this process, one layer after the other; raises what ``Layerwise.run`` does, too."""
    layerwise, report = m.layerwise, m.report
    assert layerwise is not None
    seconds = report.seconds
    start = time.perf_counter()
    blocks = list(m.blocks)
    seconds.wait = time.perf_counter() - start
    if m.resumed_digest is not None and m.resumed_digest != m.blocks.digest:
        m.blocks.others()
    count = sum(len(block.batches) for block in blocks)
    with (
        evaluating(m.model),
        Progress("measuring", count * len(layerwise.layers), "batches", m.progress) as bar,
        Interruption(m.checkpoint is not None) as interruption,
    ):
        bar.advance(count * m.first_layer)

        def on_batch(batch: Batch) -> None:
            bar.advance(1, f"layer {m.first_layer} of {len(layerwise.layers)}")
            if interruption.asked:
                raise MeasurementInterrupted(_how_to_go_on(m, f"{m.first_layer} of {len(layerwise.layers)} layers"))

        def on_layer(number: int) -> None:
            start = time.perf_counter()
            m.first_layer = number + 1
            m.save()
            seconds.count += time.perf_counter() - start

        if m.first_layer < len(layerwise.layers):  # else all was counted before, and the hidden states are gone
            layerwise.run(blocks, m.tally.counting, on_batch=on_batch, on_layer=on_layer, first_layer=m.first_layer)
    for block in blocks:
        m.tally.done(block)
        _note(m, block)
    seconds.forward, seconds.weights = layerwise.computed, layerwise.traffic.waited
    report.weights_read, report.weights_held = layerwise.traffic.read, layerwise.traffic.peak


def _note(m: Measurement, block: Block) -> None:
    m.report.pairs += block.size
    m.report.texts += 2 * block.pairs
    m.report.tokens_texts += block.texts_tokens
    m.report.batches += len(block.batches)
    m.report.tokens_run += sum(batch.tokens for batch in block.batches)
    m.report.tokens_padded += sum(batch.ids.numel() for batch in block.batches)


def _how_to_go_on(m: Measurement, done: str) -> str:
    assert m.checkpoint is not None
    if not m.checkpoint.path.exists():
        return f"interrupted; nothing was complete yet, and {m.checkpoint.path} was not written. Run the same again"
    kept = f"interrupted after {done}, which are kept in {m.checkpoint.path}"
    return f"{kept}; run the same again with resume (--resume) to go on"
