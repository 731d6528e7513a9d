"""Roles are ordered, and known by their names only."""

import pytest

from lib.roles import Role, role_of


def test_a_higher_role_may_more():
    assert sorted(Role) == [Role.reader, Role.annotator, Role.approver, Role.admin]
    assert all(role_of(role.name) is role is role_of(role) for role in Role)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("Approver", "did you mean approver?"),
        ("admins", "did you mean admin?"),
        (1, "choose one of them"),
        ("", "choose"),
    ],
)
def test_another_name_is_refused_with_the_nearest_one(text, hint):
    with pytest.raises(ValueError, match="expected one of reader, annotator, approver, admin, found") as refused:
        role_of(text)
    assert hint in str(refused.value)
