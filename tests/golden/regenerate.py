"""Write the golden files again; their checksums in test_golden*.py then have to change by hand.

python -m tests.golden.regenerate --the-format-has-changed
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.golden_cases import write_golden
from tests.support.golden_flat import write_golden_flat
from tests.support.golden_groups import write_golden_groups
from tests.support.golden_lossless import write_golden_lossless
from tests.support.golden_trellis import write_golden_trellis

HERE = Path(__file__).parent

if __name__ == "__main__":
    if sys.argv[1:] != ["--the-format-has-changed"]:
        sys.exit(__doc__)
    for version in (1, 2):
        write_golden(HERE / f"v{version}", version)
    write_golden_groups(HERE / "v1-groups")
    write_golden_flat(HERE / "v2-flat")
    write_golden_lossless(HERE / "v2-lossless")
    write_golden_trellis(HERE / "v2-trellis")
