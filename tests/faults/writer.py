"""What a writer does, in a child of the host: harvest the campaign's text."""

from collections.abc import Callable
from functools import cache
from typing import Any

from activation_cache import HarvestProgress, LanguageModel, harvest

from . import failing_calls, tiny_model

texts = cache(tiny_model.texts)


def harvest_texts(
    lm: LanguageModel,
    *,
    out: str,
    options: dict[str, Any],
    fail: tuple[list[Any], str] | None = None,
    on_progress: Callable[[HarvestProgress], None] | None = None,
) -> int:
    """Harvest into `out`. fail: the fields of a `FailingCall`, and how it is made to fail.

    Returns: how often it told of progress; 0 if there was nothing left to do.
    """
    n_told = 0

    def tell(progress: HarvestProgress) -> None:
        nonlocal n_told
        n_told += 1
        if on_progress:
            on_progress(progress)

    if fail:
        failing_calls.arm(failing_calls.FailingCall(*fail[0]), fail[1])
    harvest(lm, texts(), out=out, on_progress=tell, **options)
    return n_told
