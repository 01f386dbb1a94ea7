"""`entrollm chat`: talk with a model that has a chat template."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from entrollm.cli.console import (
    CacheTypeOption,
    CheckOption,
    JsonOption,
    MemoryOption,
    ThreadsOption,
    describe_error,
    message,
    print_json,
    stderr,
    stdout,
)
from entrollm.cli.options import read_memory
from entrollm.cli.run import (
    MaxTokensOption,
    MinPOption,
    ModelArgument,
    RepetitionPenaltyOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    describe_speed,
    result_to_json,
)
from entrollm.cli.speculation import DraftOption, SpeculateOption, open_speculation

if TYPE_CHECKING:
    from rich.console import Console

    from entrollm.engine.model import Model, Speculate
    from entrollm.engine.options import GenerateKeywords

EXAMPLES = (
    ("entrollm chat OUT", "talk; /help lists what can be typed"),
    ('entrollm chat OUT --system "Answer in one sentence."', "with instructions"),
    ("entrollm chat OUT --temperature 0.7 --top-p 0.9", "with sampled answers"),
    ("entrollm chat OUT --json < questions.txt", "one question per line, for scripts"),
)

_HELP = "/reset forgets the dialogue, /exit or Ctrl-D leaves, Ctrl-C stops the answer, /help shows this"
_DEFAULT_MAX_TOKENS = 1024


def command(
    model: ModelArgument,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="Instructions for the model, before the dialogue.")
    ] = None,
    max_tokens: MaxTokensOption = _DEFAULT_MAX_TOKENS,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    speculate: SpeculateOption = None,
    draft: DraftOption = None,
    threads: ThreadsOption = None,
    memory: MemoryOption = "auto",
    cache_type: CacheTypeOption = "f32",
    check: CheckOption = True,
    json_output: JsonOption = False,
) -> None:
    """Talk with a model that has a chat template.

    /exit or Ctrl-D leaves, /reset forgets the dialogue, /help lists what can be typed. Ctrl-C stops the answer in
    progress. With --json, each line of the input is a question, and the whole dialogue is printed at the end.
    """
    from entrollm.checkpoint.resolve import resolve
    from entrollm.engine.files import why_no_tokenizer
    from entrollm.engine.load import load
    from entrollm.errors import UnsupportedError

    form = read_memory(memory)
    guesses = open_speculation(speculate, draft, threads=threads, memory=form, check=check)
    path = resolve(model)
    loaded = load(path, threads=threads, memory=form, check=check, cache_type=cache_type)
    if loaded.tokenizer is None:
        raise UnsupportedError(why_no_tokenizer(path, "a dialogue"))
    if not loaded.has_chat_template:
        raise UnsupportedError(f"{model} has no chat template, so it is not made for dialogue; use entrollm run")
    options: GenerateKeywords = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
    }
    dialogue = _Dialogue(loaded, system, options, guesses, stderr if json_output else stdout)
    _talk(dialogue, keep_going=not json_output)
    if json_output:
        print_json({"model": model, "messages": dialogue.messages, "answers": dialogue.answers})


def _talk(dialogue: _Dialogue, *, keep_going: bool) -> None:
    """Read and answer until the input ends; with keep_going, report and forget a question that is refused."""
    message(_HELP)
    while True:
        try:
            line = _read_line().strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8 text: {error}") from None
        except KeyboardInterrupt:
            message(f"\n{_HELP}")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            dialogue.reset()
            message("the dialogue is forgotten")
        elif line.startswith("/"):
            message(_HELP if line == "/help" else f"unknown command {line}; {_HELP}")
        elif line:
            try:
                dialogue.ask(line)
            except ValueError as error:  # the context is full, or the template refuses the messages
                if not keep_going:
                    raise
                message(f"{describe_error(error)}; {dialogue.advice()}")


def _read_line() -> str:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input()  # a prompt would go to standard output
    with contextlib.suppress(ImportError):  # absent on Windows, whose terminal edits lines itself
        importlib.import_module("readline")
    return input("> ")


class _Dialogue:
    """The messages so far, and the cache that saves computing them again.

    Attributes:
        messages: role and content, the system message first if there is one.
        answers: the figures of each answer, as --json prints them.
    """

    def __init__(
        self,
        model: Model,
        system: str | None,
        options: GenerateKeywords,
        guesses: Speculate | None,
        console: Console,
    ) -> None:
        self._model = model
        self._options = options
        self._guesses = guesses
        self._console = console
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.answers: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self._opening)
        self._cache = self._model.new_cache()

    def advice(self) -> str:
        """What helps when a question is refused: forgetting the dialogue, unless it has just begun."""
        if self.messages != self._opening:
            return "/reset starts over"
        return "try another question" + (", or start again without --system" if self._opening else "")

    def ask(self, question: str) -> None:
        """Print the answer to `question` as it is generated, and keep both; Ctrl-C keeps the answer so far."""
        messages = [*self.messages, {"role": "user", "content": question}]
        stream = self._model.stream_chat(messages, cache=self._cache, speculate=self._guesses, **self._options)
        try:
            for piece in stream:
                self._console.print(Text(piece), end="", soft_wrap=True)
        except KeyboardInterrupt:
            self._cache = self._model.new_cache()  # the interrupted step left it half written
        self._console.print()
        result = stream.result
        message(describe_speed(result))
        if result.finish_reason == "unfinished" and not result.text:
            return
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        self.answers.append(result_to_json(result))
