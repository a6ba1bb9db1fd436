"""The verb that says what features are about: label. By a person, a file or a language model."""

import os
from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from feature_db import (
    Endpoint,
    FeatureDB,
    LabelConfig,
    LabelEstimate,
    LabelProgress,
    LabelSummary,
    estimate_labels,
    label_features,
    read_label_file,
    visible,
)

from ..cli import app, console
from ..errors import PipelineError
from ..interruption import stop_asked
from ..progress import StageProgress
from .arguments import DEFAULT_DATABASE, Database, Place, SaeId

OPENAI_HOST = "https://api.openai.com/"
OPENAI_KEY = "OPENAI_API_KEY"


@app.command
def label(
    feature: Annotated[int | None, Parameter(help="Feature that a person labels.")] = None,
    text: Annotated[str | None, Parameter(help="Its label.")] = None,
    *,
    db: Database = DEFAULT_DATABASE,
    sae_id: SaeId = None,
    remove: Annotated[
        bool, Parameter(negative=(), help="Take the person's label of FEATURE away.")
    ] = False,
    labels: Annotated[
        Path | None,
        Parameter(
            name=["--import"], help='.jsonl file of {"feature_id": 4021, "label": "..."}, or none.'
        ),
    ] = None,
    features: Annotated[
        str,
        Parameter(help="For the model: all, ids (3,7,12), or SQL that gives feature_id."),
    ] = "all",
    limit: Annotated[int | None, Parameter(help="Features to label, at most.")] = None,
    dry_run: Annotated[
        bool, Parameter(negative=(), help="Say what it would take; send nothing.")
    ] = False,
    api_key_env: Annotated[
        str | None,
        Parameter(
            help="Environment variable with the API key. Left out: OPENAI_API_KEY for "
            "api.openai.com, and no key for any other address."
        ),
    ] = None,
    endpoint: Annotated[Endpoint | None, Parameter(name="*")] = None,
    settings: Annotated[LabelConfig, Parameter(name="*")] = LabelConfig(),  # noqa: B008
) -> None:
    """Label features: one by hand, many from a file, or many with a language model.

    `saebase label 4021 "plural subjects"` is a person's label, which no machine overwrites. With
    --base-url and --model a language model explains features from their contexts, and scores say
    how far its explanations hold; called again it goes on where it was.
    """
    of_model = {
        "--features": features != "all",
        "--limit": limit is not None,
        "--dry-run": dry_run,
        "--api-key-env": api_key_env is not None,
    }
    _require_one_way(feature, labels, endpoint, [name for name, given in of_model.items() if given])
    if feature is not None:
        _label_by_hand(db, feature, text, sae_id, remove=remove)
    elif labels is not None:
        _import(db, labels, sae_id)
    elif endpoint is not None:
        chosen = _chosen(features)
        key = _key(endpoint, api_key_env)
        found = estimate_labels(db, endpoint, settings, features=chosen, sae_id=sae_id, limit=limit)
        _tell_estimate(found, endpoint)
        if not dry_run and found.n_features:
            _label_by_model(db, endpoint, settings, key, chosen, sae_id, limit)


def _require_one_way(
    feature: int | None, labels: Path | None, endpoint: Endpoint | None, of_model: list[str]
) -> None:
    """Raises: PipelineError unless exactly one way of labelling is asked for."""
    if (feature is not None) + (labels is not None) + (endpoint is not None) != 1:
        raise PipelineError(
            'label one feature (label 4021 "plural subjects"), or a file (--import FILE), or with '
            "a language model (--base-url URL --model NAME)"
        )
    if endpoint is None and of_model:
        raise PipelineError(f"{of_model[0]} is for a language model: give --base-url and --model")


def _label_by_hand(
    path: Place, feature: int, text: str | None, sae_id: int | None, *, remove: bool
) -> None:
    if remove == (text is not None):
        raise PipelineError(
            f'label {feature} "..." gives it a label, label {feature} --remove takes it away: '
            "say one of these"
        )
    with FeatureDB.open(path, read_only=False) as db:
        if text is None:
            db.remove_label(feature, sae_id)
        else:
            db.label(feature, text, sae_id)
        shown = db.feature(feature, sae_id)
    method = f" ({shown.label_method})" if shown.label_method else ""
    _say(f"feature {feature}: {shown.shown_label}{method}")


def _import(path: Place, labels: Path, sae_id: int | None) -> None:
    rows = read_label_file(labels)
    if sae_id is not None:
        rows = [row._replace(sae_id=sae_id) if row.sae_id is None else row for row in rows]
    with FeatureDB.open(path, read_only=False) as db:
        db.import_labels(rows)
    _say(f"{len(rows):,} labels of {labels} in {path}")


def _chosen(features: str) -> str | list[int]:
    """`all`, ids with commas or spaces between them, or SQL."""
    words = features.replace(",", " ").split()
    if not words:
        raise PipelineError("--features is empty: give all, ids such as 3,7,12, or SQL")
    return [int(word) for word in words] if all(map(str.isdecimal, words)) else features


def _key(endpoint: Endpoint, name: str | None) -> str | None:
    """The API key. OpenAI's own goes to OpenAI alone: any other address must be asked for."""
    if name is not None:
        key = os.environ.get(name)
        if not key:
            raise PipelineError(f"--api-key-env {name}: the environment has no such variable")
        return key
    is_openai = endpoint.base_url.startswith(OPENAI_HOST)
    if is_openai and not os.environ.get(OPENAI_KEY):
        raise PipelineError(f"{OPENAI_HOST} wants a key: set {OPENAI_KEY}, or give --api-key-env")
    return os.environ[OPENAI_KEY] if is_openai else None


def _tell_estimate(estimate: LabelEstimate, endpoint: Endpoint) -> None:
    console.print(
        f"[bold cyan]label[/]  {estimate.n_features:,} features with {endpoint.model} at "
        f"{endpoint.base_url}",
        highlight=False,
        soft_wrap=True,
    )
    left_out = [(estimate.n_done, "labelled so already"), (estimate.n_empty, "without contexts")]
    for n, why in left_out:
        if n:
            _say(f"{n:,} {why} are passed over")
    cost = "price unknown (--price-in, --price-out)"
    if estimate.cost is not None:
        cost = f"about {estimate.cost:,.4g} at the prices given"
    _say(
        f"about {estimate.n_requests:,} requests, {estimate.prompt_tokens:,} tokens in, "
        f"{estimate.answer_tokens:,} out, by the prompts of {estimate.n_sampled:,} of them; {cost}"
    )


def _label_by_model(
    path: Place,
    endpoint: Endpoint,
    settings: LabelConfig,
    key: str | None,
    features: str | list[int],
    sae_id: int | None,
    limit: int | None,
) -> None:
    with StageProgress(console, "label", "features") as progress, stop_asked() as should_stop:

        def show(p: LabelProgress) -> None:
            cost = "" if p.cost is None else f"  cost {p.cost:,.4g}"
            failed = f"  {p.n_failed:,} failed" if p.n_failed else ""
            speed = f"{p.n_done / max(progress.elapsed_s, 1e-9):.2f} features/s"
            note = f"{speed}  {p.n_tokens:,} tokens{cost}{failed}"
            progress.update(p.n_done, p.n_total, note)

        done = label_features(
            path,
            endpoint,
            settings,
            api_key=key,
            features=features,
            sae_id=sae_id,
            limit=limit,
            on_progress=show,
            should_stop=should_stop,
        )
    _tell_summary(done, path)
    if done.ended == "stopped":
        raise KeyboardInterrupt


def _tell_summary(done: LabelSummary, path: Place) -> None:
    cost = "" if done.cost is None else f", cost {done.cost:,.4g}"
    _say(
        f"{done.n_labelled:,} features labelled in {done.n_requests:,} requests: "
        f"{done.prompt_tokens:,} tokens in, {done.answer_tokens:,} out{cost}"
    )
    if done.n_malformed:
        _say(f"{done.n_malformed:,} answers could not be read")
    if done.n_failed:
        _say(f"{done.n_failed:,} features failed and are asked about again next time; the last, ")
        _say(f"  {done.last_failure}")
    if done.ended == "cap":
        _say("the cap is used up: the same command with a higher one goes on from here")
    sql = "SELECT * FROM explanations ORDER BY detection_score DESC LIMIT 10"
    command = f'saebase query "{sql}" --db {quote(str(path))}'
    console.print(f"[dim]next:[/] {command}", highlight=False, soft_wrap=True)


def _say(line: str) -> None:
    console.print(f"  {visible(line)}", highlight=False, markup=False, soft_wrap=True)
