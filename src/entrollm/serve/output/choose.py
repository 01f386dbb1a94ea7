"""Which formats a model writes, as its chat template shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from entrollm.serve.output.deepseek import DeepSeek
from entrollm.serve.output.gemma import Gemma
from entrollm.serve.output.glm import Glm
from entrollm.serve.output.harmony import Harmony
from entrollm.serve.output.hermes import Hermes
from entrollm.serve.output.items import CallFormat, Functions, Gather, Parser
from entrollm.serve.output.llama import Llama
from entrollm.serve.output.mistral import Mistral
from entrollm.serve.output.pythonic import Pythonic
from entrollm.serve.output.qwen_coder import QwenCoder
from entrollm.serve.output.think import Markers, Plain, Think

_FUNCTION_GEMMA = Gemma("<start_function_call>", "<end_function_call>", "<escape>")
CALL_FORMATS: Mapping[str, CallFormat] = MappingProxyType(
    {
        form.name: form
        for form in (
            Hermes(),
            QwenCoder(),
            Glm(),
            Llama(),
            Pythonic(),
            Mistral(),
            DeepSeek(),
            Gemma(),
            Harmony(),
        )
    }
)
REASONING_FORMATS: Mapping[str, Markers] = MappingProxyType(
    {
        markers.name: markers
        for markers in (
            Markers("think", "<think>", "</think>"),
            Markers("mistral", "[THINK]", "[/THINK]"),
            Markers("gemma", "<|channel>thought\n", "<channel|>", "<|channel>"),
        )
    }
)


@dataclass(frozen=True)
class OutputFormat:
    """How a model writes calls and reasoning.

    Attributes:
        calls: `None` if it writes no calls that are known here.
        reasoning: `None` if it writes none apart, or writes it in the channels of harmony.
    """

    calls: CallFormat | None
    reasoning: Markers | None

    def marks(self, *, with_calls: bool) -> tuple[str, ...]:
        """The markers that texts must show, those of calls only where calls are looked for."""
        calls = self.calls.marks if self.calls and (with_calls or isinstance(self.calls, Harmony)) else ()
        if self.reasoning is None:
            return calls
        return (*calls, self.reasoning.opening_token or self.reasoning.opening, self.reasoning.closing)

    def parser(self, functions: Functions, *, is_open: bool) -> Parser | None:
        """A parser of one answer; `None` if it is text.

        Args:
            functions: those that may be called.
            is_open: whether the prompt ends within reasoning.
        """
        calls = None
        if self.calls is not None and (functions or isinstance(self.calls, Harmony)):
            calls = self.calls.parser(functions)
        if self.reasoning is not None:
            return Gather(Think(self.reasoning, calls or Plain(), is_open=is_open))
        return None if calls is None else Gather(calls)


def check_formats(calls: str, reasoning: str) -> None:
    """Check the names that choose takes.

    Raises:
        ValueError: there is no such format.
    """
    for option, name, known in (
        ("--tool-format", calls, CALL_FORMATS),
        ("--reasoning-format", reasoning, REASONING_FORMATS),
    ):
        if name not in ("auto", "none", *known):
            raise ValueError(f"{option} should be auto, none, {', '.join(known)}; got {name!r}")


def choose(template: str | None, calls: str = "auto", reasoning: str = "auto") -> OutputFormat:
    """The formats of a model.

    Args:
        template: its chat template.
        calls: the name of a format of calls, "none", or "auto" to recognize it.
        reasoning: the same for reasoning.
    """
    template = template or ""
    name = _recognized_calls(template) if calls == "auto" else calls
    chosen = _variant(name, template)
    if reasoning != "auto":
        return OutputFormat(chosen, REASONING_FORMATS.get(reasoning))
    # Harmony has a channel for it.
    return OutputFormat(chosen, None if isinstance(chosen, Harmony) else _recognized_reasoning(template))


def _variant(name: str, template: str) -> CallFormat | None:
    """The format of a name, as a chat template shows it; `None` for "none"."""
    match name:
        case "gemma" if "<start_function_call>" in template:
            return _FUNCTION_GEMMA
        case "mistral":
            return Mistral(is_listed="[ARGS]" not in template)
        case "deepseek":
            return DeepSeek(is_fenced="```" in template or not template)
        case "glm":
            return Glm(is_spaced="</arg_key><arg_value>" not in template)
    return CALL_FORMATS.get(name)


def _recognized_calls(template: str) -> str:
    if "<|channel|>" in template and "<|message|>" in template:
        return "harmony"
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseek"  # whose first templates lay out calls that were made, and no tools
    if "tools" not in template:
        return "none"
    if "<|tool_call>" in template or "<start_function_call>" in template:
        return "gemma"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        # All three stand between these markers.
        return "qwen-coder" if "<function=" in template else "glm" if "<arg_key>" in template else "hermes"
    if "<|python_start|>" in template or "func_name1(" in template:
        return "pythonic"
    is_llama = "<|python_tag|>" in template or ("<|eot_id|>" in template and '"parameters"' in template)
    return "llama" if is_llama else "none"


def _recognized_reasoning(template: str) -> Markers | None:
    return next((markers for markers in REASONING_FORMATS.values() if markers.closing in template), None)
