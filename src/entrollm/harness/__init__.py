"""The evaluation harness: models of this package in lm-eval (pip install 'entrollm[eval]').

Importing this package registers the model type "entrollm" with lm-eval.
"""

from entrollm.harness.model import HarnessModel
from entrollm.harness.tasks import TaskScore, run_tasks

__all__ = ["HarnessModel", "TaskScore", "run_tasks"]
