"""The count of records that were skipped, and where it stops a run."""


class BadRecords:
    """Distinct bad records by name; more than `max_share` of `total` is an error."""

    def __init__(self, total: int, max_share: float) -> None:
        self._total, self._max_share = total, max_share
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, name: str, reason: str) -> None:
        """Counts a record.

        Raises:
            ValueError: with the names, where there are now too many.

        """
        self.reasons[name] = reason
        if len(self.reasons) > self._max_share * self._total:
            listed = "; ".join(f"{name} ({reason})" for name, reason in list(self.reasons.items())[:10])
            more = f"; and {len(self.reasons) - 10} more" if len(self.reasons) > 10 else ""
            raise ValueError(
                f"{len(self.reasons)} of {self._total} records cannot be used, which is more than "
                f"DataConfig.max_bad_share {self._max_share:g} allows: {listed}{more}."
            )
