"""A real SLURM on this machine: munge, one controller, two node daemons.

`python tests/slurm/cluster.py DIR` starts one to try things by hand, and prints the line that points your shell to it;
Ctrl-C ends it.

Needs Debian's packages slurm-wlm and munge (sbin programs are looked for in /usr/sbin too).
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from getpass import getuser
from pathlib import Path

import psutil

NODES = ("node1", "node2")
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
#: Seconds until a node that does not answer is down.
DEAD_S = 10
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdTimeout={dead_s}
KillWait=5
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=test Nodes=node[1-2] Default=YES MaxTime=INFINITE
"""


def missing() -> str:
    """Programs that are not installed; empty if all are."""
    return " ".join(name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=_PATH))


class Cluster:
    """A running SLURM; its commands find it by `environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # The trainer's rendezvous: node1 and node2 are names that only SLURM knows.
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1", "PATH": _PATH}

    def command(self, *words: str, **environment: str) -> str:
        """Standard output of a SLURM command. Raises RuntimeError with its error text where it fails."""
        done = subprocess.run(
            words, env={**os.environ, **self.environment, **environment}, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
        return done.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
        fields = dict(x.partition("=")[::2] for x in self.command("scontrol", "--oneliner", "show", "job", job).split())
        return fields["JobState"]

    def kill_node(self, name: str) -> None:
        """As when the power fails: the daemon, its steps and their tasks are gone at once."""
        found = [p for p in psutil.process_iter(["environ", "cmdline"]) if self._belongs(p, name)]
        for process in found:
            for each in [process, *process.children(recursive=True)]:
                _kill(each)

    def _belongs(self, process: psutil.Process, name: str) -> bool:
        words = " ".join(process.info["cmdline"] or ())
        environment = process.info["environ"] or {}
        if environment.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
            return False
        return f"slurmd -N {name}" in words or environment.get("SLURMD_NODENAME") == name


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start one, with all its files in `folder`, wait until both nodes are idle, and end it with all its processes."""
    made = Cluster(folder)
    (folder / "munge").mkdir(mode=0o700, parents=True)
    (folder / "state").mkdir()
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    ports = _free_ports(3)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(
        _CONFIGURATION.format(folder=folder, host=host, user=getuser(), ports=ports, dead_s=DEAD_S)
    )
    munge = {word: str(folder / "munge" / word) for word in ("socket", "pid", "log", "seed")}
    try:
        made.command(
            *("munged", "--force", f"--key-file={key}", f"--socket={munge['socket']}", f"--pid-file={munge['pid']}"),
            *(f"--log-file={munge['log']}", f"--seed-file={munge['seed']}"),
        )
        made.command("slurmctld", "-i")
        for name in NODES:
            made.command("slurmd", "-N", name)
        end = time.monotonic() + 60
        while made.command("sinfo", "--noheader", "--format", "%T %D").split() != ["idle", "2"]:
            if time.monotonic() > end:
                raise RuntimeError(f"The nodes are not idle after 60 s: {made.command('sinfo', '--list-reasons')}")
            time.sleep(0.5)
        yield made
    finally:
        here = str(folder)
        for process in psutil.process_iter(["environ", "cmdline"]):
            environment = process.info["environ"] or {}
            if environment.get("SLURM_CONF", "").startswith(here) or here in " ".join(process.info["cmdline"] or ()):
                _kill(process)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    with cluster(Path(sys.argv[1]).absolute()) as running:
        print(f"export SLURM_CONF={running.environment['SLURM_CONF']} MASTER_ADDR=127.0.0.1", flush=True)
        signal.pause()
