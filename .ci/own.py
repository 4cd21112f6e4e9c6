"""A python with some packages, for the tools beside this file: a virtual environment that is kept for the next time."""
import os
import subprocess
import sys
import tempfile
import venv


def own_python(*packages):
    """Make a virtual environment in the user's own corner of the temporary directory; the path of its python."""
    corner = os.path.join(tempfile.gettempdir(), "cs-tools-%d" % os.getuid())
    os.makedirs(corner, mode=0o700, exist_ok=True)
    found = os.lstat(corner)
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise SystemExit("%s is not ours alone" % corner)
    directory = os.path.join(corner, "%d.%d.%d-" % sys.version_info[:3] + "-".join(packages))
    python, stamp = os.path.join(directory, "bin", "python"), os.path.join(directory, "complete")
    if not os.path.exists(stamp):
        print("installing %s ..." % " ".join(packages), file=sys.stderr)
        venv.create(directory, clear=True, with_pip=True)
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        if done.returncode:
            raise SystemExit("pip could not install them:\n" + done.stdout)
        open(stamp, "w").close()
    return python


def run_with(*packages):
    """Start this program again in a python that has the packages; does not return."""
    python = own_python(*packages)
    os.execv(python, [python, os.path.abspath(sys.argv[0])] + sys.argv[1:])
