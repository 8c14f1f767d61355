"""Layers that other machines compute: the guest that leaves them out of a pass and carries hidden states across.

llama.cpp builds the whole graph. Nodes that use weights which this process does not own are switched off by their flag,
and so is all that depends on them, until the border: the node that holds what the last foreign layer gives (`l_out-N`).
Its value comes from elsewhere and is put there; what this process gives to foreign layers is taken from such a node.
Where anything but a border leads from foreign layers to own ones the cut is refused: nothing is ever computed from what
is not there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple, Protocol

from runtime.engine.guests import Guests
from runtime.errors import EngineError
from runtime.llama import abi
from runtime.llama.context import Context
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.memory import view
from runtime.passes import Part, Pass
from runtime.settings import Settings

_BORDER = b"l_out-%d"
_NAME_BYTES = 24
_CHECK_TOKENS = 32
_F32 = 0
_SEEN = 1 << 30  # a flag of ours on a graph's first node: its foreign nodes are switched off
_WHERE = "cut this model elsewhere, or run it on one machine"


class Hops(Protocol):
    """How hidden states travel. Any call may raise, which ends the pass."""

    def begin(self, pass_: Pass, /) -> None:
        """A pass comes."""

    def leave(self, layer: int, hidden: memoryview, /) -> None:
        """What goes into this layer, which is foreign (or the head), is computed: rows of float32."""

    def enter(self, layer: int, n_bytes: int, /) -> bytes:
        """What goes into this layer, which is own (or the head); waits for it."""


class _Border(NamedTuple):
    """A node at a border: the layer that its value goes into, and whether it comes from elsewhere."""

    node: int
    layer: int
    comes: bool


class Borders:
    """The guest for the layers of `file`, a part of a model; `addresses` are those of every weight's structs.

    A graph is walked through once. llama.cpp uses it again for passes of the same size; what was switched off is off
    then, and only the borders are looked at. hops None: every node is switched off, which only checks the cut.
    """

    def __init__(
        self, file: ModelFile, addresses: Mapping[str, Sequence[int]], guests: Guests, hops: Hops | None
    ) -> None:
        self._guests, self._hops = guests, hops
        self._foreign = foreign_weights(file, addresses)
        layers = [layer.index for layer in file.layers]
        self._enter, self._leave = borders_of(layers, file.head.index, head=bool(file.head.pieces))
        self._starts_away = 0 not in layers
        self._away = False  # whether the nodes at hand belong to foreign layers
        self._tainted: set[int] = set()  # nodes of this pass whose values are not here
        self._first = 0  # node of the pass at hand
        self._known = 0  # first node of the graph that was walked through last
        self._is_known = False  # whether the graph at hand is that one
        self._borders: dict[int, _Border] = {}  # of that graph
        self._watched: list[int] = []
        self._n_met = 0

    def begin(self, pass_: Pass) -> None:
        """A pass comes."""
        self._first = self._n_met = 0
        if self._hops:
            self._hops.begin(pass_)

    def before(self, node: int) -> bool:
        """Switch a foreign node off; True at a border."""
        if not self._first:
            self._meet_graph(node)
        if self._is_known:
            return node in self._borders
        if self._hops is None:
            self._switch_off(node)
        return self._look_at(node) and self._hops is not None

    def _meet_graph(self, first: int) -> None:
        """The first node of a pass: is its graph the one that was walked through?"""
        self._first = first
        seen = ctypes.c_int32.from_address(first + abi.FLAGS_OFFSET).value & _SEEN
        self._is_known = bool(seen) and first == self._known
        if self._is_known:
            self._guests.watched_nodes_only(self)
            return
        self._away = self._starts_away
        self._tainted.clear()
        self._borders.clear()

    def _look_at(self, node: int) -> bool:
        """A node of a graph that is new: whether it is a border."""
        name = ctypes.string_at(node + abi.NAME_OFFSET, _NAME_BYTES).split(b"\0", 1)[0]
        if self._away and name in self._enter:
            self._announce(_Border(node, self._enter[name], comes=True))
            self._switch_off(node)
            self._away = False
            return True
        if self._reads(node):
            if not self._away:
                raise EngineError(
                    f"layers of this model are tied to each other beyond their borders ({name.decode()})", _WHERE
                )
            self._switch_off(node)
            self._tainted.add(node)
            self._taint_target(node)
            return False
        if not self._away and name in self._leave:
            self._announce(_Border(node, self._leave[name], comes=False))
            self._tainted.add(node)
            self._away = True
            return True
        return False

    def _reads(self, node: int) -> bool:
        """Whether a node reads what is not here."""
        sources = abi.unpack_src(ctypes.string_at(node + abi.SRC_OFFSET, abi.SRC_BYTES))
        if not (self._tainted.isdisjoint(sources) and self._foreign.isdisjoint(sources)):
            return True
        whole = ctypes.c_void_p.from_address(node + abi.VIEW_SRC_OFFSET).value
        return whole is not None and (whole in self._tainted or whole in self._foreign)

    def _taint_target(self, node: int) -> None:
        """What a node that is switched off would have written to is not there either."""
        whole = ctypes.c_void_p.from_address(node + abi.VIEW_SRC_OFFSET).value
        if whole is not None:
            self._tainted.add(whole)

    def _switch_off(self, node: int) -> None:
        flags = ctypes.c_int32.from_address(node + abi.FLAGS_OFFSET)
        flags.value &= ~abi.FLAG_COMPUTE

    def _announce(self, border: _Border) -> None:
        tensor = abi.Tensor.from_address(border.node)
        if tensor.type != _F32 or tensor.nb[1] != 4 * tensor.ne[0] or tensor.ne[2] * tensor.ne[3] != 1:
            raise EngineError(f"what goes into layer {border.layer} of this model is no plain matrix", _WHERE)
        self._borders[border.node] = border

    def after(self, node: int) -> None:
        """Everything up to this node has been computed: carry what is at a border."""
        border = self._borders.get(node)
        if border is None or self._hops is None:
            return
        self._n_met += 1
        n_bytes = int(abi.ggml_nbytes(node))
        data = int(abi.Tensor.from_address(node).data)
        if not border.comes:
            self._hops.leave(border.layer, view(data, n_bytes))
            return
        hidden = self._hops.enter(border.layer, n_bytes)
        if len(hidden) != n_bytes:
            raise EngineError(f"{len(hidden)} bytes came for layer {border.layer}, {n_bytes} are needed", "report this")
        ctypes.memmove(data, hidden, n_bytes)

    def end(self, *, complete: bool) -> None:
        """After the pass. Raises EngineError where a border was not met."""
        if not complete:
            return
        met = {border.layer for border in self._borders.values()}
        missing = {*self._enter.values(), *self._leave.values()} - met
        if missing:
            raise EngineError(f"llama.cpp shows no border in front of layer {min(missing)} of this model", _WHERE)
        if self._hops and self._n_met != len(self._borders):
            raise EngineError("llama.cpp passed over a border between layers", "report this")
        if self._hops and not self._is_known:
            self._know_graph()

    def _know_graph(self) -> None:
        """All of the graph was walked through: from now on its borders are enough."""
        self._known = self._first
        ctypes.c_int32.from_address(self._first + abi.FLAGS_OFFSET).value |= _SEEN
        for address in self._watched:
            self._guests.filter.forget(address)
        sources = (abi.unpack_src(ctypes.string_at(n + abi.SRC_OFFSET, abi.SRC_BYTES)) for n in self._borders)
        self._watched = [found[0] for found in sources]
        for address in self._watched:
            self._guests.filter.watch(address)


def check_cut(file: ModelFile, model: HollowModel, settings: Settings) -> None:
    """Raise EngineError where llama.cpp's graph does not allow these layers to be computed apart from the others.

    The graph of one token is walked through with every node switched off: nothing is computed, and no weight is needed.
    """
    guests = Guests()
    guests.add(Borders(file, model.weights, guests, None))
    pass_ = Pass((Part(0, 0, (0,), 1),))
    with closing(Context(model, replace(settings, n_ctx=_CHECK_TOKENS, n_logits=1), 1, guests.filter)) as context:
        guests.begin(pass_)
        status = context.decode(pass_)
        guests.end(complete=status == 0)
    if guests.stop:
        raise guests.stop


def foreign_weights(file: ModelFile, addresses: Mapping[str, Sequence[int]]) -> frozenset[int]:
    """Addresses of the tensors of weights that are no part of `file`."""
    own = {piece.tensor.name for piece in file.pieces} | {info.name for info in (*file.small_tensors, *file.row_tables)}
    return frozenset(address for name, found in addresses.items() if name not in own for address in found)


def borders_of(layers: Iterable[int], n_layers: int, head: bool) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """Where something comes in and where something goes out: name of the node -> the layer that it goes into.

    layers: own ones. n_layers: of the whole model, and the number of its head; head: whether that is computed here.
    """
    own = {*layers, *([n_layers] if head else [])}
    inner = range(1, n_layers + 1)
    enter = {_BORDER % (i - 1): i for i in inner if i in own and i - 1 not in own}
    leave = {_BORDER % (i - 1): i for i in inner if i not in own and i - 1 in own}
    return enter, leave
