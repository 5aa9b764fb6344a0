"""The process of one reload: runs the new version of a program against the instance that serves the previous one.

It is a process of its own so that every module is imported anew. Its exit code is 0 if the new version serves.
"""

from __future__ import annotations

import sys

from ...broker.defaults import default_instance, needed_url
from .. import lifecycle
from .attached_client import AttachedClient
from .program import is_script, make_target, run_script, show_error


def main() -> None:
    """Run the program of the command line, and end the process."""
    target, *arguments = sys.argv[1:]
    client = AttachedClient.attach(needed_url(None), default_instance())
    lifecycle.attach_instead(client.started)
    try:
        if is_script(target):
            run_script(target, arguments)
        else:
            make_target(client, target)
    except SystemExit as e:
        if e.code not in (None, 0):
            if isinstance(e.code, str):
                sys.stderr.write(f"{e.code}\n")
            sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as e:
        show_error(e, target)
        sys.exit(1)
    client.finish()
