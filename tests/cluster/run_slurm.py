"""The smoke profile on a real single-node Slurm, with one job cancelled in the middle; not part of `make test`.

    python tests/cluster/run_slurm.py

Needs root on Debian or Ubuntu: it installs slurmctld, slurmd and munge if they are missing, and starts them on the
loopback interface out of a scratch folder. The committed state of the repository is cloned, its smoke profile is run
through `cluster/slurm`, a running job is cancelled with scancel, and the same command finishes the rest. The exit
status is 0 only if every run left its manifest, and the cancelled job alone was started twice.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PLUGIN = "snakemake-executor-plugin-slurm"
LINK = Path("/etc/slurm/slurm.conf")  # the plugin's inner srun sees no SLURM_CONF
CANCELLED = "erase_concept"

CONFIG = """\
ClusterName=solo
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
MinJobAge=86400
KillWait=3
SlurmctldTimeout=30
SlurmdTimeout=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=12:00:00 State=UP
"""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def call(*command: str, **options) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Slurm:
    """One node on the loopback interface, in a scratch folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        try:
            self.start()
            yield
        finally:  # a start that failed leaves nothing behind either
            self.stop()

    def start(self) -> None:
        if LINK.exists():  # a link to a scratch folder that is gone does not exist
            sys.exit(f"{LINK} is there: this machine belongs to a cluster already")
        self.folder.chmod(0o755)  # munged asks for it
        for name in ("run", "spool", "state", "log"):
            (self.folder / name).mkdir()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        facts = {"host": socket.gethostname().split(".")[0], "cpus": os.cpu_count(), "memory": memory * 9 // 10}
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, **facts))
        LINK.parent.mkdir(parents=True, exist_ok=True)
        LINK.unlink(missing_ok=True)
        LINK.symlink_to(self.folder / "slurm.conf")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        run, log = self.folder / "run", self.folder / "log"
        call("munged", f"--key-file={key}", f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
             f"--log-file={log}/munged.log", f"--seed-file={run}/munged.seed")  # fmt: skip
        call("slurmctld", "-c")
        call("slurmd")
        for _ in range(300):
            state = subprocess.run(["sinfo", "-ho", "%t"], capture_output=True, text=True, check=False).stdout.strip()
            if state == "idle":
                say(f"Slurm is up: {call('sinfo', '--version').strip()}, {facts['cpus']} cores")
                return
            time.sleep(0.1)
        raise RuntimeError(f"the node did not become idle; see {log}")

    def stop(self) -> None:
        for name in ("slurmd", "slurmctld", "munged"):
            path = self.folder / "run" / f"{name}.pid"
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)
        # Without cgroups a cancelled job may leave a process behind; all of ours name the scratch folder.
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(self.folder).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                    os.kill(int(path.parent.name), signal.SIGKILL)
        if LINK.is_symlink() and LINK.readlink() == self.folder / "slurm.conf":
            LINK.unlink()
        say("the daemons were told to stop")


def jobs() -> list[dict[str, str]]:
    """What Slurm knows of all jobs, running or done."""
    lines = call("scontrol", "--oneliner", "show", "job").splitlines()
    return [
        dict(re.findall(r"(\w+(?:/\w+)?)=(.*?)(?= \w+(?:[/:]\w+)*=|$)", line)) for line in lines if "JobId=" in line
    ]


def start(log: Path, environment: dict[str, str], folder: Path, *options: str) -> subprocess.Popen:
    rules = re.findall(r"^rule (\w+):", (folder / "Snakefile").read_text(), re.M)
    command = [
        sys.executable, "-m", "snakemake", "--profile", "cluster/slurm", "--config", "profile=smoke",
        "--jobs", str(os.cpu_count()), "--latency-wait", "10", "--slurm-init-seconds-before-status-checks", "6",
        "--slurm-status-command", "squeue", "--set-threads", *(f"{r}=1" for r in rules if r not in ("all", "fetch")),
        *options,
    ]  # fmt: skip
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)


def cancel_one(process: subprocess.Popen, log: Path) -> dict[str, str]:
    """Cancel an erasure a few seconds after it began."""
    while process.poll() is None:
        found = [j for j in jobs() if j["JobState"] == "RUNNING" and CANCELLED in j.get("Comment", "")]
        if found:
            time.sleep(15)
            call("scancel", found[0]["JobId"])
            say(f"scancel {found[0]['JobId']}: {found[0]['Comment']}")
            return found[0]
        time.sleep(0.5)
    raise RuntimeError(f"Snakemake ended before an erasure ran:\n{log.read_text()[-3000:]}")


def check(condition: bool, text: str) -> None:
    say(("ok: " if condition else "FAILED: ") + text)
    if not condition:
        raise SystemExit(1)


def main() -> None:
    if os.geteuid() != 0:
        sys.exit("this test starts daemons that need root")
    if not all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch", "munged")):
        say("installing " + " ".join(PACKAGES))
        call("apt-get", "update")
        call("apt-get", "install", "-y", "--no-install-recommends", *PACKAGES)
    with tempfile.TemporaryDirectory(prefix="slurm") as scratch, Slurm(Path(scratch)).running():
        run(Path(scratch))


def run(scratch: Path) -> None:
    folder, results = scratch / "repository", scratch / "results"
    call("git", "clone", "--quiet", str(REPOSITORY), str(folder))
    path = [str(folder)]
    if importlib.util.find_spec(PLUGIN.replace("-", "_")) is None:
        say(f"installing {PLUGIN} into the scratch folder")
        call(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(scratch / "site"), "--no-deps",
             PLUGIN, f"{PLUGIN}-jobstep", "throttler")  # fmt: skip
        path.append(str(scratch / "site"))
    path += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "EMBER_RESULTS": str(results),
        "TQDM_DISABLE": "1",
    }
    names = json.loads(
        call(sys.executable, "-c",
             "import json; from ember.batch.planning import plan; from ember.batch.profiles import load_profile; "
             "print(json.dumps([job.name for job in plan(load_profile('smoke'))]))", cwd=folder, env=environment)
    )  # fmt: skip
    manifests = [results / "smoke" / "notebooks" / f"{name}.json" for name in names]

    begun = time.time()
    log = scratch / "first.log"
    process = start(log, environment, folder, "--retries", "0")
    cancelled = cancel_one(process, log)
    code = process.wait()
    done = sum(path.exists() for path in manifests)
    say(f"the first call ended with {code} after {time.time() - begun:.0f} s; {done} of {len(names)} manifests")
    print("".join(line for line in log.read_text().splitlines(keepends=True) if "rror" in line or "submitted" in line))
    check(code != 0, "the call in which a job was cancelled says that it failed")
    check(done < len(names), "the cancelled run has no manifest, nor what needs it")

    again = time.time()
    log = scratch / "second.log"
    code = start(log, environment, folder).wait()
    say(f"the second call ended with {code} after {time.time() - again:.0f} s")
    print("".join(line for line in log.read_text().splitlines(keepends=True) if "rror" in line or "submitted" in line))
    check(code == 0, "the same command finishes the rest")
    missing = [path.name for path in manifests if not path.exists()]
    check(not missing, f"all {len(names)} manifests exist" + "".join(f"\n  no {name}" for name in missing))

    seen = jobs()
    for job in seen:
        limits = {key: job[key] for key in ("JobState", "TimeLimit", "RunTime", "MinMemoryNode") if key in job}
        say(f"job {job['JobId']}: {' '.join(f'{k}={v}' for k, v in limits.items())} {job['Comment'][:90]}")
    started = Counter(job["Comment"] for job in seen)
    check(len(started) == len(names), f"every run was a job of its own ({len(seen)} jobs for {len(names)} runs)")
    twice = {comment for comment, count in started.items() if count != 1}
    check(twice == {cancelled["Comment"]}, "only the cancelled job was started twice")
    states = sorted(job["JobState"] for job in seen if job["Comment"] == cancelled["Comment"])
    check(states == ["CANCELLED", "COMPLETED"], f"it was {' and '.join(states)}")

    log = scratch / "third.log"
    code = start(log, environment, folder).wait()
    check(code == 0 and len(jobs()) == len(seen), "a third call submits nothing")
    say(f"{len(seen)} jobs in {time.time() - begun:.0f} s, of which the second call {time.time() - again:.0f} s")


if __name__ == "__main__":
    main()
