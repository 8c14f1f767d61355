"""Which pieces stay in memory: limits, layouts, tiles."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.llama.model_file import Layer, ModelFile, Piece, TensorInfo
from runtime.memory import HUGE_PAGE
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import (
    first_window,
    in_huge_pages,
    k_layers_worth,
    layer_bytes,
    layers_in,
    overlapping_window,
    resident_pieces,
    smallest_window,
    streamable_bytes,
    whole_layers,
    window_bytes,
)
from runtime.sizes import MB, PAGE

ROW = 64
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def make_index(layers, head=(), n_files=1):
    """An index without files: rows of every tensor of every layer, rows of every tile of the head. 64 bytes a row."""
    number, offsets, groups = 0, [160 * (i + 1) for i in range(n_files)], []

    def tensor(name, n_rows):
        file = len(groups) % n_files
        info = TensorInfo(name, file, offsets[file], n_rows * ROW, "f16", (ROW // 2, n_rows, 1, 1), ROW)
        offsets[file] += n_rows * ROW
        return info

    for rows in layers:
        i = len(groups)
        pieces = [Piece(number + j, i, tensor(f"blk.{i}.t{j}.weight", n), 0, n) for j, n in enumerate(rows)]
        number += len(pieces)
        groups.append(Layer(i, tuple(pieces)))
    tiles, first, matrix = [], 0, tensor("output.weight", max(sum(head), 1))
    for n_rows in head:
        tiles.append(Piece(number + len(tiles), len(groups), matrix, first, n_rows))
        first += n_rows
    return ModelFile(
        paths=tuple(Path(f"part-{i}") for i in range(n_files)),
        file_sizes=tuple(offset + PAGE for offset in offsets),
        data_offsets=(160,) * n_files,
        architecture="test",
        name="test",
        tensors=(),
        layers=tuple(groups),
        head=Layer(len(groups), tuple(tiles)),
        row_tables=(),
        globals=(),
        tied_head=False,
        integers={},
        tokenizer="",
        n_byte_tokens=0,
    )


@st.composite
def or_a_part(draw, models):
    """Such a model, or some layers of it, with or without the head."""
    model = draw(models)
    layers = draw(st.sets(st.sampled_from(range(model.n_layers)), min_size=1))
    return model.owned(layers, head=draw(st.booleans()), embedding=False) if draw(st.booleans()) else model


rows = st.integers(64, 1200)
models = or_a_part(
    st.builds(
        make_index,
        st.lists(st.lists(rows, min_size=1, max_size=5), min_size=1, max_size=7),
        st.lists(st.integers(16, 500), max_size=6),
    )
)
layouts = st.sampled_from(list(Layout))


def chosen(model, plan, limit=None, **more):
    numbers = resident_pieces(model, plan, limit, **more)
    return [piece for piece in model.pieces if piece.number in numbers]


def n_bytes(pieces):
    return sum(piece.span_bytes for piece in pieces)


def assert_tiles_without_gaps(model, pieces):
    tiles = [piece for piece in pieces if piece.layer == model.head.index]
    assert tiles == list(model.head.pieces[: len(tiles)])


# --- properties ---------------------------------------------------------------------------------------------------


@QUICK
@given(models, layouts, st.integers(0, 8), st.integers(1, 4), st.floats(0, 1.2), st.booleans(), st.data())
def test_never_above_the_limit_and_tiles_in_order(model, layout, k, w, share, pinned, data):
    limit = int(share * streamable_bytes(model))
    keep = frozenset(data.draw(st.sets(st.sampled_from([piece.number for piece in model.pieces]))))
    n_tiles = data.draw(st.integers(0, len(model.head.pieces)))
    keep -= {piece.number for piece in model.head.pieces[n_tiles:]}
    keep |= {piece.number for piece in model.head.pieces[:n_tiles]}
    plan = Plan(k, w, layout, pinned_bytes=max(limit, 1) if pinned else 0)
    pieces = chosen(model, plan, limit, keep=keep)
    assert n_bytes(pieces) <= limit
    assert_tiles_without_gaps(model, pieces)
    if share >= 1 and pinned:
        assert pieces == list(model.pieces)


@QUICK
@given(models, layouts, st.floats(0, 0.99))
def test_pinned_bytes_are_filled_until_nothing_more_fits(model, layout, share):
    target = max(1, int(share * streamable_bytes(model)))
    pieces = chosen(model, Plan(0, 1, layout, pinned_bytes=target))
    left_out = [piece for piece in model.pieces if piece not in pieces]
    next_tile = [piece for piece in left_out if piece.layer == model.head.index][:1]
    for piece in [*(p for p in left_out if p.layer < model.head.index), *next_tile]:
        assert n_bytes(pieces) + piece.span_bytes > target


@QUICK
@given(models, layouts, st.floats(0, 1), st.floats(0, 1))
def test_more_budget_keeps_at_least_as_much_less_one_piece(model, layout, a, b):
    total, largest = streamable_bytes(model), smallest_window(model)
    less, more = (max(1, int(share * total)) for share in sorted((a, b)))
    kept = [n_bytes(chosen(model, Plan(0, 1, layout, pinned_bytes=target))) for target in (less, more)]
    assert kept[1] > kept[0] - largest
    assert kept[1] >= kept[0] or layout is not Layout.PREFIX


@QUICK
@given(models, st.integers(0, 8))
def test_without_bytes_prefix_and_even_keep_exactly_their_layers(model, k):
    for layout in (Layout.PREFIX, Layout.EVEN):
        pieces = chosen(model, Plan(k, 1, layout))
        if k < model.n_layers:
            assert {piece.layer for piece in pieces} == {
                model.layers[i].index for i in whole_layers(model.n_layers, k, layout)
            }
        assert n_bytes(pieces) == k_layers_worth(model, k, layout)


@QUICK
@given(models, st.integers(0, 8))
def test_balanced_has_the_same_share_of_every_layer(model, k):
    """Summed from the first layer on, less than one piece is missing of the share, and nothing is above it."""
    target = k_layers_worth(model, k, Layout.BALANCED)
    pieces = chosen(model, Plan(k, 1, Layout.BALANCED))
    share = target / streamable_bytes(model)
    seen = used = 0
    for i, group in enumerate(model.groups):
        seen += layer_bytes(group)
        used += n_bytes(piece for piece in pieces if piece.layer == group.index)
        largest = max((piece.span_bytes for g in model.groups[: i + 1] for piece in g.pieces), default=0)
        assert used <= share * seen
        assert share * seen - used < largest


@QUICK
@given(models, st.floats(0, 0.9), st.floats(0, 0.1))
def test_balanced_keeps_what_is_there_when_the_budget_grows(model, share, more):
    total = streamable_bytes(model)
    before = max(1, int(share * total))
    there = resident_pieces(model, Plan(0, 1, Layout.BALANCED, pinned_bytes=before))
    after = Plan(0, 1, Layout.BALANCED, pinned_bytes=before + int(more * total))
    pieces = chosen(model, after, keep=there)
    gone = there - {piece.number for piece in pieces}
    assert len(gone) <= 16  # some may make room for larger ones
    assert n_bytes(pieces) <= after.pinned_bytes
    assert_tiles_without_gaps(model, pieces)


def test_few_large_tensors_are_streamed_and_not_many_small_ones():
    model = make_index([[64, 64, 64, 64, 640, 640]] * 8)
    total = streamable_bytes(model)
    pieces = chosen(model, Plan(0, 1, Layout.BALANCED, pinned_bytes=int(0.7 * total)))
    streamed = [piece for piece in model.pieces if piece not in pieces]
    assert {piece.n_rows for piece in streamed} == {640}
    assert len({piece.layer for piece in streamed}) >= 6


def test_a_few_small_tensors_make_room_for_a_large_one_where_little_is_streamed():
    """As in a model of 0.5B parameters in f16: four of its large tensors were streamed where three and some small ones
    are all that there is no room for."""
    model = make_index([[1600, 1600, 8700, 8700, 8700]] * 8)
    small, large = (model.layers[0].pieces[i].span_bytes for i in (0, 2))
    for missing, streamed in ((3 * large, [3, 0]), (3 * large + 3 * small, [3, 3]), (4 * large, [4, 0])):
        pieces = chosen(model, Plan(0, 1, Layout.BALANCED, pinned_bytes=streamable_bytes(model) - missing))
        others = [piece.n_rows for piece in model.pieces if piece not in pieces]
        assert [others.count(8700), others.count(1600)] == streamed


def test_a_larger_tensor_takes_the_place_of_a_smaller_one_where_that_fills_the_target():
    model = make_index([[64, 640, 640], [64, 320, 640]])
    sizes = sorted(piece.span_bytes for piece in model.pieces)
    for target in range(sizes[0], sum(sizes), PAGE):
        pieces = chosen(model, Plan(0, 1, Layout.BALANCED, pinned_bytes=target))
        room = target - n_bytes(pieces)
        assert room >= 0
        others = [piece for piece in model.pieces if piece not in pieces]
        assert not any(PAGE <= b.span_bytes - a.span_bytes <= room for a in pieces for b in others)


@QUICK
@given(models, st.integers(0, 20), layouts)
def test_k_layers_worth(model, k, layout):
    sizes = [layer_bytes(layer) for layer in model.layers]
    worth = k_layers_worth(model, k, layout)
    if k >= len(sizes):
        assert worth == sum(sizes)
    elif layout is Layout.PREFIX:
        assert worth == sum(sizes[:k])
    elif layout is Layout.EVEN:
        assert min(sizes) * k <= worth <= max(sizes) * k
    else:
        assert worth == sum(sizes) * k // len(sizes)
        assert layers_in(model, worth) in (k - 1, k)


# --- examples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layers", [1, 2, 5, 28])
def test_even_layers_are_apart_by_the_same_step(n_layers):
    for k in range(n_layers + 3):
        layers = whole_layers(n_layers, k, Layout.EVEN)
        assert len(set(layers)) == min(k, n_layers)
        assert all(0 <= layer < n_layers for layer in layers)
        steps = {b - a for a, b in pairwise(layers)}
        assert not steps or max(steps) - min(steps) <= 1
        if 0 < k <= n_layers:
            assert abs(layers[0] - (n_layers - 1 - layers[-1])) <= 1


def test_prefix_layers():
    assert whole_layers(5, 3, Layout.PREFIX) == [0, 1, 2]
    assert whole_layers(2, 9, Layout.PREFIX) == [0, 1]


def test_windows():
    model = make_index([[64, 640], [128]], [256, 256])
    largest = max(layer_bytes(layer) for layer in model.layers)
    assert smallest_window(model) == max(piece.span_bytes for piece in model.pieces)
    everything = frozenset(piece.number for piece in model.pieces)
    assert smallest_window(model, everything) == 0
    assert window_bytes(model, Plan(0, 3)) == 3 * largest
    assert window_bytes(model, Plan(0, 3, window_bytes=MB)) == MB
    assert window_bytes(model, Plan(0, 3, window_bytes=1)) == smallest_window(model)


def test_a_part_has_its_own_window_and_its_own_share_of_the_bytes():
    model = make_index([[64, 2000], [64, 640], [128]], [256, 256])
    front, back = model.owned([0, 1], head=False, embedding=True), model.owned([2], head=True, embedding=False)
    assert streamable_bytes(front) + streamable_bytes(back) == streamable_bytes(model)
    assert smallest_window(front) == smallest_window(model) == model.layers[0].pieces[1].span_bytes
    assert smallest_window(back) == max(piece.span_bytes for piece in model.head.pieces) < smallest_window(model)
    assert window_bytes(back, Plan(0, 3)) == 3 * layer_bytes(model.layers[2])
    assert k_layers_worth(back, 1, Layout.PREFIX) == layer_bytes(model.layers[2])
    assert layers_in(back, layer_bytes(model.layers[2])) == 1
    assert resident_pieces(back, Plan(1, 1)) == {piece.number for piece in model.layers[2].pieces}
    assert resident_pieces(back, Plan(0, 1, pinned_bytes=10**9)) == {piece.number for piece in back.pieces}


def test_a_part_without_layers_has_a_head_to_stream_or_nothing():
    model = make_index([[64]] * 3, [256])
    head, nothing = (model.owned([], head=has_head, embedding=True) for has_head in (True, False))
    for layout in Layout:
        assert resident_pieces(head, Plan(0, 1, layout)) == resident_pieces(nothing, Plan(0, 1, layout)) == frozenset()
        assert len(resident_pieces(head, Plan(0, 1, layout, pinned_bytes=streamable_bytes(head)))) == 1
    assert window_bytes(head, Plan(0, 1)) == model.head.pieces[0].span_bytes
    assert window_bytes(nothing, Plan(0, 1)) == streamable_bytes(nothing) == 0


def test_layers_in():
    model = make_index([[640]] * 4)
    one = layer_bytes(model.layers[0])
    assert [layers_in(model, n) for n in (0, one - 1, one, 3 * one, 99 * one)] == [0, 0, 1, 3, 4]


def test_a_whole_model_is_resident_only_when_all_of_it_fits():
    model = make_index([[640]] * 4, [640])
    total = streamable_bytes(model)
    for layout in Layout:
        assert len(resident_pieces(model, Plan(0, 1, layout, pinned_bytes=total))) == 5
        assert len(resident_pieces(model, Plan(0, 1, layout, pinned_bytes=total - 1))) == 4
        assert resident_pieces(model, Plan(0, 1, layout)) == frozenset()


@pytest.mark.parametrize(("rate", "pieces"), [(0, 2), (400, 2), (800, 2), (900, 3), (1800, 4)])
def test_a_window_that_overlaps(rate, pieces):
    """Two pieces, and as many as the disk reads in a little more than a millisecond."""
    assert overlapping_window(4096, rate * 4096) == pieces * 4096


@pytest.mark.parametrize(
    ("window", "rate", "found"),
    [
        (2.6, 2.5e9, 4),  # a quarter in small pages would be read at half the speed
        (2.6, 1e9, 2.6),  # 1.4 huge pages more: these bytes would cost more than a millisecond
        (3.6, 1e9, 4),
        (0.5, 90e6, 0.5),
        (4, 1e9, 4),
    ],
)
def test_a_window_lies_in_huge_pages_where_that_costs_little(window, rate, found):
    """window and found in huge pages of 2 MiB / 2."""
    assert in_huge_pages(int(window * HUGE_PAGE / 2), rate) == int(found * HUGE_PAGE / 2)


def test_a_first_window_is_two_pieces_or_a_quarter_of_the_budget():
    model = make_index([[640, 1280]], [320])
    largest = smallest_window(model)
    assert first_window(model, 100 * largest) == 2 * largest
    assert first_window(model, 4 * largest) == largest
