"""The package as it is published: built, checked, and used outside the repository."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import bnlstm_jax

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "bnlstm_jax"
README = (ROOT / "README.md").read_text()


def run(*command, cwd=ROOT):
    result = subprocess.run(
        [*map(str, command)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def requirements(name):
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {str(Requirement(line)) for line in lines if line}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source archive of the committed and the new files."""
    copy = tmp_path_factory.mktemp("copy")  # setuptools writes into the folder that it builds
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), listed):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    output = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", output, copy)
    (wheel,), (source,) = output.glob("*.whl"), output.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[0]) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(file.read(name).decode())


def test_distributions_pass_twine_check(built):
    output = run(sys.executable, "-m", "twine", "check", "--strict", *built)
    assert output.count("PASSED") == 2


def test_wheel_contains_only_the_library(built):
    with zipfile.ZipFile(built[0]) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    files = {path for path in LIBRARY.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert names == {str(path.relative_to(ROOT)) for path in files}


def test_source_archive_contains_the_files_to_build(built):
    with tarfile.open(built[1]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"LICENSE", "README.md", "requirements.txt", "tests/requirements.txt"} <= names
    assert {name for name in names if name.startswith("tests/")} == {"tests/requirements.txt"}


def test_metadata_matches_citation_and_changelog(metadata):
    assert metadata["Version"] == bnlstm_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"version: {bnlstm_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\d\S*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert newest == bnlstm_jax.__version__


def test_extras_match_the_requirement_files(metadata):
    needed = {"": set(), "experiments": set(), "dev": set()}
    for line in metadata.get_all("Requires-Dist"):
        requirement = Requirement(line)
        extra = re.fullmatch(r'extra == "(\w+)"|', str(requirement.marker or ""))[1] or ""
        requirement.marker = None
        needed[extra].add(str(requirement))
    experiments = requirements("requirements.txt")
    assert needed["experiments"] == experiments
    assert needed["dev"] == experiments | requirements("tests/requirements.txt")
    assert needed[""] == {line for line in experiments if re.match("(jax|flax)[<>]", line)}


def test_workflow_runs_readme_commands_on_supported_pythons(metadata):
    job = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]
    prefix = "Programming Language :: Python :: 3."
    supported = [c for c in metadata.get_all("Classifier") if c.startswith(prefix)]
    assert [
        f"{prefix[:-2]}{version}" for version in job["strategy"]["matrix"]["python"]
    ] == supported
    commands = re.findall(r"^(scripts/\w+) +#", README, re.M)
    always = [step["run"] for step in job["steps"] if "run" in step and "if" not in step]
    assert [command.split()[0] for command in always] == commands


@pytest.mark.long
def test_readme_example_runs_from_the_installed_wheel(built, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", built[0])
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    report = "import bnlstm_jax; print(bnlstm_jax.__file__, logits.shape)"
    (tmp_path / "example.py").write_text(code + report)
    output = run(python, "example.py", cwd=tmp_path)
    assert str(tmp_path / "venv") in output and "(1, 10)" in output
