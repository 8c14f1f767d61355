"""What docs/seam.md says of llama.cpp and no other test would notice: layouts, numbers, questions, buffers, limits."""

from __future__ import annotations

import ctypes
import gc
from unittest.mock import Mock

import gguf
import llama_cpp
import numpy as np
import pytest
from broken_models import valid_model
from engines import engine
from reference import context, loaded_model, system_info

from runtime.errors import ModelError
from runtime.llama import abi, header, hollow, model_file, quantize, tokenizer
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.llama.tokenizer import Tokenizer
from runtime.memory import view
from runtime.passes import Part, Pass
from runtime.plans.ledger import SAMPLER_BYTES_PER_TOKEN
from runtime.plans.plan import Layout, Plan
from runtime.settings import KV_TYPES
from runtime.weights.repack import Repacker

EVERYTHING = Plan(9, 1, Layout.BALANCED, pinned_bytes=10**9)
TOKENS = [7 + i * 37 % 200 for i in range(70)]


# --- numbers and layouts --------------------------------------------------------------------------------------------


def test_numbers_of_types():
    wanted = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 8: "q8_0", 26: "i32", 27: "i64", 30: "bf16"}
    assert {number: abi.ggml_type_name(number).decode() for number in wanted} == wanted
    assert all(wanted[number] == name for name, number in KV_TYPES.items())
    kinds = gguf.GGUFValueType
    integers = (
        kinds.UINT8,
        kinds.INT8,
        kinds.UINT16,
        kinds.INT16,
        kinds.UINT32,
        kinds.INT32,
        kinds.UINT64,
        kinds.INT64,
    )
    assert list(header._INT_TYPES) == [int(kind) for kind in integers]
    assert (header._GGUF_STRING, header._GGUF_ARRAY) == (kinds.STRING, kinds.ARRAY)
    assert header._TOKEN_TYPE_BYTE == gguf.TokenType.BYTE


def test_numbers_of_the_library():
    assert hollow._LOAD_MODE_MMAP == llama_cpp.LLAMA_LOAD_MODE_MMAP
    for name in ("UNKNOWN", "CONTROL", "USER_DEFINED"):
        assert getattr(tokenizer, f"_ATTR_{name}") == getattr(llama_cpp, f"LLAMA_TOKEN_ATTR_{name}")
    for name, number in quantize.FILE_TYPES.items():
        known = {"f32": "LLAMA_FTYPE_ALL_F32", "q4_k": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
        assert number == getattr(llama_cpp, known.get(name, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")), name


def test_types_that_weights_are_multiplied_with():
    rows = {"q4_0": "q8_0", "q8_0": "q8_0", "q4_K": "q8_K", "q6_K": "q8_K", "f16": "f16"}
    ids = {abi.ggml_type_name(i).decode(): i for i in range(31) if abi.ggml_type_name(i)}
    for name, other in rows.items():
        planned, tiles = planned_product(ids[name], 512, 3)
        rest = planned - tiles - 3 * abi.ggml_row_size(ids[other], 512)
        assert 0 <= rest <= 2 * abi.CACHE_LINE
        assert tiles == 0 or name.endswith("_K")
    assert planned_product(ids["f32"], 512, 3)[0] <= abi.CACHE_LINE


def planned_product(type_id, n_in, n_tokens):
    """ggml's plan for a product with weights of this type and one thread: scratch in bytes, and that of tiles."""
    memory = abi.ggml_init(abi.GgmlInitParams(2**20, None, True))
    weights = abi.ggml_new_tensor_2d(memory, type_id, n_in, 16)
    product = abi.ggml_mul_mat(memory, weights, abi.ggml_new_tensor_2d(memory, 0, n_in, n_tokens))
    graph = abi.ggml_new_graph(memory)
    abi.ggml_build_forward_expand(graph, product)
    plan, tiles = abi.ggml_graph_plan(graph, 1, None), abi.ggml_tiled_wdata_size(1, product)
    assert (plan.n_threads, plan.use_ref, *plan.pointers) == (1, False, None, None, None)
    abi.ggml_free(memory)
    return plan.work_size, tiles


def test_a_view_and_its_parameters_are_where_we_look():
    """The fields of a tensor that the check at start leaves out."""
    view_1d = abi.bind(
        abi.ggml_base, "ggml_view_1d", abi.POINTER, abi.POINTER, abi.POINTER, ctypes.c_int64, ctypes.c_size_t
    )
    scale = abi.bind(abi.ggml_base, "ggml_scale", abi.POINTER, abi.POINTER, abi.POINTER, ctypes.c_float)
    memory = abi.ggml_init(abi.GgmlInitParams(2**16, None, False))
    whole = abi.ggml_new_tensor_2d(memory, 0, 16, 4)
    part = abi.Tensor.from_address(view_1d(memory, whole, 8, 64))
    assert (part.view_src, part.view_offs, part.data) == (whole, 64, abi.ggml_get_data(whole) + 64)
    assert part.op in abi.VIEW_OPS and part.src[0] == whole
    scaled = abi.Tensor.from_address(scale(memory, whole, 0.5))
    assert ctypes.c_float.from_buffer(scaled.op_params).value == 0.5
    assert scaled.buffer is None and scaled.extra is None and scaled.flags == 0
    abi.ggml_free(memory)


def test_functions_of_a_buffer_are_where_we_put_ours():
    memory = abi.aligned_alloc(64, 4096)
    address = abi.ggml_backend_cpu_buffer_from_ptr(memory, 4096)
    buffer = abi.Buffer.from_address(address)
    assert (buffer.context, buffer.size) == (memory, 4096)
    assert buffer.free_buffer is None  # what is ours is never freed by llama.cpp
    assert buffer.init_tensor is None
    assert abi.GetBase(buffer.get_base)(address) == memory
    kind = abi.BufferType.from_address(buffer.buft)
    assert ctypes.string_at(abi.GetName(kind.get_name)(buffer.buft)) == b"CPU_Mapped"
    tensor = abi.Tensor(type=0, data=memory, nb=(4, 4096, 4096, 4096), ne=(1024, 1, 1, 1), buffer=address)
    data = (ctypes.c_float * 2)(3.0, 4.0)
    abi.SetTensor(buffer.set_tensor)(address, ctypes.addressof(tensor), ctypes.addressof(data), 8, 8)
    assert np.frombuffer(view(memory, 16), np.float32)[2:].tolist() == [3.0, 4.0]
    abi.Clear(buffer.clear)(address, 0)
    assert not any(view(memory, 4096))
    usual = abi.BufferType.from_address(abi.ggml_backend_cpu_buffer_type())
    assert ctypes.string_at(abi.GetName(usual.get_name)(ctypes.addressof(usual))) == b"CPU"
    assert abi.GetAlignment(usual.get_alignment)(ctypes.addressof(usual)) <= abi.CACHE_LINE
    assert ctypes.CFUNCTYPE(ctypes.c_bool, abi.POINTER)(usual.is_host)(ctypes.addressof(usual))
    abi.ggml_backend_buffer_free(address)


def test_candidates_of_a_sampler_take_what_is_counted():
    assert ctypes.sizeof(llama_cpp.llama_token_data) <= SAMPLER_BYTES_PER_TOKEN


def test_threads_are_openmps_and_weights_can_be_rearranged():
    assert "OPENMP = 1" in system_info()
    assert "REPACK = 1" in system_info()


# --- loading --------------------------------------------------------------------------------------------------------


def test_no_weight_is_left_to_the_mapping_of_the_file(tiny_model, monkeypatch):
    """llama.cpp reads marked tables of more than 4 GiB from it as they are needed, unless it is told not to."""
    load, seen = abi.llama.llama_model_load_from_file, []
    monkeypatch.setattr(abi.llama, "llama_model_load_from_file", lambda *given: seen.append(given[1]) or load(*given))
    file = ModelFile.open(tiny_model("llama"))
    model = HollowModel(file)
    assert set(model.weights) == {tensor.name for tensor in file.tensors}
    model.free()
    assert [parameters.lazy_mode for parameters in seen] == [0]


@pytest.mark.parametrize("architecture", ["qwen4exp", "graniteswitch"])
def test_models_that_look_up_other_rows_than_their_tokens_are_refused(architecture, tmp_path):
    model = valid_model()
    model.set("general.architecture", gguf.GGUFValueType.STRING, architecture)
    with pytest.raises(ModelError, match="other embedding rows"):
        ModelFile.open(model.write(tmp_path / "m.gguf"))


# --- questions and reports ------------------------------------------------------------------------------------------


class Watcher:
    """A callback in the place of the engine's. wants(node, number of the question): ask for a report."""

    def __init__(self, opened, wants=lambda node, i: False, after=lambda node: True):
        self.calls, self.wants, self.after = [], wants, after
        self.callback = abi.EvalCallback(self._call)
        self.opened = opened
        self.on()

    def on(self):
        self.opened._context.watcher = self  # kept for llama.cpp, which has an address: tests let go of it at once
        abi.ggml_backend_sched_set_eval_callback(self.opened._context._scheduler, self.callback, None)

    def _call(self, address, ask, _data):
        node = abi.Tensor.from_address(address)
        self.calls.append((address, bool(ask)))
        return self.wants(node, sum(asked for _, asked in self.calls)) if ask else self.after(node)

    @property
    def asked(self):
        return [address for address, ask in self.calls if ask]


@pytest.fixture
def resident(tiny_model):
    """An engine with all weights in memory, after a prompt and two tokens: llama.cpp has a graph to use again."""
    with engine(tiny_model("llama"), EVERYTHING, n_ubatch=64, repack=False) as opened:
        opened.forward(TOKENS[:9])
        opened.forward([3])
        opened.forward([4])
        yield opened


def decode(opened, tokens, first, n_outputs=1):
    """llama.cpp's status of a pass that nobody takes part in."""
    gc.collect()  # who keeps a callback for llama.cpp and who does not is seen here, and not in some runs only
    return opened._context.decode(Pass((Part(0, first, tuple(tokens), n_outputs),)))


def test_every_node_is_asked_for_after_its_sources_and_views_too(resident):
    watcher = Watcher(resident)
    assert decode(resident, [5], resident.n_past) == 0
    assert all(ask for _, ask in watcher.calls)
    assert len(set(watcher.asked)) == len(watcher.asked) > 50
    seen, nodes = set(), set(watcher.asked)
    for address in watcher.asked:
        node = abi.Tensor.from_address(address)
        assert {*filter(None, node.src), node.view_src} & nodes <= seen
        seen.add(address)
    assert any(abi.Tensor.from_address(address).op in abi.VIEW_OPS for address in watcher.asked)


def test_a_report_follows_the_question_it_was_asked_for_and_nothing_behind_is_computed_before(resident):
    watcher = Watcher(resident, wants=lambda _, i: i % 7 == 0)
    assert decode(resident, [5], resident.n_past) == 0
    n_asked = 0
    for before, (address, ask) in zip([(0, False), *watcher.calls], watcher.calls, strict=False):
        n_asked += ask
        if not ask:
            assert before == (address, True) and n_asked % 7 == 0
    assert sum(not ask for _, ask in watcher.calls) == len(watcher.asked) // 7


def test_an_answer_of_no_ends_the_pass_without_an_error(resident):
    watcher = Watcher(resident, wants=lambda _, i: i == 20, after=lambda _: False)
    assert decode(resident, [5], resident.n_past) == 0
    assert len(watcher.asked) == 20 and watcher.calls[-1] == (watcher.asked[-1], False)


def test_a_node_that_is_off_is_passed_over_and_its_result_left_alone(resident):
    """The result's memory is other nodes' until the node before is done: so every node is reported here."""
    head, written = resident._model.weights["output.weight"], []

    def switch_off(node, _):
        if node.src[0] in head:
            node.op = abi.OP_NONE
            view(node.data, 8)[:] = b"untouch."
        return True

    def look(node):
        if node.src[0] in head:
            written.append(bytes(view(node.data, 8)))
            node.op = abi.OP_MUL_MAT
        return True

    Watcher(resident, switch_off, look)
    assert decode(resident, [5], resident.n_past) == 0
    assert written == [b"untouch."]
    assert view(ctypes.addressof(llama_cpp.llama_get_logits_ith(resident.context, -1).contents), 8) == b"untouch."


def test_nodes_computed_one_by_one_give_the_same_bits(resident):
    """Not even a norm and the product behind it, which llama.cpp computes together where it can."""
    resident.forward([5])
    together = resident.logits().copy()
    resident.truncate(resident.n_past - 1)
    Watcher(resident, wants=lambda *_: True)
    assert decode(resident, [5], resident.n_past) == 0
    assert np.array_equal(resident.logits(), together)


def n_reused(opened):
    return abi.llama.llama_perf_context(opened.context).n_reused


def test_a_graph_is_used_again_with_the_callback_that_was_set_last(resident):
    """A new graph calls the context's own callback back; the nodes of one that is used again are the same structs."""
    first, before = Watcher(resident), n_reused(resident)
    decode(resident, [5], 11)
    second = Watcher(resident)
    decode(resident, [6], 12)
    assert n_reused(resident) == before + 2
    assert first.asked == second.asked
    guest = Mock()
    resident.guests.add(guest)
    resident.guests.filter.pass_on_everything(True)
    third = Watcher(resident)
    decode(resident, [7, 8], 13)
    assert n_reused(resident) == before + 2
    assert third.calls == [] and guest.before.called


def test_without_outputs_the_head_is_empty(resident):
    rows = []

    def look(node, _):
        if node.src[0] in resident._model.weights["output.weight"]:
            rows.append(node.ne[1])
        return False

    decode(resident, TOKENS[:9], 11, 0)  # a graph without outputs is new, and calls the engine back
    Watcher(resident, look)
    decode(resident, TOKENS[:9], 20, 0)
    assert rows == [0]


def test_a_view_of_a_weight_is_pointed_along_and_forgotten_with_the_pass(tiny_model):
    with engine(tiny_model("llama"), Plan(0, 1)) as opened:
        opened.forward([5])
        guest = opened.weights
        weight = next(w for w in guest._weights if w.pieces[0].tensor.name == "blk.0.attn_q.weight")
        part = abi.Tensor(op=min(abi.VIEW_OPS), view_src=weight.address, view_offs=64, ne=(1, 1, 1, 1))
        part.src[0] = weight.address
        user = abi.Tensor(op=abi.OP_MUL_MAT, ne=(1, 1, 1, 1))
        user.src[0] = ctypes.addressof(part)
        opened._store.expect_passes([Pass((Part(0, 1, (5,), 1),))])
        guest.before(ctypes.addressof(part))
        assert part.data == abi.Tensor.from_address(weight.address).data + 64
        part.data = 0
        guest.before(ctypes.addressof(user))
        assert part.data == abi.Tensor.from_address(weight.address).data + 64
        guest.end(complete=False)
        assert ctypes.addressof(part) not in guest._active


# --- buffers --------------------------------------------------------------------------------------------------------


def compute_bytes(opened):
    """What llama.cpp's scheduler has for the results of nodes."""
    size = abi.bind(abi.ggml_base, "ggml_backend_sched_get_buffer_size", ctypes.c_size_t, abi.POINTER, abi.POINTER)
    scheduler = opened._context._scheduler
    return size(scheduler, abi.ggml_backend_sched_get_backend(scheduler, 0))


def n_splits(opened):
    count = abi.bind(abi.ggml_base, "ggml_backend_sched_get_n_splits", ctypes.c_int, abi.POINTER)
    return count(opened._context._scheduler)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3moe", "gpt2"])
def test_one_backend_computes_a_graph_as_a_whole_in_the_buffer_made_at_first(tiny_model, arch):
    with engine(tiny_model(arch), Plan(0, 1), n_ubatch=64, n_logits=4) as opened:
        buffers = opened._context.buffers
        scratch = [region.n_bytes for region in buffers.regions if region not in buffers._cleared]
        first = compute_bytes(opened)
        assert first <= sum(scratch) < first + 2**16
        for tokens, n_logits in ((TOKENS, 1), ([5], 1), (TOKENS[:4], 4), (TOKENS[:20], 1), ([5], 1)):
            opened.forward(tokens, n_logits)
            assert abi.ggml_backend_sched_get_n_backends(opened._context._scheduler) == n_splits(opened) == 1
            assert compute_bytes(opened) == first
        assert len(list(opened._context._backends())) == 1


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_tensors_of_a_context_begin_at_cache_lines(tiny_model, arch):
    with engine(tiny_model(arch), EVERYTHING, n_ubatch=64, repack=False) as opened:
        caches = [address for named in opened._context.buffers.caches for address in named.values()]
        assert caches and all(abi.Tensor.from_address(address).data % abi.CACHE_LINE == 0 for address in caches)
        opened.forward(TOKENS[:9])
        opened.forward([3])
        watcher = Watcher(opened)
        decode(opened, [5], opened.n_past)
        results = [abi.Tensor.from_address(address) for address in watcher.asked]
        assert all(node.data % abi.CACHE_LINE == 0 for node in results if not node.view_src)


def test_keys_and_values_and_one_row_of_logits_are_what_is_cleared(tiny_model):
    with engine(tiny_model("llama"), Plan(0, 1), n_logits=4) as opened:
        caches = [address for named in opened._context.buffers.caches for address in named.values()]
        n_bytes = sum(abi.ggml_nbytes(address) for address in caches)
        assert opened._context.buffers.kv_bytes == n_bytes + 4 * opened.n_vocab


def test_rows_of_logits_lie_one_behind_the_other_from_the_beginning(tiny_model):
    with engine(tiny_model("llama"), Plan(0, 1), n_logits=4) as opened:
        opened.forward(TOKENS[:9], 4)
        begin = ctypes.addressof(llama_cpp.llama_get_logits(opened.context).contents)
        rows = [ctypes.addressof(llama_cpp.llama_get_logits_ith(opened.context, i - 4).contents) for i in range(4)]
        assert rows == [begin + 4 * opened.n_vocab * i for i in range(4)]


# --- kernels --------------------------------------------------------------------------------------------------------


def logits_of_the_last(path, tokens, n):
    """llama.cpp's own logits after each of the last n tokens, computed in one pass."""
    with loaded_model(path) as model, context(model, n_ctx=512, n_batch=64, n_ubatch=64, n_threads=2) as ctx:
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = i >= len(tokens) - n
        assert llama_cpp.llama_decode(ctx, batch) == 0
        llama_cpp.llama_batch_free(batch)
        return [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, i - n), (n_vocab,)).copy() for i in range(n)]


@pytest.mark.parametrize("file_type", ["f16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("vocab", [512, 514, 515])
def test_tiles_of_a_head_of_any_size_for_several_tokens(tiny_model, monkeypatch, vocab, file_type):
    """ggml has another kernel for matrices of floats whose rows are a multiple of 4, as those of a tile are."""
    path = tiny_model(f"llama:layers=2,dim=256,ffn=512,heads=4,kv_heads=2,vocab={vocab},ctx=512,tied=0", file_type)
    expected = logits_of_the_last(path, TOKENS[:20], 4)
    monkeypatch.setattr(model_file, "TILE_BYTES", 20_000)
    with engine(path, Plan(0, 1), n_threads=2, n_ubatch=64, n_logits=4) as opened:
        assert len(opened.file.head.pieces) > 4
        opened.forward(TOKENS[:20], 4)
        for i, row in enumerate(expected):
            assert np.array_equal(opened.logits(i), row)


@pytest.mark.parametrize(
    ("name", "n_matrices", "rearranged"),
    [("blk.0.attn_q", 1, True), ("blk.0.ffn_up_exps", 4, True), ("blk.0.attn_k_b", 4, False)],
)
def test_stacks_of_matrices_are_rearranged_for_experts_only(name, n_matrices, rearranged):
    """llama.cpp's kernel for a rearranged matrix ends the process on a stack that is no expert's."""
    n_in, n_rows = 64, 128
    n_bytes = int(abi.ggml_row_size(2, n_in)) * n_rows * n_matrices
    data = (ctypes.c_char * n_bytes)()
    tensor = abi.Tensor(type=2, data=ctypes.addressof(data), ne=(n_in, n_rows, n_matrices, 1))
    row = n_bytes // n_rows // n_matrices
    tensor.nb, tensor.name = (18, row, row * n_rows, n_bytes), f"{name}.weight".encode()
    repacker = Repacker()
    repacker.repack(ctypes.addressof(tensor))
    found = repacker.has(ctypes.addressof(tensor))
    repacker.close()
    if rearranged and not found:
        pytest.skip("llama.cpp rearranges nothing on this processor")
    assert found == rearranged


# --- text -----------------------------------------------------------------------------------------------------------


def test_the_name_of_a_template_is_no_template(tiny_model, monkeypatch):
    """For some models of one family that have no template llama.cpp names its own."""
    file = ModelFile.open(tiny_model("llama"))
    model = HollowModel(file)
    found = []
    for given in (b"mistral-v7-tekken", b"{{ messages }}", None):
        monkeypatch.setattr(abi.llama, "llama_model_chat_template", lambda *_, given=given: given)
        found.append(Tokenizer(model, file).chat_template)
    model.free()
    assert found == ["", "{{ messages }}", ""]
