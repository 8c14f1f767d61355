"""The real command, and whether it ended as bad input has to."""

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
H2O = [sys.executable, "-m", "h2o_cli.main"]


def is_one_line(answer, *parts, code=1):
    """Whether a command ended as bad input has to: one line, at most one more that says what to do, nothing else."""
    found, out, err = answer
    lines = [line for line in err.splitlines() if not line.startswith("h2o: measuring ")]  # of work that took long
    assert found == code, answer
    assert out == "", answer
    assert lines and lines[0].startswith("h2o: "), answer
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("  next: ")), answer
    assert "Traceback" not in err and "unexpected" not in err, answer
    assert "/proc/self/fd" not in err, answer
    for part in parts:
        assert str(part) in err, answer
    return True


def h2o(*arguments, shell="H2O", **options):
    """(exit code, stdout, stderr) of the real command; shell: how it is called, H2O standing for it."""
    command = [*H2O, *map(str, arguments)]
    line = ["bash", "-c", shell.replace("H2O", shlex.join(command))]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, timeout=120, check=False, **options)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
