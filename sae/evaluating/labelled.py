"""Rows with labels: what probing and absorption work on. Who makes labels decides what they mean.

`pipelines.probe_labels` makes them of a cache's tokens and documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.codes import Codes
from sae.errors import SourceError

# Fewer examples of either class than this, on either side, and a label isn't probed.
FEWEST_EXAMPLES = 20
ENCODED_AT_ONCE = 4096


class Label(NamedTuple):
    """A property that a row has or hasn't.

    is_positive: [n] bool. is_train, is_test: [n] bool, the rows that a probe is fitted and scored
    on; rows in neither aren't used, so a label may be defined on some rows only.
    is_broad: whether specific features may absorb it, so that absorption is measured on it.
    """

    name: str
    is_positive: Tensor
    is_train: Tensor
    is_test: Tensor
    is_broad: bool = False


class LabelledRows(NamedTuple):
    """x: [n, d_model], rows of a source. labels: each aligned with them."""

    x: Tensor
    labels: tuple[Label, ...]

    @classmethod
    def of(
        cls, x: Tensor, labels: Iterable[tuple[str, Tensor]], is_test: Tensor, broad: bool = False
    ) -> LabelledRows:
        """Labels (name, is_positive [n] bool) on all rows, of which is_test [n] bool are held out.

        Raises: SourceError if a label or is_test isn't one bool for each row.
        """
        made = []
        for name, is_positive in labels:
            for each in (is_positive, is_test):
                if each.dtype != torch.bool or each.shape != x.shape[:1]:
                    raise SourceError(
                        f"label {name!r} is {each.dtype} {list(each.shape)}; expected one bool for "
                        f"each of {len(x)} rows"
                    )
            made.append(Label(name, is_positive, ~is_test, is_test, broad))
        return cls(x, tuple(made))


class Examples(NamedTuple):
    """Rows of one label, as many positive as negative. train, test: int64, ascending."""

    train: Tensor
    test: Tensor


def balanced_examples(label: Label, n_of_class: int, seed: int) -> Examples | None:
    """At most n_of_class rows of either class for each side, evenly drawn; None for too few."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for is_here in (label.is_train, label.is_test):
        classes = [
            (is_here & has).cpu().nonzero().squeeze(1)
            for has in (label.is_positive, ~label.is_positive)
        ]
        n = min(n_of_class, *(len(each) for each in classes))
        if n < FEWEST_EXAMPLES:
            return None
        drawn = [each[torch.randperm(len(each), generator=generator)[:n]] for each in classes]
        sides.append(torch.cat(drawn).sort().values)
    return Examples(*sides)


def encoded(sae: SAE, x: Tensor) -> Codes:
    """Codes of rows [n, d_model], encoded in batches, on the CPU."""
    device = sae.b_dec.device
    parts = (sae.encode_sparse(part.to(device)).to("cpu") for part in x.split(ENCODED_AT_ONCE))
    return Codes.concatenate(parts)


def columns(codes: Codes, feature_ids: Tensor, d_sae: int) -> Tensor:
    """Acts of some features, dense: [n, len(feature_ids)]."""
    places = torch.full((d_sae,), -1)
    places[feature_ids] = torch.arange(len(feature_ids))
    at = places[codes.feature_ids]
    is_wanted = at >= 0
    dense = codes.acts.new_zeros(codes.n_rows, len(feature_ids))
    dense[codes.rows()[is_wanted], at[is_wanted]] = codes.acts[is_wanted]
    return dense
