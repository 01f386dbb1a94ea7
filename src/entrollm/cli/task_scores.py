"""The part of `eval` that runs tasks of lm-eval."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from entrollm.cli.console import json_safe, print_json, stdout
from entrollm.errors import UnsupportedError

if TYPE_CHECKING:
    from entrollm.engine.memory import Memory
    from entrollm.harness import TaskScore
    from entrollm.report import Table


@dataclass(frozen=True)
class TaskOptions:
    """The tasks, and how to run them; see `run_tasks`."""

    names: tuple[str, ...]
    limit: int | None
    few_shot: int | None
    include: Path | None
    chat: bool

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("--tasks names no task")
        if self.include is not None and not self.include.is_dir():
            raise ValueError(f"--include {self.include} is not a folder")


@dataclass(frozen=True)
class LoadOptions:
    """How to load the models; see `load`."""

    threads: int | None
    memory: Memory
    cache_type: str
    check: bool


def score(models: Sequence[str], options: TaskOptions, loading: LoadOptions, *, json_output: bool) -> None:
    """Run each model on the tasks, and print a table or JSON.

    Args:
        models: folders or Hub ids.
        options: the tasks.
        loading: how to load the models.
        json_output: print JSON.
    Raises:
        UnsupportedError: lm-eval is not installed.
        EntroLLMError, ValueError, OSError: a model or a task cannot be run.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedError("--tasks needs lm-eval, which is not installed; pip install 'entrollm[eval]'")
    # Its libraries print progress bars and advice for their own command line.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from entrollm.harness import HarnessModel, run_tasks

    results = []
    for name in models:
        model = HarnessModel(name, **asdict(loading))
        scores = run_tasks(
            model,
            options.names,
            limit=options.limit,
            few_shot=options.few_shot,
            include=options.include,
            chat=options.chat,
        )
        results.append((name, scores))
        del model
    if json_output:
        listed = [{"model": name, "scores": [asdict(each) for each in scores]} for name, scores in results]
        print_json(json_safe({"models": listed}))
    else:
        stdout.print(_table(results).to_rich())


def _table(results: Sequence[tuple[str, Sequence[TaskScore]]]) -> Table:
    from entrollm.report import Column, Table

    columns = (Column("model", "left"), Column("task", "left"), Column("metric", "left"), Column("score"), Column("±"))
    rows = []
    for name, scores in results:
        for each in scores:
            error = "-" if each.standard_error is None else f"{each.standard_error:.4f}"
            rows.append((name, each.task, each.metric, f"{each.value:.4f}", error))
    samples = {each.task: each.samples for _, scores in results for each in scores}
    counted = ", ".join(f"{task}: {count:,} documents" for task, count in samples.items() if count)
    return Table(counted, (*columns,), tuple(rows))
