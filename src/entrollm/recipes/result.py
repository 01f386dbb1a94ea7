"""What a compression gives back."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from entrollm.calibrate.tune import TuneResult
from entrollm.compress.result import FolderResult
from entrollm.recipes.search import SearchResult


@dataclass(frozen=True)
class CompressResult(FolderResult):
    """What was written, and what tuning and the search for `max_kl` found.

    Attributes:
        tuning: `None` without `tune`; `is_refitted` says whether the tuned scales are stored.
        search: `None` without `max_kl`.
    """

    tuning: TuneResult | None = None
    search: SearchResult | None = None

    @classmethod
    def of(
        cls, written: FolderResult, tuning: TuneResult | None = None, search: SearchResult | None = None
    ) -> CompressResult:
        """The result of a folder that was written."""
        parts = {field.name: getattr(written, field.name) for field in fields(FolderResult)}
        return cls(**parts, tuning=tuning, search=search)

    def to_json(self) -> dict[str, Any]:
        """All fields of the folder; what tuning and the search found follows under "tuning", "kl" and "trials"."""
        found = super().to_json()
        del found["tuning"], found["search"]
        if self.search is not None:
            found |= self.search.to_json()
        if self.tuning is not None:
            found["tuning"] = {**self.tuning.to_json(), "is_kept": self.is_refitted}
        return found
