"""What the answer to a request must look like."""

from __future__ import annotations

from entrollm.serve.chat_fields import ChatRequest
from entrollm.serve.errors import bad_request
from entrollm.serve.fields import GUIDES, Sampling
from entrollm.serve.grammar import Grammars, TokenGrammar


def guided_form(grammars: Grammars, body: Sampling) -> TokenGrammar | None:
    """The grammar of the guided_* field of a request, if it has one.

    Raises:
        ApiError: there are several, or the grammar is too long, invalid, or uses what is not implemented.
    """
    given = [name for name in GUIDES if getattr(body, name) is not None]
    if len(given) > 1:
        raise bad_request(f"{' and '.join(given)} cannot be combined; give one of them", given[0])
    if body.guided_json is not None:
        return grammars.json_schema(body.guided_json, "guided_json")
    if body.guided_regex is not None:
        return grammars.regex(body.guided_regex, "guided_regex")
    if body.guided_grammar is not None:
        return grammars.lark(body.guided_grammar, "guided_grammar")
    return None if body.guided_choice is None else grammars.choice(body.guided_choice, "guided_choice")


def chat_form(grammars: Grammars, body: ChatRequest) -> TokenGrammar | None:
    """The grammar of response_format, or of the guided_* field; see guided_form."""
    form = body.response_format
    if form is None or form.type == "text":
        return guided_form(grammars, body)
    if form.definition is not None:
        compiled = grammars.regex if form.syntax == "regex" else grammars.lark
        return compiled(form.definition, "response_format")
    return grammars.json_schema(form.schema_of_answer or {}, "response_format")
