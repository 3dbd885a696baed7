"""Machines without a shared folder, as Linux namespaces on this machine (as root).

Each machine has its own network address on a common switch, host name, process ids, `/tmp`, `/var/tmp`, `/run` and `/dev/shm`.
Everything else, including the code, is read-only, as in an image. So two machines share nothing that they can write.
Killing the first process of a machine ends all its processes at once, and its network interface disappears.

This machine's own network is not changed: the switch is a bridge in a namespace of its own.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.0"
HOME = "/tmp/home"
TOOLS = ("ip", "mount", "nsenter", "setpriv", "unshare")
START_SECONDS = 10
_NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")  # options of unshare

# Runs as the first process of a machine. $1: folder of its files, $2: its name, $3: folder with the code, $4: its address.
_BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs none /media
mkdir /media/own /media/code
mount --bind "$1" /media/own
mount --bind "$3" /media/code
for folder in tmp var/tmp run; do
    mkdir -p "/media/own/$folder"
    mount --bind "/media/own/$folder" "/$folder"
done
printf '127.0.0.1 localhost\\n%s %s\\n' "$4" "$2" >/media/own/hosts
mount --bind /media/own/hosts /etc/hosts  # gloo looks up the name of its own machine
exec >/tmp/boot.log 2>&1
chmod 1777 /tmp /var/tmp
mkdir /tmp/home
mount -t tmpfs -o size=1g none /dev/shm
mkdir -p "$3"
mount --bind /media/code "$3"
mount -o remount,bind,ro "$3"
umount --lazy /media
mount -o remount,bind,ro /
hostname "$2"
ip link set lo up
touch /tmp/booted
while :; do sleep 5 || :; done  # reaps orphans
"""


def missing_requirement() -> str | None:
    """Why machines cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "requires root"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"requires {', '.join(missing)} (packages iproute2 and util-linux)"
    probe = "mount --make-rprivate / && ip link add probe0 type bridge && ip link add probe1 type veth peer name probe2"
    result = subprocess.run(["unshare", *_NAMESPACES, "sh", "-c", probe], capture_output=True, text=True)
    if result.returncode:
        return f"namespaces cannot be made here ({' '.join(result.stderr.split())[:200]})"
    return None


class _Namespaces:
    """A process in new namespaces; `pid` is its first process, seen from this machine."""

    def __init__(self, flags: Sequence[str], command: Sequence[str]) -> None:
        # Ends with this process (exactly: with the thread that starts it), but gets no signals of the terminal.
        self._unshare = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *flags, "--kill-child", *command], start_new_session=True,
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.pid = self._unshare.pid
        if "--fork" in flags:
            self.pid = self._child()

    def _child(self) -> int:
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        for _ in range(START_SECONDS * 100):
            if found := children.read_text().split():
                return int(found[0])
            time.sleep(0.01)
        raise RuntimeError("unshare did not start")

    def kill(self) -> None:
        if self._unshare.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._unshare.wait()


class Switch:
    """A bridge that connects the machines."""

    def __init__(self) -> None:
        self._namespaces = _Namespaces(["--net", "--fork"], ["sleep", "infinity"])
        self._run("ip", "link", "add", "switch", "type", "bridge")
        self._run("ip", "link", "set", "switch", "up")

    @property
    def pid(self) -> int:
        return self._namespaces.pid

    def _run(self, *command: str) -> None:
        subprocess.run(["nsenter", "--target", str(self.pid), "--net", *command], check=True)

    def connect(self, pid: int, number: int) -> None:
        """Give the namespace of a process an interface `eth0`, connected to the switch."""
        port = f"port{number}"
        self._run(
            "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid)
        )  # fmt: skip
        self._run("ip", "link", "set", port, "master", "switch", "up")

    def close(self) -> None:
        self._namespaces.kill()


class Machine:
    """A machine that is running until `kill`.

    Args:
        folder: of the files of this machine; deleted by `kill`.
        number: last part of its address, 1 to 254.
        environment: variables of its processes, in addition to PATH and HOME.
    """

    def __init__(
        self, switch: Switch, folder: Path, name: str, number: int, environment: Mapping[str, str]
    ) -> None:
        self.name, self.address, self._folder = name, f"{NETWORK}.{number}", folder
        self._environment = {"PATH": os.environ["PATH"], "HOME": HOME, "TERM": "dumb", **environment}
        folder.mkdir(parents=True)
        boot = ["sh", "-c", _BOOT, "boot", str(folder), name, str(ROOT), self.address]
        self._namespaces = _Namespaces(_NAMESPACES, boot)
        switch.connect(self._namespaces.pid, number)
        booted = folder / "tmp" / "booted"
        for _ in range(START_SECONDS * 100):
            if booted.exists():
                break
            time.sleep(0.01)
        else:
            raise RuntimeError(f"{name}: did not boot: {(folder / 'tmp' / 'boot.log').read_text()}")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def _enter(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", "--target", str(self._namespaces.pid), "--all", f"--wdns={HOME}", *command]

    def start(self, *command: str, log: str | None = None, **environment: str) -> subprocess.Popen:
        """Start a process on the machine. Its output goes to the file `log` of the machine (None: to a pipe)."""
        output = open(self._folder / "tmp" / log, "ab") if log else subprocess.PIPE  # noqa: SIM115
        process = subprocess.Popen(
            self._enter(command), env=self._environment | environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        if log:
            output.close()  # type: ignore[union-attr]
        return process

    def run(self, *command: str, timeout: float = 900, **environment: str) -> str:
        """Run a command and return its output (stdout and stderr).

        Raises:
            RuntimeError: it failed, or did not end in time.
        """
        process = self.start(*command, **environment)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise RuntimeError(
                f"{self.name}: {' '.join(command)}: not finished in {timeout:g} s\n{output}"
            ) from None
        if process.returncode:
            raise RuntimeError(
                f"{self.name}: {' '.join(command)}: exit status {process.returncode}\n{output}"
            )
        return output

    def file(self, path: str) -> Path:
        """Path on this machine of a file below /tmp of the machine."""
        return self._folder / path.removeprefix("/")

    def kill_processes(self) -> None:
        """End all processes of the machine without any notice, as a loss of power does. Its files remain."""
        first = str(self._namespaces.pid)
        own = os.readlink(f"/proc/{first}/ns/pid")
        for _ in range(3):  # a process may start another one meanwhile
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):  # it has just ended
                    if process.name != first and os.readlink(process / "ns" / "pid") == own:
                        os.kill(int(process.name), signal.SIGKILL)
            time.sleep(0.1)

    def kill(self) -> None:
        """Switch the machine off, without any notice to its processes, and delete its files."""
        self._namespaces.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
