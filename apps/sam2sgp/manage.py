"""What `sam2sgp serve`, `backup`, `restore`, `token` and `tokens` start, in a process of its own.

The app is no part of the package.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

from lib.priority import ASLEEP
from sam2sgp.errors import sentence_for_users
from sam2sgp.startup import import_monai

# Functions and the modules that hold them.
COMMANDS = {
    "serve": "lib.admin.start",
    "backup": "lib.admin.backup",
    "restore": "lib.admin.restore",
    "token": "lib.admin.token_commands",
    "tokens": "lib.admin.token_commands",
}
APP = Path(__file__).parent


def main(command: str, *words: str) -> int:
    """Do what is asked for; 1 with a sentence on standard error where it can't be done."""
    if command == "serve":
        # PyTorch reads these when it is imported, here and in the processes of tasks; what the user has set stays.
        os.environ.update({**ASLEEP, **os.environ})
    else:
        # A server may use all of MONAI.
        import_monai()
    try:
        getattr(import_module(COMMANDS[command]), command)(words, APP)
    except Exception as error:
        told = str(error) if isinstance(error, OSError) else sentence_for_users(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
