"""Who acts at the nodes of a pass: weights, the filter of keys and values, a trace. None of them knows of the others.

llama.cpp asks before it computes a node, and reports those of which a report was wanted. Here is the one place that
answers: it calls the guests, switches nodes off and on again, and ends a pass that shall not go on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from runtime.llama import abi
from runtime.llama.node_filter import NodeFilter
from runtime.passes import Pass


class Guest(Protocol):
    """What acts at nodes, each given as the address of its ggml_tensor. Any call but `end` may end the pass: it raises.

    A guest that changes a node puts it back by the end of the pass: llama.cpp may use its graph again.
    """

    def begin(self, pass_: Pass, /) -> None:
        """A pass comes."""

    def before(self, node: int, /) -> bool:
        """A node is going to be computed; True: report when it is done."""

    def after(self, node: int, /) -> None:
        """Everything up to this node has been computed: a report, wanted by this guest or by another."""

    def end(self, *, complete: bool) -> None:
        """The pass that began, or tried to, is over; complete: llama.cpp computed all of it.

        An error makes the pass one that failed.
        """


class Guests:
    """The guests of one context's passes. `filter` is for llama.cpp; `stop` ends the pass and is raised after it."""

    def __init__(self) -> None:
        self.filter = NodeFilter(self._on_node)
        self._guests: list[Guest] = []
        self._everywhere: list[Guest] = []  # those of them that see every node
        self._begun: list[Guest] = []
        self._skipped: dict[int, int] = {}  # nodes that are switched off -> their operation
        self._stop: BaseException | None = None

    def add(self, guest: Guest, *, every_node: bool = True, ops: Sequence[int] = ()) -> None:
        """Take part in all passes from the next one on, behind the guests that are there.

        every_node: it is asked about each; else about those of the operations `ops`, which one guest may name, and
        those with a tensor among their sources that the filter watches.
        """
        self._guests.append(guest)
        if every_node or (ops and not self.filter.watch_ops(ops)):
            self._everywhere.append(guest)

    def remove(self, guest: Guest) -> None:
        """Take part no more."""
        self._guests.remove(guest)
        if guest in self._everywhere:
            self._everywhere.remove(guest)

    @contextmanager
    def joined_by(self, guest: Guest) -> Iterator[None]:
        """One more guest, which sees every node, in the passes inside the block."""
        self.add(guest)
        try:
            yield
        finally:
            self.remove(guest)

    def watched_nodes_only(self, guest: Guest) -> None:
        """For the rest of this pass a guest that sees every node needs no more than the watched ones."""
        if self._everywhere == [guest]:
            self.filter.pass_on_everything(False)
            if self._stop:  # looked at last: it may come at any moment
                self.filter.pass_on_everything(True)

    # --- passes -------------------------------------------------------------------------------------------------

    @property
    def stop(self) -> BaseException | None:
        """What ends the pass, or None. It may be set from a signal handler, in the middle of a pass."""
        return self._stop

    @stop.setter
    def stop(self, reason: BaseException | None) -> None:
        self._stop = reason
        if reason is not None:
            self.filter.pass_on_everything(True)  # the next node, whatever it is, ends the pass

    @property
    def are_needed(self) -> bool:
        """Whether there is anything to do at a node; not when every weight is in memory for good."""
        return bool(self._everywhere) or self.filter.is_watching

    def begin(self, pass_: Pass) -> None:
        """A pass comes. Raises what a guest raises; end() follows in any case."""
        self.filter.pass_on_everything(bool(self._everywhere))
        if self._stop:  # looked at last: it may come at any moment
            self.filter.pass_on_everything(True)
        for guest in self._guests:
            self._begun.append(guest)
            guest.begin(pass_)

    def end(self, *, complete: bool) -> None:
        """The pass is over; complete: llama.cpp computed all of it."""
        complete = complete and self._stop is None
        for node in list(self._skipped):
            self._unskip(node)  # llama.cpp may use its graph again
        self.filter.put_back()
        for guest in reversed(self._begun):
            try:
                guest.end(complete=complete)
            except BaseException as error:  # noqa: BLE001 - the others end as well; it is raised after the pass
                self.stop = self._stop or error
        self._begun.clear()

    # --- llama.cpp calls back -----------------------------------------------------------------------------------

    def _on_node(self, node: int, ask: bool, _data: int) -> bool:
        if ask and not (self._stop or self.are_needed):
            return False
        try:
            if self._stop is None:
                return self._before(node) if ask else self._after(node)
        except BaseException as error:  # noqa: BLE001 - ctypes would swallow it: kept, and raised after the pass
            self.stop = error
        return self.skip(node) if ask else self._unskip(node)

    def _before(self, node: int) -> bool:
        report = False
        for guest in self._guests:
            if guest.before(node):
                report = True
        return report

    def _after(self, node: int) -> bool:
        self._unskip(node)
        for guest in self._guests:
            guest.after(node)
        return True

    def skip(self, node: int) -> bool:
        """Switch a node off until it is reported."""
        op = ctypes.c_int.from_address(node + abi.OP_OFFSET)
        self._skipped.setdefault(node, op.value)
        op.value = abi.OP_NONE
        return True

    def _unskip(self, node: int) -> bool:
        op = self._skipped.pop(node, None)
        if op is not None:
            ctypes.c_int.from_address(node + abi.OP_OFFSET).value = op
        return False
