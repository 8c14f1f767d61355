import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import broken_models
import numpy as np
import pytest
import reference
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from h2o_cli.bench.models import make_model as mm
from h2o_cli.bench.models.shapes import ARCHS, NAMED, Shape, hyper_parameters, parse_shape, tensor_specs
from runtime.errors import EngineError, H2OError, UsageError

TEXTS = ["Once upon a time", "the cat sat on the mat 123", "Zürich → 東京 🙂\n\ttabs", "", "x"]
SMALL = "llama:layers=1,dim=32,ffn=32,heads=2,kv_heads=1,vocab=300"
OPTIONS = {"n_ctx": 128, "n_ubatch": 64, "n_threads": 1}


@pytest.mark.parametrize("file_type", ["f16", "q4_K_M"])
@pytest.mark.parametrize("arch", [*tiny_models.ARCHS, *tiny_models.OTHER_ARCHS])
def test_every_architecture_decodes(tiny_model, arch, file_type):
    logits, tokens = reference.reference_in_subprocess(
        tiny_model(arch, file_type), "Once upon a time there was", 8, **OPTIONS
    )
    assert np.isfinite(logits).all()
    assert 1.5 < np.std(logits) < 6
    assert len({row.tobytes() for row in logits}) == len(tokens) == 8


@pytest.mark.parametrize("file_type", [t for t in mm.FILE_TYPES if t not in ("f16", "q4_k_m")])
def test_every_file_type_decodes(tiny_model, file_type):
    logits, _ = reference.reference_in_subprocess(tiny_model("llama", file_type), [5, 300, 400], 2, **OPTIONS)
    assert np.isfinite(logits).all()


def test_every_architecture_has_a_test():
    assert set(tiny_models.ARCHS + tiny_models.OTHER_ARCHS) == set(ARCHS)


@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_the_next_token_depends_on_the_token(tiny_model, arch):
    import llama_cpp

    with (
        reference.loaded_model(tiny_model(arch)) as model,
        reference.context(model, n_ctx=64, n_batch=8, n_ubatch=8, n_threads=1) as ctx,
    ):
        chosen = set()
        for token in range(300, 330):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
            reference.decode(ctx, [token], 0)
            chosen.add(int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, -1), (512,)).argmax()))
    assert len(chosen) > 15


def test_mixture_of_experts_in_llama(tmp_path):
    path = tmp_path / "m.gguf"
    mm.make_model("llama:dim=64,ffn=96,experts=4,experts_used=2,tied=0", path, file_type="Q8_0")
    logits, _ = reference.reference_in_subprocess(path, [300, 301, 302], 2, **OPTIONS)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("file_type", ["f16", "f32", "q8_0", "q6_k"])
def test_the_same_seed_gives_the_same_bytes(tmp_path, file_type):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        mm.make_model(tiny_models.tiny_shape("qwen3"), path, file_type=file_type, seed=seed)
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again
    assert first != other
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", ".user"}


@pytest.mark.parametrize("arch", sorted(ARCHS))
@pytest.mark.parametrize("vocab", [0, 5000])
def test_text_round_trips(tmp_path, arch, vocab):
    sizes = "dim=32,ffn=32,layers=1,heads=2,kv_heads=1"
    least = 260 if ARCHS[arch].pre else 261
    path = tmp_path / "m.gguf"
    mm.make_model(f"{arch}:{sizes},vocab={vocab or least}", path)
    with reference.loaded_model(path, vocab_only=True) as model:
        for text in TEXTS:
            ids = reference.tokenize(model, text, add_special=False)
            assert max(ids, default=0) < (vocab or least)
            assert reference.detokenize(model, ids) == text
        assert ARCHS[arch].bos == (len(reference.tokenize(model, "")) == 1)


def test_long_words_are_few_tokens(tmp_path):
    mm.make_model("qwen2:layers=1,dim=32,ffn=32,heads=2,vocab=100000", tmp_path / "m.gguf")
    with reference.loaded_model(tmp_path / "m.gguf", vocab_only=True) as model:
        assert len(reference.tokenize(model, "there was an otter in the water")) < 20


def test_the_half_billion_shape_has_the_real_size():
    shape = parse_shape("qwen2.5-0.5b")
    specs = tensor_specs(shape)
    values = sum(spec.n_values for spec in specs)
    assert values == 494_032_768
    assert len(specs) == 2 + 24 * 12
    data = sum(spec.n_values * (4 if spec.small else 2) for spec in specs)
    words = mm.byte_pair(shape.vocab)
    header = sum(len(text.encode()) + 12 for text in words.tokens) + sum(
        len(text.encode()) + 8 for text in words.merges
    )
    assert 990e6 < data + header < 996e6
    assert len(words.tokens) == len(words.types) == len(set(words.tokens)) == 151_936
    assert hyper_parameters(shape)["attention.head_count_kv"] == 2


def test_a_named_shape_can_be_cut_down(tmp_path):
    path = tmp_path / "m.gguf"
    seen = []
    mm.make_model("qwen2.5-0.5b:layers=1,vocab=1000,ffn=256", path, progress=lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] == sum(b - a for (a, _), (b, _) in zip([(0, 0), *seen], seen, strict=False))
    assert 0 <= path.stat().st_size - seen[-1][1] < 64_000
    assert path.stat().st_blocks * 512 >= path.stat().st_size, "every byte is on disk"
    logits, _ = reference.reference_in_subprocess(path, [1, 2, 3], 1, **OPTIONS)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", NAMED)
def test_named_shapes_are_valid(name):
    shape = parse_shape(name.upper())
    names = [spec.name for spec in tensor_specs(shape)]
    assert len(names) == len(set(names))
    assert 0.1e9 < sum(spec.n_values for spec in tensor_specs(shape)) < 40e9


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ("", "unknown model shape"),
        ("gpt5", "unknown model shape"),
        ("llama:colour=3", "unknown key 'colour'"),
        ("llama:arch=3", "unknown key"),
        ("llama:layers", "whole number"),
        ("llama:layers=-1", "whole number"),
        ("llama:layers=" + "9" * 5000, "whole number"),
        ("llama:layers=²", "whole number"),
        ("llama:layers=0", "at least 1"),
        ("llama:layers=513", "at most 512"),
        ("llama:heads=7,kv_heads=7", "dim must be a multiple of heads"),
        ("llama:heads=4,kv_heads=3", "multiple of kv_heads"),
        ("llama:heads=0", "at least 1"),
        ("llama:kv_heads=0", "at least 1"),
        ("llama:vocab=200", "vocab must be at least"),
        ("qwen2:vocab=259", "vocab must be at least 260"),
        ("llama:vocab=16000000", "vocab must be at most"),
        ("llama:dim=12,heads=4", "even"),
        ("stablelm:dim=16,heads=4", "head_dim"),
        ("qwen2:head_dim=32", "heads x head_dim = dim"),
        ("qwen2:experts=4", "no experts"),
        ("qwen3moe:experts=0,experts_used=0", "needs experts"),
        ("llama:experts=4", "both experts"),
        ("llama:experts=4,experts_used=5", "at most experts"),
        ("llama:window=64", "no sliding window"),
        ("gemma2:window=0", "needs a sliding window"),
        ("llama:tied=2", "0 or 1"),
    ],
)
def test_shapes_that_cannot_be_built(tmp_path, shape, word):
    with pytest.raises(UsageError, match=word):
        mm.make_model(shape, tmp_path / "m.gguf")
    assert list(tmp_path.glob("*.gguf")) == []


@given(st.text(alphabet="lamqwen23:,=0123456789 dimhedskv_", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_shape_text_gives_a_shape_or_a_usage_error(text):
    for candidate in (text, f"llama:{text}"):
        try:
            assert isinstance(parse_shape(candidate), Shape)
        except UsageError as error:
            assert error.next_step


@pytest.mark.parametrize("file_type", ["q9", "", "f 16"])
def test_unknown_file_types(tmp_path, file_type):
    with pytest.raises(UsageError, match="unknown file type"):
        mm.make_model(SMALL, tmp_path / "m.gguf", file_type=file_type)


def test_a_seed_must_be_usable(tmp_path):
    with pytest.raises(UsageError, match="seed"):
        mm.make_model(SMALL, tmp_path / "m.gguf", seed=-1)


@pytest.mark.parametrize("where", ["no-folder/m.gguf", ".", "", "file/m.gguf", "n" * 300])
def test_outputs_that_cannot_be_written(tmp_path, monkeypatch, where):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        mm.make_model(SMALL, Path(where))
    assert caught.value.next_step
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".user"}


def test_a_model_larger_than_the_disk(tmp_path):
    with pytest.raises(UsageError, match=r"needs .* PB|needs .* GB"):
        mm.make_model("llama:layers=512,dim=1048576,ffn=1048576", tmp_path / "m.gguf")


@pytest.mark.parametrize("file_type", ["f16", "q4_0"])
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, file_type):
    output = tmp_path / "m.gguf"
    output.write_bytes(b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
    try:
        with pytest.raises(UsageError, match="cannot be written"):
            mm.make_model(SMALL + ",ctx=64,layers=8,dim=64", output, file_type=file_type)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", ".user"}
    assert output.read_bytes() == b"old"


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mm, "_write_tensor", full)
    with pytest.raises(UsageError, match="full"):
        mm.make_model(SMALL, tmp_path / "m.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {".user"}


def test_ctrl_c_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(mm, "quantize", stop)
    with pytest.raises(KeyboardInterrupt):
        mm.make_model(SMALL, tmp_path / "m.gguf", file_type="q8_0")
    assert {path.name for path in tmp_path.iterdir()} == {".user"}


def test_without_the_gguf_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install '.*\[bench\]'"):
        mm.make_model(SMALL, tmp_path / "m.gguf")


def test_the_quantiser_says_why_it_failed(tmp_path):
    (tmp_path / "bad").write_bytes(b"GGUF")
    with pytest.raises(EngineError, match="could not quantise"):
        mm.quantize(tmp_path / "bad", tmp_path / "out", "q8_0")
    assert not (tmp_path / "out").exists()


def test_requantising(tiny_model, tmp_path):
    source = tiny_model("llama", "q8_0")
    with pytest.raises(H2OError, match="could not quantise"):
        mm.quantize(source, tmp_path / "refused", "q4_0")
    mm.quantize(source, tmp_path / "made", "q4_0", requantize=True)
    assert 0 < (tmp_path / "made").stat().st_size < source.stat().st_size


def test_bundled_variants(bundled_variant):
    for file_type in ("q8_0", "f16", "q4_0"):
        logits, _ = reference.reference_in_subprocess(bundled_variant(file_type), "Once upon a time", 3, **OPTIONS)
        assert np.isfinite(logits).all()


@pytest.mark.parametrize("file_type", ["f16", "q8_0"])
@pytest.mark.parametrize("n_prompt", [1, 7, 300])
def test_a_call_per_ubatch_is_bit_equal_to_one_call(tiny_model, file_type, n_prompt):
    prompt = np.random.default_rng(n_prompt).integers(260, 500, n_prompt)
    runs = [
        reference.reference_in_subprocess(
            tiny_model("llama", file_type), prompt, 3, n_ctx=512, n_ubatch=64, n_threads=2, per_ubatch=per_ubatch
        )
        for per_ubatch in (False, True)
    ]
    assert np.array_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_the_reference_takes_text_and_trained_models(stories):
    logits, tokens = reference.reference_in_subprocess(stories("q8_0"), "Once upon a time", 4, **OPTIONS)
    assert len(tokens) == len(logits) == 4
    assert np.isfinite(logits).all()


def test_the_model_behind_the_broken_ones_works(tmp_path):
    path = broken_models.valid_model().write(tmp_path / "valid.gguf")
    code, steps = broken_models.llama_cpp_does(path)
    assert code == 0
    assert steps[:4] == ["loads", "context", "decodes", "tokenizes"]


LOAD_ALL = """
import sys, reference
for path in sys.argv[1:]:
    try:
        with reference.loaded_model(path):
            print("loads", path)
    except RuntimeError:
        pass
"""


def test_broken_models_are_refused(tmp_path):
    refused = [
        str(make(tmp_path)) for name, make in broken_models.BROKEN.items() if name not in broken_models.LLAMA_CPP
    ]
    assert len(refused) > 70
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, *refused],
        capture_output=True,
        text=True,
        cwd=broken_models.FOLDER,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-500:]


@pytest.mark.parametrize("name", sorted(broken_models.LLAMA_CPP))
def test_what_llama_cpp_does_with_the_others(tmp_path, name):
    code, steps = broken_models.llama_cpp_does(broken_models.BROKEN[name](tmp_path))
    said = broken_models.LLAMA_CPP[name]
    assert (code == 0) == said.startswith("decodes")
    assert steps[: len(said)].count("context") == (said != "aborts in the load")
    if code == 0:
        assert steps[2] == said
