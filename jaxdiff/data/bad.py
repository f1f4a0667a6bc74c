"""Records that cannot be used: why, how many, and where their number stops a run."""


class BadRecord(Exception):
    """A record that cannot be used: `reason` says why in general, `detail` what exactly, and the message both."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


class BadRecords:
    """Distinct bad records by name; more than `max_share` of `total` is an error."""

    def __init__(self, total: int, max_share: float) -> None:
        self._total, self._max_share = total, max_share
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, *records: tuple[str, str]) -> None:
        """Counts records, each a name and a reason.

        Raises:
            ValueError: with the names, where there are now too many.

        """
        self.reasons.update(records)
        if len(self.reasons) > self._max_share * self._total:
            raise ValueError(
                f"{len(self)} of {self._total} records cannot be used, a share of {len(self) / self._total:.3g}, more "
                f"than DataConfig.max_bad_share {self._max_share:g} allows: {self.listed()}; mend or remove them, or "
                "raise --data.max_bad_share."
            )

    def listed(self) -> str:
        """The first names, with their reasons."""
        first = "; ".join(f"{name} ({reason})" for name, reason in list(self.reasons.items())[:10])
        return first + (f"; and {len(self) - 10} more" if len(self) > 10 else "")
