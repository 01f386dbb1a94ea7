"""Measure models on a text: perplexity, and divergence from a reference model."""

from entrollm.evaluate.divergence import Divergence
from entrollm.evaluate.evaluation import Evaluation, LanguageModel, evaluate, evaluate_in_turn
from entrollm.evaluate.perplexity import Perplexity
from entrollm.evaluate.size import ModelSize, model_size
from entrollm.evaluate.windows import DEFAULT_WINDOW, Protocol, Windows, cut_windows, read_text

__all__ = [
    "DEFAULT_WINDOW",
    "Divergence",
    "Evaluation",
    "LanguageModel",
    "ModelSize",
    "Perplexity",
    "Protocol",
    "Windows",
    "cut_windows",
    "evaluate",
    "evaluate_in_turn",
    "model_size",
    "read_text",
]
