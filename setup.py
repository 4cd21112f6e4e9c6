import ast
import os
import re

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = os.path.dirname(os.path.abspath(__file__))


def read(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def version():
    """Read from the source: a build must not have to run the module."""
    return re.search(r'^__version__ = "([^"]+)"', read("cs.py"), re.MULTILINE).group(1)


# What the stub says beside the annotated functions of cs.py: at its head, and at the beginning of classes.
STUB_HEAD = """\
import datetime
from collections.abc import Callable, Coroutine
from os import PathLike
from typing import NamedTuple, Protocol

# What settings may be given as: the string of an ini file, too, and None for the default.
_Text = str | bytes | None
_Number = float | str | None
_Flag = bool | str | None
_Path = str | bytes | PathLike[str] | PathLike[bytes]
_CaPath = _Path | bool | None
_PemPath = _Path | tuple[_Path, _Path] | None

class _Method(Protocol):
    def __call__(self, **params: Any) -> Any: ...

class _AsyncMethod(Protocol):
    def __call__(self, **params: Any) -> Coroutine[Any, Any, Any]: ...

class Sent(NamedTuple):
    request: Request

class Answered(NamedTuple):
    request: Request
    response: Any
    seconds: float

class Failed(NamedTuple):
    request: Request
    error: CloudStackException
    seconds: float

class Rows(NamedTuple):
    command: str
    seen: int
    total: int | None

class Waiting(NamedTuple):
    command: str
    jobid: str
    seconds: float
"""
CONSTRUCTOR = """\
    def __init__(
        self, endpoint: str | bytes, key: _Text = None, secret: _Text = None, timeout: _Number = 10,
        method: str | None = "get", verify: _CaPath = None, cert: _PemPath = None, cert_key: _Path | None = None,
        name: _Text = None, retry: _Number = 0, retry_backoff: _Number = 0.5, job_timeout: _Number = None,
        poll_interval: _Number = 2.0, expiration: _Number | datetime.timedelta = 600, trace: _Flag = False,
        dangerous_no_tls_verify: _Flag = False, headers: Mapping[str, Any] | None = None, session: Any = None,
        fetch_result: _Flag = ..., *, theme: object = None, output: object = None, username: _Text = None,
        password: _Text = None, domain: _Text = None, concurrency: _Number = 128,
        max_response_size: _Number = 256 * 1024 * 1024, recover: _Flag = False
    ) -> None: ...
"""
STUB_CLASSES = {
    "CloudStack": CONSTRUCTOR + """\
    on_event: Callable[[Any], object] | None
    endpoint: str
    key: str | None
    secret: str | None
    timeout: float
    method: str
    @property
    def verify(self) -> bool | str: ...
    @verify.setter
    def verify(self, value: _CaPath) -> None: ...
    @property
    def cert(self) -> str | tuple[str, str] | None: ...
    @cert.setter
    def cert(self, value: _PemPath) -> None: ...
    name: str | None
    retry: int
    retry_backoff: float
    job_timeout: float | None
    poll_interval: float
    expiration: datetime.timedelta
    trace: bool
    headers: dict[str, Any]
    session: Any
    fetch_result: bool
    def __getattr__(self, name: str) -> _Method: ...
""",
    "AIOCloudStack": CONSTRUCTOR + """\
    def __getattr__(self, name: str) -> _AsyncMethod: ...
    async def wait_job(self, jobid: str, **options: Any) -> Any: ...
    async def call(
        self, command: str, params: Mapping[str, Any] | None = None, *, pages: bool | None = None,
        wait: bool | None = None, **options: Any
    ) -> Any: ...
""",
}

# A definition's text up to the line that ends its signature, and that line's comment.
HEAD = re.compile(r"(.*?:)(  #[^\n]*)?\n", re.DOTALL)


def declarations(lines, body, in_class=False):
    """Yield the lines of a stub: the public names of a module or a class, without what they do.

    Only annotated functions count; in a class a subclass inherits the others. The imports for type checkers stand in
    the stub as they are. The text is the source's own: Python 3.6 cannot write one from a syntax tree."""
    for node in body:
        text = lines[node.lineno - 1]
        if isinstance(node, ast.If) and text.strip() == "if TYPE_CHECKING:":
            yield from ("".join(lines[node.lineno : last_line(node)]).replace("\n    ", "\n").lstrip(), STUB_HEAD)
        elif isinstance(node, ast.Assign):
            yield from constant(node)
        elif isinstance(node, ast.AugAssign):
            if node.target.id == "__all__":
                yield text
        elif isinstance(node, ast.AnnAssign):
            if node.target.id != "on_event" and not node.target.id.startswith("_"):
                yield text.rstrip().partition(" = ")[0] + "\n"
        elif isinstance(node, ast.ClassDef):
            if not node.name.startswith("_"):
                yield "\n" + head(lines, node) + "\n" + STUB_CLASSES.get(node.name, "")
                yield from list(declarations(lines, node.body, in_class=True)) or ["    ...\n"]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.returns is not None and (in_class or not node.name.startswith("_")):
                yield head(lines, node, " ...") + "\n"


def last_line(node):
    """Return the number of the last line of an `if` whose body has simple statements only."""
    return max(part.lineno for part in node.body)


def constant(node):
    """Yield a line for public names, or a dunder, that stand for something literal."""
    names = [getattr(target, "id", "_") for target in node.targets]
    try:
        value = ast.literal_eval(node.value)
    except ValueError:
        return
    if value is not None and re.match("__|[^_]", names[0]):
        yield "{}{} = {!r}\n".format(" " * node.col_offset, " = ".join(names), value)


def head(lines, node, body=""):
    """Return a definition, decorators and all, with another body."""
    first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
    signature, comment = HEAD.match("".join(lines[first - 1 :])).groups()
    if any(isinstance(part, ast.Yield) for part in ast.walk(node)):
        # An asynchronous generator: without its body it would read as a coroutine.
        signature = signature.replace("async def", "def", 1)
    if "json=True" in signature:  # what is left out below makes the override a proper one
        signature = signature.replace("  # type: ignore[override]", "")
    # A checker would hold every entry of a call's **dict against their types, and a subclass to naming them all.
    signature = re.sub(r", json=True.*(?=\*\*params)", ", ", signature, flags=re.DOTALL)
    return signature + body + (comment or "")


class SdistWithTests(sdist):
    """Put the tests into the source distribution, too."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files + ["test_cs.py"])


class BuildWithStub(build_py):
    """Build the package cs-stubs, too: a module cannot say that it is annotated, a package beside it can (PEP 561)."""

    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            source = read("cs.py")
            self.mkpath(os.path.dirname(self.stub_path()))
            with open(self.stub_path(), "w", encoding="utf-8", newline="\n") as file:
                file.writelines(declarations(source.splitlines(True), ast.parse(source).body))

    def get_outputs(self, *args, **options):
        return super().get_outputs(*args, **options) + [self.stub_path()]

    def stub_path(self):
        return os.path.join(self.build_lib, "cs-stubs", "__init__.pyi")


setup(
    name="cs",
    version=version(),
    description="A CloudStack API client in one file: library and command line",
    long_description=read("README.rst"),
    long_description_content_type="text/x-rst",
    author="The cs authors",
    # Metadata 2.4 (PEP 639) is written by setuptools 77 and later.
    **{"license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license": "BSD-3-Clause"},
    url="https://cloudstack.apache.org/api.html",
    project_urls={"API documentation": "https://cloudstack.apache.org/api.html"},
    py_modules=["cs"],
    cmdclass={"build_py": BuildWithStub, "sdist": SdistWithTests},
    python_requires=">=3.6",
    # Nothing is needed for AIOCloudStack; the extra stays for those who ask for cs[async].
    extras_require={"highlight": ["pygments"], "async": []},
    entry_points={"console_scripts": ["cs = cs:main"]},
    keywords="cloudstack api client command-line",
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: System Administrators",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
    ]
    + ["Programming Language :: Python :: 3.%d" % minor for minor in range(6, 16)]
    + [
        "Topic :: Software Development :: Libraries :: Python Modules",
        "Topic :: System :: Systems Administration",
    ],
)
