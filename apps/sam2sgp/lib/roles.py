"""What somebody may do: four roles, each of which may do what those before it may.

    reader      looks at images, labels and lists; has images segmented, of which nothing is kept
    annotator   saves drafts and predictions, brings earlier states back, uploads images, asks for the next image
    approver    approves, rejects, removes and restores labels
    admin       trains, scores, segments in batches, changes what is noted, deletes

Which route asks for which role is in `lib.http.access`.
"""

from difflib import get_close_matches
from enum import IntEnum


class Role(IntEnum):
    """See the module; a higher one may more."""

    reader = 1
    annotator = 2
    approver = 3
    admin = 4


def role_of(text: object) -> Role:
    """A role by its name. Raises ValueError with the nearest name for an unknown one."""
    names = [role.name for role in Role]
    if isinstance(text, Role):
        return text
    if text in names:
        return Role[str(text)]
    near = get_close_matches(str(text).lower(), names, 1)
    hint = f"; did you mean {near[0]}?" if near else "; choose one of them."
    raise ValueError(f"expected one of {', '.join(names)}, found {text!r:.80}{hint}")
