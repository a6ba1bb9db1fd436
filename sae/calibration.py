"""After training: the inference threshold, and each feature's largest act and density."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from sae.architectures import architecture_of
from sae.autoencoder import SAE

logger = logging.getLogger(__name__)

# Rows that the threshold is made from: its estimate varies by well under 1% between batches.
THRESHOLD_ROWS = 32_768
# Rows that the threshold is chosen over at a time, as in training by default.
BATCH_ROWS = 4096
# Warn when inference L0 is off by more than this fraction of the L0 that training aimed at.
L0_TOLERANCE = 0.05


@torch.no_grad()
def calibrate_(sae: SAE, threshold_rows: Tensor, batches: Iterable[Tensor]) -> float:
    """Set threshold, max_act and density from train rows, in place.

    threshold_rows: [n_rows, d_model], what calibrate_threshold_ takes. batches: [batch, d_model]
    each, what max_act and density are taken over, following the inference rule.
    Returns: L0 over the batches at inference.
    """
    calibrate_threshold_(sae, threshold_rows)
    sae.max_act.zero_()
    n_active = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.b_dec.device)
    n_rows = 0
    for batch in batches:
        codes = sae.encode_sparse(batch.to(sae.b_dec.device))
        sae.max_act.scatter_reduce_(0, codes.feature_ids, codes.acts, "amax")
        n_active += torch.bincount(codes.feature_ids, minlength=sae.d_sae)
        n_rows += len(batch)
    sae.density.copy_(n_active / n_rows)
    l0, expected = float(n_active.sum()) / n_rows, sae.expected_l0
    if expected is not None and abs(l0 - expected) > L0_TOLERANCE * expected:
        logger.warning("inference L0 is %.1f over %d rows; aimed at %g", l0, n_rows, expected)
    return l0


@torch.no_grad()
def calibrate_threshold_(sae: SAE, rows: Tensor) -> None:
    """Set the threshold (if the architecture has one) from rows [n_rows, d_model], in place.

    It becomes the mean, over parts of the rows, of the value above which L0 is as aimed at.
    """
    architecture = architecture_of(sae.config)
    n_parts = -(-len(rows) // BATCH_ROWS)
    thresholds = [
        architecture.calibrate(sae.pre_acts(part.to(sae.b_dec.device)), sae.config, sae.threshold)
        for part in rows.tensor_split(n_parts)
    ]
    sae.threshold.copy_(torch.stack(thresholds).double().mean(0))
