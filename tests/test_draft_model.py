"""A model that drafts, and low-bit copies to draft with."""

import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from answers import FOUR_BITS, STORIES, Always, Rig
from engines import engine

from h2o_cli.session.drafting import best_copy
from runtime.answer.drafters import DraftModel, ModelDrafter, can_take_back, check_vocabulary
from runtime.answer.speculate import MOST_DRAFTED, Speculation
from runtime.errors import H2OError, ModelError
from runtime.llama import quantize
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.plans.plan import Plan
from runtime.settings import Settings
from runtime.sizes import MB


@pytest.fixture(scope="module")
def rig(bundled_model):
    with engine(bundled_model, Plan(2, 1), n_logits=MOST_DRAFTED + 1) as opened:
        yield Rig(opened)


@pytest.fixture(scope="module")
def draft_model(bundled_variant):
    file = ModelFile.open(bundled_variant("q4_0"))
    model = DraftModel(file, Settings(n_ctx=512))
    yield model
    model.close()


def test_low_bit_draft_of_the_same_model(rig, draft_model):
    drafter = ModelDrafter(draft_model, 0.5, rig.engine.n_vocab)
    assert not draft_model.is_ready
    per_pass = []
    for prompt in STORIES:
        plain = rig.answer(prompt, 40)
        speculation = Speculation(drafter, MOST_DRAFTED, Always())
        drafter.begin()
        while not draft_model.is_ready:
            time.sleep(0.01)
        assert rig.answer(prompt, 40, speculation) == plain
        per_pass.append(rig.figures.tokens_per_pass)
    drafter.close()
    assert min(per_pass) >= 2.5, per_pass
    assert drafter.reading_s > 0 or len(rig.tokenizer.encode(STORIES[0])) < 17


def test_draft_model_follows_texts_that_change(draft_model):
    drafter = ModelDrafter(draft_model, 0.5, draft_model.engine.n_vocab)
    drafter.begin()
    drafter.propose([1, 2, 3], 2)  # the first pass loads the weights
    drafter.begin()
    one = drafter.propose([1, *range(20, 50)], 4)
    assert drafter.propose([1, *range(20, 50), *one[:2], 99], 3) != []
    drafter.begin()
    assert drafter.propose([1, *range(20, 50)], 4) == one
    assert drafter.propose([1, *range(20, 50), 10**5], 4) == []  # no token of the draft model
    drafter.begin()
    assert drafter.propose([1] * 510, 8) != []
    assert drafter.propose([1] * 512, 8) == []
    assert drafter.propose([1] * 508, 8) != []
    drafter.close()
    narrow = ModelDrafter(draft_model, 0.5, min(one[1:]) if min(one[1:]) > 50 else 51)
    narrow.begin()
    assert all(token < narrow._n_vocab for token in narrow.propose([1, *range(20, 50)], 4))
    narrow.close()


def test_draft_bytes_are_what_it_takes(draft_model):
    ledger = draft_model.engine.ledger
    parts = (ledger.kv_bytes, ledger.compute_bytes, ledger.embedding_bytes, ledger.sampler_bytes, ledger.resident_bytes)
    assert draft_model.n_bytes == sum(parts)
    assert ledger.resident_bytes > 0.8 * draft_model.file.n_bytes - 500_000


def test_vocabularies_must_agree(tiny_model, bundled_model):
    models = [HollowModel(ModelFile.open(p)) for p in (bundled_model, tiny_model("llama"), bundled_model)]
    try:
        check_vocabulary(models[0], models[2], ("a", "b"))
        assert can_take_back(models[0])
        with pytest.raises(ModelError, match=r"b\.gguf cannot draft for a\.gguf"):
            check_vocabulary(models[0], models[1], ("a.gguf", "b.gguf"))
    finally:
        for model in models:
            model.free()


# --- a low-bit copy -------------------------------------------------------------------------------------------------


class NoProgress:
    def __init__(self, share):
        assert share() == 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_copy_is_made_once_by_one_of_several(bundled_model, tmp_path, monkeypatch):
    made, notes, make = [], [], quantize._make
    monkeypatch.setattr(quantize, "_make", lambda *args: (made.append(1), make(*args)))
    file = ModelFile.open(bundled_model)
    paths = []
    threads = [
        threading.Thread(
            target=lambda: paths.append(quantize.low_bit_copy(file, FOUR_BITS, tmp_path, notes.append, NoProgress))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == len(made) == 1
    assert f"{file.hash:016x}" in paths[0].name
    assert paths[0] == quantize.copy_path(file, FOUR_BITS, tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.name.endswith((".gguf", ".part"))} == {paths[0].name}
    paths[0].write_bytes(b"damaged")
    assert quantize.low_bit_copy(file, FOUR_BITS, tmp_path, notes.append, NoProgress) == paths[0]
    assert ModelFile.open(paths[0]).n_layers == file.n_layers


def test_copies_that_cannot_be_made(bundled_model, bundled_variant, tmp_path, monkeypatch):
    file = ModelFile.open(bundled_model)
    assert not quantize.useful_copies(ModelFile.open(bundled_variant("q4_0")))
    with pytest.raises(H2OError, match="no copy of"):
        quantize.low_bit_copy(replace(file, paths=(tmp_path / "gone.gguf",)), FOUR_BITS, tmp_path, print, NoProgress)
    (tmp_path / "a file").write_text("")
    with pytest.raises(H2OError, match="cannot be written"):
        quantize.low_bit_copy(file, FOUR_BITS, tmp_path / "a file", print, NoProgress)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(H2OError, match="0 B free"):
        quantize.low_bit_copy(file, FOUR_BITS, tmp_path, print, NoProgress)
    assert [p for p in tmp_path.rglob("*") if p.suffix in (".gguf", ".part")] == []


_QUANTIZE = """
import sys
from runtime.llama.quantize import child
assert child(*sys.argv[1:]) == 0
print([row.split()[1] for row in open("/proc/self/status") if row.startswith("VmHWM")][0])
"""


@pytest.mark.parametrize("dim", [256, 288])
def test_sizes_of_copies_are_known_beforehand(tiny_model, tmp_path, dim):
    for tied in (0, 1):
        path = tiny_model(f"llama:layers=4,dim={dim},ffn=512,heads=4,kv_heads=4,vocab=4096,ctx=64,tied={tied}")
        file = ModelFile.open(path)
        for kind in quantize.COPY_TYPES:
            quantize.quantize(path, tmp_path / "copy.gguf", kind.name)
            found = (tmp_path / "copy.gguf").stat().st_size
            assert found == pytest.approx(quantize.copy_bytes(file, kind), rel=0.04)


def test_a_copy_is_made_in_little_memory(tiny_model, tmp_path):
    path = tiny_model("llama:layers=1,dim=256,ffn=256,heads=4,kv_heads=4,vocab=98304,ctx=64")
    command = [sys.executable, "-c", _QUANTIZE, path, tmp_path / "copy.gguf", "q8_0"]
    peak_bytes = 1024 * int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert peak_bytes < path.stat().st_size + 60 * MB  # its largest matrix has 101 MB as f32


def test_more_bits_where_they_take_less_time(tiny_model, bundled_variant, monkeypatch):
    monkeypatch.setattr("h2o_cli.session.drafting.GUESSED_DRAFT_BYTES", 0)
    monkeypatch.setattr("h2o_cli.session.drafting.guessed_room", lambda _, budget_bytes: budget_bytes)
    file = ModelFile.open(tiny_model("llama"))

    def best(room, disk_bytes_per_s=10**7):
        return best_copy(file, "auto", int(room * file.n_bytes), 32, disk_bytes_per_s).name

    assert best(0.1) == "q4_k_m"  # none fits
    assert best(0.5) == "q6_k"  # q8_0 does not fit
    assert best(0.6) == "q8_0"
    assert best(2.0) == "q4_k_m"  # nothing is read, so what counts is how fast it computes
    assert best(0.6, 10**12) == "q4_k_m"
    assert best_copy(file, None, 10**9, 32, 0) is best_copy(file, "small.gguf", 10**9, 32, 0) is None
    assert best_copy(ModelFile.open(bundled_variant("q4_0")), "auto", 10**9, 32, 0) is None
