"""Batch work without the drawing: what each picture shall be, which are drawn together, and where they are kept."""

from jaxdiff.rows.group import Batch, Picture, groups, pictures
from jaxdiff.rows.read import Line, read_rows
from jaxdiff.rows.row import Region, Row
from jaxdiff.rows.store import Store, fingerprint

__all__ = ["Batch", "Line", "Picture", "Region", "Row", "Store", "fingerprint", "groups", "pictures", "read_rows"]
