"""A conversation on the terminal: one load, the same keys and values reused from turn to turn."""

from __future__ import annotations

import signal
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from h2o_cli.closing import closing_line
from h2o_cli.console import first_with_progress
from h2o_cli.interrupts import interrupts
from h2o_cli.opened import Opened
from h2o_cli.output import emit, is_terminal, note, print_error, styled, tell
from h2o_cli.run_options import RunOptions
from h2o_cli.session.opening import Session
from h2o_cli.transcript import Transcript, load, save
from runtime.answer.generate import CANCELLED, LENGTH, Request
from runtime.answer.meter import Meter, Statistics
from runtime.errors import Cancelled, H2OError, PromptError, UsageError
from runtime.llama.chat import Message

PROMPT = "> "
QUOTES = '"""'
WHOLE_NUMBERS = ("top_k", "seed")
ANSWER_ROOM = 256  # tokens kept free for an answer, at most a quarter of the context
HELP = """/help         these lines
/set NAME N   change temp, top-k, top-p, min-p, repeat-penalty, seed or n (most tokens); /set shows them
/system TEXT  what the model is told before the first message; without TEXT: nothing
/save FILE    keep the conversation; /load FILE goes on with it
/clear        forget the conversation
/stats        speed, memory and plan of the last answer
/exit         end (also Ctrl-D)
Ctrl-C ends an answer; at an empty prompt it ends the conversation.
A paste of several lines is one message, and so are lines between \"\"\" and \"\"\".
A line that ends in \\ goes on in the next one."""
PLAIN_HELP = "This model has no chat template: a line starts a new text, an empty line goes on with the last one."


def converse(options: RunOptions) -> int:
    """Talk until the user ends it; returns the exit code."""
    if options.json:
        raise UsageError("--json needs a prompt", "give one with -p, -f or on standard input")
    readline = _line_editing()
    opened = Opened(options)
    try:
        note(f"{opened.session.model.file.name}, context {opened.n_ctx} tokens; /help lists the commands")
        return Conversation(opened, options, readline).run()
    finally:
        opened.close()


def _line_editing() -> ModuleType | None:
    """The readline module where there is one: loaded before the budget is shared out."""
    try:
        import readline
    except ImportError:
        return None
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off
    return readline


class _Left(Cancelled):
    """Ctrl-C at an empty prompt: the conversation is over."""


class Conversation:
    """The turns of one conversation. Without a chat every line starts a text of its own."""

    def __init__(self, opened: Opened, options: RunOptions, readline: ModuleType | None = None) -> None:
        self._opened = opened
        self._options = options
        self._chat = opened.chat
        self._readline = readline
        self._system = ""
        self._messages: list[Message] = []
        self._text: list[int] = []  # without a chat: the text so far
        self._statistics = Statistics()
        self._told_trimmed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/set": self._set,
            "/system": self._set_system,
            "/save": self._save,
            "/load": self._load,
            "/clear": self._clear,
            "/stats": self._stats,
        }

    @property
    def _session(self) -> Session:
        return self._opened.session

    def run(self) -> int:
        """Read lines and answer them until the end; returns the exit code."""
        with interrupts.ending(_stop, patient=True):  # also while a message is made ready for the model
            while True:
                try:
                    line = self._read()
                    if line is None or line.strip() in ("/exit", "/quit", "/bye"):
                        return 0
                    self._take(line)
                except PromptError as error:
                    print_error(error.message, error.next_step)
                except _Left:
                    raise
                except Cancelled as error:
                    if error.signal_number != signal.SIGINT:
                        raise
                    _drop_typed_ahead()
                    note("stopped")

    def _take(self, line: str) -> None:
        """Do what a line says: a command, or a message to be answered. Raises PromptError, Cancelled."""
        name, _, rest = line.strip().partition(" ")
        if name in self._commands and "\n" not in line.strip():
            try:
                self._commands[name](rest.strip())
            except Cancelled:
                raise
            except H2OError as error:
                print_error(error.message, error.next_step)
        elif line.startswith("/") and not rest and "\n" not in line:
            note(f"there is no command {name}; /help lists them")
        elif line.strip() or (not self._chat and self._text):
            self.answer(line)

    # --- reading ------------------------------------------------------------------------------------------------

    def _read(self) -> str | None:
        """A message: a line, several of which all but the last end in a backslash, or lines between triple quotes.

        None at the end of the input.
        """
        line = self._read_line(PROMPT)
        if line is not None and line.lstrip().startswith(QUOTES):
            return self._read_quoted(line.lstrip().removeprefix(QUOTES))
        while line is not None and line.endswith("\\"):
            more = self._read_line("  ")
            line = line[:-1] + "\n" + more if more is not None else line[:-1]
        return line

    def _read_quoted(self, text: str) -> str:
        while not text.rstrip().endswith(QUOTES):
            more = self._read_line("  ")
            if more is None:
                break
            text = f"{text}\n{more}"
        return text.rstrip().removesuffix(QUOTES).strip("\n")

    def _read_line(self, prompt: str) -> str | None:
        """One line. Ctrl-C throws a line away that was begun. Raises _Left at an empty one, Cancelled behind a line."""
        typed: str | None = None

        def stop(number: int) -> None:
            nonlocal typed
            typed = ""
            if self._readline:
                typed = self._readline.get_line_buffer() or ("\n" if _takes_lines() else "")
            interrupts.take()
            raise Cancelled(number)

        while True:
            try:
                with interrupts.ending(stop, patient=True):
                    return self._input(prompt)
            except EOFError:
                emit("\n")
                return None
            except Cancelled as error:
                emit("\n")
                if error.signal_number != signal.SIGINT or typed is None:
                    raise
                if not typed:
                    raise _Left(error.signal_number) from None
                typed = None
                _drop_typed_ahead()

    @staticmethod
    def _input(prompt: str) -> str:
        if is_terminal(sys.stdout):
            return input(prompt)
        tell(prompt, end="")
        return input()

    # --- answering ----------------------------------------------------------------------------------------------

    def answer(self, line: str) -> None:
        """Answer one line. Raises PromptError when it cannot be put to the model, Cancelled on SIGTERM."""
        self._opened.follow_devices()
        stop = self._options.stop + (self._chat.stop if self._chat else ())
        prompt = self._chat_prompt(line) if self._chat else self._plain_prompt(line)
        text, tokens = self._generate(Request(tuple(prompt), self._n_predict, stop))
        if self._chat:
            self._messages.append(Message("assistant", text.strip()))  # templates put their own spaces around it
        else:
            self._text = [*prompt, *tokens]

    def _generate(self, request: Request) -> tuple[str, list[int]]:
        session = self._session
        meter = Meter(session.engine, session.machine)
        parts, tokens, finish = [], [], ""
        with interrupts.ending(session.engine.cancel, patient=True):
            for step in first_with_progress(session, session.answer(request), request.prompt):
                meter.see(step)
                parts.append(step.text)
                tokens += [step.token] if step.token is not None else []
                finish = step.finish
                emit(step.text)
        session.engine.forget_cancel()
        emit("\n")
        self._statistics = meter.statistics()
        signal_number = interrupts.take()
        if signal_number == signal.SIGTERM:
            raise Cancelled(signal_number)
        self._tell_end(finish)
        return "".join(parts), tokens

    def _tell_end(self, finish: str) -> None:
        if finish == CANCELLED:
            _drop_typed_ahead()
            note("stopped")
        elif finish == LENGTH and self._session.sequence.room == 0:
            note(f"the context of {self._session.engine.settings.n_ctx} tokens is full (--ctx makes it longer)")
        elif finish == LENGTH:
            note(f"cut after {self._options.n_predict} tokens (/set n N allows more, -1 any number)")
        if self._statistics.tokens_per_s and is_terminal(sys.stderr):
            speed = f"{self._statistics.n_tokens} tokens, {self._statistics.tokens_per_s:.1f} tokens/s"
            tell(styled(f"({speed})", "dim"))

    def _chat_prompt(self, line: str) -> list[int]:
        """The conversation with the new message, its oldest turns left out where the context is too short."""
        if self._chat is None:
            return []
        n_ctx = self._session.engine.settings.n_ctx
        most = n_ctx - min(ANSWER_ROOM, n_ctx // 4)
        head = [Message("system", self._system)] if self._system else []
        messages = [*self._messages, Message("user", line)]
        tokens = self._chat.encode([*head, *messages], n_ctx)
        while len(tokens) > most and len(messages) > 1:
            del messages[:2]
            tokens = self._chat.encode([*head, *messages], n_ctx)
            if not self._told_trimmed:
                self._told_trimmed = True
                note("the conversation is longer than the context: its oldest turns are left out (--ctx raises it)")
        if len(tokens) >= n_ctx:
            raise PromptError(f"{n_ctx} tokens and more do not fit a context of {n_ctx}", "shorten the message")
        self._messages = messages
        return tokens

    def _plain_prompt(self, line: str) -> list[int]:
        n_ctx = self._session.engine.settings.n_ctx
        prompt = self._session.model.tokenizer.encode(line, most=n_ctx) if line.strip() else self._text
        if len(prompt) >= n_ctx:
            raise PromptError(f"the context of {n_ctx} tokens is full", "start a new text")
        return prompt

    # --- commands -----------------------------------------------------------------------------------------------

    def _help(self, _rest: str) -> None:
        tell(HELP if self._chat else f"{HELP}\n{PLAIN_HELP}")

    def _clear(self, _rest: str) -> None:
        self._messages, self._text = [], []
        note("the conversation was forgotten")

    def _stats(self, _rest: str) -> None:
        tell(styled(closing_line(self._session, self._statistics), "dim"))

    def _set(self, rest: str) -> None:
        """Change one setting, or show all. Raises UsageError."""
        name, _, value = rest.partition(" ")
        key = name.lstrip("-").replace("-", "_")
        known = asdict(self._opened.sampling)
        if key and key != "n" and key not in known:
            raise UsageError(f"there is no setting {name}", f"/set {', '.join((*known, 'n')).replace('_', '-')}")
        if key:
            try:
                number: int | float = int(value) if key in (*WHOLE_NUMBERS, "n") else float(value)
            except ValueError:
                raise UsageError(f"{value!r} is not a number", f"give one, such as /set {name} 1") from None
            self._change(key, number)
        shown = {**asdict(self._opened.sampling), "n": self._n_predict, "seed": self._session.sampler.seed}
        note(", ".join(f"{key.replace('_', '-')} {value}" for key, value in shown.items()))

    def _change(self, key: str, number: Any) -> None:
        if key == "n":
            if self._options.session.kv:
                raise UsageError("with --kv-filter -n cannot change", "start again with another -n")
            self._options = replace(self._options, n_predict=int(number))
            return
        self._opened.sample_with(replace(self._opened.sampling, **{key: number}))

    @property
    def _n_predict(self) -> int:
        return -1 if self._options.n_predict is None else self._options.n_predict

    def _set_system(self, rest: str) -> None:
        if not self._chat:
            raise UsageError("this model has no chat template, so there are no system messages", "write a text instead")
        self._system = rest
        note("the system message holds from the next message on" if rest else "there is no system message")

    def _save(self, rest: str) -> None:
        path = _file_named(rest, "/save")
        text = self._session.model.tokenizer.decode(self._text) if self._text else ""
        save(Transcript(self._system, self._messages, text), path)
        note(f"the conversation is in {path}")

    def _load(self, rest: str) -> None:
        path = _file_named(rest, "/load")
        found = load(path)
        self._system, self._messages = found.system, found.messages
        self._text = self._session.model.tokenizer.encode(found.text) if found.text else []
        note(f"{len(found.messages)} messages from {path}" if self._chat else f"{len(self._text)} tokens from {path}")


def _file_named(text: str, command: str) -> Path:
    if not text:
        raise UsageError(f"{command} needs a file", f"give one: {command} talk.json")
    return Path(text).expanduser()


def _takes_lines() -> bool:
    """Whether the terminal gives whole lines: not while readline edits one, so Enter was pressed already."""
    with suppress(termios.error, OSError, ValueError):
        return bool(termios.tcgetattr(sys.stdin.fileno())[3] & termios.ICANON)
    return False


def _stop(number: int) -> None:
    interrupts.take()
    raise Cancelled(number)


def _drop_typed_ahead() -> None:
    """Forget what was typed on the terminal and not read yet."""
    with suppress(termios.error, OSError, ValueError):
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
