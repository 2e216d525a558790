"""lm-eval (the package ``lm_eval``) on steered models: its tasks and metrics, through its own HFLM."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import TaskError
from ..forward.causality import expect_causal
from ..models.structure import evaluating
from ..pairs.chat import ChatForm, check_chat, options_of
from ..plans.plan import Plan
from ..steering.steer import steer
from ..steering.strength import Alpha
from .evaluate import Variant, checked_variants
from .evaluation import UNSTEERED


@contextmanager
def steered_lm(
    model: nn.Module,
    tokenizer,
    plan: Plan | None = None,
    alpha: Alpha = 1.0,
    *,
    k: int | None = None,
    batch_size: int = 16,
    **options: Any,
) -> Iterator[Any]:
    """A steered model as lm-eval's ``HFLM``, for its ``simple_evaluate(model=...)``; steered within the context.

    Example::

        with steered_lm(model, tokenizer, plan, alpha=8) as lm:
            lm_eval.simple_evaluate(model=lm, tasks=["boolq"])

    Args:
        plan: None for the model as it is. alpha, k: as of :func:`austeer.steer`.
        batch_size: rows of lm-eval's batches. options: what else ``HFLM`` takes.

    Raises:
        TaskError: lm-eval is not installed, or a model whose attention is not causal.
    """
    _require()
    expect_causal(model)
    from lm_eval.models.huggingface import HFLM

    with evaluating(model), nullcontext() if plan is None else steer(model, plan, alpha, k=k):
        logger = logging.getLogger("lm_eval.models.huggingface")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of a model that is given as an object
        try:
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **options)
        finally:
            logger.setLevel(level)
        yield lm


def check_tasks(names: Sequence[str], include_path: str | Path | None = None) -> list[str]:
    """Tasks of lm-eval by their names, before a model is loaded.

    Args:
        include_path: a folder with further tasks, as YAML.

    Raises:
        TaskError: lm-eval is not installed, no name, or one that it does not know.
    """
    manager = _manager(None if include_path is None else str(include_path))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise TaskError(
            f"lm-eval: found the tasks {', '.join(map(repr, unknown)) or 'none'}, expected names of its "
            f"{len(manager.all_tasks)} tasks (lm-eval ls tasks), or of a YAML file in --lm-eval-path"
        )
    return list(names)


def lm_evaluate(
    model: nn.Module,
    tokenizer,
    tasks: Sequence[str],
    variants: Mapping[str, Plan | Variant | tuple] | None = None,
    *,
    limit: int | None = None,
    chat: ChatForm = False,
    batch_size: int = 16,
    include_path: str | Path | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """lm-eval's metrics of the unsteered model and of every variant: variant -> task -> metric -> value.

    Args:
        tasks: lm-eval's names. variants: as of :func:`austeer.tasks.evaluate`; one is run after another.
        limit: only so many items of each task, the first ones. chat: lm-eval's own chat template
            option; ``system`` of its options (:data:`austeer.pairs.chat.ChatForm`) is lm-eval's system instruction.
        include_path: as of :func:`check_tasks`.

    Raises:
        TaskError: lm-eval is not installed, a task that it does not know, or one whose data it cannot load.
    """
    chosen = checked_variants(variants or {})
    if chat:
        check_chat(tokenizer, options_of(chat))
    options = options_of(chat)
    system = options.pop("system", None)
    arguments: dict[str, Any] = {"chat_template_args": options} if options else {}
    names = check_tasks(tasks, include_path)
    manager = _manager(None if include_path is None else str(include_path))
    import lm_eval

    try:
        manager.load(names)  # its data, before anything is run
    except Exception as error:  # of the data's library, or of the hub's client: there are many
        reason = " ".join(str(error).split())[:200]
        raise TaskError(
            f"lm-eval: {', '.join(names)}: cannot be loaded ({type(error).__name__}: {reason}); lm-eval takes its data "
            "from the Hugging Face Hub: run once with a connection, or write a task (YAML) with local files as its data"
        ) from error
    found: dict[str, dict[str, dict[str, float]]] = {}
    every: dict[str, Any] = {UNSTEERED: (None, 1.0, None), **chosen}
    for name, (plan, alpha, k) in every.items():
        with steered_lm(model, tokenizer, plan, alpha, k=k, batch_size=batch_size, **arguments) as lm:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=names,
                limit=limit,
                apply_chat_template=bool(chat),
                system_instruction=system,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
            )
        assert results is not None
        found[name] = {task: _metrics(values) for task, values in results["results"].items()}
    return found


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """By lm-eval's names, without the filter where there is none."""
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items() if "," in name}


@lru_cache(maxsize=2)  # it reads thousands of files
def _manager(include_path: str | None) -> Any:
    _require()
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise TaskError(f"lm-eval: {include_path}: no such folder, expected one with tasks as YAML")
    return TaskManager(include_path=include_path)


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise TaskError(f"lm-eval is not installed ({error}); pip install 'austeer[lm-eval]'") from error
