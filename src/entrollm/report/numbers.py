"""Numbers in human-readable form."""

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def format_bytes(size_bytes: float) -> str:
    """Format a size with decimal units and three digits, as in '31.5 MB'."""
    size = float(size_bytes)
    for unit in _BYTE_UNITS:
        if abs(size) < 999.5 or unit == _BYTE_UNITS[-1]:
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"


def format_count(count: float) -> str:
    """Format a count with three digits and a decimal suffix, as in '15.7 M'."""
    number, suffix = _scale_count(count)
    return f"{number} {suffix}".rstrip()


def format_rate(amount: float, elapsed_s: float, unit: str = "B") -> str:
    """Format `amount` per second: as bytes for the unit 'B', otherwise as in '62.1 Mweights/s'."""
    if elapsed_s <= 0:
        return f"- {unit}/s"
    if unit == "B":
        return f"{format_bytes(amount / elapsed_s)}/s"
    number, suffix = _scale_count(amount / elapsed_s)
    return f"{number} {suffix}{unit}/s"


def format_number(value: float | None, digits: int) -> str:
    """Format a number with a fixed number of decimals, or '-' for `None`."""
    return "-" if value is None else f"{value:,.{digits}f}"


def _scale_count(count: float) -> tuple[str, str]:
    for suffix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= 0.9995 * scale:
            return f"{count / scale:.3g}", suffix
    return f"{count:.3g}", ""
