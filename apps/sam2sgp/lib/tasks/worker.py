"""The process of a training, a scoring or a batch inference: see `lib.tasks.background`, which starts it.

    python -P -m lib.tasks.worker {train,scoring,batch_infer} < request.json

It builds the app again, by MONAI Label's environment variables, and calls one of its methods. The exit status is 0, or
1 with the error's sentence in the last line.
"""

import json
import logging
import sys

from monailabel.interfaces.utils import app as monailabel_app

from lib.refusals import FAILED, refuse
from lib.tasks.background import METHODS

FORMAT = "[%(asctime)s] [%(process)s] [%(threadName)s] [%(levelname)s] (%(name)s:%(lineno)d) - %(message)s"

logger = logging.getLogger(__name__)


def main(method: str) -> int:
    """Answer the request on the standard input."""
    logging.basicConfig(level=logging.INFO, format=FORMAT)
    # It logs all settings, users and their roles among them, and whoever sees a task sees its output.
    monailabel_app.logger.setLevel(logging.WARNING)
    if method not in METHODS:
        raise SystemExit(f"method: expected one of {', '.join(METHODS)}, found {method!r}.")
    request = json.load(sys.stdin)
    try:
        result = getattr(monailabel_app.app_instance(), method)(request)
    except Exception as error:
        answer = refuse(error)
        if answer.detail == FAILED:
            # For all else the sentence is enough.
            logger.error("%s failed", method, exc_info=error)
        logger.error("%s: %s", method, answer.detail)
        return 1
    logger.info("Result: %s", json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
