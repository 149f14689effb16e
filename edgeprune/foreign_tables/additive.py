"""The model behind tables of blocks: a network takes what its entries take, added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from edgeprune.errors import TableError, did_you_mean
from edgeprune.table_listing import IMPORTED, Listing


@dataclass(frozen=True, kw_only=True)
class AdditiveModel:
    """`values` by name, in `unit`."""

    values: Mapping[str, float]
    unit: str

    def predict(self, names: Iterable[str]) -> float:
        """The sum in `unit`, a name as often as it comes; added as the decimals that were written, so no rounding.

        `TableError` for a name that isn't there: nothing counts as 0.
        """
        total = Decimal(0)
        for name in names:
            if name not in self.values:
                raise TableError(f"no entry '{name}'{did_you_mean(name, self.values)}")
            total += Decimal(repr(self.values[name]))
        return float(total)


def additive_model(listing: Listing) -> AdditiveModel:
    """`TableError` for a table that isn't imported: kernels timed alone do not add up to a network."""
    units = {item.unit for item in listing.items}
    if listing.origin != IMPORTED or len(units) != 1:
        raise TableError(f"'{listing.name}' is {listing.origin}; only imported entries add up to a network")
    values = {item.name: item.value for item in listing.items if item.value is not None}
    return AdditiveModel(values=values, unit=str(units.pop()))
