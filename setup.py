"""A wheel holds, inside the package, the bundle's other files and the app: see `sam2sgp.places`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = {
    "_bundle": ("bundle", ["configs/**/*", "docs/*", "models/model.pt", "models/large_files.yml", "LICENSE"]),
    "_app": ("apps/sam2sgp", ["**/*.py", "templates/**/*", "deploy/*", "README.md"]),
}


class BuildWithBundle(build_py):
    """`build_py` that also copies the files that are no modules; an editable install finds them in the clone."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for target, (source, patterns) in FILES.items():
            for path in sorted({path for pattern in patterns for path in Path(source).glob(pattern)}):
                if path.is_file():
                    copy = Path(self.build_lib, "sam2sgp", target, path.relative_to(source))
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)


setup(cmdclass={"build_py": BuildWithBundle})
