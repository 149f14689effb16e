"""Latency tables of other software, read into lines of ours: what is doubtful is flagged, nothing is filled in.

One module per format with `read(text, file) -> list[Cell]`; `docs/tables.md` says where each format is documented.
"""

from edgeprune.foreign_tables.additive import AdditiveModel, additive_model
from edgeprune.foreign_tables.importing import FORMATS, Imported, import_table

__all__ = ["FORMATS", "AdditiveModel", "Imported", "additive_model", "import_table"]
