# SPDX-License-Identifier: Apache-2.0
"""`spatial-pe spatial run`: what is run, that nothing is run twice or lost, and what is said about wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from spatial_pe import cli
from spatial_pe._utils.errors import UserError
from spatial_pe.lab.study import study
from spatial_pe.lab.study.position_encodings import ENCODINGS
from spatial_pe.lab.study.pretrained import VARIANTS
from spatial_pe.lab.study.study import SMOKE, STUDIES, Run


@pytest.fixture
def quick(monkeypatch):
    """Runs that take no time: what is kept of them is only who they are. Counts them."""
    made = []

    def run(self, encoding, seed, device):
        made.append((encoding, seed))
        return {"seconds": 0.0, "accuracy": {"1.0": {"index": {"relation": 0.5}}}}

    monkeypatch.setattr(type(SMOKE), "run", run)
    return made


def go(path, **how):
    return study.run("encodings", "smoke", path, jobs=1, **how)


def test_every_encoding_has_as_many_runs_as_seeds():
    for name, row in STUDIES.items():
        for budget, parts in row.parts.items():
            runs = study.runs_of(name, budget, None, 5)
            assert len(set(runs)) == len(runs) == 5 * sum(len(part.encodings) for part in parts.values())
            assert runs == sorted(runs)
            for part in parts.values():
                assert set(part.encodings) <= ({*ENCODINGS} | {*VARIANTS})


def test_a_file_is_extended_and_nothing_run_again(tmp_path, quick):
    path = tmp_path / "a.json"
    first = go(path, encodings=["none", "axial"], seeds=1, command="first")
    assert quick == [("axial", 0), ("none", 0)]
    second = go(path, encodings=["none", "axial", "mixed"], seeds=2, command="second")
    assert quick[2:] == [("mixed", 0), ("axial", 1), ("mixed", 1), ("none", 1)]
    assert all(run in second["runs"] for run in first["runs"])
    assert second["commands"] == ["first", "second"]
    assert json.loads(path.read_text()) == second
    go(path, encodings=["none"], seeds=2)
    assert len(quick) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_killed_study_goes_on(tmp_path):
    """SIGKILL, no warning: what was finished is in the file, the same command adds the rest."""
    path = tmp_path / "killed.json"
    command = [sys.executable, "-m", "spatial_pe.cli", "spatial", "run", "--budget", "smoke", "--seeds", "2"]
    command += ["--encodings", "none,axial", "--jobs", "1", "--out", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("1/4"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = json.loads(path.read_text())["runs"]
    assert 1 <= len(kept) < 4
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.startswith(f"{len(kept)}/4")
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == 4 and all(run in runs for run in kept)
    assert "Accuracy by task" in done.stdout and "Its numbers are no result" in done.stdout
    again = study.STUDIES["encodings"].parts["smoke"]["objects"].recipe.run("axial", 1)
    del again["seconds"]
    first = next(run for run in runs if (run["encoding"], run["seed"]) == ("axial", 1))
    assert json.loads(json.dumps(again)) == {key: first[key] for key in again}  # bit for bit repeatable


def test_workers_end_with_their_parent(tmp_path):
    """Which is killed, and cannot end them; without a word."""
    code = (
        "import os, time\n"
        "from spatial_pe.lab.study import study\n"
        "if __name__ == '__main__':\n"
        "    pool = study.pool_of(1)\n"
        "    print(pool.apply(os.getpid), flush=True)\n"
        "    pool.apply(time.sleep, (600,))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert int(process.stdout.readline()) != process.pid
    process.kill()
    _, said = process.communicate(timeout=30)  # returns once the worker, too, has closed its end
    assert said == ""


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    study.save(path, {"runs": [1]})
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        study.save(path, {"runs": [1, 2]})
    assert json.loads(path.read_text()) == {"runs": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_runs_that_share_features_go_to_one_worker():
    """Both probes and the fine-tuning of a pretrained tower start from the same features of the frozen tower."""
    parts = STUDIES["pretrained"].parts["standard"]
    recipes = [part.recipe for part in parts.values()]
    from spatial_pe.lab.study.pretrained import ANY_HEAD

    assert len({replace(recipe, **ANY_HEAD) for recipe in recipes}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"study": "data"}, 'holds the study "data"'),
        ({"budget": "full"}, 'with the budget "full"'),
        ({"schema": 99}, "has schema 99"),
        ({"kind": "other"}, "is not the file of a study"),
        ({"recipes": {}}, 'part "objects" is new'),
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path, quick, change, message):
    path = tmp_path / "a.json"
    go(path, encodings=["none"], seeds=1)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = path.read_text()
    with pytest.raises(UserError, match=message):
        go(path, encodings=["axial"], seeds=1)
    assert path.read_text() == before


def test_other_settings_are_named(tmp_path, quick, monkeypatch):
    path = tmp_path / "a.json"
    go(path, encodings=["none"], seeds=1)
    part = STUDIES["encodings"].parts["smoke"]["objects"]
    monkeypatch.setitem(STUDIES["encodings"].parts["smoke"], "objects", replace(part, recipe=replace(SMOKE, steps=7)))
    with pytest.raises(UserError, match=r"objects\.steps was 6, is 7"):
        go(path, encodings=["axial"], seeds=1)


def spatial(capsys, *arguments: object) -> tuple[int, str]:
    status = cli.main(["spatial", *map(str, arguments)])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encodings", "axial,round"], "--encodings: 'round' is not one of none, learned-1d"),
        (["--study", "pretrained", "--encodings", "axial"], "'axial' is not one of as-is, identity"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--jobs", "-1"], "--jobs must be at least 1"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--model", "somewhere"], "--study pretrained takes one"),
        (["--study", "pretrained", "--model", "./nowhere"], "no folder './nowhere'"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, message):
    status, said = spatial(capsys, "run", "--budget", "smoke", "--out", tmp_path / "a.json", *arguments)
    assert status == 2 and message in said
    assert not list(tmp_path.iterdir())


def test_wrong_files(tmp_path, capsys):
    assert "is a folder" in spatial(capsys, "run", "--out", tmp_path)[1]
    (tmp_path / "no.json").write_text("{")
    assert "cannot be read as a study" in spatial(capsys, "report", tmp_path / "no.json")[1]
    assert "cannot be read as a study" in spatial(capsys, "report", tmp_path / "missing.json")[1]
    empty = {"schema": study.SCHEMA, "kind": "spatial-study", "runs": []}
    (tmp_path / "empty.json").write_text(json.dumps(empty))
    assert (
        "holds no finished run" in spatial(capsys, "report", tmp_path / "empty.json", "--out", tmp_path / "o.html")[1]
    )
    assert not (tmp_path / "o.html").exists()


def test_an_interrupted_study_says_how_to_go_on(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(study, "run", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["spatial", "run", "--out", str(tmp_path / "a.json")]) == 130
    assert "The same command resumes" in capsys.readouterr().err


def test_runs_are_ordered_by_seed():
    """A study that was stopped holds whole seeds of all encodings, not many seeds of one."""
    assert sorted([Run(1, "a", "x"), Run(0, "b", "y")])[0].seed == 0
