"""The index stage: SAEs + activations -> the feature database, alone or on many machines.

    saebase index runs/l6 --acts acts --out l6.duckdb
    srun --ntasks 8 saebase index runs/l6 --acts acts --out l6.duckdb    # then the line above
    saebase index runs/l6 --dataset corpus.jsonl --n-tokens 2000000 --out l6.duckdb

Of several processes each counts its share of the text; the same command alone then makes the
database of what they counted. A text that is no cache's is run through the model first; its
activations lie beside the database while the work lasts.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from activation_cache import ActivationCache, LanguageModel
from feature_db import FeatureDB, IndexConfig, IndexProgress, build_index, index_parts
from feature_db.activations import BYTES_AN_ACTIVATION
from feature_db.indexing.parts import parts_folder
from sae import SAE

from .progress import StageProgress, print_heading, print_made
from .ranks import Ranks

TEXT_SUFFIX = ".acts"


def index_stage(
    console: Console,
    load_lm: Callable[[], LanguageModel],
    folders: Sequence[Path],
    acts: ActivationCache,
    out: Path,
    config: IndexConfig,
    *,
    overwrite: bool = False,
    parts: Sequence[Path] = (),
) -> Path:
    """SAEs + activations -> the feature database. parts: counted elsewhere."""
    print_heading(console, "index", f"{', '.join(map(str, folders))} -> {out}")
    if config.keep_activations:
        print_made(console, [kept_activations_line(folders, acts, out)])
    with StageProgress(console, "index", "tokens") as progress:
        path = build_index(
            load_lm(),
            folders,
            acts,
            out=out,
            config=config,
            on_progress=_shown_by(progress),
            overwrite=overwrite,
            parts=parts,
        )
    with FeatureDB.open(path) as db:
        print_made(console, database_lines(db, path))
    return path


def count_stage(
    console: Console,
    load_lm: Callable[[], LanguageModel],
    folders: Sequence[Path],
    acts: ActivationCache,
    out: Path,
    config: IndexConfig,
    ranks: Ranks,
) -> None:
    """One process's share of the text -> parts beside the database to be."""
    made = parts_folder(out)
    print_heading(console, "index", f"share {ranks.rank} of {ranks.world_size} -> {made}")
    with StageProgress(console, "index", "tokens") as progress:
        index_parts(
            load_lm(),
            folders,
            acts,
            out=made,
            config=config,
            rank=ranks.rank,
            world_size=ranks.world_size,
            on_progress=_shown_by(progress),
        )


def text_folder(out: Path) -> Path:
    """Where the activations of a text lie while it is indexed straight from a model."""
    return out.with_name(out.name + TEXT_SUFFIX)


def forget_text(out: Path) -> None:
    """Remove the activations of a text that was indexed."""
    shutil.rmtree(text_folder(out))


def kept_activations_line(folders: Sequence[Path], acts: ActivationCache, out: Path) -> str:
    """How large the activations that are kept will be, told before."""
    saes = [SAE.load(folder) for folder in folders]
    n = acts.n_tokens * sum(sae.expected_l0 or float(sae.density.sum()) for sae in saes)
    return (
        f"keeping about {n:,.0f} activations, {n * BYTES_AN_ACTIVATION / 1e6:,.0f} MB, in "
        f"{parts_folder(out)}"
    )


def database_lines(db: FeatureDB, path: Path) -> list[str]:
    """What a feature database holds, in a sentence."""
    features, alive, contexts = db.sql(
        "SELECT count(*), count(*) FILTER (WHERE NOT is_dead), "
        "(SELECT count(*) FROM contexts) FROM features"
    ).fetchall()[0]
    return [
        f"{features:,} features ({alive:,} active), {contexts:,} contexts, "
        f"{path.stat().st_size / 1e6:,.1f} MB in {path}"
    ]


def _shown_by(progress: StageProgress) -> Callable[[IndexProgress], None]:
    return lambda told: progress.update(told.done, told.total, unit=told.stage)
