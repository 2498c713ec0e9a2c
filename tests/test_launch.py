"""The commands: shell scripts with a stand-in for Python, and what main says when it ends."""

import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
import yaml
from absl import flags
from absl.testing import flagsaver

import aim_jax
from aim_jax import config, jobs, main, preemption, run

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


def test_shellcheck_has_nothing_to_say():
    place = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("shellcheck", path=place)
    if not program:
        pytest.skip("no shellcheck here")
    found = subprocess.run(
        [program, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True
    )
    assert not found.stdout + found.stderr


def dry(project, script, *args, **env):
    """The lines that a script would execute."""
    done = bash(project, script, "--dry-run", *args, **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (project / "calls").exists()
    return done.stdout.splitlines()


JOB = ("--config", "c.py", "--workdir", "runs/x", "--set", "model.path=a b")
MAIN = "python -m aim_jax.main --config c.py --workdir runs/x --set model.path=a\\ b"


def test_local_would_start_every_process(project):
    shape = ("--processes", "3", "--devices", "2")
    lines = dry(project, "local.sh", *shape, *JOB, PORT="1234")
    start = f"env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 .venv/bin/{MAIN}"
    assert lines == [
        f"{start} --coordinator=localhost:1234 --processes=3 --process={i}"
        for i in range(3)
    ]


@pytest.mark.parametrize("folder", ["runs/x", "runs/x/"])
def test_local_shows_the_first_process_and_keeps_the_words_of_others(project, folder):
    done = bash(project, "local.sh", *JOB, "--workdir", folder)
    assert (done.returncode, done.stdout) == (0, "")
    assert sorted(line[-1] for line in calls(project)) == ["0", "1"]
    assert (project / "runs/x.process-1.log").read_text() == ""


def test_local_ends_when_a_process_fails(project):
    program = project / ".venv/bin/python"
    program.write_text(
        "#!/usr/bin/env bash\n"
        'case "$*" in *--process=1) exit 3 ;; *) exec sleep 600 ;; esac\n'
    )
    done = bash(project, "local.sh", *JOB)
    assert done.returncode == 3
    assert "status 3; what others than the first said is in runs/x.p" in done.stderr


def test_local_waits_after_an_interrupt_until_all_is_saved(project):
    program = project / ".venv/bin/python"
    program.write_text(
        "#!/usr/bin/env bash\n"
        "trap 'sleep 1; echo saved; exit 0' TERM\n"
        "echo begun\n"
        "while :; do sleep 0.1; done\n"
    )
    script = subprocess.Popen(
        ["bash", str(project / "launch/local.sh"), *JOB],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C goes to the whole group.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert script.stdout.readline() == "begun\n"
    other = project / "runs/x.process-1.log"
    while not (other.is_file() and other.read_text()):
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait() == 0
    assert script.stdout.read() == "saved\n"
    assert other.read_text() == "begun\nsaved\n"


@pytest.mark.parametrize(("per", "tasks"), [("node", 1), ("gpu", 8)])
def test_slurm_would_submit_a_job_that_goes_back_into_the_queue(project, per, tasks):
    lines = dry(project, "slurm.sh", "--nodes", "2", "--per", per, *JOB)
    beside = dry(project, "slurm.sh", *JOB, "--workdir", "runs/x/")[0]
    assert "--output=runs/x.slurm.log" in beside.split()
    options = lines[0].split()
    assert options[0] == "sbatch"
    assert {
        "--nodes=2",
        f"--ntasks-per-node={tasks}",
        "--gpus-per-node=8",
        "--requeue",
        "--signal=TERM@120",
        "--output=runs/x.slurm.log",
    } <= set(options)
    script = "\n".join(lines[1:])
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert f"/{MAIN} --distributed --preempted_status=75" in script
    # Else JAX gives each process of SLURM one GPU.
    own = "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n"
    assert (own in script) == (per == "node")
    # The job's own shell, with stand-ins for the cluster.
    for status, wanted in ((75, "requeue 17"), (0, "status 0"), (2, "status 2")):
        end = f'srun() {{ return {status}; }}; scontrol() {{ echo "$@"; }}\n'
        body = script.replace("exec scontrol", "scontrol")
        body = body.replace("exit $status", 'echo "status $status"; exit')
        done = subprocess.run(
            ["bash"],
            input=end + body,
            env=os.environ | {"SLURM_JOB_ID": "17"},
            capture_output=True,
            text=True,
        )
        assert done.stdout.splitlines()[0] == wanted


TPU = ("--name", "n", "--zone", "z", "--type", "v5litepod-16")


def test_tpu_pod_would_create_install_run_fetch_and_delete(project):
    lines = dry(project, "tpu_pod.sh", *TPU, "--spot", "--bucket", "b", *JOB)
    told = "\n".join(lines)
    parts = [
        "git\\ ls-files",
        "tpu-vm create n --zone=z --accelerator-type=v5litepod-16",
        "--spot",
        "scp",
        "--worker=all",
        "pip\\ install\\ -q\\ -r\\ requirements.txt",
        "gcsfuse\\ --implicit-dirs\\ --rename-dir-limit=10000\\ b\\ runs",
        "-m aim_jax.main --config c.py --workdir runs/x",
        "--distributed --preempted_status=75",
        "scp --recurse n:aim_jax/runs/x runs",
        "tpu-vm delete n --zone=z --quiet",
    ]
    places = [told.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)
    kept = dry(project, "tpu_pod.sh", *TPU, "--keep", *JOB)
    assert not [line for line in kept if "delete" in line or "gcsfuse" in line]


# On a worker; an environment that it makes has a stand-in for pip, and gcsfuse is there once
# it is installed.
WORKER = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$HOME/calls"
case "$*" in
-c*) exit ${OLD:-0} ;;
*"install gcsfuse") cp "$0" "$HOME/bin/gcsfuse" ;;
*venv*) mkdir -p .venv/bin && cp "$0" .venv/bin/pip ;;
esac
"""


def on_worker(project, line, **env):
    """What a worker calls for a line of tpu_pod.sh."""
    for name in ("python3", "tar", "sudo", "curl", "lsb_release"):
        program = project / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(WORKER)
        program.chmod(0o755)
    path = f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = shlex.split(line)[-1].removeprefix("--command=")
    env = os.environ | {"HOME": str(project), "PATH": path} | env
    subprocess.run(["bash", "-c", command], cwd=project, env=env, check=True)
    return "\n".join(calls(project)) if (project / "calls").exists() else ""


@pytest.mark.parametrize("old", ["0", "1"])
def test_tpu_pod_makes_an_environment_of_a_python_that_will_do(project, old):
    lines = dry(project, "tpu_pod.sh", *TPU, *JOB)
    (line,) = (x for x in lines if "requirements.txt" in x)
    for again in (False, True):
        told = on_worker(project, line, OLD=old)
        made = "-m uv venv" if old == "1" else "-m venv"
        assert (f"python3 {made}" in told) != again
        assert "pip install -q -r requirements.txt jax[tpu]" in told


def test_tpu_pod_installs_gcsfuse_where_it_is_not(project):
    lines = dry(project, "tpu_pod.sh", *TPU, "--bucket", "b", *JOB)
    (line,) = (x for x in lines if "apt-get" in x)
    assert "sudo apt-get -qy install gcsfuse" in on_worker(project, line)
    assert not on_worker(project, line)


# A slice that is preempted during the first run; it writes down what was asked of it.
GCLOUD = """#!/usr/bin/env bash
echo "$4" >>gcloud.calls
case "$*" in
*describe*) cat state 2>/dev/null ;;
*create*) echo READY >state ;;
*delete*) rm -f state ;;
*aim_jax.main*)
    echo x >>runs.made
    if [ "$(wc -l <runs.made)" = 1 ]; then
        echo "${AFTER:-PREEMPTED}" >state
        exit 1
    fi
    ;;
*status*) echo "${STATUS:-}" ;;
esac
"""


def tpu_pod(project, **env):
    """The process of a run in a slice, and what gcloud was asked for."""
    (project / "bin").mkdir()
    for name, text in (("gcloud", GCLOUD), ("git", ""), ("sleep", "")):
        program = project / "bin" / name
        program.write_text(text or "#!/usr/bin/env bash\n")
        program.chmod(0o755)
    path = f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = bash(project, "tpu_pod.sh", *TPU, "--spot", *JOB, PATH=path, **env)
    return done, (project / "gcloud.calls").read_text().split()


def test_tpu_pod_goes_on_in_a_new_slice_after_preemption(project):
    done, asked = tpu_pod(project)
    assert done.returncode == 0, done.stderr
    assert "the run goes on in a new one" in done.stderr
    assert asked.count("create") == 2 and asked.count("delete") == 2
    assert (project / "runs.made").read_text() == "x\nx\n"


@pytest.mark.parametrize(("status", "code"), [("75", 0), ("2", 1)])
def test_tpu_pod_goes_on_after_sigterm_but_not_after_an_error(project, status, code):
    done, asked = tpu_pod(project, AFTER="READY", STATUS=status)
    assert done.returncode == code
    assert asked.count("create") == 1
    assert ("tpu-vm delete n --zone=z deletes it" in done.stderr) == bool(code)


SHAPES = {
    "local.sh": ("--processes", "3", "--devices", "2"),
    "slurm.sh": ("--nodes", "2", "--gpus", "4", "--per", "gpu", "--time", "1:00:00")
    + ("--partition", "p"),
    "tpu_pod.sh": ("--name", "n", "--zone", "z", "--type", "t", "--bucket", "b")
    + ("--version", "v"),
}


@pytest.mark.parametrize("script", SHAPES)
def test_a_script_takes_its_flags_with_an_equals_sign_too(project, script):
    words = (*SHAPES[script], "--workdir", "runs/x")
    joined = map("=".join, zip(words[::2], words[1::2], strict=True))
    apart, joint = (
        dry(project, script, *args, "--config", "c.py", PORT="1")
        for args in (words, joined)
    )
    # The name of a temporary folder is another each time.
    assert [re.sub(r"tmp\.\w+", "", line) for line in joint] == [
        re.sub(r"tmp\.\w+", "", line) for line in apart
    ]


@pytest.mark.parametrize("script", SHAPES)
def test_without_arguments_a_script_tells_how_to_call_it(project, script):
    done = bash(project, script)
    assert done.returncode == 2
    assert f"bash launch/{script} [--dry-run]" in done.stderr


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_jobsets_restart_a_preempted_run_and_call_main_rightly(name):
    job = yaml.safe_load((ROOT / f"launch/k8s/{name}.yaml").read_text())
    (worker,) = job["spec"]["replicatedJobs"]
    spec = worker["template"]["spec"]
    assert spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    (container,) = spec["template"]["spec"]["containers"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [75]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    flag_names = [c[2:].split("=")[0] for c in container["command"][3:]]
    assert "preempted_status" in flag_names
    assert all(flag in flags.FLAGS for flag in flag_names)
    config_file = container["command"][3].partition("=")[2]
    assert (ROOT / config_file).is_file()
    mounted = {m["name"] for m in container["volumeMounts"]}
    (volume,) = spec["template"]["spec"]["volumes"]
    assert mounted == {volume["name"]}
    if "csi" in volume:  # a checkpoint is a folder that takes its name when it is whole
        attributes = volume["csi"]["volumeAttributes"]
        assert "rename-dir-limit=" in attributes["mountOptions"]


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
    # The folder that the export names is gone when the script ends.
    (project / ".venv/bin/python").write_text(f"{STAND_IN}\necho $7\n")
    done = bash(project, "lm_eval.sh", *given, LM_EVAL=harness)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
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


def test_the_command_ends_with_one_line_and_code_2(command, tmp_path):
    done = command(
        "main",
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


def test_an_unknown_flag_is_named(command):
    done = command("main", "--confg=configs/quickstart.py")
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


@pytest.mark.parametrize("error", [IndexError("of the port"), ValueError("its number")])
def test_a_process_that_cannot_join_the_others(call, capsys, monkeypatch, error):
    def initialize(*args, **named):
        raise error  # as JAX does for an address without a port, and for flags too few

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit) as ended:
        call(coordinator="host")
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --coordinator: give HOST:PORT, --processes and")
    assert str(error) in told


def test_a_word_that_is_no_flag(call, capsys):
    with pytest.raises(SystemExit) as ended:
        call("train.epochs=3")
    assert ended.value.code == 2
    assert "'train.epochs=3'" in capsys.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_a_command_keeps_the_memory_that_it_frees():
    """A second block of 256 MiB lies where the first did: no page of it is new."""
    code = """
import resource
import aim_jax
aim_jax.keep_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"1") * 2**28
    del block
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def faults(**told):
        left = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=left | told, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return map(int, done.stdout.split())

    first, second = faults()
    assert first > 100 * max(second, 1)
    first, second = faults(GLIBC_TUNABLES="glibc.malloc.tcache_count=7")
    assert second > 0.9 * first


def test_an_interrupt_ends_cleanly(call, capsys, monkeypatch):
    def stop(cfg, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", stop)
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err
    # One of several processes does not wait for the others, which wait for it.
    monkeypatch.setattr(main.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(main.os, "_exit", lambda status: sys.exit(f"at once: {status}"))
    with pytest.raises(SystemExit, match="at once: 130"):
        call()


def test_an_interrupt_of_another_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended, aim_jax.command(["aim_jax.report"]):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_what_was_printed_before_a_failure_is_not_lost():
    code = """
from aim_jax import main
main.jax.distributed.is_initialized = lambda: True
print("after the first task")
main.leave(2)
"""
    left = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=left, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "after the first task\n")


def test_the_first_interrupt_saves_and_the_second_stops_at_once(monkeypatch):
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(preemption, "_noticed", None)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job in background
        preemption.watch()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        preemption.watch()
        signal.raise_signal(signal.SIGINT)
        assert preemption.noticed() and preemption.by_user()
        with pytest.raises(preemption.Preempted):
            preemption.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("by_user, status", [(True, 130), (False, 0)])
def test_status_of_a_run_that_was_stopped(call, monkeypatch, by_user, status):
    def stop(cfg, folder):
        raise preemption.Preempted

    monkeypatch.setattr(run, "run", stop)
    monkeypatch.setattr(preemption, "by_user", lambda: by_user)
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == status


def stand_in(seen, fails=(), broken=()):
    """A `run.run` that only leaves results, op that of the seed; it fails on seeds."""

    def finish(cfg, folder, load=None):
        seen.append((cfg, folder))
        if load:
            load(config.override(cfg, "train.seed=0"))
        if cfg.train.seed in fails:
            raise aim_jax.InputError("it went wrong")
        if cfg.train.seed in broken:
            raise RuntimeError("no memory left")
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
    seen, loads, runs = [], [], tmp_path / "run"
    monkeypatch.setattr(run, "run", stand_in(seen))
    monkeypatch.setattr(jobs, "load_model", loads.append)
    call(config=str(tmp_path / "sweep.py"), seeds=["1", "3"], set=["lora.r=2"])
    assert [cfg.method.name for cfg in loads] == ["aim", "sequential"], (
        "seeds share one"
    )
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
    monkeypatch.setattr(jobs, "load_model", lambda cfg: None)
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


def test_a_run_that_breaks_stops_no_other(call, capsys, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(run, "run", stand_in(seen, broken={1}))
    monkeypatch.setattr(jobs, "load_model", lambda cfg: None)
    with pytest.raises(SystemExit) as ended:
        call(seeds=["1", "3"])
    assert ended.value.code == 2 and len(seen) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "seed-1: no memory left" in err
    assert err.splitlines()[-1] == "error: 1 runs failed, see above"
    assert (tmp_path / "run" / "report.html").is_file()


def test_where_all_runs_fail_that_is_said(call, capsys, monkeypatch):
    monkeypatch.setattr(run, "run", stand_in([], fails={1, 3}))
    monkeypatch.setattr(jobs, "load_model", lambda cfg: None)
    with pytest.raises(SystemExit) as ended:
        call(seeds=["1", "3"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: 2 runs failed, see above"


def test_seeds_do_not_go_into_a_run(call, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "run", stand_in([]))
    call()
    for seeds, words in (
        (["1", "2"], "holds a run"),
        (["1", "01"], "1 is there twice"),
    ):
        with pytest.raises(SystemExit) as ended:
            call(seeds=seeds)
        assert ended.value.code == 2 and words in capsys.readouterr().err
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
