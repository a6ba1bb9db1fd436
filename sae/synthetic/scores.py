"""An SAE beside the truth: which features it found, when they fire, which were absorbed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from sae.autoencoder import SAE
from sae.codes import Codes, offsets_of_counts
from sae.config import Config
from sae.errors import SourceError
from sae.evaluating.matching import match_directions, nearest_directions
from sae.evaluating.report_text import table
from sae.synthetic.source import BLOCK_ROWS, SyntheticSource, TrueRows
from sae.synthetic.truth import rows_of

RECOVERED = 0.9
# Share of the parent that a child's feature must give, as in `sae.evaluating.absorption`.
LEAST_SHARE = 0.4


class SyntheticScores(Config):
    """How an SAE does on activations whose features are known. All over heldout rows."""

    n_rows: int = Field(description="Rows scored.")
    l0: float = Field(description="Mean active features of the SAE a row.")
    true_l0: float = Field(description="Mean true features that fire in a row.")
    fvu: float = Field(
        description="Sum of squared error over sum of squared deviation from the mean."
    )
    fvu_noise: float = Field(
        description="The FVU of the rows without their noise: no autoencoder is better."
    )
    fvu_truth: float = Field(
        description="The FVU of the true features with their true magnitudes, the smallest left "
        "out until the mean number a row is the SAE's L0."
    )
    n_dead: int = Field(description="Features of the SAE active in no row scored.")
    recovery: float = Field(
        description="Mean over true features of the largest cosine with a decoder row (signed)."
    )
    recovery_by_firing: float = Field(
        description="The same, weighted by how often each true feature fires."
    )
    recovered: float = Field(
        description="Fraction of true features with a decoder row of cosine above 0.9."
    )
    matched_cosine: float = Field(
        description="Mean cosine of true features and decoder rows matched one to one (greedily), "
        "over as many pairs as the smaller set has."
    )
    uniqueness: float = Field(
        description="True features that are the nearest of some decoder row, over decoder rows."
    )
    f1: float = Field(
        description="Mean over true features that fire in the rows of the F1 with which the active "
        "rows of their one-to-one partner tell theirs; 0 without a partner."
    )
    f1_of_features: float = Field(
        description="Mean over the SAE's features of the F1 with which their active rows tell "
        "those of their nearest true feature; 0 for a dead one."
    )
    absorbed: float | None = Field(
        description="Of firings of children whose parent was recovered: fraction in which the "
        "feature nearest to the parent is silent and the one nearest to the child gives 0.4 or "
        "more of the parent's magnitude in the parent's direction. None without such firings."
    )
    parent_missed_with_child: float | None = Field(
        description="Fraction of the same firings in which the parent's feature is silent."
    )
    parent_missed_alone: float | None = Field(
        description="Fraction of firings of recovered parents without a child in which the "
        "parent's feature is silent: what is missed where nothing can absorb it."
    )

    def lines(self) -> list[str]:
        """Name and value of each, as a table."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return table(
            [
                [name, "-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4f}"]
                for name, v in values.items()
            ]
        )


class _Directions(NamedTuple):
    """What decoder and true directions alone say.

    nearest, cosine: [n_true], the SAE's feature nearest to each true one. partner: [n_true], its
    one-to-one partner, -1 for none. nearest_true: [d_sae].
    """

    nearest: Tensor
    cosine: Tensor
    partner: Tensor
    matched_cosine: float
    nearest_true: Tensor


@torch.no_grad()
def score(sae: SAE, source: SyntheticSource, n_rows: int | None = None) -> SyntheticScores:
    """Score an SAE on the first n_rows heldout rows (all where None), whole blocks of 1,024.

    Raises: SourceError if widths differ.
    """
    if sae.d_model != source.d_model(""):
        raise SourceError(
            f"the SAE is for d_model={sae.d_model}, the truth has {source.d_model('')}; train on "
            "this truth"
        )
    found = _directions(sae.W_dec, source.truth.directions.to(sae.W_dec.device))
    n_blocks = source.n_rows("", split="heldout") // BLOCK_ROWS
    if n_rows is not None:
        n_blocks = min(n_blocks, -(-n_rows // BLOCK_ROWS))
    sums, firing = _Reconstruction(source), _Firing(sae, source, found)
    for true, codes in _encoded(sae, source, n_blocks):
        sums.add(true, sae.decode_sparse(codes).cpu(), codes.to("cpu"))
        firing.add(true.codes, codes.to("cpu"))
    weights = firing.n_true.double()
    return SyntheticScores(
        **sums.result(),
        n_dead=int((firing.n_active == 0).sum()),
        recovery=float(found.cosine.double().mean()),
        recovery_by_firing=float((found.cosine.double() * weights).sum() / weights.sum()),
        recovered=float((found.cosine > RECOVERED).double().mean()),
        matched_cosine=found.matched_cosine,
        uniqueness=len(found.nearest_true.unique()) / sae.d_sae,
        **firing.result(),
    )


def _encoded(sae: SAE, source: SyntheticSource, n_blocks: int) -> Iterator[tuple[TrueRows, Codes]]:
    for number in range(n_blocks):
        true = source.block("heldout", number)
        yield true, sae.encode_sparse(true.x.to(sae.b_dec.device))


def _directions(W_dec: Tensor, truth: Tensor) -> _Directions:
    nearest, matching = nearest_directions(truth, W_dec), match_directions(truth, W_dec)
    has_partner = matching.partner >= 0
    return _Directions(
        nearest.row.cpu(),
        nearest.cosine.cpu(),
        matching.partner.cpu(),
        float(matching.cosine[has_partner].double().mean()),
        nearest_directions(W_dec, truth).row.cpu(),
    )


class _Reconstruction:
    """Errors and counts, summed over blocks in float64; deviation is from the rows' own mean."""

    def __init__(self, source: SyntheticSource) -> None:
        self._truth = source.truth
        self._sums = dict.fromkeys(("error", "noise", "limited", "square"), 0.0)
        self._total = torch.zeros(source.d_model(""), dtype=torch.float64)
        self._n_rows = self._n_active = self._n_true = 0

    def add(self, true: TrueRows, x_hat: Tensor, codes: Codes) -> None:
        best = rows_of(_largest(true.codes, codes.nnz), self._truth.directions) + self._truth.bias
        for name, y in (("error", x_hat), ("noise", true.clean), ("limited", best)):
            self._sums[name] += float((true.x - y).double().square().sum())
        self._sums["square"] += float(true.x.double().square().sum())
        self._total += true.x.sum(0, dtype=torch.float64)
        self._n_rows += len(true.x)
        self._n_active += codes.nnz
        self._n_true += true.codes.nnz

    def result(self) -> dict[str, Any]:
        n = self._n_rows
        deviation = self._sums["square"] - float(self._total.square().sum()) / n
        return {
            "n_rows": n,
            "l0": self._n_active / n,
            "true_l0": self._n_true / n,
            "fvu": self._sums["error"] / deviation,
            "fvu_noise": self._sums["noise"] / deviation,
            "fvu_truth": self._sums["limited"] / deviation,
        }


class _Firing:
    """Counts of firings, true ones beside those of the SAE."""

    def __init__(self, sae: SAE, source: SyntheticSource, found: _Directions) -> None:
        truth = source.truth
        self._parents, self._found = truth.parents, found
        n_true, d_sae = len(truth.parents), sae.d_sae
        self._sizes = d_sae, n_true
        self.n_true = torch.zeros(n_true, dtype=torch.int64)
        self.n_active = torch.zeros(d_sae, dtype=torch.int64)
        self._hits, self._hits_of_features = self.n_true.clone(), self.n_active.clone()
        # What one unit of the feature nearest to a child gives in the direction of its parent.
        W_dec, child = sae.W_dec.cpu(), truth.parents >= 0
        self._given = torch.zeros(n_true)
        self._given[child] = (
            W_dec[found.nearest[child]] * truth.directions[truth.parents[child]]
        ).sum(1)
        self._absorbed = self._missed = self._n_children = self._missed_alone = self._n_alone = 0

    def add(self, true: Codes, codes: Codes) -> None:
        d_sae, n_true = self._sizes
        self.n_true += torch.bincount(true.feature_ids, minlength=n_true)
        self.n_active += torch.bincount(codes.feature_ids, minlength=d_sae)
        partner = self._found.partner[true.feature_ids]
        is_hit = (partner >= 0) & (acts_at(codes, true.rows(), partner, d_sae) > 0)
        self._hits += torch.bincount(true.feature_ids[is_hit], minlength=n_true)
        nearest = self._found.nearest_true[codes.feature_ids]
        is_right = acts_at(true, codes.rows(), nearest, n_true) > 0
        self._hits_of_features += torch.bincount(codes.feature_ids[is_right], minlength=d_sae)
        self._add_families(true, codes)

    def _add_families(self, true: Codes, codes: Codes) -> None:
        """Firings of children, and of parents alone, where the parent was recovered."""
        (d_sae, n_true), found = self._sizes, self._found
        rows, ids = true.rows(), true.feature_ids
        parents = self._parents[ids]
        is_child = (parents >= 0) & (found.cosine[parents.clamp(min=0)] > RECOVERED)
        with_child, own, parents = rows[is_child], ids[is_child], parents[is_child]
        silent = acts_at(codes, with_child, found.nearest[parents], d_sae) == 0
        given = acts_at(codes, with_child, found.nearest[own], d_sae) * self._given[own]
        wanted = LEAST_SHARE * acts_at(true, with_child, parents, n_true)
        self._n_children += len(own)
        self._missed += int(silent.sum())
        self._absorbed += int((silent & (given >= wanted)).sum())
        has_child = torch.isin(rows * n_true + ids, with_child * n_true + parents)
        is_alone = torch.isin(ids, self._parents) & ~has_child
        is_alone &= found.cosine[ids] > RECOVERED
        alone = acts_at(codes, rows[is_alone], found.nearest[ids[is_alone]], d_sae)
        self._n_alone += len(alone)
        self._missed_alone += int((alone == 0).sum())

    def result(self) -> dict[str, Any]:
        partner = self._found.partner
        said = torch.where(partner >= 0, self.n_active[partner.clamp(min=0)], 0)
        fires = self.n_true > 0
        f1 = _f1(self._hits, self.n_true, said)[fires]
        of_features = _f1(
            self._hits_of_features, self.n_true[self._found.nearest_true], self.n_active
        )
        return {
            "f1": float(f1.mean()),
            "f1_of_features": float(of_features.mean()),
            "absorbed": _share(self._absorbed, self._n_children),
            "parent_missed_with_child": _share(self._missed, self._n_children),
            "parent_missed_alone": _share(self._missed_alone, self._n_alone),
        }


def acts_at(codes: Codes, rows: Tensor, feature_ids: Tensor, n_features: int) -> Tensor:
    """The act of a feature in a row, 0 where it isn't active; pair by pair: [n].

    codes: ascending by feature within a row. feature_ids: int64; -1 is no feature.
    """
    if codes.nnz == 0:
        return codes.acts.new_zeros(len(rows))
    keys = codes.rows() * n_features + codes.feature_ids
    wanted = torch.where(feature_ids >= 0, rows * n_features + feature_ids, -1)
    places = torch.searchsorted(keys, wanted).clamp(max=codes.nnz - 1)
    return torch.where(keys[places] == wanted, codes.acts[places], 0.0)


def _largest(codes: Codes, n: int) -> Codes:
    """The n largest entries of all rows together."""
    if codes.nnz <= n:
        return codes
    kept = codes.acts.topk(n).indices.sort().values
    counts = torch.bincount(codes.rows()[kept], minlength=codes.n_rows)
    return Codes(codes.acts[kept], codes.feature_ids[kept], offsets_of_counts(counts))


def _f1(hits: Tensor, n_true: Tensor, n_said: Tensor) -> Tensor:
    return 2 * hits.double() / (n_true + n_said).clamp(min=1)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
