"""Copies of the repository, with the jobs as they are or as stubs."""

import shutil
from pathlib import Path

import pytest
from project import Project, copy_repository, with_stubs


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A copy of the repository."""
    return copy_repository(tmp_path / "repository")


@pytest.fixture
def stubbed(tmp_path: Path) -> Project:
    """A copy of the repository with stub jobs."""
    return with_stubs(copy_repository(tmp_path / "repository"))


@pytest.fixture(scope="session")
def finished_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stubbed repository in which the ci scale has run to its end."""
    project = with_stubs(copy_repository(tmp_path_factory.mktemp("finished") / "repository"))
    project.run("--config", "scale=ci")
    return project.path


@pytest.fixture(scope="session")
def everything(finished_template: Path) -> dict[str, int]:
    """Rule -> jobs of the ci scale."""
    return Project(finished_template).planned("--config", "scale=ci", "--forceall")


@pytest.fixture
def finished(finished_template: Path, tmp_path: Path) -> Project:
    """Such a repository of the test's own; times of files are kept."""
    return Project(Path(shutil.copytree(finished_template, tmp_path / "repository", symlinks=True)))
