"""The model and the session of a conversation; both are opened anew where other devices are to compute."""

from __future__ import annotations

import gc
from dataclasses import replace

from h2o_cli.console import CONSOLE
from h2o_cli.output import note
from h2o_cli.run_options import RunOptions
from h2o_cli.session.defaults import CONVERSATION_CONTEXT
from h2o_cli.session.device_changes import DeviceChanges
from h2o_cli.session.model import OpenModel, context_for
from h2o_cli.session.opening import Session, open_session
from runtime.answer.sampler import Sampling
from runtime.errors import BudgetError, EngineError, UsageError, WorkerError
from runtime.llama.chat import Chat

LONGEST_TAIL = 1024  # tokens of an answer that a filter keeps apart from the prompt


class Opened:
    """What a conversation is held with. chat: None where the model has no template and none was asked for."""

    def __init__(self, options: RunOptions) -> None:
        """Raises H2OError."""
        wanted = options.session
        self._options = options
        self._changes = DeviceChanges(wanted.devices, CONSOLE.note)
        self._session: Session | None = None
        self._devices = wanted.devices
        self.chat: Chat | None = None
        self.sampling = wanted.sampling
        if wanted.devices.devices is not None:
            self._devices = wanted.devices.naming(wanted.devices.addresses())
            note(f"order of the devices: {self._devices.workers}")
            self._devices = replace(self._devices, refresh=wanted.devices.refresh)
        self._open()

    @property
    def session(self) -> Session:
        """The session; opened again where a signal came while it was."""
        return self._session or self._open()

    def _open(self) -> Session:
        options = self._options
        wanted = replace(options.session, devices=self._devices, sampling=self.sampling)
        model = OpenModel(wanted, CONSOLE)
        try:
            if self.chat:
                self.chat.move_to(model.tokenizer)
            elif options.chat or model.tokenizer.chat_template:
                self.chat = Chat(model.tokenizer, note)
                self.chat.compile()
            self.n_ctx = context_for(model, wanted.ctx, options.max_context or CONVERSATION_CONTEXT)
            longest = LONGEST_TAIL if options.n_predict in (None, -1) else options.n_predict
            self._session = open_session(model, wanted.for_answers_of(longest or 0), self.n_ctx, self.n_ctx)
        except BaseException:
            model.close()
            raise
        self._devices = replace(self._devices, refresh=False)
        return self._session

    def sample_with(self, sampling: Sampling) -> None:
        """Choose the tokens of the answers that follow in another way. Raises UsageError."""
        self.session.sample_with(sampling)
        self.sampling = sampling

    def follow_devices(self) -> None:
        """Between two answers: go on with other devices, if there are news of them. Raises H2OError."""
        wanted = self._changes.look(self._devices, self.session.model.team)
        if wanted is None:
            return
        before = self._devices
        self.close()
        gc.collect()  # its objects are in circles
        self._devices = wanted
        try:
            self._open()
        except (BudgetError, EngineError, UsageError, WorkerError) as error:
            self._changes.keep(error)
            self._devices = before
            self._open()

    def close(self) -> None:
        """Free everything."""
        session, self._session = self._session, None
        if session:
            session.close()
            session.model.close()
