"""An emulated machine that runs one static program: Bochs, a Linux kernel, and nothing else.

Bochs interprets the real machine code. It cannot boot a kernel itself, so the kernel and a file
system with the program lie on a CD image; the program is process 1, and its output comes back
through the serial port.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

#: F, BW, DQ, VL, CD, VBMI, VNNI, BITALG and VPOPCNTDQ; no model of Debian's Bochs has BF16
MODEL = "corei7_icelake_u"
#: the copies of the kernels that this model can run
COPIES = ["avx512", "avx512_vpopcnt", "avx512_vnni"]

PACKAGES = ["bochs", "bochsbios", "vgabios", "xorriso", "isolinux", "syslinux-common"]
KERNEL_PACKAGE = "linux-image-cloud-amd64"  # what it depends on is the kernel itself
#: where those packages put what is needed
BOOT_LOADER = [
    Path("/usr/lib/ISOLINUX/isolinux.bin"),
    Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"),
]
BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
VGA_BIOS = Path("/usr/share/vgabios/vgabios.bin")

#: Bochs answers cpuid for these and does not do, or not quite, what Linux then expects: pku,
#: xsavec and xsaves (without which Linux computes the sizes of states by itself, and turns AVX off
#: where they differ), xfd, amx_tile (early hangs), rdpid, fsrm
CLEARED = "clearcpuid=515,321,323,324,600,534,580"
COMMAND_LINE = (
    f"console=ttyS0 loglevel=1 rdinit=/check {CLEARED} mitigations=off nosmp selinux=0 apparmor=0 "
    "no_timer_check tsc=reliable random.trust_cpu=on cryptomgr.notests lpj=1000000"
)

BOCHS = """\
cpu: model={model}, count=1, ips=50000000, reset_on_triple_fault=0
memory: guest=256, host=256
romimage: file={bios}
vgaromimage: file={vga}
pci: enabled=1, chipset=i440fx
ata0-master: type=cdrom, path=machine.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=console.txt
plugin_ctrl: speaker=0
display_library: rfb, options="timeout=0"
log: bochs.txt
panic: action=fatal
error: action=ignore
info: action=ignore
clock: sync=none
"""


def provide(folder: Path) -> str | None:
    """Gets what is missing, where this process may; else says what is missing and what to do."""
    missing = _missing()
    if missing and not (os.geteuid() == 0 and shutil.which("apt-get")):
        return (
            f"{', '.join(missing)} missing; need Debian's packages; try as root: apt-get install "
            f"--no-install-recommends {' '.join(PACKAGES)}"
        )
    try:
        if missing:
            _call("apt-get", "update", "-qq")
            _call("apt-get", "install", "-qq", "-y", "--no-install-recommends", *PACKAGES)
        if not (folder / "vmlinuz").exists():
            _fetch_kernel(folder)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        return f"'{' '.join(error.cmd)}' failed{': ' + said[-1] if said else ''}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if missing := _missing():
        return f"{', '.join(missing)} missing, though its package is installed"
    return None


def _missing() -> list[str]:
    tools = [tool for tool in ("bochs", "xorriso") if shutil.which(tool) is None]
    return tools + [str(path) for path in (*BOOT_LOADER, BIOS, VGA_BIOS) if not path.exists()]


def _call(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=cwd, timeout=300,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    )  # fmt: skip
    return done.stdout


def _fetch_kernel(folder: Path) -> None:
    """The kernel of Debian's cloud image, unpacked and not installed."""
    depends = _call("apt-cache", "depends", "--important", KERNEL_PACKAGE)
    package = depends.partition("Depends: ")[2].split()[0]
    unpacked = folder / "kernel"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir(parents=True)
    _call("apt-get", "download", "-qq", package, cwd=unpacked)
    (archive,) = unpacked.glob("*.deb")
    _call("dpkg", "-x", str(archive), str(unpacked))
    (kernel,) = unpacked.glob("boot/vmlinuz-*")
    kernel.rename(folder / "vmlinuz")
    shutil.rmtree(unpacked)


def _entry(number: int, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)):
    """One file of a file system in the form that Linux unpacks at its start (cpio, newc)."""
    fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0]
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def _file_system(program: Path) -> bytes:
    entries = [
        _entry(1, "dev", 0o040755),
        _entry(2, "dev/console", 0o020600, device=(5, 1)),
        _entry(3, "check", 0o100755, program.read_bytes()),
        _entry(0, "TRAILER!!!", 0),
    ]
    return b"".join(entries)


def _cd(program: Path, arguments: list[str], folder: Path) -> None:
    tree = folder / "cd"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    for source in (folder / "vmlinuz", *BOOT_LOADER):
        shutil.copy(source, tree)
    (tree / "initrd").write_bytes(_file_system(program))
    (tree / "isolinux.cfg").write_text(
        "default check\nprompt 0\nlabel check\n  kernel vmlinuz\n"
        f"  append initrd=initrd {COMMAND_LINE} -- {' '.join(arguments)}\n"
    )
    _call(
        "xorriso", "-as", "mkisofs", "-quiet", "-o", str(folder / "machine.iso"),
        "-b", "isolinux.bin", "-c", "boot.cat",
        "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", str(tree),
    )  # fmt: skip


def run(program: Path, arguments: list[str], folder: Path, timeout: float) -> list[str]:
    """Lines of the program's output, which are printed as they come. The program must end it with
    ``NAME: exit CODE``, and then the machine."""
    console = folder / "console.txt"
    console.write_text("")
    _cd(program, arguments, folder)
    settings = BOCHS.format(model=MODEL, bios=BIOS, vga=VGA_BIOS)
    (folder / "bochsrc").write_text(settings)
    (folder / "debugger").write_text("c\n")  # Debian's Bochs is a debugger: go on
    command = ["bochs", "-q", "-f", "bochsrc", "-rc", "debugger"]
    with (folder / "bochs-output.txt").open("w") as output:
        bochs = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder
        )
        try:
            return _follow(console, bochs, f"{program.name}: exit ", timeout)
        finally:
            bochs.kill()
            bochs.wait()


def _follow(console: Path, bochs: subprocess.Popen, last: str, timeout: float) -> list[str]:
    """Prints whole lines of the console as they come, until the last one."""
    deadline = time.monotonic() + timeout
    lines: list[str] = []
    while True:
        ended = bochs.poll() is not None or time.monotonic() > deadline
        whole = console.read_text(errors="replace").replace("\r", "").split("\n")[:-1]
        for line in whole[len(lines) :]:
            print(line, flush=True)
            lines.append(line)
            if line.startswith(last) or "Kernel panic" in line:
                return lines
        if ended:
            return lines
        time.sleep(0.2)
