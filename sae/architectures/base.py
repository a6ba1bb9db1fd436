"""What an architecture is: a choice of active features, in training and at inference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from sae.codes import Codes
from sae.config import SAEConfig
from sae.selection import PreActs


class Selection(NamedTuple):
    """What training selects in a batch.

    codes: its active features. threshold: the SAE's threshold from now on, shaped as before.
    """

    codes: Codes
    threshold: Tensor


class Architecture(ABC):
    """A stateless strategy: an SAE asks its architecture which features are active.

    What an architecture learns besides the four weights lies in the SAE's threshold, a scalar.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[SAEConfig]]

    @abstractmethod
    def select_training(self, pre_acts: PreActs, config: SAEConfig, threshold: Tensor) -> Selection:
        """Active features of a training batch, and the threshold after it."""

    @abstractmethod
    def select(self, pre_acts: PreActs, config: SAEConfig, threshold: Tensor) -> Codes:
        """Active features at inference: of each row alone, whatever else is in the batch."""

    @abstractmethod
    def expected_l0(self, config: SAEConfig) -> float | None:
        """The L0 that training aims at; None if it isn't fixed beforehand."""

    def calibrate(self, pre_acts: PreActs, config: SAEConfig, threshold: Tensor) -> Tensor:
        """The inference threshold that fits this batch best; the same one if there is none."""
        del pre_acts, config
        return threshold
