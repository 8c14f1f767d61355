"""A conversation on the terminal: one load, the same keys and values reused from turn to turn."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import ModuleType

from h2o_cli.closing import closing_line
from h2o_cli.cmd_run import first_with_progress
from h2o_cli.defaults import CONVERSATION_CONTEXT
from h2o_cli.interrupts import interrupts
from h2o_cli.opening import OpenModel, RunOptions, Session, context_for, open_session
from h2o_cli.output import emit, is_terminal, note, print_error, styled, tell
from runtime.chat import Chat, Message
from runtime.errors import Cancelled, PromptError, UsageError
from runtime.generate import CANCELLED, LENGTH, Request, generate
from runtime.meter import Meter, Statistics

PROMPT = "> "
LONGEST_TAIL = 1024  # tokens of an answer that a filter keeps apart from the prompt
ANSWER_ROOM = 256  # tokens kept free for an answer, at most a quarter of the context
HELP = """/help   these lines
/clear  forget the conversation
/stats  speed, memory and plan of the last answer
/exit   end (also Ctrl-D)
Ctrl-C  ends an answer; at an empty prompt it ends the conversation
A line that ends in \\ goes on in the next one."""
PLAIN_HELP = "This model has no chat template: a line starts a new text, an empty line goes on with the last one."


def converse(options: RunOptions) -> int:
    """Talk until the user ends it; returns the exit code."""
    if options.json:
        raise UsageError("--json needs a prompt", "give one with -p, -f or on standard input")
    readline = _line_editing()
    model = OpenModel(options, note)
    try:
        chat = Chat(model.tokenizer, note) if options.chat or model.tokenizer.chat_template else None
        n_ctx = context_for(model, options.ctx, options.max_context or CONVERSATION_CONTEXT, note)
        longest = LONGEST_TAIL if options.n_predict in (None, -1) else options.n_predict
        session = open_session(model, options.for_answers_of(longest or 0), n_ctx, n_ctx, note)
        try:
            note(f"{model.file.name}, context {n_ctx} tokens; /help lists the commands")
            return Conversation(session, options, chat, readline).run()
        finally:
            session.close()
    finally:
        model.close()


def _line_editing() -> ModuleType | None:
    """The readline module where there is one: loaded before the budget is shared out."""
    try:
        import readline
    except ImportError:
        return None
    return readline


class Conversation:
    """The turns of one conversation. Without a chat every line starts a text of its own."""

    def __init__(
        self, session: Session, options: RunOptions, chat: Chat | None, readline: ModuleType | None = None
    ) -> None:
        self._session = session
        self._options = options
        self._chat = chat
        self._readline = readline
        self._messages: list[Message] = []
        self._text: list[int] = []  # without a chat: the text so far
        self._statistics = Statistics()
        self._told_trimmed = False
        self._commands: dict[str, Callable[[], None]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/stats": lambda: note(closing_line(session, self._statistics).removeprefix("h2o: ")),
        }

    def run(self) -> int:
        """Read lines and answer them until the end; returns the exit code."""
        while True:
            line = self._read()
            if line is None or line.strip() in ("/exit", "/quit", "/bye"):
                return 0
            command = self._commands.get(line.strip())
            if command:
                command()
            elif line.startswith("/") and " " not in line.strip():
                note(f"there is no command {line.strip()}; /help lists them")
            elif line.strip() or (not self._chat and self._text):
                try:
                    self.answer(line)
                except PromptError as error:
                    print_error(error.message, error.next_step)

    # --- reading ------------------------------------------------------------------------------------------------

    def _read(self) -> str | None:
        """A line (or several, each but the last ending in a backslash); None at the end of the input."""
        line = self._read_line(PROMPT)
        while line is not None and line.endswith("\\"):
            more = self._read_line("  ")
            line = line[:-1] + "\n" + more if more is not None else line[:-1]
        return line

    def _read_line(self, prompt: str) -> str | None:
        """One line. Ctrl-C throws a line away that was begun, and is raised at an empty one."""
        typed = ""

        def stop(number: int) -> None:
            nonlocal typed
            typed = self._readline.get_line_buffer() if self._readline else ""
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
                if error.signal_number != signal.SIGINT or not typed:
                    raise
                typed = ""

    @staticmethod
    def _input(prompt: str) -> str:
        if is_terminal(sys.stdout):
            return input(prompt)
        tell(prompt, end="")
        return input()

    # --- answering ----------------------------------------------------------------------------------------------

    def answer(self, line: str) -> None:
        """Answer one line. Raises PromptError when it cannot be put to the model, Cancelled on SIGTERM."""
        stop = self._options.stop + (self._chat.stop if self._chat else ())
        prompt = self._chat_prompt(line) if self._chat else self._plain_prompt(line)
        n_predict = -1 if self._options.n_predict is None else self._options.n_predict
        text, tokens = self._generate(Request(tuple(prompt), n_predict, stop))
        if self._chat:
            self._messages.append(Message("assistant", text.strip()))  # templates put their own spaces around it
        else:
            self._text = [*prompt, *tokens]

    def _generate(self, request: Request) -> tuple[str, list[int]]:
        session = self._session
        meter = Meter(session.engine, session.machine)
        parts, tokens, finish = [], [], ""
        with interrupts.ending(session.engine.cancel, patient=True):
            steps = generate(session.sequence, session.model.tokenizer, session.sampler, request, session.follower)
            for step in first_with_progress(session, steps, request.prompt):
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
            note("stopped")
        elif finish == LENGTH and self._session.sequence.room == 0:
            note(f"the context of {self._session.engine.settings.n_ctx} tokens is full (--ctx makes it longer)")
        if self._statistics.tokens_per_s and is_terminal(sys.stderr):
            speed = f"{self._statistics.n_tokens} tokens, {self._statistics.tokens_per_s:.1f} tokens/s"
            tell(styled(f"({speed})", "dim"))

    def _chat_prompt(self, line: str) -> list[int]:
        """The conversation with the new message, its oldest turns left out where the context is too short."""
        if self._chat is None:
            return []
        n_ctx = self._session.engine.settings.n_ctx
        most = n_ctx - min(ANSWER_ROOM, n_ctx // 4)
        messages = [*self._messages, Message("user", line)]
        tokens = self._chat.encode(messages, n_ctx)
        while len(tokens) > most and len(messages) > 1:
            del messages[:2]
            tokens = self._chat.encode(messages, n_ctx)
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

    def _help(self) -> None:
        tell(HELP if self._chat else f"{HELP}\n{PLAIN_HELP}")

    def _clear(self) -> None:
        self._messages, self._text = [], []
        note("the conversation was forgotten")
