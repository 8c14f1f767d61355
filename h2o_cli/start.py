"""Where the command `h2o` starts: until its own handlers are in place, Ctrl-C ends the process without a traceback."""

import gc
from _signal import SIG_DFL, SIGINT, signal  # the module `signal` would take longer to load than this matters


def main() -> None:
    """The console script."""
    signal(SIGINT, SIG_DFL)
    gc.disable()  # until the command is imported: what is imported stays
    from h2o_cli.main import main as run

    run()


if __name__ == "__main__":
    main()
