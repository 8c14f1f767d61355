import broken_models
import pytest

from runtime.chat import CHATML_STOP, Chat, Message
from runtime.errors import PromptError
from runtime.hollow import HollowModel
from runtime.model_file import ModelFile
from runtime.tokenizer import Tokenizer

TALK = [Message("user", "Hello"), Message("assistant", "Hi."), Message("user", "Bye")]


@pytest.fixture(scope="module")
def tokenizer_of():
    models = {}

    def make(path):
        if path not in models:
            file = ModelFile.open(path)
            models[path] = (HollowModel(file), file)
        return Tokenizer(*models[path])

    yield make
    for model, _ in models.values():
        model.free()


def test_the_models_own_template(tiny_model, tokenizer_of):
    notes = []
    tokenizer = tokenizer_of(tiny_model("qwen2"))
    chat = Chat(tokenizer, notes.append)
    text = chat.render(TALK)
    assert text == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (notes, chat.stop) == ([], ())
    tokens = chat.encode(TALK)
    assert tokenizer.decode(tokens, special=True) == text
    start = tokenizer.encode("<|im_start|>", parse_special=True)[0]
    assert tokens.count(start) == 4


def test_conversations_begin_alike(tiny_model, tokenizer_of):
    chat = Chat(tokenizer_of(tiny_model("qwen2")), print)
    assert chat.encode(TALK)[: len(chat.encode(TALK[:1]))] == chat.encode(TALK[:1])


def test_without_a_template_chatml_is_used_and_said(stories, tokenizer_of):
    notes = []
    chat = Chat(tokenizer_of(stories()), notes.append)
    assert chat.render(TALK[:1]) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert chat.stop == CHATML_STOP
    assert len(notes) == 1
    assert "no chat template" in notes[0]


def with_template(tokenizer, template):
    class Other:
        chat_template = template
        bos_text, adds_bos, eos_text = tokenizer.bos_text, tokenizer.adds_bos, tokenizer.eos_text
        encode = staticmethod(tokenizer.encode)

    return Chat(Other(), print)


def test_begin_of_text_is_there_once(tiny_model, tokenizer_of):
    tokenizer = tokenizer_of(tiny_model("llama"))
    chat = with_template(tokenizer, "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert chat.render(TALK[:1]) == "<s>Hello"
    assert chat.encode(TALK[:1]) == tokenizer.encode("Hello")


def test_template_that_refuses(tiny_model, tokenizer_of):
    chat = with_template(tokenizer_of(tiny_model("llama")), "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptError, match="roles must alternate"):
        chat.render(TALK)


@pytest.mark.parametrize(
    "template", ["{% for {{ messages", "{{ messages[9].content.x }}", "{{ 1 // 0 }}", "{{ 'a' + 1 }}"]
)
def test_broken_templates(template, tiny_model, tokenizer_of):
    tokenizer = tokenizer_of(tiny_model("llama"))
    with pytest.raises(PromptError, match="chat template"):
        with_template(tokenizer, template).render(TALK)


def test_template_that_never_ends(tmp_path, tokenizer_of):
    chat = Chat(tokenizer_of(broken_models.BROKEN["endless_chat_template"](tmp_path)), print)
    with pytest.raises(PromptError, match="refuses"):
        chat.render(TALK)
