"""The smoke profile on a real single-node Slurm, with one job cancelled in the middle; not part of `make test`.

    python cluster/slurm/run_here.py

Needs the extra `slurm`, and root on Debian or Ubuntu: it installs slurmctld, slurmd and munge if they are missing, and
starts them on the loopback interface out of a scratch folder. The committed state of the repository is cloned, its
smoke profile is run through `cluster/slurm`, a running job is cancelled with scancel, and the same command finishes the
rest. The exit status is 0 only if every run left its manifest, and the cancelled job alone was started twice.
"""

import contextlib
import importlib.util
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
LINK = Path("/etc/slurm/slurm.conf")  # the plugin's inner srun sees no SLURM_CONF
CANCELLED = "erase_concept"
MEMORY_MB = 3000  # two jobs of the smoke profile fit a small machine

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


def snakemake(log: Path, environment: dict[str, str], folder: Path, *options: str) -> subprocess.Popen:
    rules = {path.stem.split("_", 1)[1] for path in (folder / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    command = [
        sys.executable, "-m", "snakemake", "--profile", "cluster/slurm", "--config", "profile=smoke",
        "--jobs", str(os.cpu_count()), "--latency-wait", "10", "--slurm-init-seconds-before-status-checks", "6",
        "--slurm-status-command", "squeue", "--set-threads", *(f"{rule}=1" for rule in rules),
        "--set-resources", *(f"{rule}:mem_mb={MEMORY_MB}" for rule in rules), *options,
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
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        sys.exit("this test needs the extra `slurm`: pip install -e '.[slurm]'")
    if not all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch", "munged")):
        say("installing " + " ".join(PACKAGES))
        call("apt-get", "update")
        call("apt-get", "install", "-y", "--no-install-recommends", *PACKAGES)
    with tempfile.TemporaryDirectory(prefix="slurm") as scratch, Slurm(Path(scratch)).running():
        run(Path(scratch))


def told(what: str, process: subprocess.Popen, log: Path) -> int:
    """Wait for a call of Snakemake, and show what it says of jobs and errors."""
    begun, code = time.time(), process.wait()
    say(f"{what} ended with {code} after {time.time() - begun:.0f} s")
    print("".join(line for line in log.read_text().splitlines(keepends=True) if "rror" in line or "submitted" in line))
    return code


def run(scratch: Path) -> None:
    folder = scratch / "repository"
    call("git", "clone", "--quiet", str(REPOSITORY), str(folder))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "EMBER_RESULTS": str(scratch / "results"), "TQDM_DISABLE": "1"}
    planned = (
        "from ember.batch.planning import plan; from ember.batch.profiles import load_profile; "
        "print(*(job.name for job in plan(load_profile('smoke'))))"
    )
    names = call(sys.executable, "-c", planned, cwd=folder, env=environment).split()
    manifests = [scratch / "results" / "smoke" / "notebooks" / f"{name}.json" for name in names]

    log = scratch / "first.log"
    process = snakemake(log, environment, folder, "--retries", "0")
    cancelled = cancel_one(process, log)
    check(told("the first call", process, log) != 0, "the call in which a job was cancelled says that it failed")
    done = sum(path.exists() for path in manifests)
    check(done < len(names), f"the cancelled run has no manifest, nor what needs it: {done} of {len(names)} are there")

    log = scratch / "second.log"
    check(told("the second call", snakemake(log, environment, folder), log) == 0, "the same command finishes the rest")
    missing = [path.name for path in manifests if not path.exists()]
    check(not missing, f"all {len(names)} manifests exist" + "".join(f"\n  no {name}" for name in missing))

    seen = jobs()
    started = Counter(job["Comment"] for job in seen)
    check(len(started) == len(names), f"every run was a job of its own ({len(seen)} jobs for {len(names)} runs)")
    twice = {comment for comment, count in started.items() if count != 1}
    check(twice == {cancelled["Comment"]}, "only the cancelled job was started twice")
    states = sorted(job["JobState"] for job in seen if job["Comment"] == cancelled["Comment"])
    check(states == ["CANCELLED", "COMPLETED"], f"it was {' and '.join(states)}")

    code = snakemake(scratch / "third.log", environment, folder).wait()
    check(code == 0 and len(jobs()) == len(seen), "a third call submits nothing")


if __name__ == "__main__":
    main()
