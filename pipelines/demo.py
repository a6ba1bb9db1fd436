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
from feature_db import FeatureDB
from feature_db.shading import shaded_text
from interp import Add, SteeringOutcome, compare
from sae import SAE

from .config import PipelineConfig, read_config
from .console_tables import outcome_table
from .doctor import has_fast_bfloat16

CONFIG = Path(__file__).with_name("demo.yaml")
N_SHOWN = 12
PROMPT = "Yesterday I met a man who told me about"
DOSES = (1.0, 1.5)
"""Strengths that are tried, in maxima of the feature."""
READABLE = 3.0
"""Perplexity of the steered text over that of the unsteered one, above which it is left aside."""

# Features that are plainly about something: the strongest contexts, in many documents, peak on one
# content word (`on`), or hold a word that the label found to be far more frequent there (`in`).
# A content word is one that seven documents in ten do without.
CLEAR_FEATURES = """
WITH tops AS (
    SELECT sae_id, feature_id, doc_id, lower(trim(token)) AS word, lower(text) AS text
    FROM contexts WHERE kind = 'top'
), peaks AS (
    SELECT sae_id, feature_id, 'on' AS kind, mode(word) AS word, count(*) AS n,
           count(DISTINCT doc_id) AS n_documents
    FROM tops WHERE regexp_full_match(word, '[a-z]{4,}')
    GROUP BY sae_id, feature_id, left(word, 5)
), topics AS (
    SELECT sae_id, feature_id, 'in' AS kind,
           lower(regexp_extract(label, 'in text on ([A-Za-z]{5,})', 1)) AS word
    FROM features WHERE label LIKE 'in text on %'
), topic_counts AS (
    SELECT sae_id, feature_id, kind, topics.word,
           count(*) FILTER (contains(text, topics.word)) AS n,
           count(DISTINCT doc_id) AS n_documents
    FROM topics JOIN tops USING (sae_id, feature_id) WHERE topics.word <> '' GROUP BY ALL
), clear AS (
    SELECT * FROM (FROM peaks UNION ALL FROM topic_counts) WHERE n >= 10 AND n_documents >= 6
), spread AS (
    SELECT word, count(*) FILTER (contains(lower(documents.text), word)) / count(*) AS share
    FROM (SELECT DISTINCT word FROM clear), documents GROUP BY word
)
SELECT feature_id, kind, word
FROM clear JOIN spread USING (word) JOIN features USING (sae_id, feature_id)
WHERE share < 0.3 AND density < 0.02
ORDER BY n * ln(clear.n_documents) DESC, feature_id
"""

QUERIES = {
    "Which features fire on the word ` war`, and how much of their activity is that?": """
SELECT feature_id, label, t.n_active AS on_war, round(100 * t.n_active / f.n_active, 1) AS percent,
       round(t.lift, 1) AS lift
FROM feature_tokens t JOIN features f USING (sae_id, feature_id)
WHERE t.token = ' war' ORDER BY t.n_active DESC LIMIT 5""",
    "Which features react to wars and battles, and in which articles most strongly?": """
SELECT feature_id, label, source AS article, round(max(act), 1) AS strongest
FROM features JOIN contexts USING (sae_id, feature_id) JOIN documents USING (doc_id)
WHERE regexp_matches(lower(label), '\\b(war|battle|army|troops)\\b')
GROUP BY ALL ORDER BY strongest DESC LIMIT 5""",
    "Which features point in nearly the same direction, and how do they differ?": """
SELECT a.feature_id, a.label, b.feature_id AS neighbor, b.label AS its_label,
       round(cosine, 2) AS cosine
FROM neighbors n
JOIN features a USING (sae_id, feature_id)
JOIN features b ON b.sae_id = n.sae_id AND b.feature_id = n.neighbor_id
WHERE a.feature_id < b.feature_id AND a.label NOT LIKE 'mixed%' AND b.label NOT LIKE 'mixed%'
ORDER BY n.cosine DESC LIMIT 5""",
}


class ClearFeature(NamedTuple):
    """A feature that is plainly about something. kind: it fires `on` a word or `in` text on it."""

    feature_id: int
    kind: str
    word: str


class Steered(NamedTuple):
    """A feature, the dose that was added, what came of it, and the feature's mean activation, in
    maxima, when the unsteered model reads the new text."""

    feature: ClearFeature
    dose: float
    outcome: SteeringOutcome
    echo: float


def demo_config(out: Path) -> PipelineConfig:
    """The demo's configuration; the model in bfloat16 where this CPU is fast at it."""
    config = read_config(CONFIG, out=str(out))
    return config.model_copy(update={"dtype": "bfloat16"}) if has_fast_bfloat16() else config


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
            console.print(f"[bold]{question}[/]{sql}", highlight=False, soft_wrap=True)
            console.print(db.sql(sql))
    console.print(Rule("one prompt, unsteered and steered", align="left"))
    lm = LanguageModel.load(config.model, device=config.device, dtype=config.dtype)
    sae = SAE.load(folder)
    with console.status("steering"):
        tried = steered_examples(lm, sae, [f for f in features if f.kind == "in"] or features)
    best = max(tried, key=lambda each: each.echo)
    console.print(
        f"feature {best.feature.feature_id} ({best.feature.kind} {best.feature.word}), raised by "
        f"{best.dose:g} of its maximum at every position: of {len(tried)} readable texts, the one "
        "that makes the feature fire most when the unsteered model reads it"
    )
    console.print(outcome_table(best.outcome))
    console.print(Rule("timing and what to try next", align="left"))
    console.print(timing_table(config, seconds))
    console.print(Text("\n".join(next_steps(config, folder, best))), soft_wrap=True)


def clear_features(db: FeatureDB, n: int) -> list[ClearFeature]:
    """The n features that are most plainly about something, half `on` and half `in`, where there
    are as many; no two about the same word."""
    rows = [ClearFeature(*row) for row in db.sql(CLEAR_FEATURES).fetchall()]
    chosen: dict[str, ClearFeature] = {}
    for limit, kinds in ((n // 2, ("on",)), (n, ("in",)), (n, ("on", "in"))):
        for row in rows:
            if len(chosen) < limit and row.kind in kinds:
                chosen.setdefault(row.word[:5], row)
    return list(chosen.values())


def steered_examples(lm: LanguageModel, sae: SAE, features: list[ClearFeature]) -> list[Steered]:
    """Every feature at every dose; those that stay readable, or all if none does."""
    tried, baseline = [], None
    for feature in features[:6]:
        for dose in DOSES:
            add = {feature.feature_id: Add(dose)}
            outcome = compare(lm, sae, add, PROMPT, max_new_tokens=32, baseline=baseline)
            baseline = outcome.baseline
            tried.append(Steered(feature, dose, outcome, echo(lm, sae, feature, outcome.steered)))
    readable = [
        t for t in tried if t.outcome.steered_perplexity < READABLE * t.outcome.baseline_perplexity
    ]
    return readable or tried


def echo(lm: LanguageModel, sae: SAE, feature: ClearFeature, text: str) -> float:
    """Mean activation of the feature, in maxima, when the unsteered model reads `text`."""
    place = str(sae.hookpoint)
    x = lm.capture(text, [place]).acts[place][0]
    acts = sae.encode(x[sae.in_domain(x)])[:, feature.feature_id]
    return float(acts.mean() / sae.max_act[feature.feature_id])


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


def next_steps(config: PipelineConfig, folder: Path, best: Steered) -> list[str]:
    """Commands and Python lines to try, with this run's own paths and a feature of it."""
    db, feature, dose = config.database, best.feature.feature_id, f"{best.dose:g}"
    return [
        "",
        f"saebase show {feature} --db {db}",
        f'saebase search "war" --db {db}',
        f'saebase query "SELECT label, density FROM features ORDER BY density DESC" --db {db}',
        f'saebase active "The army crossed the river" --sae {folder} --db {db}',
        f'saebase steer "{PROMPT}" --sae {folder} --add {feature}:{dose}',
        "",
        "from activation_cache import LanguageModel",
        "from feature_db import FeatureDB",
        "from interp import Add, steer",
        "from sae import SAE",
        f'lm, sae = LanguageModel.load("{config.model}"), SAE.load("{folder}")',
        f'db = FeatureDB.open("{db}")',
        'db.search("war").df()',
        f"with steer(lm, sae, {{{feature}: Add({dose})}}):",
        f'    print(lm.generate("{PROMPT}"))',
    ]


def _brief(db: FeatureDB, clear: ClearFeature) -> Group:
    """Label, how often it is active, and its three strongest contexts, shaded."""
    feature = db.feature(clear.feature_id)
    title = Text.assemble(
        (f"{clear.feature_id:>5}  ", "bold cyan"),
        (feature.shown_label, "bold"),
        (f"  active on {feature.n_active:,} tokens", "dim"),
    )
    contexts = [
        shaded_text(c.tokens, c.acts, peak=c.peak, highest=feature.max_act) for c in feature.top[:3]
    ]
    return Group(title, *contexts, Text(""))
