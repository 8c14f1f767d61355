"""Imports go one way, and a command loads only what it needs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BOTTOM_UP = ("runtime", "profiler", "planner", "h2o_cli")
GROUND = ("errors", "limited", "memory", "passes", "settings", "sizes", "threads")
# Rooms of runtime/, from the bottom up.
ROOMS = (GROUND, "llama", "plans", "weights", "kv", "engine", "distributed", "answer")
COMMANDS = ("main", "start", "floor_run", "run_memory", "cmd_")  # of h2o_cli/: beginnings of the names on top
FILES = sorted(path for package in BOTTOM_UP for path in (ROOT / package).rglob("*.py"))

# Heavy package -> modules that import it when they are imported themselves, and those that do so inside a function.
HEAVY = {
    "llama_cpp": (set(), {"h2o_cli/bench/models/make_model.py", "h2o_cli/bench/speed/llama_cpp_run.py"}),
    "jinja2": (set(), {"runtime/llama/chat_template.py"}),
    "gguf": (set(), {"h2o_cli/bench/models/make_model.py"}),
    "matplotlib": (
        set(),
        {f"h2o_cli/bench/{name}plots.py" for name in ("", "speed/", "kv/", "batch/", "admission/")},
    ),
    "torch": (set(), {"h2o_cli/bench/predict/trained.py"}),
    "grpc": ({"runtime/distributed/wire.py"}, set()),
    "cryptography": (set(), {"runtime/distributed/keys.py"}),
    "ray": (set(), {"h2o_cli/session/ray_workers.py"}),
    "sentencepiece": (set(), set()),
}
NEVER_ON_THE_RUN_PATH = (
    "grpc",
    "cryptography",
    "ray",
    "gguf",
    "matplotlib",
    "torch",
    "sentencepiece",
    "h2o_cli.bench.models.make_model",
    "rich",
)
AT_THE_END = "import sys; loaded = sys.modules; "
AT_THE_TOKEN = """import sys
from runtime.answer.meter import Meter
loaded, see = set(), Meter.see
Meter.see = lambda meter, step: (loaded.update(sys.modules), see(meter, step))
"""  # of an answer of one token
REPORT = "print(','.join(name for name in {names!r} if name in loaded), file=sys.stderr)"


def imports_of(path, *, when_imported=False, for_types=True):
    """Dotted names that a file imports; when_imported: without those inside functions or for type checkers only.

    for_types False: without those for type checkers, with those inside functions.
    """
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module in BOTTOM_UP:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if not (when_imported and is_put_off(node)) and (for_types or not is_for_types(node)):
            nodes += ast.iter_child_nodes(node)


def is_for_types(node):
    """Whether what is inside a node is for type checkers only."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def is_put_off(node):
    """Whether what is inside a node does not run when its module is imported."""
    return is_for_types(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def relative(path):
    return path.relative_to(ROOT).as_posix()


def test_every_module_of_the_runtime_is_in_the_table():
    table = (ROOT / "docs" / "design.md").read_text().split("## 2.")[0]
    rooms = [path for path in (ROOT / "runtime").rglob("*.py") if path.stem != "__init__" and path.parent.name != "kv"]
    assert [relative(path) for path in rooms if f"`{path.name}`" not in table] == []


def test_the_root_of_the_runtime_is_the_ground_only():
    assert {path.stem for path in (ROOT / "runtime").glob("*.py")} == {"__init__", *GROUND}


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.is_relative_to(ROOT / "runtime")], ids=lambda p: p.name
)
def test_rooms_of_the_runtime_go_down_only(path):
    allowed = ROOMS[: ROOMS.index(room_of(path)) + 1]
    for name in imports_of(path, for_types=False):
        if name.startswith("runtime."):
            room = name.split(".")[1]
            assert (GROUND if room in GROUND else room) in allowed, f"{relative(path)} imports {name}"


def room_of(path):
    """The room of the runtime that a file is in; the ground for those at its root."""
    inside = path.relative_to(ROOT / "runtime")
    return inside.parts[0] if len(inside.parts) > 1 else GROUND


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "h2o_cli")], ids=relative)
def test_rooms_of_the_commands_go_down_only(path):
    """A session is opened by commands, benchmarks and servers alike, so it knows no flags, terminal or signals."""
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name in imports_of(path):
        assert level_of(name) <= level_of(own), f"{relative(path)} imports {name}"
        assert level_of(own) or name.split(".")[0] != "typer", f"{relative(path)} imports {name}"


def level_of(module):
    """0: h2o_cli.session and what is below h2o_cli; 1: its texts and benchmarks; 2: its commands."""
    room, *inside = module.split(".")[1:] or [""]
    if not module.startswith("h2o_cli.") or room == "session":
        return 0
    return 2 if not inside and room.startswith(COMMANDS) else 1


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_down_only(path):
    allowed = BOTTOM_UP[: BOTTOM_UP.index(path.relative_to(ROOT).parts[0]) + 1]
    for name in imports_of(path):
        package = name.split(".")[0]
        assert package in allowed or package not in BOTTOM_UP, f"{relative(path)} imports {name}"
        assert package not in ("tests", "model_configs"), f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_heavy_packages_only_where_they_are_needed(path):
    anywhere = {name.split(".")[0] for name in imports_of(path)}
    at_import = {name.split(".")[0] for name in imports_of(path, when_imported=True)}
    for package, (at_module_level, inside_functions) in HEAVY.items():
        if package in at_import:
            assert relative(path) in at_module_level, f"{relative(path)} imports {package} at module level"
        elif package in anywhere:
            assert relative(path) in inside_functions, f"{relative(path)} imports {package}"


def test_files_and_functions_are_short():
    n_lines, functions = {}, []
    for path in (*FILES, *sorted((ROOT / "tests").glob("*.py"))):
        text = path.read_text()
        n_lines[relative(path)] = text.count("\n")
        found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        functions += [(node.end_lineno - node.lineno + 1, node.name, relative(path)) for node in found]
    assert {path: n for path, n in n_lines.items() if n > 450} == {}
    longest = sorted(functions, reverse=True)[: len(functions) // 100]  # one of a hundred
    assert longest[-1][0] <= 60, longest


def test_packages_have_empty_init_files():
    for path in FILES:
        assert path.name != "__init__.py" or not path.read_text().strip(), f"{relative(path)} is not empty"


def loaded_after(arguments, names, tmp_path, look=AT_THE_END):
    """Which of these modules a command has imported by then."""
    code = look + f"from h2o_cli.main import run_command; code = run_command({arguments!r}); "
    code += REPORT.format(names=names) + "; sys.exit(code)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [name for name in done.stderr.splitlines()[-1].split(",") if name]


def test_help_loads_no_library(tmp_path):
    names = ("llama_cpp", "numpy", "msgspec", *NEVER_ON_THE_RUN_PATH)
    assert loaded_after(["--help"], names, tmp_path) == []


def test_a_run_loads_nothing_it_does_not_need(tmp_path, tiny_model):
    arguments = ["run", str(tiny_model("llama")), "-p", "a", "-n", "2", "-s", str(tmp_path / "plan")]
    bindings = "llama_cpp.llama_cpp"  # the package around them is heavy: numpy, jinja2, a server's formats
    names = (bindings, "llama_cpp", "numpy", "jinja2", *NEVER_ON_THE_RUN_PATH)
    assert loaded_after(arguments, names, tmp_path) == [bindings]


def test_the_first_token_waits_for_no_import_of_what_comes_later(tmp_path, tiny_model):
    """What writes JSON and versions comes after it; errors, and budgets near the smallest one, bring the rest."""
    arguments = ["run", str(tiny_model("llama")), "-p", "a", "-n", "1", "--json", "-s", str(tmp_path / "plan")]
    names = ("json", "importlib.metadata", "email", "platformdirs", "tempfile", "random", "shlex", "unicodedata")
    assert loaded_after(arguments, names, tmp_path, look=AT_THE_TOKEN) == []


def test_a_run_with_a_profile_loads_no_planner(tmp_path, tiny_model, monkeypatch):
    """A child plans and predicts: what the planner takes would be missing for weights."""
    monkeypatch.setenv("H2O_PROFILES", str(tmp_path))
    model = str(tiny_model("llama"))
    loaded_after(["profile", model, "--repeats", "1"], (), tmp_path)
    names = ("msgspec", "planner", "profiler", "pickle")
    assert loaded_after(["run", model, "-p", "a", "-n", "3", "-s", str(tmp_path / "plan")], names, tmp_path) == []
