"""The commands: shell scripts with a stand-in for Python, and what main says when it ends."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import aim_jax
from aim_jax import config, main, run

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci/run"]
QUICKSTART = str(ROOT / "configs/quickstart.py")

# Writes down how it was called; a report leaves a page with two tables.
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>calls
case "$*" in
*"pip install"*) exit "${PIP_FAILS:-0}" ;;
*aim_jax.report*)
    mkdir -p runs/quickstart "${RUNS:-.}"
    printf '# Runs\\n\\n| method |\\n| --- |\\n| aim |\\n\\nOP: ...\\n\\n| more |\\n' \\
        >"${RUNS:-runs/quickstart}/report.md"
    ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A project of scripts and requirements alone, in whose .venv all is a stand-in."""
    for name in ("launch", "tests", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    for script in SCRIPTS[:-1]:
        shutil.copy(script, tmp_path / "launch")
    for name in ("requirements.txt", "tests/requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("python", "ruff", "lm_eval"):
        program = tmp_path / ".venv/bin" / name
        program.write_text(STAND_IN)
        program.chmod(0o755)
    return tmp_path


def bash(project, script, *args, **env):
    """The finished process of a script, called from elsewhere."""
    return subprocess.run(
        ["bash", str(project / "launch" / script), *args],
        cwd="/",
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


def calls(project):
    """What the stand-ins were called with, without the look whether pip is there."""
    lines = (project / "calls").read_text().splitlines()
    (project / "calls").unlink()
    return [line for line in lines if line != "python -m pip --version"]


def installs(project):
    return [line.split()[-1] for line in calls(project) if "pip install" in line]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
def test_shellcheck_has_nothing_to_say():
    found = subprocess.run(
        ["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True
    )
    assert not found.stdout + found.stderr


def test_requirements_are_installed_once(project):
    assert bash(project, "test.sh").returncode == 0
    assert installs(project) == ["tests/requirements.txt"]
    assert bash(project, "test.sh").returncode == 0
    assert installs(project) == []
    assert bash(project, "quickstart.sh").returncode == 0
    assert installs(project) == ["requirements.txt"]
    with (project / "requirements.txt").open("a") as file:
        file.write("another\n")
    assert bash(project, "test.sh").returncode == 0
    assert installs(project) == ["tests/requirements.txt"]


def test_a_failed_install_ends_the_script_and_is_repeated(project):
    assert bash(project, "test.sh", PIP_FAILS="1").returncode == 1
    assert calls(project)[-1].endswith("-r tests/requirements.txt")
    assert bash(project, "test.sh").returncode == 0
    assert installs(project) == ["tests/requirements.txt"]


def test_a_python_that_will_not_do(project):
    shutil.rmtree(project / ".venv")
    done = bash(project, "test.sh", PYTHON="false")
    assert done.returncode == 1
    assert (
        done.stderr == "error: false is not Python 3.11 or newer; set PYTHON to one\n"
    )
    assert not (project / ".venv").exists()


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], ""),
        (["-k", "a b"], " -k a b"),
        (["--all"], " -m "),
        (["--all", "-x"], " -m  -x"),
    ],
)
def test_tests_take_arguments(project, given, passed):
    assert bash(project, "test.sh", *given).returncode == 0
    assert calls(project)[1:] == [
        "ruff check .",
        "ruff format --check .",
        f"python -m pytest -n auto --maxprocesses 4 --dist loadfile{passed}",
    ]


def test_quickstart_runs_both_methods_and_shows_their_table(project):
    done = bash(project, "quickstart.sh", "--set", "train.seed=1")
    assert (done.returncode, done.stderr) == (0, "")
    job = "python -m aim_jax.main --config configs/quickstart.py --set method.name="
    runs = "runs/quickstart"
    assert calls(project)[1:] == [
        f"{job}aim --workdir {runs}/aim --set train.seed=1",
        f"{job}sequential --workdir {runs}/sequential --set train.seed=1",
        f"python -m aim_jax.report {runs}/aim {runs}/sequential"
        f" --out {runs}/report.html",
    ]
    assert done.stdout.splitlines() == [
        "installing requirements.txt into .venv",
        "| method |",
        "| --- |",
        "| aim |",
        f"report: {runs}/report.html",
    ]


def test_quickstart_elsewhere(project):
    folder = str(project / "other")
    done = bash(project, "quickstart.sh", RUNS=folder)
    assert done.stdout.endswith(f"| aim |\nreport: {folder}/report.html\n")
    assert f"--workdir {folder}/aim" in calls(project)[1]


def test_lm_eval_scores_the_merged_model(project):
    given = ["runs/a b", "scores", "--tasks", "gsm8k", "--limit", "5"]
    harness = str(project / ".venv/bin/lm_eval")
    done = bash(project, "lm_eval.sh", *given, LM_EVAL=harness)
    assert (done.returncode, done.stderr) == (0, "")
    (part,) = [c.split()[-1] for c in calls(project)[:1]]
    assert part.startswith("scores/part.")
    assert [p.name for p in (project / "scores").iterdir()] == ["model"]
    # The model is there now, so it is not made again.
    assert bash(project, "lm_eval.sh", *given, LM_EVAL=harness).returncode == 0
    assert calls(project) == [
        "lm_eval run --model hf --model_args pretrained=scores/model"
        " --output_path scores/results --tasks gsm8k --limit 5"
    ]


def test_lm_eval_that_is_missing_or_asked_for_nothing(project):
    done = bash(project, "lm_eval.sh", "run", "out", "--tasks=x", LM_EVAL="no-such")
    assert done.returncode == 1 and 'pip install "lm_eval[hf]"' in done.stderr
    assert bash(project, "lm_eval.sh", "run").returncode == 2
    assert not (project / "out").exists() and not (project / "calls").exists()


def test_an_example_is_a_report_and_its_pictures(project):
    for name in ("chromium", "bash", "dirname"):
        program = shutil.which(name) if name != "chromium" else None
        (project / "bin").mkdir(exist_ok=True)
        target = project / "bin" / name
        if program:
            target.symlink_to(program)
        else:
            shutil.copy(project / ".venv/bin/ruff", target)
    env = {"PATH": f"{project}/bin:{os.environ['PATH']}"}
    done = bash(project, "example.sh", "order4", "runs/a", "runs/b", **env)
    assert done.returncode == 0
    made = calls(project)
    page = "docs/example/order4"
    assert made[0] == f"python -m aim_jax.report runs/a runs/b --out {page}.html"
    assert [c.split()[0] for c in made[1:]] == ["chromium", "chromium"]
    assert done.stdout.splitlines() == [f"{page}.png", f"{page}-dark.png"]
    assert bash(project, "example.sh", "order4").returncode == 2


def command(*args):
    """The finished process of the main job."""
    return subprocess.run(
        [sys.executable, "-m", "aim_jax.main", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_command_ends_with_one_line_and_code_2(tmp_path):
    done = command(
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
        "--set=train.epocs=3",
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: --set train.epocs=3: no train field 'epocs'; there are seed, epochs,"
    )
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_flag_is_named():
    done = command("--confg=configs/quickstart.py")
    assert done.returncode == 1
    assert "Unknown command line flag 'confg'. Did you mean: config" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs main in this process: call(argument, ..., flag=value, ...)."""
    monkeypatch.chdir(ROOT)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    def call(*arguments, **given):
        given = {"config": QUICKSTART, "workdir": str(tmp_path / "run")} | given
        with flagsaver.flagsaver(**given):
            main.main(["main", *arguments])

    return call


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": None}, "--config: name a file; configs here: configs/"),
        (
            {"config": "configs/no.py"},
            "--config: no file 'configs/no.py'; configs here:",
        ),
        ({"workdir": None}, "--workdir: "),
        ({"set": ["train.epochs=none"]}, "--set train.epochs=none: must be int"),
        (
            {"set": ["method.name=aims"]},
            "method.name: no method 'aims'; there are aim,",
        ),
        ({"set": ["parallel.mode=gpu"]}, "parallel.mode: no 'gpu'; there are auto,"),
        ({"set": ["data.benchmark=glue"]}, "data.benchmark: no 'glue'; there are "),
        ({"set": ["data.tasks=rumours"]}, "data.tasks: no task 'rumours' in benchmark"),
        ({"set": ["data.benchmark=superni"]}, "data.root: "),
        ({"set": ["data.benchmark=superni", "data.root=/no/where"]}, "/no/where"),
        ({"set": ["data.limit_train=8", "model.path=/no/where"]}, "/no/where"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_bad_input_is_one_line(call, capsys, tmp_path, given, message):
    with pytest.raises(SystemExit) as ended:
        call(**given)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not out and not list(tmp_path.iterdir())


def test_a_word_that_is_no_flag(call, capsys):
    with pytest.raises(SystemExit) as ended:
        call("train.epochs=3")
    assert ended.value.code == 2
    assert "'train.epochs=3'" in capsys.readouterr().err


def test_an_interrupt_ends_cleanly(call, capsys, monkeypatch):
    def stop(cfg, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", stop)
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def stand_in(seen, fails=()):
    """A `run.run` that only leaves results, op that of the seed; it fails on seeds."""

    def finish(cfg, folder):
        seen.append((cfg, folder))
        if cfg.train.seed in fails:
            raise aim_jax.InputError("it went wrong")
        folder.mkdir(parents=True, exist_ok=True)
        results = {"method": cfg.method.name, "seed": cfg.train.seed, "tasks": []}
        results |= {"op": cfg.train.seed / 10, "fwt": None, "bwt": -0.0125}
        results["seconds"] = {"total": 90.0}
        (folder / "config.json").write_text(json.dumps(config.to_json(cfg)))
        (folder / "results.json").write_text(json.dumps(results))

    return finish


def test_results_are_printed_in_percent(call, capsys, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(run, "run", stand_in(seen))
    call(set=["train.epochs=3", "train.seed=5"])
    assert [(c.train.epochs, f) for c, f in seen] == [(3, tmp_path / "run")]
    heads, cells = capsys.readouterr().out.splitlines()
    assert heads.split()[:8] == ["method", "OP", "%", "FWT", "%", "BWT", "%", "minutes"]
    assert cells.split() == ["aim", "50.0", "–", "-1.2", "1.5", "–", "0", "1"]
    assert not (tmp_path / "run" / "report.html").exists(), "a run writes its own"


SWEEP = """
from aim_jax import config
from aim_jax.methods import aim, sequential

CONFIGS = {
    name: config.Config(method=method)
    for name, method in {"ours": aim.Options(), "plain": sequential.Options()}.items()
}
"""


def test_a_sweep_runs_all_its_configs_and_seeds(call, capsys, monkeypatch, tmp_path):
    (tmp_path / "sweep.py").write_text(SWEEP)
    seen, runs = [], tmp_path / "run"
    monkeypatch.setattr(run, "run", stand_in(seen))
    call(config=str(tmp_path / "sweep.py"), seeds=["1", "3"], set=["lora.r=2"])
    assert [(c.method.name, c.train.seed, c.lora.r, f) for c, f in seen] == [
        (method, seed, 2, runs / f"{name}-seed-{seed}")
        for name, method in (("ours", "aim"), ("plain", "sequential"))
        for seed in (1, 3)
    ]
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split()[:4] for row in table] == [
        ["aim", "20.0", "±", "14.1"],
        ["sequential", "20.0", "±", "14.1"],
    ]
    twin = json.loads((runs / "report.json").read_text())
    assert [row["op"]["n"] for row in twin["summary"]] == [2, 2]


def test_a_run_that_fails_stops_no_other(call, capsys, monkeypatch, tmp_path):
    (tmp_path / "sweep.py").write_text(SWEEP)
    seen = []
    monkeypatch.setattr(run, "run", stand_in(seen, fails={1}))
    with pytest.raises(SystemExit) as ended:
        call(config=str(tmp_path / "sweep.py"), seeds=["1", "3"])
    assert ended.value.code == 2 and len(seen) == 4
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"error: {tmp_path}/run/ours-seed-1: it went wrong",
        f"error: {tmp_path}/run/plain-seed-1: it went wrong",
        "error: 2 runs failed, see above",
    ]
    assert len(out.splitlines()[-2].split("±")) == 1, "one seed has no deviation"
