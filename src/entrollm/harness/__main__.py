"""The `lm_eval` command with this package's models: python -m entrollm.harness run --model entrollm ..."""

from lm_eval.__main__ import cli_evaluate

import entrollm.harness  # noqa: F401  (registers the models)

cli_evaluate()
