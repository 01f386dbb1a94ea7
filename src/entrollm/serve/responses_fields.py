"""The fields of requests to /v1/responses, and the request for chat that they stand for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from entrollm.serve.chat_fields import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Call,
    CalledFunction,
    ChatMessage,
    ChatRequest,
    Function,
    FunctionName,
    JsonSchema,
    ResponseFormat,
    TextPart,
    Tool,
    ToolChoice,
    check_chat,
)
from entrollm.serve.errors import bad_request
from entrollm.serve.fields import Off, Strict


class InputPart(Strict):
    """A part of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    """A message of a dialogue."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Strict):
    """A call that an earlier answer asked for."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputPart]
    id: str | None = None
    status: str | None = None


class ReasoningPart(Strict):
    """A part of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Strict):
    """Reasoning of an earlier answer, which goes with what follows it."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] | None = None
    content: list[ReasoningPart] | None = None
    encrypted_content: None = None
    status: str | None = None


def _kind(value: object) -> str | None:
    """Which item it is; messages need not say so."""
    if isinstance(value, dict):
        kind = value.get("type", "message")
        return kind if isinstance(kind, str) else None
    return str(getattr(value, "type", None))


InputItem = InputMessage | InputCall | InputCallOutput | InputReasoning
_Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="type should be message, function_call, function_call_output or reasoning",
    ),
]


class ResponseTool(Strict):
    """A function that may be called."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(Strict):
    """Whether an answer must be JSON, or follow a grammar."""

    type: Literal["text", "json_object", "json_schema", "grammar"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class Text(Strict):
    """What the text of an answer must look like."""

    format: TextFormat | None = None
    verbosity: None = None


class ReasoningOptions(Strict):
    """How much to reason."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto"] | None = None
    generate_summary: None = None


class ResponsesRequest(Strict):
    """The body of /v1/responses. Nothing is stored, so every request holds its whole dialogue."""

    model: str | None = None
    input: str | Annotated[list[_Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    text: Text | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    store: Off = None
    truncation: Literal["disabled"] | None = None
    background: Off = None
    include: Annotated[list[Any], Field(max_length=0)] | None = None

    def to_chat(self) -> ChatRequest:
        """The request for chat that asks the same.

        Raises:
            ApiError: fields contradict each other.
        """
        chosen = self.tool_choice
        if isinstance(chosen, ResponseToolChoice):
            choice: Any = ToolChoice(type="function", function=FunctionName(name=chosen.name))
        else:
            choice = chosen
        chat = ChatRequest.model_construct(
            messages=self._messages(),
            model=self.model,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stream=self.stream,
            tools=[Tool(type="function", function=_function(tool)) for tool in self.tools or []],
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=_format(self.text),
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
        )
        check_chat(chat)
        return chat

    def _messages(self) -> list[ChatMessage]:
        messages = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*messages, ChatMessage(role="user", content=self.input)]
        reasoning = ""
        for item in self.input:
            if isinstance(item, InputReasoning):
                reasoning += "".join(part.text for part in item.content or [])
                continue
            message = _message(item)
            if message.role == "assistant":
                message.reasoning_content, reasoning = reasoning or None, ""
                last = messages[-1] if messages else None
                if message.tool_calls and last is not None and last.role == "assistant":
                    # Calls belong to the text before them.
                    last.tool_calls = [*(last.tool_calls or []), *message.tool_calls]
                    continue
            messages.append(message)
        return messages


def _message(item: InputMessage | InputCall | InputCallOutput) -> ChatMessage:
    if isinstance(item, InputMessage):
        return ChatMessage(role=item.role, content=_content(item.content))
    if isinstance(item, InputCallOutput):
        return ChatMessage(role="tool", content=_content(item.output), tool_call_id=item.call_id)
    function = CalledFunction(name=item.name, arguments=item.arguments)
    return ChatMessage(role="assistant", tool_calls=[Call(id=item.call_id, type="function", function=function)])


def _content(content: str | list[InputPart]) -> str | list[TextPart]:
    return content if isinstance(content, str) else [TextPart(type="text", text=part.text) for part in content]


def _function(tool: ResponseTool) -> Function:
    return Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)


def _format(text: Text | None) -> ResponseFormat | None:
    given = text.format if text else None
    if given is None:
        return None
    schema = None
    if given.type == "json_schema":
        if given.schema_ is None:
            raise bad_request("text.format of type json_schema needs schema", "text.format.schema")
        schema = JsonSchema.model_validate({"name": given.name or "answer", "schema": given.schema_})
    return ResponseFormat(type=given.type, json_schema=schema, syntax=given.syntax, definition=given.definition)
