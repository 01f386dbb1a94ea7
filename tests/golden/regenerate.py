"""Write the golden files again; their checksums in test_golden*.py then have to change by hand.

python tests/golden/regenerate.py --the-format-has-changed
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    if sys.argv[1:] != ["--the-format-has-changed"]:
        sys.exit(__doc__)
    sys.path.insert(0, str(HERE.parent / "support"))
    from golden_cases import write_golden
    from golden_groups import write_golden_groups

    for version in (1, 2):
        write_golden(HERE / f"v{version}", version)
    write_golden_groups(HERE / "v1-groups")
