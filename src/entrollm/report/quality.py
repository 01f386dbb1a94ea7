"""The table of sizes and quality, as in Table I of the EntroLLM paper."""

from collections.abc import Sequence
from dataclasses import dataclass

from entrollm.report.numbers import format_bytes, format_number
from entrollm.report.table import Column, Table


@dataclass(frozen=True)
class QualityRow:
    """One variant of a model; a figure that was not measured is `None`.

    Attributes:
        label: the variant, such as 'uint4 + Huffman'.
        size_bytes: size of the weight files, everything included.
        bits_per_weight: size_bytes * 8 / weights.
        entropy_bits: entropy of the symbols, per weight.
        perplexity, perplexity_error: per token, and its standard error.
        bits_per_byte: nats per token / ln 2, times tokens per byte of the text.
        kl_nats, kl_error, kl_percentile_99, kl_maximum: KL divergence from the original, per token; kl_error is the
            standard error of kl_nats.
        top1_agreement: share of the predictions whose likeliest token is the original's.
    """

    label: str
    size_bytes: int | None = None
    bits_per_weight: float | None = None
    entropy_bits: float | None = None
    perplexity: float | None = None
    perplexity_error: float | None = None
    bits_per_byte: float | None = None
    kl_nats: float | None = None
    kl_error: float | None = None
    kl_percentile_99: float | None = None
    kl_maximum: float | None = None
    top1_agreement: float | None = None


def quality_table(title: str, rows: Sequence[QualityRow]) -> Table:
    """Arrange the variants of a model in a table, without the columns that no variant fills."""
    columns = (
        (Column("model", "left"), [row.label for row in rows]),
        (Column("file size"), ["-" if row.size_bytes is None else format_bytes(row.size_bytes) for row in rows]),
        (Column("file bits/weight"), [format_number(row.bits_per_weight, 3) for row in rows]),
        (Column("entropy"), [format_number(row.entropy_bits, 3) for row in rows]),
        (Column("perplexity"), [format_number(row.perplexity, 3) for row in rows]),
        (Column("±"), [format_number(row.perplexity_error, 3) for row in rows]),
        (Column("bits/byte"), [format_number(row.bits_per_byte, 4) for row in rows]),
        (Column("KL (nats)"), [format_number(row.kl_nats, 5) for row in rows]),
        (Column("± KL"), [format_number(row.kl_error, 5) for row in rows]),
        (Column("KL 99 %"), [format_number(row.kl_percentile_99, 4) for row in rows]),
        (Column("KL max"), [format_number(row.kl_maximum, 3) for row in rows]),
        (Column("same top-1 (%)"), [format_number(_percent(row.top1_agreement), 2) for row in rows]),
    )
    filled = [(column, cells) for column, cells in columns if any(cell != "-" for cell in cells)]
    return Table(title, tuple(column for column, _ in filled), tuple(zip(*(cells for _, cells in filled), strict=True)))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
