"""Find the feature for a word by SQL, and see what the model says when it is raised.

    python examples/steer_by_word.py war --run demo/run --db demo/features.duckdb

Of the features that fire on tokens beginning with the word, that of the highest lift is taken.
"""

import argparse

from activation_cache import LanguageModel
from feature_db import FeatureDB
from interp import Add, compare
from sae import SAE

SQL = """
SELECT feature_id, label, token, lift
FROM feature_tokens JOIN features USING (sae_id, feature_id)
WHERE starts_with(lower(trim(token)), lower(?)) ORDER BY lift DESC, feature_id LIMIT 1
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word")
    parser.add_argument("--run", default="demo/run")
    parser.add_argument("--db", default="demo/features.duckdb")
    parser.add_argument("--prompt", default="Yesterday I met a man who told me about")
    parser.add_argument("--doses", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5, 2.0])
    args = parser.parse_args()
    with FeatureDB.open(args.db) as db:
        found = db.sql(SQL, [args.word]).fetchall()
    if not found:
        raise SystemExit(f"no feature fires on {args.word!r} more than on other tokens")
    feature_id, label, token, lift = found[0]
    print(f"feature {feature_id} ({label}): {lift:.0f} times likelier on {token!r}")
    sae = SAE.load(args.run)
    made_with = sae.origin.provenance
    lm = LanguageModel.load(made_with["model"], dtype=made_with["model_dtype"])
    for dose in args.doses:
        outcome = compare(lm, sae, {feature_id: Add(dose)}, args.prompt, max_new_tokens=24)
        print(f"{dose:4.1f}  perplexity {outcome.steered_perplexity:6.1f}  {outcome.steered!r}")


if __name__ == "__main__":
    main()
