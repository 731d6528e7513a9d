"""What `sam2sgp serve`, `backup`, `restore`, `token` and `tokens` start, in a process of its own.

The app is no part of the package.
"""

import sys
from pathlib import Path

from lib.admin.backup import backup
from lib.admin.restore import restore
from lib.admin.start import serve
from lib.admin.token_commands import token, tokens
from sam2sgp.errors import sentence_for_users

COMMANDS = {"serve": serve, "backup": backup, "restore": restore, "token": token, "tokens": tokens}
APP = Path(__file__).parent


def main(command: str, *words: str) -> int:
    """Do what is asked for; 1 with a sentence on standard error where it can't be done."""
    try:
        COMMANDS[command](words, APP)
    except Exception as error:
        told = str(error) if isinstance(error, OSError) else sentence_for_users(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
