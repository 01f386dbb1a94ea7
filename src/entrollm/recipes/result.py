"""What a compression gives back."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from entrollm.compress.result import FolderResult
from entrollm.recipes.search import SearchResult

if TYPE_CHECKING:
    from entrollm.calibrate.tune import TuneResult
    from entrollm.evaluate.closeness import Closeness


@dataclass(frozen=True)
class CompressResult(FolderResult):
    """What was written, how close it is to the original, and what tuning and the search for `max_kl` found.

    Attributes:
        tuning: `None` without `tune`; `is_refitted` says whether the tuned scales are stored.
        search: `None` without `max_kl`.
        closeness: on a short text; `None` without `measure`, where nothing was rounded, and where tuning or the search
            measured a divergence.
        unmeasured: why closeness could not be measured; `None` if it was, or was not to be.
    """

    tuning: TuneResult | None = None
    search: SearchResult | None = None
    closeness: Closeness | None = None
    unmeasured: str | None = None

    @classmethod
    def of(
        cls, written: FolderResult, tuning: TuneResult | None = None, search: SearchResult | None = None
    ) -> CompressResult:
        """The result of a folder that was written."""
        parts = {field.name: getattr(written, field.name) for field in fields(FolderResult)}
        return cls(**parts, tuning=tuning, search=search)

    def to_json(self) -> dict[str, Any]:
        """All fields of the folder, and "closeness".

        What tuning and the search found follows under "tuning", "kl" and "trials".
        """
        found = super().to_json()
        del found["tuning"], found["search"]
        if self.search is not None:
            found |= self.search.to_json()
        if self.tuning is not None:
            found["tuning"] = {**self.tuning.to_json(), "is_kept": self.is_refitted}
        return found
