"""What `interp` does with a set of features of a database: `FeatureSet.steer`.

Registered in pyproject.toml as entry points of the group `saebase.features`.
"""

from contextlib import AbstractContextManager

from activation_cache import LanguageModel
from feature_db import FeatureSet, NotFoundError
from sae import SAE

from .errors import SteeringError
from .steering import Add, steer


def steer_by_features(
    features: FeatureSet, lm: LanguageModel, sae: SAE, strength: float
) -> AbstractContextManager[None]:
    """`steer` with Add(strength) for each feature of the set.

    Raises: SteeringError for an empty set, or features of several SAEs; NotFoundError if the
        database wasn't made from `sae`, or they are another one's.
    """
    of_saes = sorted({sae_id for sae_id, _ in features.ids})
    if not of_saes:
        raise SteeringError("no feature to steer by: the set is empty")
    if len(of_saes) > 1:
        raise SteeringError(
            f"features of SAEs {', '.join(map(str, of_saes))}: steer by those of one, such as "
            f"WHERE sae_id = {of_saes[0]}"
        )
    sae_id = features.db.sae_id_of(sae)
    if sae_id != of_saes[0]:
        raise NotFoundError(f"features of SAE {of_saes[0]}, steered by SAE {sae_id}: pass that one")
    return steer(lm, sae, {feature_id: Add(strength) for _, feature_id in features.ids})
