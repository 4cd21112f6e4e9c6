#!/usr/bin/env python3
"""Run a command for a limited time, and make sure that no process is left of it.

    python3 .ci/alone.py SECONDS COMMAND [args]

Whatever the command started, in sessions of its own or orphaned, becomes a child of this process at last (Linux only;
elsewhere only the limit holds). What is left at the end is named and killed, and is a failure. The exit code is the
command's, or 1.
"""
import ctypes
import os
import signal
import subprocess
import sys
import time

ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER
PATIENCE = 5  # seconds for what is just ending


def adopt_orphans():
    return sys.platform.startswith("linux") and ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1, 0, 0, 0) == 0


def descendants():
    """Find {pid: command line} of all that this process and its children started and that has not ended."""
    parents, dead = {}, set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, parent = file.read().rpartition(") ")[2].split()[:2]
        except OSError:
            continue
        parents[int(name)] = int(parent)
        if state in "ZX":
            dead.add(int(name))
    found, todo = {}, [os.getpid()]
    while todo:
        parent = todo.pop()
        for pid in [pid for pid, its in parents.items() if its == parent]:
            todo.append(pid)
            if pid not in dead:
                found[pid] = command_line(pid)
    return found


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()[:200]
    except OSError:
        return ""


def kill_all(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass


def finished(command, limit):
    """Run it; its exit code."""
    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return child.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"not done after {limit:g} s: {' '.join(command)}", flush=True)
        child.terminate()  # a chance to tidy up, and to say what it did
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
        return 1
    finally:
        if child.poll() is None:
            child.kill()


def main():
    adopting = adopt_orphans()
    status = 1
    try:
        status = finished(sys.argv[2:], float(sys.argv[1]))
        deadline = time.monotonic() + PATIENCE
        while adopting and descendants() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        left = descendants() if adopting else {}
        while adopting and descendants():
            kill_all(descendants())
            time.sleep(0.05)
    for line in left.values():
        print("left running: " + line)
    return status if status or not left else 1


if __name__ == "__main__":
    sys.exit(main())
