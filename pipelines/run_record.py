"""A run's folder -> what is known of it: metrics, settings, features, evaluation.

A run that is still training, or was stopped, has metrics and settings alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae import SAE, Metrics
from sae.run_folder import CHECKPOINTS_FOLDER, METRICS_FILE
from sae.storage import CONFIG_FILE, read_description
from sae.wiring import wiring_from

from .errors import PipelineError
from .feature_statistics import FeatureStatistics, feature_statistics
from .flattening import flat
from .sweep_file import runs_in

REPORT_FILE = "report.json"
_LEFT_OUT = ("made_from", "provenance")


class RunRecord(NamedTuple):
    """A run. settings, evaluation: by dotted name; evaluation is empty before `evaluate`.

    features: None until the run is finished.
    """

    name: str
    metrics: list[Metrics]
    settings: dict[str, Any]
    features: FeatureStatistics | None
    evaluation: dict[str, Any]


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in folders; a sweep's folder stands for all of its runs.

    Raises: PipelineError for what is no run; FormatError for a damaged SAE.
    """
    runs = [run for folder in folders for run in runs_in(folder) or [folder]]
    runs = list(dict.fromkeys(runs))
    return [_read_run(folder, name) for folder, name in zip(runs, _names(runs), strict=True)]


def read_metrics(folder: Path) -> list[Metrics]:
    """The lines of metrics.jsonl; one that is being written is left out.

    Raises: PipelineError if there are none.
    """
    file, lines = folder / METRICS_FILE, []
    if not file.is_file():
        raise PipelineError(
            f"{folder} holds no {METRICS_FILE}: expected the folder of a run, such as train makes"
        )
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(Metrics(**json.loads(text)))
        except (json.JSONDecodeError, TypeError):
            break
    if not lines:
        raise PipelineError(f"{file} holds no line yet: wait until training has logged one")
    return lines


def _names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their last parts, as many as it takes."""
    parts = [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-n:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(folder: Path, name: str) -> RunRecord:
    metrics = read_metrics(folder)
    is_finished = (folder / CONFIG_FILE).is_file()
    description = read_description(folder) if is_finished else _settings_so_far(folder)
    report = folder / REPORT_FILE
    return RunRecord(
        name=name,
        metrics=metrics,
        settings=_settings(description),
        features=feature_statistics(SAE.load(folder)) if is_finished else None,
        evaluation=_evaluation(report) if report.is_file() else {},
    )


def _settings_so_far(folder: Path) -> dict[str, Any]:
    """The settings in the newest checkpoint; none before the first one."""
    manifests = sorted((folder / CHECKPOINTS_FOLDER).glob("step-*/manifest.json"))
    try:
        content = json.loads(manifests[-1].read_text(encoding="utf-8"))
        return dict(content["body"]["values"]["settings"])
    except (IndexError, OSError, ValueError, KeyError):
        return {}


def _settings(description: Mapping[str, Any]) -> dict[str, Any]:
    """Architecture, place and model first, then every setting that training had."""
    if not description:
        return {}
    wiring, made_with = wiring_from(dict(description)), description.get("provenance", {})
    first = {
        "architecture": description.get("architecture"),
        "place": wiring.name if wiring else None,
        "model": made_with.get("model"),
        "data": made_with.get("data"),
        "n_tokens_trained": description.get("n_tokens_trained"),
    }
    settings = {**first, **description.get("sae", {}), **(description.get("train") or {})}
    return {name: value for name, value in settings.items() if value is not None}


def _evaluation(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        return {
            name: value
            for name, value in flat({k: v for k, v in report.items() if k not in _LEFT_OUT}).items()
            if not isinstance(value, str)
        }
    except (OSError, ValueError, AttributeError) as error:
        raise PipelineError(f"{file} can't be read: evaluate the run again") from error
