"""From a request for chat to what the model reads, and what its answer is split into."""

from __future__ import annotations

from collections.abc import Sequence

from entrollm.serve.answering import Answers
from entrollm.serve.asking import Asker, Prompted, answer_jobs, in_thread
from entrollm.serve.chat_fields import ChatRequest, check_tools
from entrollm.serve.errors import bad_request
from entrollm.serve.forms import chat_form
from entrollm.serve.grammar import AnswerForm
from entrollm.serve.output.harmony import Harmony
from entrollm.serve.scheduler import Scheduler
from entrollm.serve.served import ServedModel


async def dialogue_answers(scheduler: Scheduler, asker: Asker, served: ServedModel, body: ChatRequest) -> Answers:
    """The answers to a dialogue, not yet submitted.

    Raises:
        ApiError: the model cannot answer the request, or a field of it is wrong.
    """
    if not served.model.has_chat_template:
        raise bad_request(f"the model {served.name} has no chat template; use /v1/completions", "model")
    check_tools(body)
    messages = [message.to_template() for message in body.messages]
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        if "reasoning_effort" not in (served.model.chat_template or ""):
            raise bad_request(f"the chat template of {served.name} has no reasoning_effort", "reasoning_effort")
        variables["reasoning_effort"] = body.reasoning_effort
    if body.offered:
        if served.output.calls is None:
            raise bad_request(
                f"the chat template of {served.name} writes no calls of tools that are known here; if you know how "
                "the model writes them, start the server with --tool-format",
                "tools",
            )
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    ids = await in_thread(lambda: served.model.encode_chat(messages, **variables), "messages")
    form = await in_thread(lambda: _form(served, body, ids), "response_format")
    functions = {function.name: function.parameters or {} for function in body.offered}
    shown = served.shown_tokens(with_calls=bool(functions))
    prompted = Prompted(served, body, ids, body.listed_logprobs, shown, form, is_chat=True)
    answers = Answers(scheduler, answer_jobs(asker, prompted))
    for choice in answers.choices:
        choice.parser = served.output.parser(functions, is_open=served.begins_in_reasoning(ids))
        choice.most_calls = 1 if body.parallel_tool_calls is False else None
    return answers


def _form(served: ServedModel, body: ChatRequest, prompt: Sequence[int]) -> AnswerForm | None:
    """What the answer must look like, if the request says so."""
    if not body.required:
        grammar = chat_form(served.grammars, body)
        return None if grammar is None else served.after_reasoning(grammar, prompt)
    functions = {function.name: function.parameters or {"type": "object"} for function in body.required}
    grammar = served.call_grammar(functions, several=body.parallel_tool_calls is not False)
    # The grammar of harmony has room for reasoning.
    return grammar if isinstance(served.output.calls, Harmony) else served.after_reasoning(grammar, prompt)
