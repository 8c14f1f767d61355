"""Keys and values in ggml's small types: what is lost, what they take, and what is refused."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace

import numpy as np
import pytest
from engines import engine
from test_batch import alone, batched, requests_of

from h2o_cli.main import run_command
from h2o_cli.session.model import check_kv_type
from runtime.errors import UsageError
from runtime.llama import abi
from runtime.llama.model_file import ModelFile

STEPS = {"q8_0": 127, "q4_0": 8}  # steps of a block from 0 to its largest value


def rounded(kind, largest):
    """What a block's scale, a number of 16 bits, makes its largest value differ by."""
    return max(2.0**-11 * largest, 2.0**-25 * STEPS[kind])


def round_trip(kind, values):
    """32 numbers, as ggml keeps and gives them back."""
    values = np.ascontiguousarray(values, np.float32)
    kept, found = (ctypes.c_uint8 * 64)(), np.empty(32, np.float32)
    getattr(abi.ggml_base, f"quantize_row_{kind}_ref")(ctypes.c_void_p(values.ctypes.data), kept, ctypes.c_int64(32))
    getattr(abi.ggml_base, f"dequantize_row_{kind}")(kept, ctypes.c_void_p(found.ctypes.data), ctypes.c_int64(32))
    return found


@pytest.mark.parametrize("kind", STEPS)
def test_a_value_is_at_most_a_step_off(kind):
    random = np.random.default_rng(1)
    for scale in (1e-3, 1.0, 300.0):
        for _ in range(200):
            values = scale * random.standard_normal(32)
            largest = np.abs(values).max()
            step = largest / STEPS[kind]
            most = step / 2 if kind == "q8_0" else step  # 4 bits have 8 steps on one side of 0 and 7 on the other
            assert np.abs(round_trip(kind, values) - values).max() <= most + 2 * rounded(kind, largest)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-3, 1000.0])
def test_blocks_of_one_value_keep_it(kind, value):
    found = round_trip(kind, np.full(32, value))
    assert np.isfinite(found).all()
    assert np.abs(found - value).max() <= rounded(kind, abs(value))


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_answers_are_those_of_single_runs_with_this_type(bundled_model, kv_type):
    requests = requests_of(bundled_model, [24, 3, 40, 17, 1, 30, 8, 24])
    found, batch = batched(bundled_model, requests, 4, n_ctx=512, n_ubatch=128, kv_type=kv_type)
    assert batch.engine.attention
    assert found == alone(bundled_model, requests, kv_type=kv_type)


def batch_command(model, folder, *flags):
    prompts = folder / "p"
    prompts.write_text("Once upon a time\nTom\n")
    return ["batch", model, "-f", prompts, "-o", folder / "a", "-n", "4", "--temp", "0", "-t", "1", *flags]


def totals(capsys, command):
    assert run_command([str(word) for word in command]) == 0
    return json.loads(capsys.readouterr().out)


def test_positions_of_a_smaller_type_take_less(bundled_model, tmp_path, capsys):
    sizes = {}
    for kind in ("f16", "q8_0", "q4_0"):
        folder = tmp_path / kind
        folder.mkdir()
        flags = ["--kv-type", kind, "--ctx", "2048", "--percent", *["0", "100", "0", "100", "0", "100"], "--json"]
        found = totals(capsys, batch_command(bundled_model, folder, *flags))
        sizes[kind] = found["placement"]["kv_memory_bytes"]
    assert sizes["q8_0"] == pytest.approx(sizes["f16"] * 34 / 64, rel=0.05)
    assert sizes["q4_0"] == pytest.approx(sizes["f16"] * 18 / 64, rel=0.05)


def test_texts_of_a_small_type_are_swapped(bundled_model, tmp_path, capsys):
    prompts = tmp_path / "p"
    prompts.write_text("Once upon a time there was\nTom and Lily\nThe little dog\nOne day\n")
    found = []
    for name, flags in (("a", ()), ("b", ("--ctx", "96", "--admission", "none", "--swap", "ram"))):
        files = ["-f", prompts, "-o", tmp_path / name, "-n", "60", "--temp", "0", "-t", "1", "--kv-type", "q4_0"]
        swaps = totals(capsys, ["batch", bundled_model, *files, *flags, "--json"])["swaps_out"]
        assert bool(swaps) == bool(flags)
        answers = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        found.append({one["custom_id"]: one["response"]["body"]["choices"] for one in answers})
    assert found[0] == found[1]


HEADS_OF_48 = "llama:layers=2,dim=192,ffn=256,heads=4,kv_heads=2,vocab=512,ctx=512"


@pytest.mark.parametrize("command", ["run", "batch"])
@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_heads_that_are_no_whole_blocks_are_refused(tiny_model, tmp_path, capsys, command, kv_type):
    model, flags = tiny_model(HEADS_OF_48), ("--kv-type", kv_type)
    words = batch_command(model, tmp_path, *flags) if command == "batch" else ["run", model, "-p", "a", *flags]
    assert run_command([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == [
        f"h2o: --kv-type {kv_type} has blocks of 32 values, and heads of this model have 48",
        "  next: use --kv-type f16",
    ]


@pytest.mark.parametrize("width", [16, 32, 48, 64, 80, 96])
def test_only_what_llama_cpp_refuses_is_refused(tiny_model, width):
    path = tiny_model(f"llama:layers=1,dim={4 * width},ffn=64,heads=4,kv_heads=2,vocab=512,ctx=512")
    fits = width % 32 == 0
    for kv_type in ("f16", "q8_0", "q4_0"):
        try:
            check_kv_type(ModelFile.open(path), kv_type)
            assert fits or kv_type == "f16"
        except UsageError:
            assert not fits and kv_type != "f16"
            continue
        with engine(path, n_ctx=256, kv_type=kv_type) as opened:
            opened.forward([1, 2, 3])
            assert np.isfinite(opened.logits()).all()


def test_models_without_flash_attention_are_refused(bundled_model):
    file = ModelFile.open(bundled_model)
    check_kv_type(file, "q8_0")
    file = replace(file, architecture="grok")
    check_kv_type(file, "f16")
    with pytest.raises(UsageError, match=r"q8_0 needs flash attention, which .* has not for grok"):
        check_kv_type(file, "q8_0")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--kv-type f32", "llama.cpp rounds it to f16"),
        ("--kv-type q5_1", "choose one of f32, f16, q8_0, q4_0"),
        ("--kv-type q8_0 --kv-filter", "there is no option --kv-filter"),
        ("--compress-cache", "use --kv-type q8_0 or q4_0"),
        ("--compress-weight", "give a GGUF file of a smaller type"),
        ("--attn-sparsity 0.1", "`h2o run MODEL --kv-filter`"),
    ],
)
def test_what_a_batch_does_not_take_is_answered(bundled_model, tmp_path, capsys, flags, said):
    command = batch_command(bundled_model, tmp_path, *flags.split())
    assert run_command([str(word) for word in command]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
