import subprocess

from experiments.records import workdir


def test_commit_of_changed_files_is_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "__file__", str(tmp_path / "workdir.py"))

    def git(*arguments):
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert workdir.current_commit() is None
    git("init")
    (tmp_path / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-m", "One file")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "notes.txt").touch()  # untracked
    assert workdir.current_commit() == commit
    (tmp_path / "code.py").write_text("2\n")
    assert workdir.current_commit() == f"{commit}+"
