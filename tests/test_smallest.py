"""The smallest budget is one number for everybody who names it: it works, and one MB less does not."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cgroups import memory_limit

from h2o_cli.floor_run import ask
from h2o_cli.session import opening, smallest
from h2o_cli.session.model import settings_for
from h2o_cli.session.options import SessionOptions
from h2o_cli.session.smallest import CHAT, CONVERSATION, PROMPT, agreed, least_settings, written
from runtime.answer.sampler import Sampling
from runtime.errors import ModelError
from runtime.llama.compiled import LIBRARY
from runtime.llama.model_file import ModelFile
from runtime.settings import MARGIN_BYTES, TURNS_MARGIN_BYTES, Settings

MB = 10**6
H2O = [sys.executable, "-m", "h2o_cli.main"]
SETTINGS = Settings(n_ctx=512, n_ubatch=128)


def test_a_conversation_keeps_more_free_for_its_turns(bundled_model):
    def margin(kind):
        options = SessionOptions(bundled_model, kind=kind)
        return settings_for(ModelFile.open(bundled_model), options, 512, 128, None).margin_bytes

    assert margin(PROMPT) == margin(CHAT) == MARGIN_BYTES
    assert margin(CONVERSATION) == TURNS_MARGIN_BYTES > MARGIN_BYTES


# --- the number that was written down -------------------------------------------------------------------------------


def test_the_number_stays_while_measurements_agree():
    first = agreed(77, SETTINGS, PROMPT, 40_300_000)
    assert first == written(77, SETTINGS, PROMPT) == 42 * MB
    for need in (40_300_000, 40_900_000, 41_990_000, 39_000_000):
        assert agreed(77, SETTINGS, PROMPT, need) == first
    assert agreed(77, SETTINGS, PROMPT, 42_100_000) == 44 * MB
    assert agreed(77, SETTINGS, PROMPT, 30_000_000) == 31 * MB == written(77, SETTINGS, PROMPT)


def test_other_runs_have_other_numbers():
    agreed(77, SETTINGS, PROMPT, 40 * MB)
    others = [replace(SETTINGS, n_ctx=513), replace(SETTINGS, kv_type="q8_0"), replace(SETTINGS, prefetch_input=True)]
    others.append(replace(SETTINGS, n_threads=7))
    assert [written(77, other, PROMPT) for other in others] == [0, 0, 0, 0]
    assert (written(78, SETTINGS, PROMPT), written(77, SETTINGS, CHAT)) == (0, 0)
    assert written(77, replace(SETTINGS, depth=1, n_logits=4), PROMPT) == 41 * MB


def test_numbers_of_older_code_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(smallest, "_ROOT", tmp_path)
    for room in ("runtime/engine", "h2o_cli"):
        (tmp_path / room).mkdir(parents=True)
        (tmp_path / room / "a.py").touch()
    for i, room in enumerate(("runtime/engine", "h2o_cli")):
        agreed(77, SETTINGS, PROMPT, 40 * MB)
        assert written(77, SETTINGS, PROMPT) == 41 * MB
        os.utime(tmp_path / room / "a.py", (2**32 + i, 2**32 + i))
        assert written(77, SETTINGS, PROMPT) == 0


@pytest.mark.parametrize("changed", [{"PINNED_VERSION": "0.0"}, {"sys": SimpleNamespace(hexversion=1)}])
def test_numbers_of_another_llama_cpp_or_python_do_not_count(changed, monkeypatch):
    agreed(77, SETTINGS, PROMPT, 40 * MB)
    for name, value in changed.items():
        monkeypatch.setattr(smallest, name, value)
    assert written(77, SETTINGS, PROMPT) == 0


@pytest.mark.parametrize("text", ["", "[1]", '{"a": []}', "\x00", '{"a": "b"}'])
def test_a_damaged_file_is_as_good_as_none(text):
    agreed(77, SETTINGS, PROMPT, 40 * MB)
    smallest._path().write_text(text)
    assert written(77, SETTINGS, PROMPT) == 0
    assert agreed(77, SETTINGS, PROMPT, 50 * MB) == 51 * MB == written(77, SETTINGS, PROMPT)


# --- everybody names it ---------------------------------------------------------------------------------------------


def h2o(*arguments, **options):
    command = [*H2O, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def named(text):
    """The number in an error or a summary."""
    return int(re.search(r"smallest budget[a-z :]*-m (\d+)", text).group(1))


def test_all_commands_name_the_same_number(bundled_model, tmp_path, monkeypatch):
    """Whoever is asked first, from processes that have loaded different things."""
    monkeypatch.setenv("H2O_PROFILES", str(tmp_path))
    run = ("run", bundled_model, "-p", "Once", "-s", tmp_path / "plan", "--ctx", 512)
    numbers = [named(h2o(*run, "-m", size).stderr) for size in (5, 20, 30)]
    numbers.append(named(h2o("inspect", bundled_model).stdout))
    numbers.append(named(h2o("profile", bundled_model, "--repeats", 1).stdout))
    numbers.append(named(h2o(*run, "-m", 5).stderr))
    for size, stream in ((10, "stderr"), (200, "stdout")):
        numbers.append(named(getattr(h2o("plan", bundled_model, "-m", size, "-s", tmp_path / "plan"), stream)))
    (tmp_path / "long").write_text("Once upon a time there was a dog. " * 30)
    numbers.append(named(h2o("run", bundled_model, "-f", tmp_path / "long", "--ctx", 512, "-m", 20).stderr))
    assert len(set(numbers)) == 1, numbers


def test_a_model_that_cannot_be_opened(tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"no\.gguf"):
        ask(PROMPT, [str(tmp_path / "no.gguf")])


# --- it works, and one MB less does not -----------------------------------------------------------------------------


@pytest.fixture
def floors(bundled_model, tmp_path, monkeypatch):
    """What `h2o inspect` says of the bundled model, in a user's folder of its own, in MB."""
    monkeypatch.setenv("H2O_PROFILES", str(tmp_path))
    found = json.loads(h2o("inspect", bundled_model, "--json").stdout)
    return {PROMPT: found["floor_bytes"] // MB, CONVERSATION: found["conversation_floor_bytes"] // MB}


@pytest.mark.cgroup
@pytest.mark.parametrize("words", [2, 400])
def test_a_prompt_in_the_smallest_budget(bundled_model, floors, words, tmp_path):
    (tmp_path / "prompt").write_text("dog " * words)
    command = [*H2O, "run", str(bundled_model), "-f", str(tmp_path / "prompt"), "-n", "8", "--ctx", "512", "-m"]
    for size, code in ((floors[PROMPT], 0), (floors[PROMPT] - 1, 1)):
        with memory_limit(floors[PROMPT] * MB) as group:
            done = group.run([*command, str(size)], timeout=120, env=os.environ)
            assert (done.returncode, group.kills) == (code, 0), done.stderr
    assert named(done.stderr) == floors[PROMPT]


@pytest.mark.cgroup
@pytest.mark.parametrize("flags", [("--chat",), ("--kv-filter",)], ids=str)
def test_flags_in_the_smallest_budget(bundled_model, flags):
    command = [*H2O, "run", str(bundled_model), "-p", "A dog", "-n", "8", *flags, "-m"]
    floor = named(h2o(*command[3:], "5").stderr)
    for size, code in ((floor, 0), (floor - 1, 1)):
        with memory_limit(floor * MB) as group:
            done = group.run([*command, str(size)], timeout=120, env=os.environ)
            assert (done.returncode, group.kills) == (code, 0), done.stderr
    assert named(done.stderr) == floor


@pytest.mark.skipif(LIBRARY is None, reason="built without a compiler")
def test_a_greedy_run_has_weights_in_the_place_of_a_sampler_and_the_same_smallest_budget(bundled_model):
    """One number for both; only a run that does no more than take the likeliest token has the memory."""
    run, greedy = ("run", bundled_model, "-p", "A dog", "-n", 4, "--ctx", 512), ("--temp", 0)
    counted = {}
    for flags in ((), greedy, (*greedy, "--chat"), (*greedy, "--repeat-penalty", 1.1)):
        done = h2o(*run, *flags, "-m", 60, "--json")
        counted[flags] = json.loads(done.stdout)["ledger"]["sampler_bytes"]
    assert [n_bytes > 0 for n_bytes in counted.values()] == [True, False, False, True]
    assert least_settings(replace(SETTINGS, lists_tokens=False), None) == least_settings(SETTINGS, None)
    floors = {named(h2o(*run, *flags, "-m", 5).stderr) for flags in ((), greedy)}
    assert len(floors) == 1
    floor = floors.pop()
    assert [h2o(*run, *greedy, "-m", size).returncode for size in (floor, floor - 1)] == [0, 1]


def test_a_conversation_keeps_the_memory_of_a_sampler():
    """Its tokens may be chosen in another way from its next turn on."""
    model = SimpleNamespace(tokenizer=SimpleNamespace(suppressed=[]))
    options = [SessionOptions(Path("model"), kind=kind, sampling=Sampling(temp=0)) for kind in (PROMPT, CONVERSATION)]
    assert [opening._lists_tokens(model, each) for each in options] == [LIBRARY is None, True]
    model.tokenizer.suppressed = [3]
    assert opening._lists_tokens(model, options[0])


@pytest.mark.cgroup
def test_a_conversation_in_the_smallest_budget(bundled_model, floors):
    command = [*H2O, "run", str(bundled_model), "-n", "20", "-m"]
    floor = floors[CONVERSATION]
    text, code, kills = converse([*command, str(floor)], floor)
    assert (code, kills) == (0, 0), text
    assert text.count("tokens/s)") == 3
    text, code, _ = converse([*command, str(floor - 1)], floor)
    assert code == 1
    assert named(text) == floor


def converse(command, limit_mb):
    """Three turns in a cgroup: what was shown, the exit code, and how many processes were killed."""
    ours, theirs = pty.openpty()
    with memory_limit(limit_mb * MB) as group:
        environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        process = group.popen(command, env=environment, **streams)
        os.close(theirs)
        text = ""
        for line in ("Once upon a time", "The dog and the cat ran home. " * 20, "And then?", "/exit"):
            text += read_until(ours, "\n> ", "> ")
            os.write(ours, f"{line}\n".encode()) if process.poll() is None else None
        code = process.wait(60)
        return text + read_until(ours, "no such text"), code, group.kills


def read_until(fd, *ends, seconds=30):
    """What comes until it ends in one of `ends`, or nothing comes any more."""
    text, last = "", time.monotonic() + seconds
    while time.monotonic() < last and not text.endswith(ends):
        try:
            new = os.read(fd, 4096).decode(errors="replace")
        except OSError:
            break
        text += new
    return text
