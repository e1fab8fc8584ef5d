"""Whether other machines see the disk of a run folder, as far as it can be told from here."""

from __future__ import annotations

import re
from pathlib import Path

from dtune_launch.spec import LaunchError

MOUNTS = Path("/proc/self/mountinfo")

# In memory, or in the layers of a container: of this machine alone, whatever else holds.
_OWN = frozenset("tmpfs ramfs devtmpfs overlay fuse.fuse-overlayfs aufs squashfs rootfs".split())
# On a disk of this machine, which may serve it to the others.
_DISK = frozenset(
    "ext2 ext3 ext4 xfs btrfs zfs f2fs bcachefs jfs reiserfs vfat exfat ntfs ntfs3 fuseblk".split()
)
# Made for many machines; those in FUSE have its name before their own.
_SHARED = frozenset(
    "nfs nfs4 lustre gpfs mmfs beegfs ceph ceph-fuse glusterfs wekafs panfs pvfs2 orangefs cifs "
    "smb3 afs gfs2 ocfs2 quobyte juicefs mfs moosefs daos".split()
)
# By custom of each machine's own.
_TEMPORARY = tuple(Path(name) for name in ("/tmp", "/var/tmp", "/dev/shm", "/run"))


def check_shared(run_dir: Path, *, nodes: int) -> list[str]:
    """Warnings about a run folder that other machines may not see.

    Raises LaunchError where they cannot.
    """
    # Where a link leads is what other nodes must see.
    folder = run_dir.resolve()
    kind, mount = file_system(folder)
    others = f"the other {nodes - 1} of {nodes} nodes" if nodes > 1 else "the node of the job"
    key = "if all nodes do see it, set launch.shared_disk=true"
    is_shared = kind.removeprefix("fuse.") in _SHARED
    if kind in _OWN:
        raise LaunchError(
            f"run_dir={run_dir} lies on {kind} ({mount}), which is of this machine alone: {others} "
            f"would not see it; name a folder on a shared disk; {key}"
        )
    temporary = next((place for place in _TEMPORARY if folder.is_relative_to(place)), None)
    if temporary is not None and not is_shared:
        raise LaunchError(
            f"run_dir={run_dir} lies in {temporary}, of which each machine has its own: {others} "
            f"would not see it; name a folder on a shared disk; {key}"
        )
    if kind in _DISK:
        return [
            f"run_dir={run_dir} lies on a disk of this machine ({kind} at {mount}); unless it is "
            f"served to them, {others} will not see it. {key[0].upper()}{key[1:]}"
        ]
    if not is_shared:
        return [
            f"run_dir={run_dir} lies on {kind} ({mount}), of which dtune does not know whether "
            f"{others} will see it. {key[0].upper()}{key[1:]}"
        ]
    return []


def file_system(path: Path, mounts: str | None = None) -> tuple[str, str]:
    """Type and mount point of the file system that a path, or what exists of it, lies on."""
    best, kind = Path("/"), "unknown"
    for line in (MOUNTS.read_text() if mounts is None else mounts).splitlines():
        before, _, after = line.partition(" - ")
        # Spaces of a mount point are written \040.
        point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split()[4]))
        # Of two mounts on one point the later one is seen.
        if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, after.split()[0]
    return kind, str(best)
