"""The directive `command-line`: a section for each command of `entrollm`, made from the sources of its help."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, get_args, get_origin

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.models import ArgumentInfo, OptionInfo

from entrollm.cli.main import app

_OPTION = r"--?[a-z][a-z-]*"


@dataclass(frozen=True)
class _Parameter:
    """An option or an argument as its help shows it; `default` is empty if there is none worth stating."""

    spelling: str
    help: str
    default: str
    is_argument: bool
    is_required: bool


class CommandLine(SphinxDirective):
    """Sections for all commands, in the order in which `entrollm --help` lists them."""

    def run(self) -> list[nodes.Node]:
        """Return one section for each command."""
        return [self._section(str(registered.name), str(registered.help)) for registered in app.registered_commands]

    def _section(self, name: str, text: str) -> nodes.section:
        module = importlib.import_module(f"entrollm.cli.{name}")
        parameters = _parameters(module.command)
        code = _code_pattern(parameters)
        title = f"entrollm {name}"
        section = nodes.section(names=[nodes.fully_normalize_name(title)])
        section += nodes.title("", title)
        self.state.document.note_implicit_target(section, section)
        required = [parameter.spelling.split(", ")[-1] for parameter in parameters if parameter.is_required]
        section += _code(" ".join([title, *required, "[OPTIONS]"]))
        section += [_paragraph(paragraph, code) for paragraph in text.split("\n\n")]
        section += _definitions(parameters, code)
        section += _code("\n\n".join(f"# {purpose}\n{command}" for command, purpose in module.EXAMPLES))
        return section


def _parameters(command: Any) -> list[_Parameter]:
    signature = inspect.signature(command, eval_str=True)
    return [_parameter(parameter) for parameter in signature.parameters.values()]


def _parameter(parameter: inspect.Parameter) -> _Parameter:
    annotation, info = parameter.annotation, None
    if get_origin(annotation) is Annotated:
        annotation, info = get_args(annotation)[:2]
    if not isinstance(info, OptionInfo | ArgumentInfo):
        raise TypeError(f"{parameter.name}: expected an annotation with typer.Option or typer.Argument")
    default = parameter.default
    is_argument = isinstance(info, ArgumentInfo)
    is_stated = default not in (parameter.empty, None, False, True)
    return _Parameter(
        spelling=str(info.metavar) if is_argument else _spelling(parameter.name, annotation, info),
        help=info.help or "",
        default=f" By default {getattr(default, 'value', default)}." if is_stated else "",
        is_argument=is_argument,
        is_required=default is parameter.empty,
    )


def _spelling(name: str, annotation: Any, info: OptionInfo) -> str:
    """An option with its value, such as '-o, --output OUT'."""
    # typer takes the first name as its parameter `default`.
    declared = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]
    if annotation is bool:
        return ", ".join(declared or [f"--{name}", f"--no-{name}"])
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    choices = [[str(member.value) for member in kind] for kind in kinds if issubclass(kind, Enum)]
    value = "|".join(choices[0]) if choices else info.metavar
    return f"{', '.join(sorted(declared, key=len))} {value}"


def _code_pattern(parameters: Iterable[_Parameter]) -> re.Pattern[str]:
    """What is set as code in help texts: options, and the placeholders of this command, such as OUT and N."""
    words = {word for parameter in parameters for word in re.findall(r"\b[A-Z]+\b", parameter.spelling)}
    placeholders = "|".join(sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])({_OPTION}|(?:{placeholders})=?)(?![\w-])")


def _definitions(parameters: Iterable[_Parameter], code: re.Pattern[str]) -> nodes.definition_list:
    found = nodes.definition_list()
    for parameter in sorted(parameters, key=lambda parameter: not parameter.is_argument):
        term = nodes.term("", "", nodes.literal("", parameter.spelling))
        body = nodes.definition("", _paragraph(parameter.help + parameter.default, code))
        found += nodes.definition_list_item("", term, body)
    return found


def _paragraph(text: str, code: re.Pattern[str]) -> nodes.paragraph:
    paragraph = nodes.paragraph()
    for index, part in enumerate(code.split(text)):
        if part:
            paragraph += nodes.literal("", part) if index % 2 else nodes.Text(part)
    return paragraph


def _code(text: str) -> nodes.literal_block:
    return nodes.literal_block(text, text, language="bash")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
