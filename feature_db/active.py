"""A text in, the features that fire on it out: a frame by token and a shaded display."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from sae import SAE

from .indexing.sorting import Float32, Int64
from .indexing.text_rows import rank_in_run
from .result import Result
from .shading import html_block, html_text, shaded_html, shaded_text
from .token_text import visible

if TYPE_CHECKING:
    from activation_cache import LanguageModel

_SHOWN_FEATURES = 12


class ActiveFeatures(Result):
    """Features that fire on a text, the strongest of each token.

    Rows: token_index, token, feature_id, act, act_fraction (of the largest act in the index; null
    for a feature that never fired there), label; by token and descending act.
    tokens: all tokens of the text, those without a feature too.
    In a notebook or terminal: the features that stand out, each with the whole text shaded by it.
    A feature stands out by its largest act_fraction times log(1 / density): strong and rare.
    """

    def __init__(
        self, table: pa.Table, tokens: list[str], standing_out: list["StandingOut"]
    ) -> None:
        super().__init__(table)
        self.tokens = tokens
        self.standing_out = standing_out

    def __repr__(self) -> str:
        ids = ", ".join(str(each.feature_id) for each in self.standing_out)
        return f"ActiveFeatures({len(self.tokens)} tokens; standing out: {ids})"

    def _repr_html_(self) -> str:
        return html_block(
            *(
                f"<b>{each.feature_id}</b> {html_text(each.label or '')}<br>"
                f"{shaded_html(self.tokens, each.acts, highest=each.max_act)}"
                for each in self.standing_out
            )
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for each in self.standing_out:
            yield Text.assemble((f"{each.feature_id:>7}", "bold"), f"  {visible(each.label or '')}")
            yield shaded_text(self.tokens, each.acts, highest=each.max_act)


class StandingOut:
    """A feature and its acts on every token of the text; max_act is the index's, or None."""

    def __init__(
        self, feature_id: int, label: str | None, acts: list[float], max_act: float | None
    ) -> None:
        self.feature_id, self.label, self.acts, self.max_act = feature_id, label, acts, max_act


@torch.no_grad()
def text_codes(
    lm: "LanguageModel", sae: SAE, hookpoint: str, text: str
) -> tuple[list[str], tuple[Int64, Int64, Float32]]:
    """Tokens of `text`, and (token_index, feature_id, act) of every non-zero act.

    Rows that the SAE was never trained on (BOS, massive norm) have no acts.
    """
    captured = lm.capture(text, [hookpoint])
    x = captured.acts[hookpoint][0].to(sae.W_dec.device)
    kept = sae.in_domain(x)
    if lm.prepends_bos:
        kept[0] = False
    rows = kept.nonzero().squeeze(1)
    codes = sae.encode_sparse(x[rows])
    token_index = rows.repeat_interleave(codes.n_active())
    return lm.token_strings(captured.token_ids[0]), (
        token_index.cpu().numpy(),
        codes.feature_ids.cpu().numpy(),
        codes.acts.float().cpu().numpy(),
    )


def active_features(
    tokens: list[str],
    codes: tuple[Int64, Int64, Float32],
    known: pa.Table,
    n: int,
) -> ActiveFeatures:
    """Join the codes of a text with what the database says.

    known: feature_id, label, max_act, density of every feature, by ascending feature_id.
    n: features kept of each token.
    """
    index, features, acts = codes
    max_acts = known.column("max_act").to_numpy().astype(np.float64)
    labels = known.column("label").combine_chunks()
    order = np.lexsort((features, -acts, index))
    order = order[rank_in_run(index[order]) < n]
    with np.errstate(invalid="ignore"):
        fractions = acts[order] / max_acts[features[order]]
    table = pa.table(
        {
            "token_index": index[order],
            "token": pa.array(tokens, pa.string()).take(pa.array(index[order])),
            "feature_id": features[order],
            "act": acts[order],
            "act_fraction": pa.array(fractions, from_pandas=True),
            "label": labels.take(pa.array(features[order])),
        }
    )
    return ActiveFeatures(table, tokens, _standing_out(tokens, codes, known))


def _standing_out(
    tokens: list[str], codes: tuple[Int64, Int64, Float32], known: pa.Table
) -> list[StandingOut]:
    index, features, acts = codes
    max_acts = known.column("max_act").to_numpy().astype(np.float64)
    density = np.maximum(known.column("density").to_numpy(), 1e-9)
    fractions = np.nan_to_num(acts / max_acts[features]) * -np.log(density[features])
    ids = np.unique(features)
    scores = np.array([fractions[features == i].max() for i in ids])
    chosen = ids[np.lexsort((ids, -scores))][:_SHOWN_FEATURES]
    found = []
    for i in chosen.tolist():
        on_tokens = np.zeros(len(tokens), np.float32)
        on_tokens[index[features == i]] = acts[features == i]
        max_act = None if np.isnan(max_acts[i]) else float(max_acts[i])
        label = known.column("label")[i].as_py()
        found.append(StandingOut(i, label, on_tokens.tolist(), max_act))
    return found
