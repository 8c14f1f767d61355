"""The index of a model file: layers, pieces, tiles, small tensors, parts, hash."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_models import ARCHS, OTHER_ARCHS

from runtime.errors import ModelError, UsageError
from runtime.llama.model_file import TILE_BYTES, Layer, ModelFile
from runtime.sizes import PAGE

N_LAYERS = 4


def described(path):
    """name -> (offset, bytes) of all tensors, as the gguf package reads them."""
    return {t.name: (t.data_offset, t.n_bytes) for t in gguf.GGUFReader(path).tensors}


def parts_of(model):
    """All tensors of the index by where they are kept."""
    pieces = {piece.tensor.name: piece.tensor for piece in model.pieces}
    small = {info.name: info for info in model.small_tensors}
    tables = {info.name: info for info in model.row_tables}
    return pieces, small, tables


# --- every architecture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_type", ["f16", "q8_0"])
@pytest.mark.parametrize("arch", [*ARCHS, *OTHER_ARCHS])
def test_every_tensor_has_its_place(tiny_model, arch, file_type):
    path = tiny_model(arch, file_type)
    model, there = ModelFile.open(path), described(path)
    assert {info.name: (info.offset, info.n_bytes) for info in model.tensors} == there
    pieces, small, tables = parts_of(model)
    assert pieces.keys() | small.keys() | tables.keys() == there.keys()
    assert not small.keys() & (pieces.keys() | tables.keys())
    assert model.tied_head == ("output.weight" not in there)
    assert (pieces.keys() & tables.keys()) == ({"token_embd.weight"} if model.tied_head else set())
    assert all(info.n_bytes < PAGE or info.n_rows == 1 for info in small.values() if info.name.startswith("blk."))
    assert model.architecture == arch
    assert (model.path, model.n_bytes) == (path, path.stat().st_size)


@pytest.mark.parametrize("arch", [*ARCHS, *OTHER_ARCHS])
def test_groups_and_pieces(tiny_model, arch):
    model = ModelFile.open(tiny_model(arch))
    assert model.n_layers == N_LAYERS
    assert [group.index for group in model.groups] == list(range(N_LAYERS + 1))
    pieces = list(model.pieces)
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    for group in model.groups:
        assert {piece.layer for piece in group.pieces} == {group.index}
    for layer in model.layers:
        names = [piece.tensor.name for piece in layer.pieces] + [info.name for info in layer.small]
        assert all(name.startswith(f"blk.{layer.index}.") for name in names)
        assert all((piece.first_row, piece.n_bytes) == (0, piece.tensor.n_bytes) for piece in layer.pieces)
        assert all(piece.tensor.n_bytes >= PAGE for piece in layer.pieces)
    same = [[piece.tensor.name.split(".", 2)[2] for piece in layer.pieces] for layer in model.layers]
    assert same == same[:1] * N_LAYERS


@pytest.mark.parametrize("arch", [*ARCHS, *OTHER_ARCHS])
def test_spans_are_the_pieces_widened_to_pages(tiny_model, arch):
    for piece in ModelFile.open(tiny_model(arch, "q8_0")).pieces:
        start, end = piece.span
        assert start % PAGE == end % PAGE == 0
        assert piece.offset - PAGE < start <= piece.offset
        assert piece.offset + piece.n_bytes <= end < piece.offset + piece.n_bytes + PAGE
        assert piece.span_bytes == end - start


@pytest.mark.parametrize("file_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize(
    "shape",
    [
        "llama",
        "qwen2",
        "llama:layers=1,dim=64,ffn=64,heads=2,kv_heads=2,vocab=1000,ctx=64,tied=0",
        "llama:layers=2,dim=256,ffn=512,heads=4,kv_heads=2,vocab=4099,ctx=64",
    ],
)
def test_tiles_cover_the_head_exactly(tiny_model, shape, file_type):
    model = ModelFile.open(tiny_model(shape, file_type))
    tiles = model.head.pieces
    largest = max((piece.n_bytes for layer in model.layers for piece in layer.pieces), default=TILE_BYTES)
    (info,) = {tile.tensor for tile in tiles}
    assert info.name == ("token_embd.weight" if model.tied_head else "output.weight")
    assert [a.first_row + a.n_rows for a in tiles] == [*(b.first_row for b in tiles[1:]), info.n_rows]
    assert tiles[0].first_row == 0
    assert all(tile.n_rows == tiles[0].n_rows for tile in tiles[:-1])
    assert len(tiles) == 1 or tiles[0].n_rows % 16 == 0
    assert max(tile.n_bytes for tile in tiles) <= max(min(TILE_BYTES, largest), 16 * info.row_bytes)
    assert all(b.offset == a.offset + a.n_bytes for a, b in pairwise(tiles))
    assert tiles[-1].offset + tiles[-1].n_bytes == info.offset + info.n_bytes
    assert model.head.small == ()


def test_facts_of_the_header(tiny_model):
    model = ModelFile.open(tiny_model("llama"))
    assert model.hyper_parameter("embedding_length") == 256
    assert model.hyper_parameter("feed_forward_length") == 512
    assert model.hyper_parameter("attention.head_count_kv") == 2
    assert model.hyper_parameter("context_length") == 512
    assert model.hyper_parameter("attention.sliding_window") == 0
    assert [info.name for info in model.row_tables] == ["token_embd.weight"]
    assert [info.name for info in model.globals] == ["output_norm.weight"]
    assert model.row_tables[0].n_rows == 512
    assert model.row_tables[0].type_name == "f16"


@pytest.mark.parametrize("arch", [*ARCHS, *OTHER_ARCHS])
def test_the_width_of_keys_is_that_of_the_header(tiny_model, arch):
    path = tiny_model(arch)
    field = gguf.GGUFReader(path).get_field(f"{arch}.attention.key_length")
    assert ModelFile.open(path).hyper_parameter("attention.key_length") == (field.contents() if field else 0)


# --- a part --------------------------------------------------------------------------------------------------------


def test_a_part_keeps_the_numbers_of_the_whole(tiny_model):
    model = ModelFile.open(tiny_model("qwen2"))
    part = model.owned(range(1, 3), head=True, embedding=False)
    assert part.layers == model.layers[1:3]
    assert (part.n_layers, part.head.index) == (2, N_LAYERS)
    assert list(part.pieces) == [piece for piece in model.pieces if piece.layer in (1, 2, N_LAYERS)]
    assert (part.paths, part.file_sizes, part.tensors) == (model.paths, model.file_sizes, model.tensors)
    assert part.row_tables == ()
    front = model.owned([0], head=False, embedding=True)
    assert front.row_tables == model.row_tables
    assert list(front.pieces) == list(model.layers[0].pieces)
    assert front.head == Layer(N_LAYERS, ())


def test_small_tensors_outside_the_layers_go_where_they_are_used(tiny_model):
    model = ModelFile.open(tiny_model("gpt2"))
    names = {info.name for info in model.globals}
    assert names == {"position_embd.weight", "output_norm.weight", "output_norm.bias"}
    for head in (False, True):
        for embedding in (False, True):
            part = model.owned([0], head=head, embedding=embedding)
            foreign = {n for n in names if n.startswith("output") and not head}
            foreign |= {n for n in names if n.startswith("position") and not embedding}
            assert {info.name for info in part.globals} == names - foreign
            layers = [info.name for info in part.small_tensors if info.name.startswith("blk.")]
            assert layers == [info.name for info in model.layers[0].small]


def test_a_part_is_a_model_of_its_own_and_everything_is_the_model(tiny_model):
    model = ModelFile.open(tiny_model("llama"))
    assert model.owned(range(N_LAYERS), head=True, embedding=True) is model
    parts = [model.owned(range(N_LAYERS), head=head, embedding=not head) for head in (False, True)]
    parts += [model.owned(layers, head=True, embedding=True) for layers in ([0], [1], [0, 1])]
    hashes = [part.hash for part in (model, *parts)]
    assert len(set(hashes)) == len(hashes)
    assert all(0 < number < 2**63 for number in hashes)
    assert model.owned([1, 0], head=True, embedding=True) == parts[-1]
    with pytest.raises(UsageError, match="no layer 4"):
        model.owned([3, 4], head=True, embedding=True)


# --- the hash -----------------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_the_content_not_of_the_name(tiny_model, tmp_path):
    path = tiny_model("qwen2")
    copy = tmp_path / "other name.gguf"
    shutil.copy(path, copy)
    first = ModelFile.open(path).hash
    assert 0 < first < 2**63
    assert ModelFile.open(copy).hash == first == ModelFile.open(path).hash


@pytest.mark.parametrize("where", ["first weights", "header", "size"])
def test_the_hash_differs_when_the_file_does(tiny_model, tmp_path, where):
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_model("qwen2"), path)
    before = ModelFile.open(path)
    data = bytearray(path.read_bytes())
    if where == "first weights":
        data[before.data_offsets[0]] ^= 1
    elif where == "header":
        data[data.index(b"qwen2.rope") + len("qwen2.rope.freq_base") + 4] ^= 1
    else:
        data += bytes(64)
    path.write_bytes(data)
    assert ModelFile.open(path).hash != before.hash


def test_models_of_different_weights_have_different_hashes(tiny_model):
    hashes = {ModelFile.open(tiny_model(arch, kind)).hash for arch in ("llama", "qwen3") for kind in ("f16", "q8_0")}
    assert len(hashes) == 4


# --- models in several files ------------------------------------------------------------------------------------------


def write_parts(path, folder, most_tensors):
    """The model at path again, as llama.cpp's naming has it: NAME-00001-of-0000N.gguf."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(folder / "parts.gguf", arch, split_max_tensors=most_tensors)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = (field.types[0], field.types[-1] if len(field.types) > 1 else None)
            writer.add_key_value(key, field.contents(), *kinds)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("parts-*.gguf"))


@pytest.fixture(scope="module")
def parts(tiny_model, tmp_path_factory):
    """(path of the whole model, paths of its parts)."""
    path = tiny_model("llama", "q8_0")
    return path, write_parts(path, tmp_path_factory.mktemp("parts"), 11)


def bytes_of(model, piece):
    data = np.memmap(model.paths[piece.tensor.file], mode="r")
    return data[piece.offset : piece.offset + piece.n_bytes]


def test_parts_are_one_model(parts):
    whole_path, paths = parts
    assert len(paths) == 4
    whole, model = ModelFile.open(whole_path), ModelFile.open(paths[0])
    assert model.paths == tuple(paths)
    assert model.file_sizes == tuple(path.stat().st_size for path in paths)
    assert model.hash != whole.hash
    assert {info.file for info in model.tensors} == {0, 1, 2, 3}
    for one, other in zip(whole.pieces, model.pieces, strict=True):
        assert (one.tensor.name, one.first_row, one.n_rows) == (other.tensor.name, other.first_row, other.n_rows)
        assert np.array_equal(bytes_of(whole, one), bytes_of(model, other))
    assert (model.architecture, model.tokenizer, model.integers) == (
        whole.architecture,
        whole.tokenizer,
        whole.integers,
    )


def test_the_hash_is_over_all_parts(parts, tmp_path):
    copies = [Path(shutil.copy(path, tmp_path)) for path in parts[1]]
    before = ModelFile.open(copies[0])
    data = bytearray(copies[-1].read_bytes())
    data[before.data_offsets[-1]] ^= 1
    copies[-1].write_bytes(data)
    assert ModelFile.open(copies[0]).hash != before.hash


def test_any_part_may_be_named(parts):
    assert ModelFile.open(parts[1][2]).hash == ModelFile.open(parts[1][0]).hash


def test_a_missing_part(parts, tmp_path):
    copies = [Path(shutil.copy(path, tmp_path)) for path in parts[1]]
    copies[2].unlink()
    with pytest.raises(ModelError, match="part 3 of 4 is missing"):
        ModelFile.open(copies[0])


def test_a_part_under_another_name(parts, tmp_path):
    alone = Path(shutil.copy(parts[1][0], tmp_path / "model.gguf"))
    with pytest.raises(ModelError, match="part of a model in 4 files"):
        ModelFile.open(alone)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_file_that_ends_too_early(tiny_model, tmp_path):
    path = tmp_path / "model.gguf"
    data = tiny_model("qwen2").read_bytes()
    for n_bytes, problem in ((len(data) - 1, "cut short"), (5000, "cut|damaged"), (23, "cut short"), (0, "empty")):
        path.write_bytes(data[:n_bytes])
        with pytest.raises(ModelError, match=problem):
            ModelFile.open(path)


def test_what_is_not_a_model(tmp_path):
    for path, problem in ((tmp_path, "directory"), (tmp_path / "no", "No such file"), (Path("/dev/null"), "regular")):
        with pytest.raises(ModelError, match=problem):
            ModelFile.open(path)
    text = tmp_path / "text.gguf"
    text.write_text("Once upon a time there was a file.")
    with pytest.raises(ModelError, match="not a GGUF"):
        ModelFile.open(text)
