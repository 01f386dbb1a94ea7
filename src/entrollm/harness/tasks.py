"""Run tasks of lm-eval on a model, and collect the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from entrollm.harness.model import HarnessModel


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task, metric: their names in lm-eval; a filter other than "none" is part of the metric's.
        value: the score, in the metric's unit.
        standard_error: of the value, or None if lm-eval gives none.
        samples: how many documents were evaluated.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    samples: int


def run_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    few_shot: int | None = None,
    include: Path | None = None,
    chat: bool = False,
) -> list[TaskScore]:
    """Evaluate a model on tasks of lm-eval.

    Args:
        model: the model.
        tasks: names of tasks or groups.
        limit: use only the first documents of each task.
        few_shot: examples before each question; by default as the task says.
        include: a folder of further tasks (YAML), whose data may be local files.
        chat: lay questions out by the model's chat template.
    Raises:
        ValueError: a task is unknown, or the options do not fit the model.
        OSError: the data of a task cannot be read or downloaded.
    """
    manager = TaskManager(include_path=str(include), include_defaults=False) if include else TaskManager()
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown and include:  # reading all of lm-eval's own takes seconds
        manager = TaskManager(include_path=str(include))
        unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists what it has")
    results = lm_eval.simple_evaluate(
        model, tasks=list(tasks), num_fewshot=few_shot, limit=limit, task_manager=manager, apply_chat_template=chat
    )
    return _scores(results)


def _scores(results: dict[str, Any]) -> list[TaskScore]:
    scores = []
    for task, metrics in results["results"].items():
        samples = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{name}")
            label = metric if name == "none" else f"{metric} ({name})"
            scores.append(TaskScore(task, label, float(value), error if isinstance(error, float) else None, samples))
    return scores
