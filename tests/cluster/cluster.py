"""A real SLURM for tests: all daemons of a small cluster on one Debian machine, as root, over the loopback.

    python tests/cluster/cluster.py start | stop | crash-node NAME | start-node NAME | crash-controller

Several nodes share the host and differ by port; GPUs are links to /dev/null, which is all that SLURM looks at.
Accounting keeps its database behind a unix socket. Everything lives in one folder and is configured from there, so a
machine's own SLURM, if it has one, is not touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from waiting import WATCHED, cpu_ticks, until

PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",
}
"""Packages by a command of theirs; the two cores bring no service and no user."""

CONFIGURATION = """
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits: two minutes unless it is set
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=8
KillWait=4
{accounting}
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=120 DefaultTime=5 PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=120 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=120 PriorityTier=10 PreemptMode=OFF
"""

ACCOUNTING = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
# with munge this is a path: without it every client looks for the default socket
AccountingStoragePass={folder}/munge.socket
AccountingStoreFlags=job_comment
AccountingStorageTRES=gres/gpu"""

DATABASE = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounting
"""


def why_not() -> str | None:
    """Why this machine cannot have a test cluster, or None."""
    if os.geteuid() != 0:
        return "a SLURM of our own needs root, whose daemons start jobs as their users"
    if missing() and shutil.which("apt-get") is None:
        return f"a SLURM of our own needs {', '.join(missing())}, and this machine has no apt-get to install them"
    return None


def missing() -> list[str]:
    """Debian packages that are not installed."""
    return [package for command, package in PACKAGES.items() if shutil.which(command) is None]


class Cluster:
    """A cluster in a folder.

    Args:
        folder: For configuration, state and logs; its path must be short enough for unix sockets.
        nodes: Simulated nodes, called node1, node2, ...
        gpus: Simulated GPUs on each.
        cpus: Processors that each claims, independent of the machine's.
        port: First of the TCP ports on the loopback.
        name: Of the cluster; two on one machine tell their processes apart by it.
    """

    def __init__(
        self, folder: Path, *, nodes: int = 2, gpus: int = 4, cpus: int = 8, port: int = 17600, name: str = "testing"
    ) -> None:
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.gpus = gpus
        self.cpus = cpus
        self.port = port
        self.name = name
        self.host = socket.gethostname().split(".")[0]
        self._database: subprocess.Popen[bytes] | None = None
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    # -- life

    def start(self) -> None:
        """Install what is missing, start what is not running, wait until all nodes are idle."""
        if self.signs not in WATCHED:
            WATCHED.append(self.signs)
        install()
        self.configure()
        self._name_nodes()
        self._start_munge()
        self._start_database()
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        until(self._all_idle, "nodes did not become idle")

    def stop(self) -> None:
        """End every daemon and every job; leave no process behind."""
        if self._runs("slurmctld"):
            run(["scancel", "--me"], self.environment, check=False)
        for pid in self.processes():
            end(pid, signal.SIGKILL)
        for name in [*(f"slurmd-{node}" for node in self.nodes), "slurmctld", "slurmdbd", "mariadbd", "munged"]:
            self._halt(name)
        if self._database is not None:
            self._database.wait()
        for pid in self.processes():
            end(pid, signal.SIGKILL)
        if self.signs in WATCHED:
            WATCHED.remove(self.signs)

    def signs(self) -> object:
        """Signs of progress: sizes of the daemons' logs, and CPU time of the jobs' processes."""
        logs = {log: log.stat().st_size for log in self.folder.glob("*.log")}
        return logs, cpu_ticks(self.processes())

    def configure(self) -> None:
        """Write the configuration."""
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for number in range(self.gpus):  # SLURM wants a character device and takes its number from the name
            device = self.folder / f"gpu{number}"
            device.unlink(missing_ok=True)
            device.symlink_to("/dev/null")
        values = {"folder": self.folder, "host": self.host, "name": self.name}
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={self.host} NodeAddr=127.0.0.1 Port={self.port + 10 + number} "
            f"CPUs={self.cpus} RealMemory=4000 Gres=gpu:{self.gpus}"
            for number, node in enumerate(self.nodes)
        )
        accounting = ACCOUNTING.format(port=self.port + 1, **values)
        self._write("slurm.conf", CONFIGURATION.format(port=self.port, accounting=accounting, nodes=nodes, **values))
        self._write(
            "gres.conf",
            f"NodeName={','.join(self.nodes)} Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n",
        )
        self._write("slurmdbd.conf", DATABASE.format(port=self.port + 1, **values), mode=0o600)

    # -- faults

    def crash_node(self, node: str) -> None:
        """End a node's daemon, its step daemons and its jobs at once, as a power cut would."""
        self._halt(f"slurmd-{node}", signal.SIGKILL)
        for pid in self.processes(node):
            end(pid, signal.SIGKILL)

    def crash_controller(self) -> None:
        """Kill slurmctld; jobs go on."""
        self._halt("slurmctld", signal.SIGKILL)

    def lose_state(self) -> None:
        """Kill slurmctld and delete its state, then start anew.

        Job numbers begin again at 1, and a slurmd refuses numbers whose credentials it has revoked, so the nodes start
        anew as well.
        """
        self.crash_controller()
        for node in self.nodes:
            self.crash_node(node)
            shutil.rmtree(self.folder / f"spool-{node}", ignore_errors=True)
        shutil.rmtree(self.folder / "state")
        self.start()

    def stop_accounting(self) -> None:
        """Stop slurmdbd; slurmctld keeps its messages for later."""
        self._halt("slurmdbd")

    # -- daemons

    def start_controller(self) -> None:
        """Start slurmctld where it is not running."""
        if not self._runs("slurmctld"):
            self._launch(["slurmctld"])
        until(lambda: self.run("scontrol", "ping", check=False).find("UP") > 0, "slurmctld does not answer")

    def start_node(self, node: str) -> None:
        """Start a node's daemon where it is not running."""
        if not self._runs(f"slurmd-{node}"):
            self._launch(["slurmd", "-N", node])

    def start_accounting(self) -> None:
        """Start slurmdbd where it is not running."""
        if not self._runs("slurmdbd"):
            self._launch(["slurmdbd"], MYSQL_UNIX_PORT=str(self.folder / "mysql.socket"))
        until(lambda: port_is_open(self.port + 1), "slurmdbd does not listen")
        run(["sacctmgr", "-i", "add", "cluster", self.name], self.environment, check=False)

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a SLURM command."""
        return run(list(command), self.environment, check=check)

    def processes(self, node: str | None = None) -> list[int]:
        """Step daemons and job processes, of one node or of all."""
        found = []
        for process in Path("/proc").iterdir():
            if not process.name.isdigit() or int(process.name) == os.getpid():
                continue
            try:
                if (process / "comm").read_text().startswith("slurmstepd"):
                    logs = {str(file.readlink()) for file in (process / "fd").iterdir()}
                    if any(log.startswith(f"{self.folder}/slurmd-{node or ''}") for log in logs):
                        found.append(int(process.name))
                    continue
                environment = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SLURM_CLUSTER_NAME={self.name}".encode() in environment and (
                node is None or f"SLURMD_NODENAME={node}".encode() in environment
            ):
                found.append(int(process.name))
        return found

    def _start_munge(self) -> None:
        if self._runs("munged"):
            return
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        command = ["munged", *(f"--{option}={self.folder}/munge.{end}" for option, end in options.items())]
        run(command, {}, check=True)
        (self.folder / "munged.pid").unlink(missing_ok=True)
        (self.folder / "munged.pid").symlink_to(self.folder / "munge.pid")

    def _start_database(self) -> None:
        if not self._runs("mariadbd"):
            data, sock = self.folder / "mysql", self.folder / "mysql.socket"
            if not (data / "mysql").exists():
                shutil.rmtree(data, ignore_errors=True)
                data.mkdir(mode=0o700)
                run(
                    [
                        "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}",
                        "--auth-root-authentication-method=socket", "--skip-test-db",
                    ],
                    {},
                )  # fmt: skip
            sock.unlink(missing_ok=True)
            self._database = subprocess.Popen(
                [
                    "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-networking",
                    f"--socket={sock}", f"--pid-file={self.folder}/mariadbd.pid",
                    f"--log-error={self.folder}/mariadbd.log", "--innodb-flush-log-at-trx-commit=0",
                ],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            until(sock.exists, "mariadbd does not listen")
        self.start_accounting()

    def _all_idle(self) -> bool:
        # A node is drained when a controller that lost its memory starts a job on it twice.
        for node in self.run("sinfo", "-h", "-N", "-t", "drain,down", "-o", "%N", check=False).split():
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()
        return len(states) == len(self.nodes) and all(state in ("idle", "mixed", "allocated") for state in states)

    def _launch(self, command: list[str], **environment: str) -> None:
        run(command, self.environment | environment)

    def _write(self, name: str, content: str, *, mode: int = 0o644) -> None:
        file = self.folder / name
        file.write_text(content.lstrip())
        file.chmod(mode)

    def _pid(self, name: str) -> int | None:
        try:
            return int((self.folder / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None

    def _runs(self, name: str) -> bool:
        pid = self._pid(name)
        return pid is not None and is_running(pid)

    def _halt(self, name: str, signum: int = signal.SIGTERM) -> None:
        pid = self._pid(name)
        if pid is not None and is_running(pid):
            end(pid, signum)
            with contextlib.suppress(TimeoutError):
                until(lambda: not is_running(pid), f"{name} did not end", quiet_samples=10)
            end(pid, signal.SIGKILL)
        (self.folder / f"{name}.pid").unlink(missing_ok=True)

    def _name_nodes(self) -> None:
        """Make the nodes' names resolve: jobs of several tasks look them up, and wait in silence when they cannot.

        The line is only ever added, and stays: other programs edit the file too, and rewriting it could lose their lines.
        """
        lines = [name for name in (*self.nodes, self.host) if not resolves(name)]
        if lines:
            with Path("/etc/hosts").open("a") as hosts:
                hosts.write(f"127.0.0.1 {' '.join(lines)} # nodes of a test cluster\n")


def install() -> None:
    """Install the packages, without letting them start services of their own."""
    if not (wanted := missing()):
        return
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        run(["apt-get", "update", "-qq"], {})
        run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *wanted],
            {"DEBIAN_FRONTEND": "noninteractive"},
        )
    finally:
        if ours:
            policy.unlink()


def run(command: list[str], environment: dict[str, str], *, check: bool = True) -> str:
    """Output of a command; a failure shows its output."""
    done = subprocess.run(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {done.stdout}")
    return done.stdout


def is_running(pid: int) -> bool:
    """True if a process exists and is no zombie, which in a container may never be reaped."""
    try:
        return re.search(r"^State:\s+[ZX]", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is None
    except OSError:
        return False


def end(pid: int, signum: int) -> None:
    """Send a signal to a process, if it still exists."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return


def resolves(name: str) -> bool:
    """True if the host name resolves."""
    try:
        socket.gethostbyname(name)
    except OSError:
        return False
    return True


def port_is_open(port: int) -> bool:
    """True if a process listens on the loopback."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _main(arguments: list[str]) -> Iterator[str]:
    cluster = Cluster(Path(os.environ.get("SCALING_TEST_CLUSTER", "/run/scaling-slurm")))
    match arguments:
        case ["start"]:
            began = time.monotonic()
            cluster.start()
            yield f"up in {time.monotonic() - began:.1f} s; export SLURM_CONF={cluster.environment['SLURM_CONF']}"
        case ["stop"]:
            cluster.stop()
        case ["crash-node", node]:
            cluster.crash_node(node)
        case ["start-node", node]:
            cluster.start_node(node)
        case ["crash-controller"]:
            cluster.crash_controller()
        case _:
            yield (__doc__ or "").split("\n\n")[1].strip()


if __name__ == "__main__":
    for line in _main(sys.argv[1:]):
        print(line)
