"""KnownSAEs: the SAEs that a database holds, by number or by their weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae import SAE

from .errors import NotFoundError
from .inputs import weights_hash


class KnownSAEs:
    """The table `saes`, read once. ask: runs a query. path: of the database, for messages."""

    def __init__(self, ask: Callable[[str], list[dict[str, Any]]], path: Path | str) -> None:
        self._ask, self.path = ask, path
        self._saes: list[dict[str, Any]] | None = None

    def forget(self) -> None:
        """Ask again, so that whoever asks a closed database is told."""
        self._saes = None

    def sae_id(self, sae_id: int | None) -> int:
        """The SAE meant. Raises: NotFoundError if that is unknown or not plain."""
        return int(self.row(sae_id)["sae_id"])

    def row(self, sae_id: int | None) -> dict[str, Any]:
        """The row of the SAE meant. Raises: NotFoundError."""
        saes = self._rows()
        for row in saes:
            if row["sae_id"] == sae_id or (sae_id is None and len(saes) == 1):
                return row
        names = ", ".join(f"{row['sae_id']} ({row['name']})" for row in saes)
        if sae_id is None:
            raise NotFoundError(f"{self.path} holds {len(saes)} SAEs: pass sae_id, one of {names}")
        raise NotFoundError(f"{self.path} has no SAE {sae_id}: pass sae_id, one of {names}")

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of `saes`, which nothing changes while a database is open."""
        if self._saes is None:
            self._saes = self._ask("SELECT * FROM saes ORDER BY sae_id")
        return self._saes

    def d_sae(self, sae_id: int) -> int:
        """Features of an SAE. Raises: NotFoundError."""
        return int(self.row(sae_id)["d_sae"])

    def no_feature(self, feature_id: int, sae_id: int) -> NotFoundError:
        """What to say of a feature that there isn't."""
        return NotFoundError(
            f"no feature {feature_id} in SAE {sae_id} of {self.path}: expected 0 to "
            f"{self.d_sae(sae_id) - 1}"
        )

    def require_feature(self, feature_id: int, sae_id: int) -> None:
        """Raises: NotFoundError for one that there isn't."""
        if not 0 <= feature_id < self.d_sae(sae_id):
            raise self.no_feature(feature_id, sae_id)

    def row_of(self, sae: SAE) -> dict[str, Any]:
        """The row that was made from exactly this SAE. Raises: NotFoundError."""
        saes = self._rows()
        digest = weights_hash(sae)
        for row in saes:
            if row["weights_hash"] == digest:
                return row
        names = ", ".join(row["name"] for row in saes)
        raise NotFoundError(
            f"{self.path} wasn't made from this SAE ({sae.architecture}, d_sae={sae.d_sae}, "
            f"{sae.hookpoint}); it holds {names}: pass one of these, or index this one"
        )
