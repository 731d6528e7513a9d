"""Lines of an audit log, for tests."""

import json
from datetime import UTC, datetime, timedelta

NOON = datetime(2026, 11, 29, 12, tzinfo=UTC)


def line(seconds: float, action: str = "approve", user: str | None = "ann", image: str = "A", tag="final") -> str:
    time = (NOON + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "user": user, "action": action, "image": image, "tag": tag}) + "\n"
