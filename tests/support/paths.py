"""Where the test data lies."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TINY_LLAMA = EXAMPLES / "tiny-llama"
SENTENCES = EXAMPLES / "wikitext-2-test.txt"
GOLDEN = ROOT / "tests" / "golden"
