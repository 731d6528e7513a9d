"""The tests mirror the packages, so that whoever changes a module finds its tests, and helpers are no tests."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where the tests of a package's modules are.
MIRRORED = {"bundle/sam2sgp": "tests", "apps/sam2sgp/lib": "tests/app"}
# Modules without tests of their own, and why.
EXCEPTIONS = {
    "bundle/sam2sgp/inferers/adapting.py": "protocols only",
}


@pytest.mark.parametrize(("package", "tests"), MIRRORED.items())
def test_each_module_has_its_tests_in_the_file_of_its_name(package, tests):
    modules = [path.relative_to(ROOT / package) for path in (ROOT / package).rglob("[!_]*.py")]
    assert len(modules) > 70
    expected = {f"{package}/{module}": ROOT / tests / module.parent / f"test_{module.name}" for module in modules}
    missing = {module for module, file in expected.items() if not file.is_file()}
    assert missing == {module for module in EXCEPTIONS if module.startswith(f"{package}/")}
    assert [file for file in expected.values() if file.is_file() and "def test_" not in file.read_text()] == []


def test_helpers_are_in_one_place():
    modules = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("*.py")}
    others = {path for path in modules if not path.name.startswith("test_") and path.name != "conftest.py"}
    # Servers, browsers and archives of the end-to-end tests are by themselves.
    assert {path.parts[0] for path in others} == {"helpers", "e2e"}
    assert not any(path.name.startswith("test_") for path in modules if path.parts[0] == "helpers")


def test_tests_take_their_helpers_from_modules_that_are_no_tests():
    written = re.compile(r"^\s*(?:from|import) tests\.(?:\w+\.)*test_\w+", re.MULTILINE)
    assert [path.name for path in (ROOT / "tests").rglob("*.py") if written.search(path.read_text())] == []
