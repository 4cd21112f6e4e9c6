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


def stub():
    """The wheel's stub: STUB with the module's own lists of public names."""
    names = re.findall(r"^__all__ .*?\]$", read("cs.py"), re.MULTILINE | re.DOTALL)
    return STUB.replace("@NAMES@", "\n".join(names))


# The wheel's stub: the types of what programs use. stubtest, which .ci/typed/check runs, holds it against cs.py.
STUB = """\
import datetime
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, NamedTuple, Protocol

from typing_extensions import Self  # type checkers bring it along

@NAMES@

__version__: str

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

class CloudStackException(Exception):
    response: Any
    error: Any
    shown: Any
    jobid: str | None
    jobinstanceid: str | None
    jobinstancetype: str | None
    outcome_unknown: bool
    unsent: bool
    stale: bool
    job_failed: bool
    def __init__(self, *args: object, error: Any = None, response: Any = None) -> None: ...

class CloudStackApiException(CloudStackException): ...
class CloudStackConnectionError(CloudStackException, ConnectionError): ...
class CloudStackTimeoutError(CloudStackException, TimeoutError): ...
class CloudStackJobTimeout(CloudStackTimeoutError): ...

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

class CloudStack:
    on_event: Callable[[Any], object] | None
    endpoint: str
    key: str | None
    secret: str | None
    timeout: float
    method: str
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
    @property
    def verify(self) -> bool | str: ...
    @verify.setter
    def verify(self, value: _CaPath) -> None: ...
    @property
    def cert(self) -> str | tuple[str, str] | None: ...
    @cert.setter
    def cert(self, value: _PemPath) -> None: ...
    def __init__(
        self, endpoint: str | bytes, key: _Text = None, secret: _Text = None,
        timeout: _Number = 10, method: str | None = "get", verify: _CaPath = None,
        cert: _PemPath = None, cert_key: _Path | None = None, name: _Text = None,
        retry: _Number = 0, retry_backoff: _Number = 0.5, job_timeout: _Number = None,
        poll_interval: _Number = 2.0, expiration: _Number | datetime.timedelta = 600,
        trace: _Flag = False, dangerous_no_tls_verify: _Flag = False,
        headers: Mapping[str, Any] | None = None, session: Any = None,
        fetch_result: _Flag = None, *, theme: object = None, output: object = None,
        username: _Text = None, password: _Text = None, domain: _Text = None,
        concurrency: _Number = 128, max_response_size: _Number = 256 * 1024 * 1024,
        recover: _Flag = False
    ) -> None: ...
    def __getattr__(self, name: str) -> _Method: ...
    def _request(self, command: str, **params: Any) -> Any: ...
    def get_setting(self, name: str) -> Any: ...
    def set_setting(self, name: str, value: Any) -> None: ...
    def check(self) -> None: ...
    def call(
        self, command: str, params: Mapping[str, Any] | None = None, *, pages: bool | None = None,
        wait: bool | None = None, **options: Any
    ) -> Any: ...
    def pages(
        self, command: str, params: Mapping[str, Any] | None = None, **options: Any
    ) -> Iterator[Any]: ...
    def iter_list(self, command: str, **params: Any) -> Iterator[Any]: ...
    def prepare(
        self, command: str, params: Mapping[str, Any] | None = None, **options: Any
    ) -> Request: ...
    def find_id(self, list_command: str, name: str, **params: Any) -> str: ...
    def wait_job(self, jobid: str, **options: Any) -> Any: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: object) -> None: ...

class AIOCloudStack(CloudStack):
    fetch_result: bool = ...  # True unless it is given; False in CloudStack
    def __getattr__(self, name: str) -> _AsyncMethod: ...
    async def _request(self, command: str, **params: Any) -> Any: ...
    async def call(
        self, command: str, params: Mapping[str, Any] | None = None, *, pages: bool | None = None,
        wait: bool | None = None, **options: Any
    ) -> Any: ...
    def pages(  # type: ignore[override]  # the price of being a CloudStack
        self, command: str, params: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncIterator[Any]: ...
    def iter_list(  # type: ignore[override]
        self, command: str, **params: Any
    ) -> AsyncIterator[Any]: ...
    async def find_id(  # type: ignore[override]
        self, list_command: str, name: str, **params: Any
    ) -> str: ...
    async def wait_job(self, jobid: str, **options: Any) -> Any: ...
    async def aclose(self) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc_info: object) -> None: ...

class Request:
    method: str
    url: str | None
    body: bytes | None
    params: dict[str, str]
    headers: dict[str, str]
    cancelled: bool
    anonymous: bool
    signing: Any
    deadline: float
    def masked_url(self) -> str: ...
    def masked_params(self) -> dict[str, str]: ...

class Config: ...

PAGE_SIZE: int
PAGES_AHEAD: int
MOST_PAGES: int
LONGEST_WAIT: float
LONGEST_HEAD: int
POLL_GROWTH: float
SHORTEST_POLL: float
DIRECT_POLL: int
MOST_FAILED_POLLS: int
IDLE: float
MASK: str
SETTINGS: tuple[Any, ...]
FORMATS: tuple[str, ...]

def flatten(params: Mapping[str, Any]) -> dict[str, str]: ...
def cs_encode(value: str | bytes) -> str: ...
def sign(params: Mapping[str, str], secret: str) -> str: ...
def strtobool(value: str) -> bool: ...
def backoff(attempt: int, first: float) -> float: ...
def load_config(
    region: str | None = None, overrides: Mapping[str, str] | None = None, path: str | None = None
) -> Config: ...
def parse_section(path: str, text: str, region: str) -> dict[str, Any]: ...
def list_regions(path: str | None = None) -> list[str]: ...
def read_config(ini_group: str | None = None) -> dict[str, Any]: ...
def read_config_from_ini(ini_group: str | None = None) -> dict[str, Any]: ...
def main(args: Iterable[str] | None = None) -> int: ...
"""

class SdistWithTests(sdist):
    """Put the tests into the source distribution, too."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files + ["test_cs.py"])


class BuildWithStub(build_py):
    """Build the package cs-stubs, too: a module cannot say that it is annotated, a package beside it can (PEP 561)."""

    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            self.mkpath(os.path.dirname(self.stub_path()))
            with open(self.stub_path(), "w", encoding="utf-8", newline="\n") as file:
                file.write(stub())

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
