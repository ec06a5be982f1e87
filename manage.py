#!/usr/bin/env python
"""Django's command line for the portal."""

import os
import sys


def make_streams_writable():
    """A terminal or log that knows no Chinese gets other characters for it, and a closed output is
    no reason to stop: what is done matters more than what is said of it.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def main():
    make_streams_writable()
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")
    # Must be set before torch is imported, here or in a child process: waiting threads that spin
    # made a training step of the starter cost 3 to 6 times the CPU time on a busy machine with 2
    # cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from django.core.management import execute_from_command_line
    except ImportError:
        sys.exit(
            "Django is missing: `make up` installs everything into .venv; then `source "
            ".venv/bin/activate` once."
        )

    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
