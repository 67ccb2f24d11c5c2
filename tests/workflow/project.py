"""A copy of the repository in which every job is a stub, so that a whole workflow takes seconds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUBS = Path(__file__).parent / "stubs"
COPIED = ("Snakefile", "config", "cropr", "envs", "notebooks", "profiles", "workflow", "assets")


class Project:
    """A copy of the repository and how to run Snakemake in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def snakemake(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run ``snakemake`` as a user does, from the repository's root; stdout and stderr together."""
        kept = {name: os.environ[name] for name in os.environ.keys() - {"PYTHONPATH", "SNAKEMAKE_PROFILE"}}
        return subprocess.run(
            [sys.executable, "-m", "snakemake", *arguments],
            cwd=self.path,
            env=kept | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1800,  # the whole ci scale takes six minutes on two idle cores
            check=False,
        )

    def run(self, *arguments: str) -> str:
        """Run to success; the output."""
        result = self.snakemake("--cores", "2", *arguments)
        assert result.returncode == 0, result.stdout
        return result.stdout

    def planned(self, *arguments: str) -> dict[str, int]:
        """Rule -> jobs that a call would run."""
        return counts(self.run("--dry-run", *arguments))

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace text that stands in a file exactly once."""
        file = self.path / name
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
        file.write_text(text.replace(old, new), encoding="utf-8")


def counts(output: str) -> dict[str, int]:
    """Rule -> jobs, from what a dry run prints; empty where there is nothing to do."""
    table = re.search(r"^Job stats:\njob +count\n-+ +-+\n(.*?)\n\n", output, re.MULTILINE | re.DOTALL)
    jobs = dict(line.split() for line in table[1].splitlines()) if table else {}
    return {rule: int(number) for rule, number in jobs.items() if rule != "total"}


def copy_repository(path: Path) -> Project:
    """The parts of the repository that the workflow reads."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            path.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, path / name)
    return Project(path)


def with_stubs(project: Project) -> Project:
    """Replace what the jobs call; the grid, the rules and the sources that are digested stay."""
    for main in ("cropr/__main__.py", "workflow/paper/microbench/__main__.py"):
        shutil.copy2(STUBS / "cropr_main.py", project / main)
    shutil.copy2(STUBS / "run_notebook.py", project / "workflow/paper/run_notebook.py")
    shutil.copy2(STUBS / "page.py", project / "workflow/paper/page.py")
    return project
