"""The analytic cost model: what steering costs on each path, from a model's config alone, beside the model itself.

Nothing is run with values and no weights are read; a model of any size takes a second or so. The predictions are held
against counts of real forward passes in tests/costs/test_steering.py, and against times measured on a GPU.

How seconds follow from what is counted, for a pass with or without steering:

- D, of the device: max(bytes / bandwidth, operations / flops) + launches * seconds a launch (``ceilings``), a floor.
- H, of the host: the model's launches * seconds a launch of the host, and what each way takes at each site beside them:
  so much for entering it and so much for each operation (``host``), nothing for fold and bias.
- Eager on a GPU: max(D, H). The host queues what the device does later; decoding a few rows the host is the later one,
  and then only what it is spared counts.
- A CUDA graph, and compiled: D. Nothing is called one by one; compiled, what is elementwise has no launch of its own.
- Eager on a CPU: max(bytes / bandwidth, operations / flops) + H, as one processor does both; compiled: D.

An overhead is the pass with a way over the pass without, less 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PlanError, SiteError, SteeringError, check_count
from ..models.families import Layout
from ..models.sites import find_sites
from ..models.skeleton import dtypes, load_config, skeleton
from ..models.structure import unwrap
from ..plans.table import OPERATIONS
from .ceilings import Ceilings, ceilings
from .host import Host
from .shapes import LayerWork, layer_works
from .unsteered import UnsteeredPass, unsteered
from .ways import WAYS, automatic, kept_bytes, place_of, runs_as, runs_kernel, why_not
from .work import EXECUTIONS, Target, Work

#: The dtypes that predictions are made for: all that the kernels have on every device.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Extra:
    """What one way to steer adds to a forward pass.

    Attributes:
        work: over all its sites. device, host: seconds of each for it.
        overhead: of the pass's predicted seconds, as a fraction: 0.01 is 1 %.
    """

    work: Work
    device: float
    host: float
    overhead: float

    def to_json(self) -> dict[str, Any]:
        work = {**asdict(self.work), "bytes": self.work.bytes}
        return {**work, "device": self.device, "host": self.host, "overhead_percent": 100 * self.overhead}


@dataclass(frozen=True)
class Pass:
    """One forward pass: of the prompt (prefill), or of one new token a row (decode).

    Attributes:
        tokens: of all rows. past: tokens a row that are in the cache before.
        unsteered: the model itself. device, host: seconds of each for it. seconds: predicted of the pass.
        extra: what each way adds.
    """

    tokens: int
    past: int
    unsteered: UnsteeredPass
    device: float
    host: float
    seconds: float
    extra: dict[str, Extra]

    def to_json(self) -> dict[str, Any]:
        itself = {**self.unsteered.to_json(), "device": self.device, "host": self.host, "seconds": self.seconds}
        extra = {way: found.to_json() for way, found in self.extra.items()}
        return {"tokens": self.tokens, "past": self.past, "unsteered": itself, "extra": extra}


@dataclass(frozen=True)
class SteeringCost:
    """What steering costs; made by :func:`steering_cost`.

    Attributes:
        model: its type. site, k, operation, dtype, device, batch, execution: what was asked about.
        layers: of the model. aus: layer -> how many AUs are steered there; other layers are not touched.
        decode, prefill: one forward pass each.
        memory: bytes that each way keeps on the device: tables, and for fold the weights' saved rows.
        refused: ways that are not possible here, and why. auto: the one that ``mode="auto"`` takes for a decoded token.
        ceilings, host: what the seconds were worked out with. notes: what is not known of the model.
    """

    model: str
    site: str
    k: int
    operation: str
    dtype: str
    device: str
    batch: int
    execution: str
    layers: int
    aus: dict[int, int]
    decode: Pass
    prefill: Pass
    memory: dict[str, int]
    refused: dict[str, str]
    auto: str
    ceilings: Ceilings
    host: Host
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"decode": self.decode.to_json(), "prefill": self.prefill.to_json()}

    def conclusion(self) -> str:
        """One plain sentence."""
        extra = self.decode.extra

        def percent(way: str) -> str:
            found = 100 * extra[way].overhead
            return "nothing" if found == 0 else f"{found:.2g} %" if found >= 0.005 else "less than 0.01 %"

        beside = {"columns": "columns", "public": "the public code's arithmetic"}
        told = [f"{words} {percent(way)}" for way, words in beside.items() if way != self.auto and way in extra]
        return (
            f"Steering {self.k} AUs in {len(self.aus)} of {self.layers} layers ({self.execution}), of a decoded "
            f"token: auto takes {self.auto} and adds {percent(self.auto)}{'; ' if told else ''}{', '.join(told)}."
        )


@dataclass(frozen=True)
class Pace:
    """How seconds follow from what is counted: the rule above."""

    ceilings: Ceilings
    host: Host
    target: Target

    def device(self, moved: float, operations: float, launches: float) -> float:
        """D; in eager mode on a CPU launches are the host's."""
        both = self.target.kind == "cpu" and self.target.execution == "eager"
        return self.ceilings.seconds(moved, operations, 0 if both else launches)

    def seconds(self, device: float, host: float) -> float:
        """Of a pass, from all of D and H."""
        if self.target.execution != "eager":
            return device
        return device + host if self.target.kind == "cpu" else max(device, host)


def spread(k: int, touched: int, layers: int) -> dict[int, int]:
    """Layer -> AUs: k of them over ``touched`` of ``layers`` layers, which lie as far apart as can be; evenly."""
    chosen = [round((i + 0.5) * layers / touched - 0.5) for i in range(touched)]
    starts = [-(-i * k // touched) for i in range(touched + 1)]
    return {layer: starts[i + 1] - starts[i] for i, layer in enumerate(chosen)}


def steering_cost(
    model: Any,
    site: str = "ffn",
    k: int = 100,
    *,
    layers: int | None = None,
    batch: int = 1,
    prompt_tokens: int = 512,
    context: int = 512,
    operation: str = "scale",
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device = "cuda",
    execution: str = "eager",
    bandwidth: float | None = None,
    flops: float | None = None,
    launch: float | None = None,
    host_us: float | None = None,
    layout: Layout | None = None,
) -> SteeringCost:
    """Predicts what each way to steer adds to a forward pass: bytes, operations, launches, memory, seconds.

    The ways: this library's ``fold``, ``bias``, ``columns``, ``fused`` and ``dense`` (docs/steering.md); ``public``,
    the paper's code, at every layer; ``dense hook`` and ``sparse hook``, what one writes with PyTorch hooks; and
    ``lora``, the same edit as a PEFT adapter that is not merged.

    The device's seconds are a floor: every byte goes through memory at full speed, the launches follow each other at
    the ceilings' cost. Small tensors that stay in a cache cost less than their bytes say, and the product of ``fused``
    is taken to be as fast as the library's, which only a measurement can tell. The host's seconds are in proportion
    to what was measured on one machine (:mod:`austeer.costs.host`).

    Args:
        model: a Transformers config, what :func:`austeer.models.skeleton.load_config` takes (a folder, a config.json,
            a Hub id, "demo"), or a model, of which only the config is looked at. A quantised one counts as before it
            was.
        site, k: the AUs, spread evenly. layers: how many layers they are in; by default as many as there are, or k.
        batch: rows. prompt_tokens: of each row, in the prefill. context: of each row, at the decoded token.
        dtype: of weights and activations: float16, bfloat16 or float32, or "auto", as the model was saved.
        device: "cpu" or "cuda"; an H100 if there is no GPU here.
        execution: "eager", "graph" (a CUDA graph, on a GPU) or "compile".
        bandwidth, flops, launch: see :class:`austeer.costs.ceilings.Ceilings`; measured on the device by default, in
            about a second, or an H100's.
        host_us: microseconds of the host for each launch of the model in eager mode; measured by default, or an H200's.

    Raises:
        ModelError: no such config, or no decoder that Transformers has.
        SiteError: a site or layers that the model does not have. PlanError: more AUs than there are, or than layers.
        SteeringError: an operation, dtype, device, execution or number that cannot be.
    """
    batch = check_count("batch", batch, 2**20, "rows of a batch", SteeringError)
    prompt_tokens = check_count("prompt_tokens", prompt_tokens, 2**24, "tokens of a row", SteeringError)
    context = check_count("context", context, 2**24, "tokens of a row", SteeringError)
    if operation not in OPERATIONS:
        raise SteeringError(f"operation: found {operation!r}, expected one of {', '.join(OPERATIONS)}")
    device, config = _device(device), _config(model)
    dtype = dtypes(config, dtype)[1] if isinstance(dtype, str) else dtype
    if dtype not in DTYPES:
        raise SteeringError(f"dtype: found {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    network = skeleton(config, dtype)
    found = find_sites(network, list(dict.fromkeys([site, "layer", "attention"])), layout)
    places, width = found[site], found[site][0].width
    count = len(places)
    aus = _chosen(k, layers, count, width, site)
    target = _target(device, execution)
    host = Host.of(device, host_us) if execution == "eager" else Host(0.0, "nothing is called one by one")
    pace = Pace(ceilings(device, dtype, bandwidth, flops, launch), host, target)
    works = layer_works(network, found)
    touched = [places[layer] for layer in aus]
    reasons = {way: why_not(network, way, touched, operation) for way in WAYS}
    ways = [way for way in WAYS if not reasons[way]]

    def one(length: int, past: int) -> Pass:
        itself = unsteered(network, found["layer"], works, batch, length, past)
        device = pace.device(itself.bytes, itself.operations, itself.launches or 0)
        host = pace.host.launch * (itself.launches or 0)
        seconds, extra = pace.seconds(device, host), {}
        for way in ways:
            work, called = Work(), 0.0
            for at in places if way == "public" else touched:
                place = place_of(network, at, batch * length, aus, dtype, operation)
                here = WAYS[way](place, target)
                called += pace.host.site(runs_as(way, place), here.launches, runs_kernel(way, place, target))
                work += here
            floor = pace.device(work.moved, work.operations, work.launches)
            extra[way] = Extra(work, floor, called, pace.seconds(device + floor, host + called) / seconds - 1)
        return Pass(batch * length, past, itself, device, host, seconds, extra)

    decode = one(1, context - 1)
    decoded = [place_of(network, at, batch, aus, dtype, operation) for at in touched]
    return SteeringCost(
        model=network.config.model_type,  # type: ignore[union-attr,arg-type]
        site=site,
        k=k,
        operation=operation,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        batch=batch,
        execution=execution,
        layers=count,
        aus=aus,
        decode=decode,
        prefill=one(prompt_tokens, 0),
        memory={way: kept_bytes(network, way, places, aus, dtype, operation, target) for way in ways},
        refused={way: reason for way, reason in reasons.items() if reason},
        auto=automatic(ways, decoded, target),
        ceilings=pace.ceilings,
        host=pace.host,
        notes=tuple(_notes(config, works, decode)),
    )


def _chosen(k: int, layers: int | None, count: int, width: int, site: str) -> dict[int, int]:
    """Layer -> AUs, as :func:`spread`, of numbers that the model's layers and widths allow."""
    k = check_count("k", k, count * width, f"the AUs of site {site!r}: {count} layers of {width}", PlanError)
    if layers is None:
        layers = min(k, count)
    layers = check_count("layers", layers, count, "the model's layers", SiteError)
    if not layers <= k <= layers * width:
        raise PlanError(
            f"k: found {k} AUs for {layers} layers, expected {layers} to {layers * width} (each layer that is touched "
            f"has at least one AU and at most {width}); change k or layers"
        )
    return spread(k, layers, count)


def _notes(config: Any, works: Sequence[LayerWork], decode: Pass) -> Iterator[str]:
    if getattr(config, "quantization_config", None) is not None:
        yield "the checkpoint is quantised, and counted as the model before it was"
    if decode.unsteered.launches is None:
        yield (
            "the model's code cannot be followed without values: its own launches are not known and not in its floor, "
            "so the overheads are too high"
        )
    mixture = next((work.experts for work in works if work.experts), None)
    if mixture and mixture[0] == mixture[1]:
        yield f"all {mixture[1]} experts run for every token, or nothing says how many do"
    if getattr(config.get_text_config(), "kv_lora_rank", None):
        yield "what Transformers does to make keys and values anew from cached latents is not counted"
    if any(not work.attention for work in works):
        yield "the recurrence of linear attention layers is not among the model's operations"


def _config(model: Any) -> Any:
    if isinstance(model, nn.Module):
        return unwrap(model).config
    return load_config(str(model)) if isinstance(model, str) or hasattr(model, "__fspath__") else model


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise SteeringError(f"device: found {str(device)!r}, expected cpu or cuda")
    gpus = torch.cuda.device_count()
    if found.type == "cuda" and gpus and (found.index or 0) >= gpus:
        raise SteeringError(f"device: found {str(device)!r}, expected cuda:0 to cuda:{gpus - 1}, which are here")
    return found


def _target(device: torch.device, execution: str) -> Target:
    expected = EXECUTIONS if device.type == "cuda" else ("eager", "compile")
    if execution not in expected:
        raise SteeringError(f"execution: found {execution!r} on {device.type}, expected one of {', '.join(expected)}")
    return Target.of(device, execution)
