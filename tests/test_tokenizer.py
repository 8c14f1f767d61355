import broken_models
import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.errors import PromptError
from runtime.hollow import HollowModel
from runtime.model_file import ModelFile
from runtime.tokenizer import Tokenizer

TEXTS = ["Once upon a time", " leading", "wörld 😀 日本語", "", "a\n\tb", "<s>not special</s>", "e\u0301\u200d"]
ARCHS = ("llama", "qwen2", "gemma2", "gpt2")


@pytest.fixture(scope="module")
def tokenizer_of():
    """tokenizer_of(path): a Tokenizer whose model lives as long as the module."""
    models = {}

    def make(path):
        if path not in models:
            file = ModelFile.open(path)
            models[path] = (HollowModel(file), file)
        return Tokenizer(*models[path])

    yield make
    for model, _ in models.values():
        model.free()


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
