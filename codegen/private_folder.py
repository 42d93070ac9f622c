"""Folders that only this user can write to: how to tell, and how to make one.

What lies in them is loaded as code, so the question is not whether a folder is writable but for whom.
"""

from __future__ import annotations

import atexit
import contextlib
import grp
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


class FolderError(OSError):
    """No folder could be made that is private to this user."""


def why_unsafe(folder: Path) -> str | None:
    """Why another user could put files into `folder`, an existing absolute path; None if nobody else can.

    The folder must be a real directory of ours without write permission for others. Above it, up to the
    root, every directory must be ours or root's and not writable for others, unless it is sticky (there
    nobody else can rename what is ours). A link above it must be ours or root's; examine what it leads
    to as well.
    """
    try:
        info = folder.lstat()
        if stat.S_ISLNK(info.st_mode):
            return f"{folder} is a symbolic link"
        if not stat.S_ISDIR(info.st_mode):
            return f"{folder} is not a folder"
        if info.st_uid != os.geteuid():
            return f"{folder} belongs to {_user_name(info.st_uid)}"
        if _others_write(info):
            return f"{folder} can be written by other users (mode {stat.S_IMODE(info.st_mode):04o})"
        for parent in folder.parents:
            if reason := _why_unsafe_above(parent):
                return reason
    except OSError as error:
        return f"{folder} cannot be examined: {error.strerror or error}"
    return None


def _why_unsafe_above(parent: Path) -> str | None:
    info = parent.lstat()
    if info.st_uid not in (0, os.geteuid()):
        return f"{parent}, above the cache folder, belongs to {_user_name(info.st_uid)}"
    if stat.S_ISLNK(info.st_mode) or info.st_mode & stat.S_ISVTX:
        return None
    if _others_write(info):
        return f"{parent}, above the cache folder, can be written by other users"
    return None


def _others_write(info: os.stat_result) -> bool:
    if info.st_mode & stat.S_IWOTH:
        return True
    return bool(info.st_mode & stat.S_IWGRP) and not _is_private_group(info.st_gid)


def _is_private_group(gid: int) -> bool:
    """Whether the group is this user's alone: with umask 002, systems give every user one of his own name."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return (
        group.gr_gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    )


def _user_name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def make_folder(folder: Path) -> None:
    """Create the folder and what is missing above it, mode 0700; an existing one is left as it is."""
    for missing in reversed([parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]):
        with contextlib.suppress(FileExistsError):
            missing.mkdir(mode=0o700)


@contextlib.contextmanager
def private_scratch() -> Iterator[Path]:
    """A new empty folder of mode 0700, removed afterwards. Raises FolderError if none can be made."""
    folder = _new_temporary_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def process_folder() -> Path:
    """A new empty folder of mode 0700 until this process ends. Raises FolderError if none can be made."""
    folder = _new_temporary_folder()
    owner = os.getpid()

    def remove() -> None:
        # A forked child inherits this handler but not the folder.
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _new_temporary_folder() -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="torchweld-")).resolve(strict=True)
    except OSError as error:
        raise FolderError(
            f"no temporary folder can be made ({error}); set TMPDIR to one with space"
        ) from error
    if reason := why_unsafe(folder):
        folder.rmdir()
        raise FolderError(f"the temporary folder is not safe: {reason}; set TMPDIR to a folder of your own")
    return folder
