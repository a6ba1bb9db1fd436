"""The demo: the main job on a small real model, and then what it was for.

In: `demo.yaml` beside this file. Out: after the stages, a dozen features with their contexts, three
SQL queries with their answers, one prompt unsteered and steered, and what to try next.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from activation_cache import LanguageModel
from feature_db import FeatureDB, visible
from feature_db.shading import shaded_text
from interp import Clamp, SteeringOutcome, compare
from sae import SAE

from .config import PipelineConfig, read_config
from .console_tables import outcome_table
from .doctor import has_fast_bfloat16

CONFIG = Path(__file__).with_name("demo.yaml")
N_SHOWN = 12
PROMPT = "I went to the museum and saw"
DOSES = (3.0, 2.0, 4.0, 1.5)
"""Strengths that are tried, in maxima: the first that changes the text and keeps it readable."""
READABLE = 12.0
"""Perplexity of the steered text over that of the unsteered one, above which it is babble."""

# Features that are plainly about something: active often enough to be seen and seldom enough to
# mean something, in several documents, and promoting the very tokens that they fire on.
CLEAR_FEATURES = """
WITH fires AS (
    SELECT sae_id, feature_id, token_id, lower(trim(token)) AS word, n_active, lift
    FROM feature_tokens
    WHERE length(trim(token)) >= 4 AND regexp_full_match(trim(token), '[A-Za-z]+')
), says AS (
    SELECT sae_id, feature_id, lower(trim(token)) AS word, max(logit) AS logit
    FROM feature_logits WHERE sign = 1 GROUP BY ALL
), spread AS (
    SELECT sae_id, feature_id, count(DISTINCT doc_id) AS n_documents
    FROM contexts WHERE kind = 'top' GROUP BY ALL
)
SELECT feature_id, label, n_active, n_documents, max_act,
       max(says.logit) AS logit, arg_max(fires.word, fires.n_active) AS word
FROM features
JOIN fires USING (sae_id, feature_id)
JOIN says USING (sae_id, feature_id, word)
JOIN spread USING (sae_id, feature_id)
WHERE features.n_active BETWEEN 25 AND 2000 AND n_documents >= 4
GROUP BY ALL
ORDER BY logit * ln(n_documents) DESC, feature_id
"""

QUERIES = {
    "Which features fire on the widest range of documents, and yet seldom?": """
SELECT feature_id, label, round(density * 100, 3) AS percent_of_tokens,
       count(DISTINCT doc_id) AS documents
FROM features JOIN contexts USING (sae_id, feature_id)
WHERE kind = 'top' AND density < 0.001
GROUP BY ALL ORDER BY documents DESC, max(act) DESC LIMIT 5""",
    "Which features are about wars, and in which articles do they fire most strongly?": """
SELECT feature_id, label, source AS article, round(max(act), 1) AS act
FROM features JOIN contexts USING (sae_id, feature_id) JOIN documents USING (doc_id)
WHERE label ILIKE '%war%' OR label ILIKE '%army%' OR label ILIKE '%military%'
GROUP BY ALL ORDER BY act DESC LIMIT 5""",
    "Which pairs of features point in nearly the same direction?": """
SELECT feature_id, a.label, neighbor_id, b.label AS neighbor_label, round(cosine, 2) AS cosine
FROM neighbors
JOIN features a USING (sae_id, feature_id)
JOIN (SELECT sae_id, feature_id AS neighbor_id, label FROM features) b USING (sae_id, neighbor_id)
WHERE feature_id < neighbor_id AND a.label IS NOT NULL AND b.label IS NOT NULL
ORDER BY neighbors.cosine DESC LIMIT 5""",
}


class ClearFeature(NamedTuple):
    """A feature that is plainly about something, and the word it fires on and promotes most."""

    feature_id: int
    label: str
    n_active: int
    word: str


def demo_config(out: Path) -> PipelineConfig:
    """The demo's configuration; the model in bfloat16 where this CPU is fast at it."""
    dtype = "bfloat16" if has_fast_bfloat16() else "auto"
    return read_config(CONFIG, out=str(out), dtype=dtype)


def show_demo(config: PipelineConfig, seconds: Mapping[str, float], console: Console) -> None:
    """Features, queries, steering, and what to try next."""
    folder = config.run_folder(config.hookpoints[0])
    with FeatureDB.open(config.database) as db:
        features = clear_features(db, N_SHOWN)
        console.print(Rule("a dozen features", align="left"))
        for feature in features:
            console.print(_brief(db, feature))
        console.print(Rule("three questions in SQL", align="left"))
        for question, sql in QUERIES.items():
            console.print(f"[bold]{question}[/]{sql}", highlight=False)
            console.print(db.sql(sql))
    console.print(Rule("one prompt, unsteered and steered", align="left"))
    with console.status("steering"):
        lm = LanguageModel.load(config.model, device=config.device, dtype=config.dtype)
        sae = SAE.load(folder)
        feature, dose, outcome = steered_example(lm, sae, features)
    console.print(
        f"feature {feature.feature_id} ({visible(feature.label)}) held at {dose:g} maxima"
    )
    console.print(outcome_table(outcome))
    console.print(Rule("timing and what to try next", align="left"))
    console.print(timing_table(config, seconds))
    console.print(Text("\n".join(next_steps(config, folder, feature.feature_id, dose))))


def clear_features(db: FeatureDB, n: int) -> list[ClearFeature]:
    """The n features that are most plainly about something, no two about the same word."""
    found: dict[str, ClearFeature] = {}
    for feature_id, label, n_active, _, _, _, word in db.sql(CLEAR_FEATURES).fetchall():
        found.setdefault(word[:5], ClearFeature(feature_id, label, n_active, word))
    return list(found.values())[:n]


def steered_example(
    lm: LanguageModel, sae: SAE, features: list[ClearFeature]
) -> tuple[ClearFeature, float, SteeringOutcome]:
    """The first feature and dose whose word the steered text holds, still readable."""
    tried = []
    for dose in DOSES:
        for feature in features[:6]:
            clamp = {feature.feature_id: Clamp(dose)}
            outcome = compare(lm, sae, clamp, PROMPT, max_new_tokens=32)
            tried.append((feature, dose, outcome))
            gained = outcome.steered.removeprefix(PROMPT).lower().count(feature.word)
            had = outcome.baseline.lower().count(feature.word)
            limit = READABLE * outcome.baseline_perplexity
            if gained > had and outcome.steered_perplexity < limit:
                return tried[-1]
    return tried[0]


def timing_table(config: PipelineConfig, seconds: Mapping[str, float]) -> Table:
    """What each stage did and how fast, as far as it ran now."""
    rows = {
        "harvest": config.harvest.n_tokens,
        "train": (config.train.n_steps or 0) * config.train.batch_size,
        "evaluate": config.evaluate.n_lm_tokens,
        "index": config.harvest.n_tokens,
    }
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "rows", "seconds", "rows/s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, n_rows in rows.items():
        s = seconds.get(stage, 0.0)
        table.add_row(stage, f"{n_rows:,}", f"{s:.0f}", f"{n_rows / s:,.0f}" if s > 1 else "-")
    table.add_row("in all", "", f"{sum(seconds.values()):.0f}", "")
    return table


def next_steps(config: PipelineConfig, folder: Path, feature: int, dose: float) -> list[str]:
    """Commands and Python lines to try, with this run's own paths and a feature of it."""
    db = config.database
    return [
        "",
        f"saebase show {feature} --db {db}",
        f'saebase search "president" --db {db}',
        f'saebase query "SELECT label, density FROM features ORDER BY density DESC" --db {db}',
        f'saebase active "Albert Einstein was born in Germany" --sae {folder} --db {db}',
        f'saebase steer "{PROMPT}" --sae {folder} --clamp {feature}:{dose:g}',
        "",
        "from activation_cache import LanguageModel",
        "from feature_db import FeatureDB",
        "from interp import Clamp, steer",
        "from sae import SAE",
        f'lm, sae = LanguageModel.load("{config.model}"), SAE.load("{folder}")',
        f'db = FeatureDB.open("{db}")',
        'db.search("president").df()',
        f"with steer(lm, sae, {{{feature}: Clamp({dose:g})}}):",
        f'    print(lm.generate("{PROMPT}"))',
    ]


def _brief(db: FeatureDB, clear: ClearFeature) -> Group:
    """Label, how often it is active, and its three strongest contexts, shaded."""
    feature = db.feature(clear.feature_id)
    title = Text.assemble(
        (f"{clear.feature_id:>5}  ", "bold cyan"),
        (feature.label or "", "bold"),
        (f"  active on {clear.n_active:,} tokens", "dim"),
    )
    contexts = [
        shaded_text(c.tokens, c.acts, peak=c.peak, highest=feature.max_act) for c in feature.top[:3]
    ]
    return Group(title, *contexts, Text(""))
