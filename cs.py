#!/usr/bin/env python3
"""cs: a CloudStack API client in one file, for Python 3.6 and later, standard library only.

    from cs import CloudStack, read_config

    cs = CloudStack(endpoint="https://cloud.example/client/api", key="...", secret="...")
    for vm in cs.iter_list("listVirtualMachines", state="Running"):
        print(vm["name"])
    cs.createSecurityGroup(name="web", description="HTTP traffic")
    cs.deployVirtualMachine(zoneid=..., templateid=..., serviceofferingid=..., fetch_result=True)

Every API call, present or future, is a method; AIOCloudStack has the same ones as coroutines.
On the command line: `cs listZones`, `python -m cs listZones` or `python cs.py listZones`.

Rooms (the numbered parts of this file)
    1 settings          the one table of them, and how each is converted
    2 errors            the tree of exceptions
    3 parameters        keyword arguments to names and texts, and their signature
    4 redaction         what a person may see of a request; the trace
    5 protocol          limits and waits, then 5.1 call and request, 5.2 answer, 5.3 retry,
                        5.4 session, 5.5 pages, 5.6 jobs, 5.7 recovery
    6 transport         6.1 route, 6.2 connections, 6.3 reading against the clock,
                        6.4 failures in words, 6.5 a program's own session
    7 clients           CloudStack, AIOCloudStack, and their threads
    8 configuration     environment and ini files
    9 command line      the tool `cs`, which a library can do without: 9.1 options, 9.2 run and
                        report, 9.3 formats, 9.4 the list of commands, 9.5 completion,
                        9.6 configure, 9.7 names for ids, 9.8 --where, 9.9 --each, 9.10 the shell

Data flows one way: keyword arguments -> parameters -> signed request -> exchange -> decoded
answer -> page or job loop -> result. Rooms 1 to 5 decide everything and do no I/O, but for the
trace that room 4 writes: the protocol is made of generators that yield what they need done. Room 6
does it, room 7 brings the two together.

For the auditor
    Sockets are opened in room 6 only. Files are read in rooms 6 (certificates, by ssl), 8 (ini
    files) and 9 (what @file and --configure name, the cache, the shell's history); files are
    written in room 9 only: the ini file of --configure, the cache of commands and ids in
    ~/.cache/cs or $XDG_CACHE_HOME/cs, and that history in ~/.local/state/cs or $XDG_STATE_HOME/cs.
    There is no eval, no exec, no subprocess, no pickle. Nothing runs at import but definitions.
    A copy of the head and rooms 1 to 8, cut at the banner of room 9, is a whole library under any
    module name.

License: BSD, see LICENSE.
"""

import collections
import functools
import gc
import hmac
import io
import itertools
import json as jsonlib
import os
import re
import sys
import threading
import time
from binascii import b2a_base64, crc32
from urllib.parse import quote, urlsplit

__all__ = [
    "AIOCloudStack",
    "CloudStack",
    "CloudStackApiException",
    "CloudStackConnectionError",
    "CloudStackException",
    "CloudStackJobTimeout",
    "CloudStackTimeoutError",
    "read_config",
    "read_config_from_ini",
]

__version__ = "6.0.0"

# What is public is annotated, and setup.py makes the stub that the wheel carries from it.
TYPE_CHECKING = False  # type checkers take it for true; importing typing costs milliseconds
if TYPE_CHECKING:
    import datetime
    from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
    from os import PathLike
    from typing import Any, Protocol

    from typing_extensions import Self  # type checkers bring it along

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

# Tests replace these two: the clock that measures every duration, and the sleep between two steps.
_clock = time.monotonic
_sleep = time.sleep


# --- 1 settings -----------------------------------------------------------------------------------
# One table drives the constructor's conversions, the environment, the ini keys, read_config's
# defaults and README (a test compares). A converter takes what a program or an ini file gives and
# returns what the client works with; it raises ValueError, and never quotes what may be a secret.


def strtobool(value: str) -> bool:
    """Parse a boolean word: y yes t true on 1, n no f false off 0, in any case.

    Raises ValueError for any other word, AttributeError for what is not text."""
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return True
    if word in ("n", "no", "f", "false", "off", "0"):
        return False
    raise ValueError(f"invalid truth value {value!r}")


def _parse_flag(value):
    """Return the bool that a setting means; None and an empty ini value are False."""
    if value is None or value == "" or isinstance(value, bool):
        return bool(value)
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    try:
        return strtobool(value)
    except (AttributeError, ValueError):
        raise ValueError(f"{value!r} is neither true nor false") from None


def _parse_number(value, most=1e9):
    """Return an int or float; refuse nan, infinity and more than `most`.

    Beyond 1e9 seconds the platform's own clocks give up."""
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str):
            value = int(value) if re.match(r"\s*[-+]?[0-9_]+\s*\Z", value) else float(value)
        if not abs(value) <= most:
            raise ValueError
    except (TypeError, ValueError, ArithmeticError):
        raise ValueError(f"{value!r} is not a number of seconds up to {most:g}") from None
    return value if isinstance(value, (int, float)) else float(value)


def _parse_seconds(value, positive=False, optional=False):
    """Return a number of seconds of 0 or more; more than 0 if `positive`; None if `optional`."""
    if optional and value in (None, ""):
        return None
    number = _parse_number(value)
    if number < 0:
        raise ValueError(f"{value!r} is negative")
    if positive and number == 0:
        raise ValueError(f"{value!r} is not more than 0 seconds")
    return number


def _parse_count(value, least=0):
    """Return a whole number of `least` or more."""
    try:
        if isinstance(value, bool):
            raise ValueError
        number = int(value)
        if number != float(value) or number < least:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a whole number of {least} or more") from None
    return number


def _parse_lifetime(value):
    """Return a timedelta, made of seconds if it is none yet."""
    import datetime

    if isinstance(value, datetime.timedelta):
        return value
    try:
        return datetime.timedelta(seconds=_parse_number(value, 1e15))
    except OverflowError:
        raise ValueError(f"{value!r} is too long") from None


def _parse_method(value):
    """Return "get" or "post"."""
    if isinstance(value, str) and value.lower() in ("get", "post"):
        return value.lower()
    raise ValueError(f"{value!r} is neither get nor post")


def _parse_text(value):
    """Return plain text, or None for none and for empty text."""
    try:
        if isinstance(value, bytes):
            value = bytes.decode(value, "utf-8")
        if value is not None and not isinstance(value, str):
            raise ValueError(f"text was expected, got {type(value).__name__}")
        if value:
            str.encode(value, "utf-8")
    except UnicodeError:
        raise ValueError("it holds something that is not UTF-8") from None
    # The base type's own conversion, whatever a subclass (Ansible's tagged text) makes of str().
    return str.__str__(value) if value else None


def _parse_domain(value):
    """Return a domain's path as log-in wants it: the server's own spelling ROOT/sub means /sub.

    Seen on 4.23: answers say `domainpath: ROOT/sub`, and log-in refuses exactly that (531)."""
    path = _parse_text(value)
    if path == "ROOT" or (path or "").startswith("ROOT/"):
        return path[len("ROOT") :] or "/"
    return path


def _parse_ca_path(value):
    """Return a path, or None for the system's CA certificates.

    A boolean word, such as an ini file's `verify = false`, reads as None: only
    dangerous_no_tls_verify turns verification off. (A file of such a name needs ./ before it.)"""
    if value is None or isinstance(value, bool):
        return None
    value = os.fsdecode(value)
    try:
        strtobool(value)
    except ValueError:
        return value or None
    return None


def _parse_pem_path(value):
    """Return a path, a pair of paths (certificate, private key), or None."""
    if value is None or value == "":
        return None
    if isinstance(value, (tuple, list)):
        certificate, key = map(os.fsdecode, value)
        return certificate, key
    return os.fsdecode(value)


def _parse_path(value):
    """Return a path, or None."""
    return None if value in (None, "") else os.fsdecode(value)


def _parse_headers(value):
    """Return a dict of headers that can be sent."""
    if value is not None and not hasattr(value, "items"):
        raise ValueError(f"a dict was expected, got {type(value).__name__}")
    headers = dict(value or {})
    for name, content in headers.items():
        _check_header(name, content)
    return headers


_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")


def _check_header(name, content):
    """Refuse a header that would break out of its line (RFC 9110, 5.5), never quoting its value."""
    if not isinstance(name, str) or not _TOKEN.match(name):
        raise ValueError(f"{name!r} is not a header name")
    if name.lower() in ("content-length", "transfer-encoding"):
        raise ValueError(f"{name!r} belongs to the transport")
    text = content.decode("latin-1") if isinstance(content, bytes) else content
    if not isinstance(text, (str, int, float, type(None))):
        raise ValueError(f"the value of {name!r} is not text")
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f]|[^\x00-\xff]", str(text)):
        problem = "holds a line break, a control character or one beyond Latin-1"
        raise ValueError(f"the value of {name!r} {problem}")


def _parse_session(value):
    """Return the object that sends; an aiohttp session cannot, its methods are coroutines."""
    if type(value).__module__.partition(".")[0] == "aiohttp":
        raise ValueError(
            "an aiohttp session cannot be used; leave it out, or give a requests.Session"
        )
    return value


def _convert(name, converter, value):
    """Return converter(value). Raises ValueError that begins with the name it was given by."""
    try:
        return converter(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


_positive_seconds = functools.partial(_parse_seconds, positive=True)
_optional_seconds = functools.partial(_parse_seconds, optional=True)
_positive_count = functools.partial(_parse_count, least=1)

_Setting = collections.namedtuple("_Setting", "name default convert given_in meaning")

# given_in: "both" is read from the environment (CLOUDSTACK_<NAME>) and from ini files under its
# name; "code" is an argument of the constructor only; "tool" is as "both", but for the command line
# alone, which finds its text in _Invocation.settings. CloudStack.__init__ has an argument of that
# name, too, and drops it, since read_config() passes it on; a flag for it stands in _OPTIONS.
# fmt: off
SETTINGS: "tuple[Any, ...]" = (
    _Setting("endpoint", None, _parse_text, "both", "URL of the API, http or https"),
    _Setting("key", None, _parse_text, "both",
             "API key; without key and user name requests go out unsigned"),
    _Setting("secret", None, _parse_text, "both", "secret key that belongs to the API key"),
    _Setting("timeout", 10, _positive_seconds, "both",
             "seconds to connect, and of silence; ten times that in all"),
    _Setting("method", "get", _parse_method, "both",
             "HTTP verb, get or post; post is used by itself where get cannot do"),
    _Setting("verify", None, _parse_ca_path, "both",
             "CA certificates to trust, a file or a directory; the system's if unset"),
    _Setting("cert", None, _parse_pem_path, "both", "client certificate, a PEM file"),
    _Setting("cert_key", None, _parse_path, "both",
             "private key of the client certificate, where it has its own file"),
    _Setting("name", None, _parse_text, "code",
             "what repr() calls the client; read_config() fills in the region"),
    _Setting("retry", 0, _parse_count, "both",
             "how often to send again what may safely be sent again"),
    _Setting("retry_backoff", 0.5, _parse_seconds, "both",
             "seconds before the first retry; doubles, with jitter, up to 30"),
    _Setting("job_timeout", None, _optional_seconds, "both",
             "seconds to wait for a job; no limit if unset"),
    _Setting("poll_interval", 2.0, _parse_seconds, "both",
             "most seconds between two looks at a job; the first come sooner"),
    _Setting("expiration", 600, _parse_lifetime, "both",
             "seconds a signature is valid; negative: for ever"),
    _Setting("trace", False, _parse_flag, "both",
             "show each exchange on standard error, secrets replaced"),
    _Setting("dangerous_no_tls_verify", False, _parse_flag, "both",
             "do not verify the server's certificate"),
    _Setting("headers", None, _parse_headers, "code",
             "more HTTP headers; one each as HEADER_<NAME> or header_<name>"),
    _Setting("session", None, _parse_session, "code",
             "object with requests.Session's interface to send with"),
    _Setting("fetch_result", False, _parse_flag, "code",
             "wait for jobs and return their results; True for AIOCloudStack"),
    _Setting("username", None, _parse_text, "both",
             "log in with this user name, instead of key and secret"),
    _Setting("password", None, _parse_text, "both", "password of that user"),
    _Setting("domain", None, _parse_domain, "both", "domain path of that user; / if unset"),
    _Setting("concurrency", 128, _positive_count, "code",
             "connections kept; worker threads of AIOCloudStack"),
    _Setting("max_response_size", 256 * 1024 * 1024, _positive_count, "both",
             "bytes an answer may have, unpacked"),
    _Setting("recover", False, _parse_flag, "both",
             "find the job of a lost answer again; on for the command line"),
    _Setting("output", None, _parse_text, "tool", "format of the command line's answers"),
    _Setting("theme", None, _parse_text, "tool", "Pygments style of the command line's JSON"),
)
# fmt: on
_CLIENT_SETTINGS = {setting.name: setting for setting in SETTINGS if setting.given_in != "tool"}

# These are not attributes of a client: 5.2.0 had none of these names, and subclasses written for it
# use them for their own, as in `self.domain = {...}`. They are kept in _ClientState.
_NOT_ATTRIBUTES = frozenset(
    "cert_key dangerous_no_tls_verify username password domain concurrency max_response_size"
    " recover".split()
)
_CONVERTERS = {
    name: setting.convert
    for name, setting in _CLIENT_SETTINGS.items()
    if name not in _NOT_ATTRIBUTES
}


# --- 2 errors -------------------------------------------------------------------------------------


class CloudStackException(Exception):
    """The root of everything this client raises about an exchange.

    CloudStackException                 an answer that is not CloudStack's: HTML, broken JSON, ...
     +-- CloudStackApiException         the server's own error, or a failed job: see .error
     +-- CloudStackConnectionError      name look-up, refused, reset, TLS; also a ConnectionError
     +-- CloudStackTimeoutError         no answer in time; also a TimeoutError
          +-- CloudStackJobTimeout      the job still ran at job_timeout: see .jobid

    Arguments and settings that cannot be used are a ValueError, before anything is sent.

    .response         the answer (status_code, reason, headers, text, json()), None without one
    .error            the server's own words about a failure: a dict with errorcode and errortext,
                      or what stood in its place; None but for CloudStackApiException
    .jobid            the job's id, on everything raised after a job was submitted; else None
    .outcome_unknown  True if a command that changes something may have run although this was raised
    .unsent           True if the server never saw the request
    .stale            True if a kept connection had been closed by the server when it was used again
    """

    # Each has its default here, so that nobody has to ask with getattr.
    response: "Any" = None
    error: "Any" = None
    jobid: "str | None" = None
    outcome_unknown = unsent = stale = False

    def __init__(self, *args: object, response: "Any" = None) -> None:
        super().__init__(*args)
        self.response = response

    def __str__(self):
        # OSError's own would print two arguments as "[Errno first] second".
        return ": ".join(str(arg) for arg in self.args)


class CloudStackApiException(CloudStackException):
    """The server refused a command, or a job failed: `error` holds its own words."""

    def __init__(
        self, *args: object, error: "Any" = None, response: "Any" = None
    ) -> None:
        super().__init__(*args, response=response)
        self.error = error

    def __str__(self):
        return f"{super().__str__()}, error: {self.error}"


class CloudStackConnectionError(CloudStackException, ConnectionError):
    """There was no connection, or it broke before the answer was whole."""

    errno = strerror = None  # OSError would take two arguments for these; set if the cause had one


class CloudStackTimeoutError(CloudStackException, TimeoutError):
    """The server was silent for `timeout` seconds, or took ten times that in all."""

    errno = strerror = None


class CloudStackJobTimeout(CloudStackTimeoutError):
    """The job was still running after job_timeout seconds; args are the message and its id."""


# --- 3 parameters and signature -------------------------------------------------------------------
# Pure functions. The rules are the server's: ApiServer.verifyRequest for the signature,
# ApiDispatcher for lists and maps.

_LISTS = (list, tuple, set, frozenset)

# The server answers 431 to control characters but LF and CR (ApiServer.checkCharacterInkParams; its
# versions differ about a tab, which is therefore sent). Lone surrogates have no UTF-8.
_UNSENDABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_UNRESERVED = re.compile(r"[A-Za-z0-9._*-]*\Z")


def flatten(params: "Mapping[str, Any]") -> "dict[str, str]":
    """Turn keyword arguments into {name: text} as CloudStack wants them.

    Dicts and lists of dicts become `name[0].field`, other lists are joined by commas, booleans are
    true and false. None and empty lists are left out, an empty text is not. Raises ValueError that
    names the parameter and the type that cannot be sent, never the value."""
    flat = {}
    for name, value in params.items():
        if type(value) is str:
            flat[name] = value
        elif isinstance(value, (dict,) + _LISTS):
            flat.update(_flatten_container(name, value))
        elif value is not None:
            flat[name] = _encode_scalar(name, value)
    return flat


def _flatten_container(name, value):
    """Yield the (name, text) pairs of a dict, a list of dicts, or a list; none for an empty one."""
    items = [value] if isinstance(value, dict) else [item for item in value if item is not None]
    if any(isinstance(item, dict) for item in items):
        for index, item in enumerate(items):
            yield from _flatten_map(name, index, item)
    elif items:
        yield name, _join_list(name, value)


def _flatten_map(name, index, entry):
    """Yield (`name[index].field`, text) for each field of a dict that has a value."""
    if not isinstance(entry, dict):
        raise ValueError(f"parameter {name!r}: {type(entry).__name__} among dicts")
    for field, value in entry.items():
        full = f"{name}[{index}].{field}"
        if not isinstance(value, _LISTS):
            if value is not None:
                yield full, _encode_scalar(full, value)
        elif any(item is not None for item in value):
            yield full, _join_list(full, value)


def _join_list(name, values):
    """Join a list with commas, which the server splits at without escaping or trimming."""
    texts = [_encode_scalar(name, value) for value in values if value is not None]
    # Sets have no order of their own: the same call must give the same bytes.
    return ",".join(sorted(texts) if isinstance(values, (set, frozenset)) else texts)


def _encode_scalar(name, value):
    """Return the text of one value.

    The base type's own conversion is used, whatever a subclass (an Enum, Ansible's tagged types)
    makes of str(). The server takes nothing but "true", in any case, for true."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, bytes):
        try:
            return bytes.decode(value, "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"parameter {name!r}: bytes that are not UTF-8") from None
    raise ValueError(f"parameter {name!r}: a value of type {type(value).__name__} cannot be sent")


def cs_encode(value: "str | bytes") -> str:
    """Percent-encode as the server does before it verifies a signature.

    That is Java's URLEncoder, then %20 for +: everything but A-Z a-z 0-9 . - _ * is encoded, `~`
    too, which Python 3.7 and later would leave."""
    if isinstance(value, str) and _UNRESERVED.match(value):
        return value
    return quote(value, safe="*").replace("~", "%7E")


def sign(params: "Mapping[str, str]", secret: str) -> str:
    """Return the signature of {name: text}: base64, not yet percent-encoded.

    As ApiServer.verifyRequest computes it: sorted by the raw name, values encoded but names not,
    the whole lower-cased, HMAC-SHA1. _Request.prepare() calls it, after it has added the expiry."""
    names = sorted(params)
    if max("".join(params), default="") > "\uffff":
        # Java compares UTF-16 code units, which is Python's order but for such characters.
        names.sort(key=lambda name: name.encode("utf-16-be"))
    canonical = "&".join([name + "=" + cs_encode(params[name]) for name in names]).lower()
    digest = hmac.new(secret.encode("utf-8"), canonical.encode("utf-8"), "sha1").digest()
    return b2a_base64(digest).decode("ascii").strip()


def _join_query(params):
    """Return the query string or form body; sorted, so that the same call gives the same bytes."""
    pairs = [cs_encode(name) + "=" + cs_encode(text) for name, text in sorted(params.items())]
    return "&".join(pairs)


# Kept because programs written for 5.2.0 import them; nothing below uses them.

EXPIRES_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


def transform(params: "dict[str, Any]") -> None:
    """Apply flatten() in place; bytes at the top stay as they are."""
    kept = {name: value for name, value in params.items() if isinstance(value, bytes)}
    flat = flatten({name: value for name, value in params.items() if name not in kept})
    params.clear()
    params.update(kept, **flat)


def check_key(key: str, allowed: "Iterable[str]") -> bool:
    """Tell whether a key is one of the allowed names, or matches one of them as a shell pattern."""
    import fnmatch

    return any(key == pattern or fnmatch.fnmatchcase(key, pattern) for pattern in allowed)


# --- 4 redaction ----------------------------------------------------------------------------------
# What a person may get to see of a request, an address, or an answer in a trace goes through here.
# (An answer on standard output is the user's, and is shown as it came.)

MASK = "***"

# Names with secret values are known by how they end: `details[0].password`, `usersecretkey`. A call
# with such a parameter also goes out by POST (_needs_post), to stay out of the logs of proxies.
_SECRET = (
    r"(?:password|passwd|passphrase|secret|secret[_-]?key|private[_-]?key|user[_-]?data"
    r"|session[_-]?key|jsessionid|signature|api[_-]?key|access[_-]?key|token|credentials?|psk"
    r"|pre[_-]?shared[_-]?key|bind[_-]?pass|secret[_-]?code|code[_-]?for[_-]?2fa|config[_-]?data)"
)
_SECRET_NAME = re.compile(r"(?i)" + _SECRET + r"\Z")
_SECRET_HEADER = re.compile(r"(?i)(?:" + _SECRET + r"|auth|authorization|cookie|key)\Z")
# A field of JSON, also of JSON within a text (three backslashes deep); and a value beside the
# secret name that it belongs to. The bounds keep a search in proportion to the text.
_TEXT = r'\\{0,3}"(?:[^"\\]|\\.)*"?'
_TITLE = r'"(?:name|key)"\s*:\s*"[\w.\[\]-]*' + _SECRET + '"'
_FIELD_NAME = r'\\{0,3}"[\w.\[\]-]*' + _SECRET + r'\\{0,3}"\s*:\s*'
_SECRET_FIELDS = [
    re.compile(rf"(?i)({_FIELD_NAME})(?:{_TEXT}|[^\s,}}\]\[{{]+)()"),
    re.compile(rf'(?i)({_TITLE}[^{{}}]{{0,200}}?"value"\s*:\s*){_TEXT}()'),
    re.compile(rf'(?i)("value"\s*:\s*){_TEXT}([^{{}}]{{0,200}}?{_TITLE})'),
]
_SECRET_ELEMENT = re.compile(r"(?i)(<[\w.-]*" + _SECRET + r">)[^<]*")
_SECRET_QUERIES = [  # in an address, and in one that is a parameter of another
    re.compile(rf"(?i)({_SECRET}{equals})(?:(?!{end})[^&\s\"'<>;\\])+")
    for equals, end in (("=", "&"), ("%3D", "%26"))
]

# Control characters but line breaks and tabs, C1 controls, bidirectional overrides, surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff]"
)


def _secret_names(params):
    """Yield the names of parameters whose values must not be shown.

    A parameter is secret by its own name, or by the name it is given as the value of:
    tags[0].key=password tags[0].value=..., updateConfiguration's name and value."""
    lower: dict = {}
    for name in params:
        if _SECRET_NAME.search(name):
            yield name
        elif name.lower().endswith("value"):
            front = name.lower()[: -len("value")]
            lower = lower or {other.lower(): text for other, text in params.items()}
            titles = (lower.get(front + "key"), lower.get(front + "name"))
            if any(isinstance(title, str) and _SECRET_NAME.search(title) for title in titles):
                yield name


def _mask_params(params):
    """Return the parameters with secret values replaced."""
    secret = set(_secret_names(params))
    return {name: MASK if name in secret else text for name, text in params.items()}


def _mask_header(name, value):
    """Return a header's line, its value replaced if it may be secret."""
    return f"{name}: {MASK if _SECRET_HEADER.search(name) else value}"


def _mask_address(endpoint):
    """Return an address without user and password, query and fragment. Takes any text.

    A password may hold / ? or #, so everything up to the last @ goes."""
    pattern = r"((?:[A-Za-z][\w+.-]*:)?//)?(.*)"
    scheme, rest = re.match(pattern, endpoint, re.DOTALL).groups("")  # type: ignore[union-attr]
    return scheme + re.split("[?#]", rest.rpartition("@")[2])[0]


def _mask_text(text, secrets):
    """Return text with secret fields, and the given secrets wherever they stand, replaced."""
    for field in _SECRET_FIELDS:
        text = field.sub(r'\1"' + MASK + r'"\2', text)
    text = _SECRET_ELEMENT.sub(r"\1" + MASK, text)
    for query in _SECRET_QUERIES:
        text = query.sub(r"\1" + MASK, text)
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        if len(secret) > 3:  # shorter ones stand in half of all words
            for form in (secret, cs_encode(secret), quote(secret), jsonlib.dumps(secret)[1:-1]):
                text = text.replace(form, MASK)
    return text


def _escape_unprintable(text):
    """Return text that is safe for a terminal to show."""
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], text)


def _write_stderr(text):
    """Write a line to standard error; a broken standard error does not stop a program.

    One write for all of it, so that threads do not write into each other's lines."""
    try:
        sys.stderr.write(_escape_unprintable(text) + "\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass


def _trace_request(request):
    """Show a request as it goes out, secrets replaced in place."""
    lines = [f"{request.method} {request.masked_url()}"]
    lines += [_mask_header(name, value) for name, value in request.headers.items()]
    lines.append("")
    if request.method == "POST":
        lines += [_join_query(_mask_params(request.params)), ""]
    _write_stderr("\n".join(lines))


def _trace_response(request, response, seconds):
    """Show an answer as it came, secrets replaced, and how long it took."""
    lines = [f"{response.status_code} {response.reason}"]
    lines += [_mask_header(name, value) for name, value in response.headers.items()]
    lines += ["", response.text, "", f"({seconds * 1000:.0f} ms)", ""]
    _write_stderr(_mask_text("\n".join(lines), request.all_secrets()))


# --- 5 protocol -----------------------------------------------------------------------------------
# Generators that decide everything and do no I/O. What they yield is done by a driver (room 7),
# which sends back what came of it or throws what was raised:
#     a _Request            is sent, and becomes its _Response
#     a number              of seconds is slept
#     a _Pause              is slept, but ends early when its signal is set
#     a list of generators  is run at once, and becomes the list of their results and exceptions

PAGE_SIZE = 500  # the server's default.page.size, unless the site changed it
PAGES_AHEAD = 4  # page requests of one fetch_list that may be under way at once
MOST_PAGES = 100000  # of one list: a longer walk goes in circles
_AS_WALK = "walk"  # as fetch_list: return the _Walk, along which iter_list goes

# Seconds before a retry, as retry_backoff in SETTINGS says, or a look at a job after one that went
# wrong; if the server asks for a longer wait before a retry, the error is raised.
LONGEST_WAIT = 30.0
LONGEST_HEAD = 8000  # bytes of request line and headers; the server answers 414 over 8192
_SIGNED = 150  # bytes of LONGEST_HEAD that expiry, signature and the request line's words may take

# The first look at a job is due at once (_JobWait).
NEXT_LOOK = 0.5  # the part of the time waited so far that passes before the next look
SHORTEST_PAUSE = 0.1  # the least number of seconds between two looks; poll_interval is the most
OWN_LOOK = 15  # poll_intervals after which a job is asked for singly, whatever a list of jobs says
LEASE = 3.0  # seconds that one caller may take for work that all callers wait for
PATIENCE = 10  # failed looks in a row at a job without job_timeout (long enough for a restart)
_JOB_FAILURE = "Job failure"


# 5.1 Call and request: what is to be sent, and how.

# GET is refused for all but these where enforce.post.requests.and.timestamps is set (ApiServlet,
# since 4.20): the names that match the pattern, and a few commands that are annotated.
_READING = re.compile(r"(?i)(?:get|list|query|find)\w+\Z")
_READING_TOO = frozenset(
    "isaccountallowedtocreateofferingswithtags quotabalance quotaisenabled quotastatement"
    " quotasummary quotatarifflist cloudianisenabled readyforshutdown"
    " verifyoauthcodeandgetuser".split()
)
# These change something under a reading name, so that they must never be repeated.
_CHANGING = re.compile(
    r"(?i)(?:getUploadParamsFor\w*|getDiagnosticsData|listAndSwitchSamlAccount)\Z"
)
# Packing costs more than it saves on the way to the same host.
_LOOPBACK = re.compile(r"https?://(?:127\.|localhost(?:[:/?]|\Z)|\[::1\])")


@functools.lru_cache(maxsize=1024)
def _only_reads(command):
    """Tell whether a command may be repeated: it is known to read and changes nothing."""
    return _may_get(command) and not _CHANGING.match(command)


def _may_get(command):
    """Tell whether the server takes a command by GET, whatever its settings are."""
    return bool(_READING.match(command)) or command.lower() in _READING_TOO


class _Call:
    """One command: what to send, and how its answer is to be read.

    Raises ValueError for what the server would refuse: control characters."""

    def __init__(self, command, params, json=True, opcode_name="command", headers=None):
        self.command = command
        self.json = json
        self.opcode_name = opcode_name
        self.headers = headers and _convert("headers", _parse_headers, headers)
        self.reads = _only_reads(command)
        self.is_login = command.lower() == "login"
        self.is_secret = self.is_login or any(_secret_names(params))
        self.params = {}
        self.has_page = False
        self.expires = None
        self.retries = None  # how often it may be sent again; None: as the client is set
        self.job_id = None  # the id its job gets, if the caller chooses it
        self.total = None  # seconds for one exchange in all, if less than ten times the timeout
        self.response: Any = None  # the last answer

        dropped = {"signature", "signatureversion"} | ({"response"} if json else set())
        for name, text in params.items():
            found = _UNSENDABLE.search(name) or _UNSENDABLE.search(text)
            if found:
                character = f"U+{ord(found.group()):04X}"
                problem = f"the server refuses the character {character}"
                raise ValueError(f"parameter {name!a}: {problem}")
            lower = name.lower()
            if lower == "expires":
                self.expires = text
            elif lower not in dropped:
                self.params[name] = text
                self.has_page = self.has_page or lower == "page"

    def get_param(self, name):
        """Return the text of the parameter of this lower-case name, in any case, or None."""
        return next((text for key, text in self.params.items() if key.lower() == name), None)

    def set_params(self, **values):
        """Set parameters, in place of those that differ by case only."""
        for name, value in values.items():
            for key in [key for key in self.params if key.lower() == name]:
                del self.params[key]
            self.params[name] = str(value)

    def complete_page(self, size):
        """Add a page size to a page; the server refuses one without the other (431)."""
        if self.has_page and self.get_param("pagesize") is None:
            self.set_params(pagesize=size)

    def with_page(self, page, size):
        """Return the same call for one page."""
        import copy

        call = copy.copy(self)
        call.params = dict(self.params)
        call.set_params(page=page, pagesize=size)
        return call

    def choose_job_id(self):
        """Give the job an id that is known before the answer is, so that it can be found again.

        The server takes a `customjobid` from any account, and ignores it where there is no job
        (seen on 4.23)."""
        if self.reads or not self.json or self.command.lower() in ("login", "logout"):
            return  # there is no job, or its id could not be read
        if self.get_param("customjobid") is None:
            import uuid

            self.set_params(customjobid=uuid.uuid4())
        self.job_id = self.get_param("customjobid")


class _Request:
    """One HTTP request: method, url, body and headers as they go out, once it is prepared."""

    cancelled = False  # set by _cut_off(); and `socket` is there while the exchange is under way
    url = body = None

    def __init__(self, client, call, params, secrets):
        self.endpoint = client.endpoint.partition("#")[0]
        self.params = params
        self.secrets = secrets  # values that must not be shown, beside those of secret parameters
        self.signing = None  # (secret, expiration, expires), if it is to be signed
        self.anonymous = False
        self.method = "GET"
        self.headers = {}
        self.timeout = client.timeout
        self.total = 10 * client.timeout
        if call.total is not None:
            self.total = min(call.total, self.total)
        self.verify, self.cert = client._state.get_tls_files()
        self.limit = client._state.max_response_size

    def prepare(self):
        """Sign the parameters and write out url and body.

        This comes when the request is about to be sent, by which time a call of AIOCloudStack has
        its thread: one that waited for it longer than a signature is valid would be refused."""
        if self.signing is not None:
            secret, expiration, expires = self.signing
            seconds = expiration.total_seconds()
            if expires is None and seconds >= 0:
                # The year 9999 is as far as the format goes.
                moment = time.gmtime(min(time.time() + seconds, 253402300799))
                expires = time.strftime("%Y-%m-%dT%H:%M:%S+0000", moment)
            if expires is not None:
                self.params.update(signatureVersion="3", expires=expires)
            self.params["signature"] = sign(self.params, secret)

        query = _join_query(self.params)
        self.url = self.endpoint
        if self.method == "POST":
            self.body = query.encode("ascii")
        else:
            self.url += ("&" if "?" in self.endpoint else "?") + query

    def masked_url(self):
        """Return the url as a person may see it."""
        url = _mask_address(self.endpoint)
        if not urlsplit(self.endpoint).path:
            url += "/"
        if self.method == "POST":
            return url
        return url + "?" + _join_query(_mask_params(self.params))

    def all_secrets(self):
        """Return the values that must not be shown."""
        return self.secrets + [self.params[name] for name in _secret_names(self.params)]


def _build_request(client, call, login=None, post=False):
    """Return a _Request for a call, anew for each attempt; prepare() will sign it."""
    params = dict(call.params)
    params[call.opcode_name] = call.command
    if call.json:
        params["response"] = "json"
    request = _Request(client, call, params, [client._state.password])

    if login is not None:
        params["sessionkey"] = login.key
        request.secrets += login.cookies.values()
    elif client.key is not None and client._state.username is None:
        for name in [name for name in params if name.lower() == "apikey"]:
            del params[name]
        params["apiKey"] = client.key
        request.secrets.append(client.secret)
        request.signing = (client.secret, client.expiration, call.expires)
    else:
        # With a user name it is to get a session; --dry-run shows it before there is one.
        request.anonymous = not call.is_login and client._state.username is None
    if call.expires is not None:
        params["expires"] = call.expires

    packing = "identity" if _LOOPBACK.match(request.endpoint) else "gzip"
    request.headers = {"User-Agent": "cs/" + __version__, "Accept-Encoding": packing}
    if login is not None and login.cookies:  # an empty header would hide those of a `session`
        pairs = [name + "=" + value for name, value in login.cookies.items()]
        request.headers["Cookie"] = "; ".join(pairs)
    if client.headers or call.headers:
        request.headers = _merge_headers(request.headers, client.headers, call.headers or {})

    if _needs_post(client, call, request, post):
        request.method = "POST"
        request.headers["Content-Type"] = "application/x-www-form-urlencoded"
    return request


def _merge_headers(*maps):
    """Merge headers: later ones win, names compare without case, None takes one out."""
    merged = {name.lower(): (name, value) for headers in maps for name, value in headers.items()}
    for name, value in merged.values():
        _check_header(name, value)  # again: client.headers is the program's to change

    return {
        name: value.decode("latin-1") if isinstance(value, bytes) else str(value)
        for name, value in merged.values()
        if value is not None
    }


def _needs_post(client, call, request, post):
    """Tell whether GET cannot do.

    An anonymous request goes to the integration port, which reads no body; what it holds of secrets
    is then in its address."""
    if request.anonymous:
        return False
    if post or call.is_secret or client.method == "post":
        return True
    if client._server.post_only and not _may_get(call.command):
        return True

    # A server takes so much in a GET. A character is twelve bytes at the most, mostly one.
    head = sum(len(name) + len(value) + 4 for name, value in request.headers.items())
    room = LONGEST_HEAD - _SIGNED - len(request.endpoint) - head
    raw = sum(len(name) + len(text) + 2 for name, text in request.params.items())
    return 12 * raw > room and len(_join_query(request.params)) > room


def _check_client(client):
    """Refuse settings that make no sense together. Raises ValueError that names them."""
    endpoint, state = client.endpoint, client._state
    user = (client.key, client.secret, state.username, state.password)
    seen = (endpoint, user, state.pem_path, state.cert_key)
    if state.checked == seen:
        return

    _check_endpoint(endpoint)
    for pair in (("key", "secret"), ("username", "password")):
        missing = [name for name in pair if client.get_setting(name) is None]
        if len(missing) == 1:
            raise ValueError(f"{missing[0]}: missing; {pair[0]} and {pair[1]} go together")
    if state.cert_key is not None and state.pem_path is None:
        raise ValueError("cert: missing, although cert_key is given; they go together")
    if client.key is not None and state.username is not None:
        raise ValueError(
            "username: given together with key; use either key and secret or username and password"
        )
    state.checked = seen


def _check_endpoint(endpoint):
    """Raise ValueError for an endpoint that cannot be used, without its secret parts."""
    if not endpoint:
        raise ValueError(
            "endpoint: missing; it is the URL of the API, such as https://host/client/api"
        )
    try:
        parts = urlsplit(endpoint)
        proper = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        proper = False
    if not proper or re.search(r"[^\x21-\x7e]", endpoint):
        problem = "is not an http:// or https:// address"
        if proper and re.search(r"[^\x00-\x7f]", endpoint):
            problem = "must be ASCII: write the host name as xn--..., other characters as %XX"
        raise ValueError(f"endpoint: {_mask_address(endpoint)!a} {problem}")
    if parts.username is not None:
        raise ValueError("endpoint: a user name or password cannot be part of the address")


# 5.2 Answer: what an HTTP response means.


def _refuse_constant(name):
    """Refuse NaN and Infinity, which Python's decoder would take."""
    raise ValueError(f"{name} is not JSON")


def _parse_short_int(digits):
    """Refuse integers that older Pythons take minutes for; later ones do that by themselves."""
    if len(digits) > 4300:
        raise ValueError("a number of too many digits")
    return int(digits)


# strict=False: the server leaves raw control characters in strings.
_JSON = jsonlib.JSONDecoder(
    strict=False,
    parse_constant=_refuse_constant,
    parse_int=None if hasattr(sys, "get_int_max_str_digits") else _parse_short_int,
)
_LONG_ANSWER = 1 << 13  # characters; below, the collector hardly runs


def _parse_json(response):
    """Return the answer as JSON. Raises ValueError or RecursionError.

    Python's cyclic garbage collector rests while a long answer is decoded: that makes thousands of
    containers that can hold no cycle, and looking through them again and again took half the time
    of a long list. The decoder is C code that no other thread interrupts; a thread that comes in
    between finds the collector off, as it does where a program has turned it off, and leaves it."""
    text = response.content.decode("utf-8", "replace")
    text = text[1:] if text[:1] == "\ufeff" else text  # a byte order mark
    if len(text) < _LONG_ANSWER or not gc.isenabled():
        return _JSON.decode(text)

    try:
        gc.disable()
        return _JSON.decode(text)
    finally:
        gc.enable()


def _decode_answer(client, call, response):
    """Return the value under the answer's single top-level key, or raise what the answer means.

    About 85 commands answer under another key than their own, so any single key is taken. Bodies
    of any status may be the servlet container's HTML: parsing decides, not the status."""
    code = response.status_code
    status = f"HTTP {code} {response.reason}"
    if 300 <= code < 400 and response.headers.get("Location"):
        place = _mask_address(response.headers.get("Location"))
        detail = f"Redirects are not followed; the new address is {place!a}. Set the endpoint to"
        raise CloudStackException(status, detail + " where the API is.", response=response)
    if not call.json:
        if code != 200:
            raise _make_api_error(code, response.text, response)
        return response.text

    if code == 200 and not response.content:
        detail = "The answer is empty: an unexpected error inside the server."
        raise CloudStackException(status, detail, response=response)
    kind = response.headers.get("Content-Type")
    if code == 200 and kind and "json" not in kind.lower() and "javascript" not in kind.lower():
        message = f"JSON (application/json) was expected, got {kind!r}"
        raise CloudStackException(message, response=response)
    try:
        document = _parse_json(response)
    except (ValueError, RecursionError):
        broken = "Malformed JSON document. " if code == 200 else ""
        advice = f"Make sure endpoint URL {_mask_address(client.endpoint)!r} is correct."
        raise CloudStackException(status, broken + advice, response=response) from None

    if not isinstance(document, dict) or len(document) != 1:
        raise _unexpected("a single top-level key was expected", response)
    (value,) = document.values()
    if code != 200:
        raise _make_api_error(code, value, response)
    return value


def _make_api_error(code, said, response):
    """Return the exception for an answer that is the server's own error."""
    message = f"HTTP {code} response from CloudStack"
    if code == 511:
        message += " (two-factor authentication is required: use an API key and secret, which it"
        message += " does not apply to)"
    return CloudStackApiException(message, error=said, response=response)


def _unexpected(detail, response=None):
    """Return the exception for JSON that CloudStack would not answer."""
    return CloudStackException("Unexpected response from CloudStack", detail, response=response)


def _find_rows(answer):
    """Return the answer's rows: its only list, whatever its name. None for an object."""
    if not isinstance(answer, dict):
        return None
    lists = [value for value in answer.values() if isinstance(value, list)]
    if len(lists) == 1 and "id" not in answer:  # with an id it is an object that holds a list
        return lists[0]
    return None if set(answer) - {"count"} else []  # nothing but a count is an empty list


# 5.3 Retry: whether and when a command is sent again.

_RETRY_AFTER = re.compile(r"(?i)retry after\s*\[?\s*([0-9]+)\s*\]?\s*ms")


def _status_of(error):
    """Return the HTTP status behind an exception, or None."""
    return getattr(error.response, "status_code", None)


def _was_rejected(error):
    """Tell whether the server says that it did not run the command: throttled, in maintenance.

    Only what certainly did not run: a mere "try later" belongs to _is_transient."""
    said = isinstance(error.error, dict) and "errorcode" in error.error
    return _status_of(error) == 429 or (_status_of(error) == 503 and said)


def _is_transient(error):
    """Tell whether the same reading request may well succeed a little later.

    For a command that changes something see _was_rejected, for a look at a job
    _poll_may_continue (5.6)."""
    if error.response is None:
        return isinstance(error, OSError)
    return _status_of(error) in (429, 502, 503, 504)


def _asked_delay(error):
    """Return the seconds that the server asked to wait, or None.

    They stand in the text of its answer (ApiRateLimitServiceImpl's 429) or in Retry-After."""
    if error.response is None:
        return None
    found = _RETRY_AFTER.search(error.response.text)
    if found:
        return float(found.group(1)) / 1000.0
    after = (error.response.headers.get("Retry-After") or "").strip()
    if re.match(r"[0-9]+\Z", after):
        return float(after)

    from email.utils import mktime_tz, parsedate_tz

    try:
        moment = parsedate_tz(after)
        return None if moment is None else max(0.0, mktime_tz(moment) - time.time())
    except (OverflowError, TypeError, ValueError):
        return None


def _random():
    """Return a number from 0 to 1. Importing random costs milliseconds; only a retry needs it."""
    import random

    return random.random()


def backoff(attempt: int, first: float) -> float:
    """Return the seconds before retry number `attempt`, counted from 0.

    Exponential, half of it jitter, at most LONGEST_WAIT."""
    return min(LONGEST_WAIT, first * 2.0 ** min(attempt, 32)) * (0.5 + _random() / 2)


def _retry_delay(client, call, error, attempt):
    """Return the seconds until a call may be sent again, or None if it may not.

    A command that changes something is sent again only if the server did not run it."""
    if not (error.unsent or _was_rejected(error) or (call.reads and _is_transient(error))):
        return None
    asked = _asked_delay(error) or 0.0
    return None if asked > LONGEST_WAIT else max(asked, backoff(attempt, client.retry_backoff))


def _wants_post(error):
    """Tell whether the server asks for POST (ApiServlet, since 4.20)."""
    if _status_of(error) != 400 or not isinstance(error, CloudStackApiException):
        return False
    return "using post request" in error.response.text.lower()


def _mark_outcome(call, error):
    """Say on the exception whether the command may have run."""
    if error.outcome_unknown:
        return
    answered = isinstance(error.error, dict) or 300 <= (_status_of(error) or 0) < 500
    error.outcome_unknown = not (call.reads or error.unsent or answered)
    if error.outcome_unknown and error.response is None and error.args:
        hint = "may have run, its outcome is unknown: look before it is sent again"
        _add_hint(error, f"{call.command} {hint}")


def _add_hint(error, hint):
    """Add a hint to an exception's message; of an OSError's arguments a third would be lost."""
    error.args = (error.args[0], "; ".join([str(arg) for arg in error.args[1:]] + [hint]))


def _send_with_retries(client, call):
    """Send one command until it is answered or may not be sent again; returns the answer."""
    attempt = 0
    post = renewed = replayed = False
    retries = client.retry if call.retries is None else call.retries
    while True:
        login = None
        if client._state.username is not None and not call.is_login:
            login = yield from _current_login(client)
        request = _build_request(client, call, login, post)
        try:
            call.response = yield request
            return _decode_answer(client, call, call.response)
        except CloudStackException as error:
            if _wants_post(error) and not post and not request.anonymous:
                post = client._server.post_only = True
                continue
            if login is not None and _status_of(error) == 401 and not renewed:
                renewed = True
                if client._server.login is login:  # else another caller has renewed it already
                    client._server.login = None
                continue
            if call.reads and error.stale and not replayed:
                replayed = True
                continue
            delay = _retry_delay(client, call, error, attempt) if attempt < retries else None
            if delay is None:
                _mark_outcome(call, error)
                raise
        attempt += 1
        yield delay


# 5.4 Session: user name and password instead of key and secret; and what callers share.

_Login = collections.namedtuple("_Login", "key cookies")


class _Server:
    """Keeps what was learned about the server behind one endpoint, as one user."""

    def __init__(self):
        self.post_only = False  # commands that change something must be POST
        self.page_limit = PAGE_SIZE
        self.login = None  # a _Login, while there is a session
        self.login_error = None
        self.login_turn = _Turn()
        self.jobs = _JobList()


class _Signal:
    """Wakes all callers that wait for the same thing, in threads and event loops alike."""

    def __init__(self):
        self.wakers = set()  # functions to be called whenever it is set
        self.count = 0  # another one whenever it is set: noted before a look, it misses nothing
        self._counter = itertools.count(1)  # which threads may use at once

    def set(self):
        """Wake all that wait."""
        self.count = next(self._counter)
        for wake in list(self.wakers):
            wake()


# A step of the protocol: sleep for `seconds`, or until the signal's count is another one.
_Pause = collections.namedtuple("_Pause", "seconds signal count")


class _Turn:
    """Lets one caller do work that many need; `done` is set when it is given back.

    It is lent for LEASE seconds: its holder may be a task of an event loop that was stopped, and
    must not hold up the others for ever."""

    def __init__(self):
        self.done = _Signal()
        self._lock = threading.Lock()
        self._holder = None
        self._until = 0.0

    def take(self):
        """Return a token for give_back(), or None while another caller has the turn."""
        with self._lock:
            if self._holder is not None and _clock() < self._until:
                return None
            self._until = _clock() + LEASE
            self._holder = object()
            return self._holder

    def give_back(self, token):
        """End the turn and wake those who waited for it."""
        with self._lock:
            if self._holder is token:
                self._holder = None
        self.done.set()


def _current_login(client):
    """Return the session to send with, made if there is none yet.

    Of many callers one logs in; the others wait for it (LEASE seconds at a time) and share its
    failure, since wrong passwords in a row would lock the account."""
    server = client._server
    turn = server.login_turn
    while server.login is None:
        count = turn.done.count
        token = turn.take()
        if token is not None:
            yield from _log_in_for_all(client, server, token)
            continue

        yield _Pause(LEASE, turn.done, count)
        if server.login is None and server.login_error is not None:
            import copy

            raise copy.copy(server.login_error)  # each caller writes its own job's id on it
    return server.login


def _log_in_for_all(client, server, token):
    """Log in unless another caller has, and leave session or failure with the server."""
    try:
        if server.login is None:
            server.login_error = None
            server.login = yield from _log_in(client)
    except CloudStackException as error:
        server.login_error = error
        raise
    finally:
        server.login_turn.give_back(token)


def _log_in(client):
    """Log in and return the _Login: the session key, and the cookies that go beside it."""
    state = client._state
    params = {
        "username": state.username,
        "password": state.password,
        "domain": state.domain or "/",
    }
    call = _Call("login", params)
    answer = yield from _send_with_retries(client, call)
    key = answer.get("sessionkey") if isinstance(answer, dict) else None
    if not isinstance(key, str) or not key or _UNSENDABLE.search(key):
        raise _unexpected("login gave no session key", call.response)
    return _Login(key, call.response.cookies())


def _log_out(client):
    """End the session, if there is one; the server ends it by itself after half an hour idle."""
    login = client._server.login
    if login is None:
        return
    client._server.login = None
    try:
        yield _build_request(client, _Call("logout", {}), login, post=True)
    except CloudStackException:
        pass


# 5.5 Pages: all rows of a list.

# How the server says that its limit is lower (a 431). Another wording is an alternative in front of
# the one group: (?:page ?size.*max allowed|another).*?(?P<limit>...)
_PAGE_LIMIT_TEXT = re.compile(r"(?i)page ?size.*max allowed.*?(?P<limit>[0-9]{1,9})")


def _is_same_page(rows, page):
    """Tell whether two pages hold the same rows in the same order.

    Rows are the same if they are equal, or go by the same ids and names while figures in them
    have moved. The id alone would not do: listTemplates repeats it for every zone."""
    if len(rows) != len(page):
        return False
    if rows == page:
        return True

    ids = [row.get("id") if isinstance(row, dict) else None for row in rows]
    if len(rows) < 2 or None in ids:  # a page of one row says too little
        return False
    return all(
        isinstance(other, dict) and _identity(row) == _identity(other)
        for row, other in zip(rows, page)
    )


def _identity(row):
    """Return the part of a row that stays while its figures move."""
    return {name: value for name, value in row.items() if name.endswith(("id", "name"))}


class _Walk:
    """Fetches all pages of one list, in order.

    A page is never taken for the last by its length alone: `count` is the total for most commands,
    the length of this page for some, and missing for others. So the walk continues while a page is
    full or fewer than `count` rows were seen. It ends with an empty page, with one that repeats the
    one before it or the first (commands that ignore `page`, servers that begin anew), or with one
    that is longer than asked for (commands that ignore `pagesize`, too)."""

    def __init__(self, client, call, ahead=1, report=None):
        self.client = client
        self.call = call
        self.ahead = ahead
        self.report = report
        self.page = self._read_number("page", 1)
        self.size = self._read_number("pagesize", client._server.page_limit)
        self.first = None  # the first answer, which may turn out not to be a list
        self.total = None  # rows there are, as the server says
        self.seen = 0
        self.skip = 0  # rows of the first page that stand before those asked for
        self.pages = 0
        self.first_rows = self.previous = None
        self.buffered = []
        self.done = False

    def _read_number(self, name, default):
        text = self.call.get_param(name)
        return _convert(f"parameter {name!r}", _positive_count, text) if text else default

    def next_page(self):
        """Return the next page's rows, or None after the last; to be used by `yield from`."""
        while not self.done:
            if not self.buffered:
                yield from self._fetch()
            answer = self.buffered.pop(0)
            if isinstance(answer, BaseException):
                self.done = True
                raise answer
            rows = self._accept(answer)
            if rows and self.skip:
                rows, self.skip = rows[self.skip :], 0
            if rows:
                if self.report:
                    self.report("rows", self.seen, self.total)
                return rows
        return None

    def is_list(self):
        """Tell whether the answer was a list at all."""
        return _find_rows(self.first) is not None

    def _fetch(self):
        """Fill the buffer with at least one answer."""
        pages = self._sure_pages()
        if len(pages) > 1:
            yield from self._fetch_at_once(pages)
        if not self.buffered:
            call = self.call.with_page(self.page, self.size)
            self.buffered = [(yield from self._send_within_limit(call))]

    def _sure_pages(self):
        """Return the pages to come that may be asked for at once.

        They are sure only if the last page was full and `count` says that there are more. A
        program's own session may not be safe in threads: then there are none."""
        full = len(self.previous or ()) >= self.size
        if self.ahead < 2 or not self.total or not full or self.client.session is not None:
            return ()
        # And the one after the last, which has to be looked at if the last is full.
        return range(self.page, self.page + (self.total - self.seen) // self.size + 1)

    def _fetch_at_once(self, pages):
        """Fetch pages by several workers that share them."""
        todo = iter(pages)
        answers: dict = {}
        halt: list = []
        try:
            workers = [self._page_worker(todo, answers, halt) for _ in pages[: self.ahead]]
            outcomes = yield workers
        finally:
            halt.append(True)  # a caller who was interrupted wants no more of them
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

        # Up to the first gap, lest rows are lost in it: what follows is read again, from there.
        self.buffered = [
            answers[page] for page in itertools.takewhile(answers.__contains__, pages)
        ]

    def _page_worker(self, todo, answers, halt):
        """Ask for one shared page after another, until none is left or a worker called a halt.

        The first page that is not full, or repeats an earlier one, is the end, whatever the count
        said. The halt is looked at first: a page that was taken is always asked for."""
        while not halt:
            page = next(todo, None)
            if page is None:
                break
            try:
                call = self.call.with_page(page, self.size)
                answers[page] = yield from _send_with_retries(self.client, call)
                rows = _find_rows(answers[page])
                good = rows is not None and len(rows) == self.size and not self._repeats(rows)
            except CloudStackException as error:
                answers[page], good = error, False
            if self.report:
                seen = min(self.seen + len(answers) * self.size, self.total)
                self.report("rows", seen, self.total)
            if not good:
                halt.append(page)

    def _send_within_limit(self, call):
        """Send for one page; if the server says on the first that its limit is lower, again.

        The limit is remembered for the client's other lists."""
        try:
            return (yield from _send_with_retries(self.client, call))
        except CloudStackApiException as error:
            text = error.response.text if _status_of(error) == 431 else ""
            found = _PAGE_LIMIT_TEXT.search(text)
            limit = int(found.group("limit")) if found else 0
            if self.first is not None or not 0 < limit < self.size:
                raise

        start = (self.page - 1) * self.size
        self.page, self.skip = start // limit + 1, start % limit
        self.client._server.page_limit = self.size = limit
        return (yield from _send_with_retries(self.client, call.with_page(self.page, limit)))

    def _accept(self, answer):
        """Return the new rows of an answer, and note whether it was the last."""
        rows = _find_rows(answer)
        if self.first is None:
            self.first = answer
        if not rows or self._repeats(rows):
            self.done = True
            return None
        self.pages += 1
        if self.pages > MOST_PAGES:
            self.done = True
            raise _unexpected(f"a list of more than {MOST_PAGES} pages")

        self.seen += len(rows)
        count = answer.get("count")
        if isinstance(count, int) and count > len(rows):
            self.total = count
        short = len(rows) < self.size and self.seen >= (self.total or 0)
        self.done = short or len(rows) > self.size
        self.previous = rows
        self.first_rows = self.first_rows or rows
        self.page += 1
        return rows

    def _repeats(self, rows):
        """Tell whether a page is the one before it, or the first, once more."""
        earlier = (self.previous, self.first_rows)
        return any(_is_same_page(rows, page) for page in earlier if page)


def _collect_rows(client, call):
    """Return every row of a list; any other answer as it is."""
    walk = _Walk(client, call, PAGES_AHEAD, client._state.progress)
    everything: list = []
    while True:
        rows = yield from walk.next_page()
        if rows is None:
            return everything if walk.is_list() else walk.first
        everything += rows


# 5.6 Jobs: submit, look, wait.


def _run_command(client, command, params, json, opcode_name, fetch_list, headers, fetch_result):
    """Carry out a whole call: returns the answer, all rows of a list, or the result of a job."""
    if fetch_result is None:
        fetch_result = client.fetch_result
    elif type(fetch_result) is not bool:
        fetch_result = _convert("fetch_result", _parse_flag, fetch_result)
    if type(fetch_list) is not bool and fetch_list != _AS_WALK:
        fetch_list = _convert("fetch_list", _parse_flag, fetch_list)
    call = _Call(command, flatten(params), json, opcode_name, headers)
    _check_client(client)
    if fetch_list and not call.reads:  # a second page would carry it out a second time
        if fetch_list == _AS_WALK:
            raise ValueError(f"{command} changes something; it cannot be read page by page")
        fetch_list = False
    if fetch_list == _AS_WALK:
        return _Walk(client, call, report=client._state.progress)

    if call.has_page:
        call.complete_page(client._server.page_limit)
    if client._state.recover:
        call.choose_job_id()
    if call.job_id is not None:
        answer = yield from _submit(client, call)
    elif fetch_list:
        answer = yield from _collect_rows(client, call)
    else:
        answer = yield from _send_with_retries(client, call)
    # A submission's answer has a jobid and no status, which queryAsyncJobResult's own has.
    if fetch_result and isinstance(answer, dict) and "jobid" in answer:
        if "jobstatus" not in answer:
            answer = yield from _await_job(client, call, answer["jobid"])
    return answer


class _JobList:
    """Finds out once, for all callers that wait, which jobs are pending.

    listAsyncJobs says in one request what single looks would ask for each. It serves threads and
    event loops alike: the caller who needs news first fetches them, and all others are woken to
    look at them. A job that is not in the list is asked for singly, so that whatever the list
    leaves out (another account's jobs, rows that moved between pages) costs a request and nothing
    else."""

    FEWEST = 4  # waiters; for fewer, asking singly is as cheap
    USELESS = 600.0  # seconds to do without a list that does not help

    def __init__(self):
        self.waiting = set()
        self.needed = self.FEWEST  # waiters, for the list to be worth its requests
        self.reading = _Turn()
        self.pending = set()
        self.asked_at = float("-inf")  # when it was asked for: what it says is at least that new
        self.off_until = 0.0
        self.failures = 0  # in a row
        self.in_vain = 0  # looks at jobs that the list had not shown, though they were pending

    def leave(self, poll):
        """Count one waiter less."""
        self.waiting.discard(poll)
        if not self.waiting:
            self.needed = self.FEWEST

    def is_used(self):
        """Tell whether the list is worth its requests now."""
        return len(self.waiting) >= self.needed and self.off_until <= _clock()

    def make_pause(self, seconds):
        """Return the step that sleeps until the list was read anew, or for so many seconds."""
        return _Pause(seconds, self.reading.done, self.reading.done.count)

    def refresh(self, client, call):
        """Read the list, or wait for the caller who does; look for news afterwards."""
        pause = self.make_pause(max(SHORTEST_PAUSE, client.poll_interval))
        token = self.reading.take()
        if token is None:
            yield pause
            return
        try:
            yield from self._read(client, call)
        finally:
            self.reading.give_back(token)

    def _read(self, client, call):
        """Read the list; if that fails, do without it for a while."""
        asked_at = _clock()
        listing = _Call("listAsyncJobs", {}, True, call.opcode_name, call.headers)
        listing.retries = 0
        listing.total = max(1.0, client.poll_interval)  # a slower one saves nobody anything
        try:
            rows = yield from self._read_rows(client, listing)
        except CloudStackException as error:
            # Transient trouble passes; a role that may not list jobs stays a while.
            self.failures += 1
            transient = _is_transient(error) and self.failures < PATIENCE
            self.off_until = _clock() + (client.poll_interval if transient else self.USELESS)
            return

        self.failures = 0
        if rows is not None:
            # Servers up to 4.19 list finished jobs, too.
            pending = [row for row in rows if str(row.get("jobstatus", 0)) == "0"]
            self.pending = {str(row.get("jobid")) for row in pending}
            self.asked_at = asked_at

    def _read_rows(self, client, listing):
        """Return all rows of the list, or None if it takes more requests than it saves.

        That can be so if it holds the jobs of others, too; it is tried again when there are twice
        as many waiters."""
        walk = _Walk(client, listing)
        found = []
        while not walk.done and walk.pages < len(self.waiting) // 2:
            rows = yield from walk.next_page()
            found += [row for row in rows or () if isinstance(row, dict)]
        if not walk.done:
            self.needed = max(self.FEWEST, 2 * len(self.waiting))
            return None
        if not walk.is_list():
            raise CloudStackException("listAsyncJobs is of no use here")
        return found

    def note_unlisted(self):
        """Note a pending job that the list did not show; with too many, do without the list."""
        self.in_vain += 1
        if self.in_vain > len(self.waiting):
            self.in_vain = 0
            self.off_until = _clock() + self.USELESS


class _JobWait:
    """Keeps the times of one caller's looks at its job: the first is due at once."""

    def __init__(self, client):
        self.client = client
        self.started = self.due = self.looked = _clock()
        # When the job was last known to run; a list asked for in this very moment counts, too.
        self.news = self.started - 1e-6
        limit = client.job_timeout
        self.deadline = float("inf") if limit is None else self.started + limit
        self.was_listed = False
        self.is_missing = False  # from a list that should show it
        self.failures = 0  # in a row

    def found_pending(self, at):
        """Note that the job was pending at that moment, and set the next look."""
        self.news = at
        self.failures = 0
        self.set_due(at)

    def set_due(self, at):
        """Set the next look, at growing distances.

        So a short job is seen early, and a long one costs few looks."""
        growing = max(SHORTEST_PAUSE, NEXT_LOOK * (at - self.started))
        self.due = _clock() + min(self.client.poll_interval, growing)

    def may_continue(self, error):
        """Set the next look after one that went wrong; False if that ends the wait.

        It does if the server says something about the job, or if trouble has lasted too long."""
        patient = self.client.job_timeout is not None or self.failures + 1 < PATIENCE
        if not _poll_may_continue(error) or not patient:
            return False
        # Growing also where poll_interval is 0, and not beyond what a float holds.
        growing = max(0.001, self.client.poll_interval) * 2.0 ** min(self.failures, 32)
        self.due = _clock() + min(LONGEST_WAIT, max(_asked_delay(error) or 0.0, growing))
        self.failures += 1
        return True

    def seconds_left(self):
        """Return the seconds until the next look."""
        return max(0.0, min(self.due, self.deadline) - _clock())


def _poll_may_continue(error):
    """Tell whether to look again after a look that went wrong.

    So it is without an answer, after a page that is not CloudStack's, and after a 429 or 503. Any
    other error that CloudStack states in JSON is about the job: _is_transient would be too wide."""
    if not isinstance(error, CloudStackApiException):
        return True
    if error.args[0] == _JOB_FAILURE:
        return False
    return _status_of(error) in (429, 503) or not isinstance(error.error, dict)


def _make_poll(call, jobid):
    """Return the call that looks at a job, sent as the one that started it. Raises ValueError."""
    params = {"jobid": str(jobid)}
    poll = _Call("queryAsyncJobResult", params, True, call.opcode_name, call.headers)
    poll.retries = 0
    return poll


def _await_job(client, call, jobid):
    """Wait for a job; returns its jobresult. Anything raised meanwhile carries the job's id."""
    jobs = client._server.jobs
    poll = None
    try:
        try:
            poll = _make_poll(call, jobid)
        except ValueError as error:
            raise _unexpected(str(error)) from None
        jobs.waiting.add(poll)
        return (yield from _look_until_done(client, call, poll))
    except BaseException as error:  # KeyboardInterrupt and CancelledError, too
        error.jobid = str(jobid)  # type: ignore[attr-defined]
        raise
    finally:
        jobs.leave(poll)


def _look_until_done(client, call, poll):
    """Look at a job at once, then at growing distances, and once more at the deadline.

    Trouble on the way (no answer, one that is not CloudStack's, 429, 503) is ridden out for as
    long as the deadline allows, or PATIENCE times in a row if there is none."""
    jobs = client._server.jobs
    wait = _JobWait(client)
    answered = None
    while True:
        if client._state.progress:
            client._state.progress("job", call.command, _clock() - wait.started)
        if not (yield from _wait_for_look(client, call, poll, wait)):
            continue

        wait.looked = _clock()
        is_last = wait.looked >= wait.deadline
        poll.total = max(0.0, wait.deadline - wait.looked) + client.timeout
        try:
            answer = yield from _send_with_retries(client, poll)
            answered = poll.response
            finished, result = _read_job(answer, answered)
            if finished:
                return result
            wait.found_pending(wait.looked)
            if wait.is_missing:
                jobs.note_unlisted()
        except CloudStackException as error:
            answered = error.response or answered
            if not wait.may_continue(error):
                raise
        if is_last:
            response = answered and answered.with_status(408, "Request Timeout")
            message = "Timeout waiting for async job result"
            raise CloudStackJobTimeout(message, poll.params["jobid"], response=response)


def _wait_for_look(client, call, poll, wait):
    """Sleep until a look at the job itself is due; False if the list of jobs spares that look.

    The list spares it while it shows the job as pending. The job is asked for singly without a
    list, when the list no longer shows it, and now and then in any case."""
    jobs = client._server.jobs
    wait.is_missing = False
    while jobs.is_used() and not wait.failures:
        pause = jobs.make_pause(wait.seconds_left())
        if jobs.asked_at > wait.news:
            if poll.params["jobid"] in jobs.pending:
                return _note_listed(client, jobs, wait)
            if wait.was_listed or not pause.seconds:
                wait.was_listed, wait.is_missing = False, True
                return True

        if pause.seconds:
            yield pause
        elif _clock() >= wait.deadline:
            return True
        elif _clock() - jobs.asked_at < min(SHORTEST_PAUSE, client.poll_interval):
            yield jobs.make_pause(SHORTEST_PAUSE)
        elif _clock() > wait.due + max(1.0, client.poll_interval):
            return True  # another caller reads the list, and does not come back
        else:
            yield from jobs.refresh(client, call)

    if wait.seconds_left():
        yield wait.seconds_left()
    return True


def _note_listed(client, jobs, wait):
    """Set the next look at a job that the list shows; True if it is to be asked for singly now.

    That is so at the deadline, and now and then: no list is believed for ever. (Servers up to 4.19
    list finished jobs, too.)"""
    wait.was_listed = True
    jobs.in_vain = 0
    wait.found_pending(jobs.asked_at)
    own_look = wait.looked + OWN_LOOK * max(SHORTEST_PAUSE, client.poll_interval)
    return _clock() >= min(own_look, wait.deadline)


def _read_job_status(answer, response):
    """Return jobstatus out of queryAsyncJobResult's answer. Raises CloudStackException without."""
    try:
        return int(answer["jobstatus"])
    except (KeyError, OverflowError, TypeError, ValueError):
        raise _unexpected("queryAsyncJobResult gave no jobstatus", response) from None


def _read_job(answer, response):
    """Return (finished, result) out of queryAsyncJobResult's answer.

    Raises CloudStackApiException for a failed job. That may come without jobresult: the server was
    restarted, or its queue cancelled."""
    status = _read_job_status(answer, response)
    result = answer.get("jobresult")
    if status == 0:
        return False, None
    if status == 1:
        return True, {} if result is None else result
    said = answer if result is None else result
    raise CloudStackApiException(_JOB_FAILURE, error=said, response=response)


def _resume_wait(client, jobid):
    """Wait for a job that was submitted earlier."""
    _check_client(client)
    call = _Call("queryAsyncJobResult", {"jobid": str(jobid)})
    return (yield from _await_job(client, call, jobid))


# 5.7 Recovery: the job of a command whose answer was lost is found by the id that the command gave
# it. It is only asked for: sent again, even under the same id, the command would be refused and yet
# leave a second machine behind (seen on 4.23).


def _submit(client, call):
    """Send a command that changes something; returns its answer, or one made of its job."""
    try:
        try:
            return (yield from _send_with_retries(client, call))
        except CloudStackException as error:
            if not error.outcome_unknown:
                raise
            lost = error
        return (yield from _find_job(client, call, lost))
    except BaseException as error:
        if not isinstance(error, CloudStackException):  # Ctrl-C, a cancelled task
            error.jobid, error.outcome_unknown = call.job_id, True  # type: ignore[attr-defined]
        raise


def _find_job(client, call, lost):
    """Ask for the job at once and at growing distances, riding out trouble as a wait does.

    Raises the error by which the answer was lost, once the server has not known the job for
    `timeout` seconds in a row."""
    poll = _make_poll(call, call.job_id)
    wait = _JobWait(client)
    unknown_since = None
    while True:
        asked_at = _clock()
        try:
            answer = yield from _send_with_retries(client, poll)
            _read_job_status(answer, poll.response)
            return _make_submission(answer, call.job_id)
        except CloudStackException as error:
            if isinstance(error, CloudStackApiException) and _status_of(error) == 431:
                unknown_since = asked_at if unknown_since is None else unknown_since
                wait.set_due(asked_at)
                is_over = asked_at - unknown_since >= client.timeout
            else:
                unknown_since = None
                is_over = not wait.may_continue(error)

        if is_over or asked_at >= wait.deadline:
            break
        yield wait.seconds_left()

    said = "the server knows no job" if unknown_since else "the server could not be asked for job"
    later = f"wait_job() or `cs --wait {call.job_id}` asks again later"
    lost.jobid = call.job_id
    _add_hint(lost, f"{said} {call.job_id}; {later}")
    raise lost


def _make_submission(job, job_id):
    """Return the answer that a submission had, made of its job as the server knows it."""
    answer = {"jobid": job_id}
    if job.get("jobinstanceid") is not None:
        answer["id"] = job["jobinstanceid"]
    return answer


# --- 6 transport ----------------------------------------------------------------------------------
# Everything that opens a socket. http.client only reads answers here: its own connection cannot be
# cut off while it connects, and reaches an https origin through a proxy by private names only.

IDLE = 20.0  # seconds after which a kept connection is not used again; the server closes it at 30
_CHUNK = 1 << 18
_BUFFER = 1 << 14  # the longest record of TLS: with less, a part of one could hide from a poll


class _Response:
    """Holds an answer, read to its end, with the names that requests gives to its parts.

    status_code, reason, headers (a mapping, names in any case), content (bytes), text, ok, json()
    """

    def __init__(self, status_code, reason, headers, content):
        self.status_code = status_code
        self.reason = reason
        self.headers = headers
        self.content = content

    def __repr__(self):
        return f"<Response [{self.status_code}]>"

    @property
    def text(self):
        return self.content.decode("utf-8", "replace")

    @property
    def ok(self):
        return self.status_code < 400

    def json(self):
        return _parse_json(self)

    def with_status(self, status_code, reason):
        """Return the same answer under another status."""
        return _Response(status_code, reason, self.headers, self.content)

    def cookies(self):
        """Return the cookies it sets, {name: value}."""
        lines = self.headers.get_all("Set-Cookie") if hasattr(self.headers, "get_all") else None
        pairs = [line.partition(";")[0].partition("=") for line in lines or []]
        return {name.strip(): value.strip() for name, _, value in pairs if name.strip()}


# 6.1 Route: how requests get to an endpoint.

_Place = collections.namedtuple("_Place", "secure host port")  # secure: TLS is spoken there
# headers: the lines that the proxy wants, in a request to it or in the one for a tunnel. Another
# one is made in _parse_proxy; the last word of each is taken for a secret (_ask_for_tunnel).
_Proxy = collections.namedtuple("_Proxy", "secure host port headers")
_PROXY_ADDRESS = re.compile(
    r"(?:([^/]*)@)?"  # user:password
    r"(\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\]]+)(?::([0-9]{1,5}))?"
    r"(?:[/?#][^@]*)?\Z"  # an @ in here says that the password holds a slash: refuse to guess
)


class _Route:
    """Knows the way to one endpoint: straight, as full URLs to an http proxy, or by a tunnel."""

    def __init__(self, endpoint):
        parts = urlsplit(endpoint)
        secure = parts.scheme == "https"
        usual = _default_port(secure)
        self.origin = _Place(secure, parts.hostname, parts.port or usual)
        self.proxy = _find_proxy(parts)
        self.tunnel = secure and self.proxy is not None
        self.absolute = self.proxy is not None and not secure
        self.host = _join_port(parts.hostname, None if parts.port == usual else parts.port)
        self._start = len(parts.scheme) + len("://") + len(parts.netloc)  # of a URL's target

    def make_head(self, request):
        """Return the request line and headers, as bytes."""
        target = request.url
        if not self.absolute:
            target = target[self._start :]
            if target[:1] != "/":
                target = "/" + target

        lines = [f"{request.method} {target} HTTP/1.1"]
        if "host" not in map(str.lower, request.headers):
            lines.append("Host: " + self.host)
        lines += [f"{name}: {value}" for name, value in request.headers.items()]
        if self.absolute:
            lines += self.proxy.headers
        if request.body is not None:
            lines.append(f"Content-Length: {len(request.body)}")
        return "\r\n".join(lines + ["", ""]).encode("latin-1")


def _default_port(secure):
    return 443 if secure else 80


def _join_port(host, port):
    """Return host:port as a URL has it, IPv6 addresses in brackets."""
    if ":" in host:
        host = f"[{host}]"
    return host if port is None else f"{host}:{port}"


def _find_proxy(parts):
    """Return the _Proxy for an address, or None. Raises OSError for one that cannot be used.

    It stands in the environment; elsewhere than on Unix in the system's settings, too. ALL_PROXY
    counts for a scheme without a proxy of its own, as curl and requests have it."""
    asks_system = os.name != "posix" or sys.platform == "darwin"
    names = (parts.scheme + "_proxy", "all_proxy")
    if not asks_system and not any(name.lower() in names for name in os.environ):
        return None  # importing urllib.request costs as much as a call

    import urllib.request

    proxies = urllib.request.getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or urllib.request.proxy_bypass(parts.netloc):
        return None
    if _is_excluded(parts.hostname, proxies.get("no", "")):
        return None
    return _parse_proxy(address)


def _is_excluded(host, no_proxy):
    """Tell whether NO_PROXY covers a host in a way that urllib does not know.

    That is: by a bare IPv6 address, by a range such as 10.0.0.0/8, or by * in a list."""
    entries = [entry.strip() for entry in no_proxy.split(",")]
    if "*" in entries:
        return True
    if ":" not in host and not host.replace(".", "").isdigit():
        return False

    import ipaddress

    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for entry in entries:
        try:
            if address in ipaddress.ip_network(re.sub(r"[\[\]]", "", entry), strict=False):
                return True
        except ValueError:  # a name
            continue
    return False


def _parse_proxy(address):
    """Return the _Proxy of an address. Raises OSError, which never quotes it, for a wrong one."""
    pattern = r"(?:([A-Za-z][\w+.-]*)://)?(.*)"
    scheme, place = re.match(pattern, address, re.DOTALL).groups()  # type: ignore[union-attr]
    scheme = (scheme or "http").lower()
    if scheme not in ("http", "https"):
        raise OSError(f"{scheme} proxies cannot be used; http and https ones can")
    found = _PROXY_ADDRESS.match(place)
    if not found or not 0 < int(found.group(3) or 1) < 65536:
        wanted = "http://[user:password@]host:port"
        raise OSError(f"the address of the proxy cannot be used; it is to be {wanted}")

    from urllib.parse import unquote

    login, host, port = found.groups()
    headers: tuple = ()
    if login:
        user, _, password = map(unquote, login.partition(":"))
        # surrogateescape: the environment may hold bytes that are not UTF-8
        code = b2a_base64(f"{user}:{password}".encode("utf-8", "surrogateescape"), newline=False)
        headers = ("Proxy-Authorization: Basic " + code.decode("ascii"),)
    secure = scheme == "https"
    return _Proxy(secure, host.strip("[]"), int(port or _default_port(secure)), headers)


# 6.2 Connections: kept ones, new ones, TLS, and how they are cut off.


class _Transport:
    """Sends a _Request and returns its _Response, over kept connections.

    Threads may share it: deque's append and pop are atomic. A fork's child gets one of its own."""

    def __init__(self, keep):
        self.keep = keep
        self._idle = {}  # pool_key -> deque of (socket, since); last in, first out
        self._contexts = {}
        self._routes = {}  # the environment is looked at once for each endpoint

    def __del__(self):
        self.close()

    def close(self):
        """Close the connections that are not in use."""
        # The attribute is missing if an interrupt came before __init__ had set it.
        for idle in list(self.__dict__.get("_idle", {}).values()):
            while idle:
                try:
                    idle.pop()[0].close()
                except (IndexError, OSError):  # another thread was faster
                    pass

    def send(self, request):
        """Send and read one answer of any status.

        Raises CloudStackConnectionError, CloudStackTimeoutError, or ValueError for a setting
        (verify, cert) that cannot be used."""
        flight = _Flight(request)
        try:
            return self._round_trip(flight)
        except _Failed as raised:
            failed = raised
        # Raised out here, so that what http.client quoted is not its context either.
        raise _network_error(failed, request) from _safe_cause(failed.cause)

    def _round_trip(self, flight):
        """Send and read over a kept or a new connection. Raises _Failed."""
        request = flight.request
        route = self._routes.get(request.endpoint) or self._add_route(request.endpoint)
        pool_key = (route.origin, route.proxy, request.verify, request.cert)
        sock = self._checkout(pool_key)
        kept = sock is not None
        if not kept:
            sock = self._connect(route, flight)

        sent = False
        try:
            flight.start_step(sock)
            sent = True
            sock.sendall(route.make_head(request) + (request.body or b""))
            response, reusable = _read_response(flight)
        except BaseException as error:
            _let_go(request)
            sock.close()
            if not _is_failure(error):
                raise
            stale = sent and kept and isinstance(error, ConnectionError)
            raise flight.make_failed(error, unsent=not sent, stale=stale) from None

        # A caller who cancelled meanwhile has taken the socket away, to shut it down.
        if _let_go(request) and reusable:
            self._keep(pool_key, sock)
        else:
            sock.close()
        return response

    def _add_route(self, endpoint):
        try:
            route = self._routes[endpoint] = _Route(endpoint)
        except OSError as error:
            raise _Failed(error, unsent=True) from None
        return route

    def _checkout(self, pool_key):
        """Return the connection that was used last, if it is still good; else None."""
        idle = self._idle.get(pool_key)
        while idle:
            try:
                sock, since = idle.pop()
            except IndexError:  # another thread was faster
                return None
            if _clock() - since < IDLE and not _has_news(sock):
                return sock
            sock.close()
        return None

    def _keep(self, pool_key, sock):
        """Keep a connection for the next request; the oldest one goes if there are too many."""
        idle = self._idle.get(pool_key)
        if idle is None:
            idle = self._idle.setdefault(pool_key, collections.deque())
        idle.append((sock, _clock()))
        if len(idle) > self.keep:
            try:
                idle.popleft()[0].close()
            except IndexError:
                pass

    def _get_context(self, verify, cert):
        """Return the one SSLContext for these settings; making it costs tens of milliseconds."""
        key = (verify, cert)
        if key not in self._contexts:
            self._contexts[key] = _make_context(verify, cert)
        return self._contexts[key]

    def _connect(self, route, flight):
        """Return a new connection to the origin, with TLS to the proxy, tunnel and TLS as needed.

        Raises _Failed(unsent=True), or ValueError for a setting."""
        _response_class()  # imports what reading needs: an interrupt within an import can get lost
        origin, proxy, request = route.origin, route.proxy, flight.request
        context = outer = sock = None
        if origin.secure:
            context = self._get_context(request.verify, request.cert)
        if proxy and proxy.secure:
            outer = self._get_context(request.verify, None)  # our certificate is not for it

        try:
            sock = _dial(proxy or origin, flight)
            if outer:
                sock = _wrap_tls(outer, sock, proxy.host)
                flight.start_step(sock)
                sock.do_handshake()
            if route.tunnel:
                _ask_for_tunnel(route, flight, sock)
            if context:
                sock = _wrap_tls(context, sock, origin.host)
                flight.start_step(sock)
                sock.do_handshake()
        except BaseException as error:
            if sock is not None:
                _let_go(request)
                sock.close()
            if not _is_failure(error):
                raise
            raise flight.make_failed(error, unsent=True, proxy=proxy) from None
        return sock


def _has_news(sock):
    """Tell whether an idle connection was closed by the server, or said something unasked."""
    import select

    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([sock], [], [], 0)[0])


def _dial(place, flight):
    """Connect to the first address of a place that answers, as socket.create_connection does.

    But each socket is known before it connects, so that it can be cut off. (Looking up the name
    takes the time that the system allows for it.)"""
    import socket

    addresses = socket.getaddrinfo(place.host, place.port, 0, socket.SOCK_STREAM)
    for number, (family, kind, protocol, _, address) in enumerate(addresses, 1):
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)  # a system may lack the family
            flight.start_step(sock)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except BaseException as error:
            if sock is not None:
                _let_go(flight.request)
                sock.close()
            if not isinstance(error, OSError) or number == len(addresses):
                raise
    raise OSError("the name has no address")


def _ask_for_tunnel(route, flight, sock):
    """Have the proxy connect to the origin: CONNECT (RFC 9110, 9.3.6)."""
    place = _join_port(route.origin.host, route.origin.port)
    lines = [f"CONNECT {place} HTTP/1.1", "Host: " + place, *route.proxy.headers]
    flight.start_step(sock)
    sock.sendall("\r\n".join(lines + ["", ""]).encode("latin-1"))

    response = _response_class()(_AnswerReader(flight, _BUFFER), method="CONNECT")
    try:
        response.begin()
    finally:
        response.close()
    if not 200 <= response.status < 300:
        reason = _mask_text(response.reason, [line.split()[-1] for line in route.proxy.headers])
        raise OSError(f"Tunnel connection failed: {response.status} {reason}")


def _wrap_tls(context, sock, host):
    """Return TLS over a connection, its handshake yet to come.

    The connection must be known by then, so that it can be cut off."""
    if hasattr(sock, "do_handshake"):  # it is TLS already, to a proxy
        return _InnerTls(context, sock, host)
    return context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)


class _InnerTls:
    """Speaks TLS inside the TLS connection to an https proxy, as wrap_socket() cannot."""

    def __init__(self, context, outer, host):
        import ssl

        self.outer = outer
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self.gettimeout, self.settimeout = outer.gettimeout, outer.settimeout
        self.fileno, self.close = outer.fileno, outer.close

    def _pump(self, function, *args):
        """Call a method of the TLS object until it has all it needs; carry its bytes to and fro."""
        import ssl

        while True:
            try:
                result, done = function(*args), True
            except ssl.SSLWantReadError:
                result, done = None, False
            if self._outgoing.pending:
                self.outer.sendall(self._outgoing.read())
            if done:
                return result

            received = self.outer.recv(_BUFFER)
            if received:
                self._incoming.write(received)
            else:
                self._incoming.write_eof()

    def do_handshake(self):
        self._pump(self._tls.do_handshake)

    def sendall(self, content):
        rest = memoryview(content)
        while rest:
            rest = rest[self._pump(self._tls.write, rest[:_BUFFER]) :]

    def recv_into(self, buffer):
        import ssl

        try:
            return self._pump(self._tls.read, len(buffer), buffer)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):  # as SSLSocket takes a bare end
            return 0

    def pending(self):
        return self._tls.pending() + self._incoming.pending


def _make_context(verify, cert):
    """Return an SSLContext. Raises ValueError that names the setting whose file cannot be used."""
    import ssl

    path = verify if isinstance(verify, str) else None
    try:
        if path and os.path.isdir(path):
            context = ssl.create_default_context(capath=path)
        else:
            context = ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:
        why = _error_text(error)
        raise ValueError(f"verify: cannot read CA certificates from {path!a}: {why}") from None

    if hasattr(context, "minimum_version"):  # since 3.7; distributions set it as they like
        context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    else:
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cert:
        _load_certificate(context, *(cert if isinstance(cert, tuple) else (cert, None)))
    return context


def _load_certificate(context, own, key):
    """Load a client certificate. Raises ValueError; an encrypted private key is refused."""
    questions: list = []

    def refuse_to_ask():  # OpenSSL would ask for the passphrase on the terminal
        questions.append("passphrase")
        return ""

    try:
        context.load_cert_chain(own, key, password=refuse_to_ask)
    except (OSError, ValueError) as error:
        why = _error_text(error)
        if questions:
            advice = "decrypt it first, as `openssl pkey -in KEY -out NEWKEY` does"
            why = f"its private key is encrypted; {advice}"
        raise ValueError(f"cert: cannot use client certificate {own!a}: {why}") from None


# A request holds the socket of its exchange. To take it away is one atomic step, so that either the
# thread that exchanges or the one that cancels has it, and no kept connection is ever cut off.


def _let_go(request):
    """Take the socket back; None if it was taken away."""
    return vars(request).pop("socket", None)


def _cut_off(request):
    """Wake the thread that connects or reads for a caller who has left."""
    import socket

    request.cancelled = True
    sock = _let_go(request)
    if sock is not None:
        try:
            # The plain socket's method: SSLSocket's would pull TLS from under the reading thread.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
        except OSError:
            pass


# 6.3 Reading against the clock.


class _Flight(io.RawIOBase):
    """Carries one request to its answer, under two clocks: each silence, and the exchange in all.

    It is also the stream that http.client reads. The stream ends after `limit` bytes: for a chunk
    of negative size http.client would read without end."""

    def __init__(self, request):
        self.request = request
        self.deadline = _clock() + request.total
        self.sock: Any = None
        self.over = False
        self._room = request.limit + (1 << 20)  # the latter for status, headers and chunk sizes

    def start_step(self, sock):
        """Use this socket from now on, and give its next step the seconds it may take.

        Raises _Overdue if none are left, ConnectionAbortedError if the caller has left."""
        self.sock = sock
        self.request.socket = getattr(sock, "outer", sock)
        if self.request.cancelled:
            raise ConnectionAbortedError("cancelled")

        left = self.deadline - _clock()
        if left <= 0:
            raise _Overdue
        seconds = min(self.request.timeout, left)
        if sock.gettimeout() != seconds:  # setting it is a system call, asking is none
            sock.settimeout(seconds)

    def readable(self):
        return True

    def readinto(self, buffer):
        if self.over:
            return 0
        self.start_step(self.sock)
        if self._room <= 0:
            raise _TooLarge
        count = self.sock.recv_into(memoryview(buffer)[: self._room])
        self._room -= count
        return count

    def make_failed(self, error, **facts):
        """Return the _Failed for an error: _Overdue if only the rest of all the time was left."""
        if _is_late(error) and _clock() >= self.deadline:
            error = _Overdue()
        return _Failed(error, **facts)


class _AnswerReader(io.BufferedReader):
    """What http.client reads an answer from, in place of a socket.

    http.client closes it at the answer's end, when bytes beyond that must still be seen."""

    def makefile(self, mode):
        return self

    def close(self):
        pass


@functools.lru_cache(maxsize=None)
def _response_class():
    """Return http.client's HTTPResponse, made fit for interrupts.

    One that comes before its constructor has set `fp` would have its destructor complain."""
    import http.client

    return type("HTTPResponse", (http.client.HTTPResponse,), {"fp": None})


def _read_response(flight):
    """Read the answer; returns (_Response, whether the connection can be used again)."""
    import http.client

    request, sock = flight.request, flight.sock
    reader = _AnswerReader(flight, _BUFFER)
    response = _response_class()(reader, method=request.method)
    try:
        response.begin()
        content = _read_body(response, request.limit)
    finally:
        response.close()

    reason = response.reason
    if reason != http.client.responses.get(response.status):
        reason = _mask_reason(reason, request)
    # From here on only what is buffered counts, which a poll of the socket cannot see: more bytes
    # than the answer's say that the connection is out of step.
    flight.over = True
    surplus = reader.peek(1) or (hasattr(sock, "pending") and sock.pending())
    answer = _Response(response.status, reason, response.headers, content)
    return answer, not (response.will_close or surplus)


def _mask_reason(reason, request):
    """Return a reason phrase without secrets: a server may repeat the request line in it."""
    return _mask_text(reason, request.all_secrets()) if isinstance(reason, str) else reason


def _read_body(response, limit):
    """Return the whole body, unpacked.

    Raises _TooLarge beyond the limit, IncompleteRead if the end is missing."""
    packed = response.headers.get("Content-Encoding", "").strip().lower() in ("gzip", "x-gzip")
    if response.length is not None and response.length > limit:
        raise _TooLarge
    if response.length is not None and not packed:
        return response.read()

    import http.client

    gunzip = _Gunzip() if packed else None
    parts = []
    size = 0
    while True:
        part = response.read(_CHUNK)
        if not part:
            break
        if gunzip:
            part = gunzip.unpack(part, limit - size + 1)
        size += len(part)
        if size > limit:
            raise _TooLarge
        parts.append(part)

    # read(amount) does not complain of a body that ends before its Content-Length.
    if response.length or (gunzip and parts and not gunzip.is_whole()):  # what it holds is not used
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


class _Gunzip:
    """Unpacks gzip of one member or several (RFC 1952, 2.2); other bytes after them are left.

    Asked for in _build_request, by Accept-Encoding."""

    MOST = 10000  # members, since each costs a copy of what follows it

    def __init__(self):
        self._members = 0
        self._is_over = False
        self._start_member()

    def _start_member(self):
        import zlib

        self._members += 1
        if self._members > self.MOST:
            raise ValueError("gzip of too many members")
        self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def unpack(self, part, most):
        """Return the next part, unpacked: at most so many bytes of it."""
        import zlib

        unpacked = b""
        while part and len(unpacked) < most and not self._is_over:
            if self._member.eof:
                self._is_over = part[:1] != b"\x1f"  # the first byte of a member
                if self._is_over:
                    break
                self._start_member()
            try:
                unpacked += self._member.decompress(part, most - len(unpacked))
            except zlib.error:  # not a ValueError
                raise ValueError("bad gzip") from None
            part = self._member.unused_data
        return unpacked

    def is_whole(self):
        """Tell whether the last member has come to its end."""
        return self._member.eof


# 6.4 Failures in words.


class _Failed(Exception):
    """Says that an exchange failed: what was raised, and what that says about the request."""

    def __init__(self, cause, unsent=False, stale=False, proxy=None):
        super().__init__()
        self.cause = cause
        self.unsent = unsent
        self.stale = stale
        self.proxy = proxy


class _Overdue(TimeoutError):
    """Says that an exchange took too long in all."""


class _TooLarge(ValueError):
    """Says that an answer has more bytes than it may have."""


def _is_failure(error):
    """Tell whether an exception is an exchange's failure, unlike Ctrl-C or a program's mistake."""
    import http.client

    # ssl.CertificateError is a ValueError on 3.6.
    return isinstance(error, (OSError, OverflowError, ValueError, http.client.HTTPException))


def _is_late(error):
    """Tell whether an exception is a time-out."""
    import socket

    return isinstance(error, (socket.timeout, TimeoutError))  # one and the same since 3.10


def _error_text(error):
    """Return what went wrong, in words, without a Python class or an [Errno ..] around it."""
    text = getattr(error, "strerror", None)  # an OSError's; ssl and Unicode errors have a reason
    if text == "" and error.errno:  # as PyPy's ssl has it
        text = os.strerror(error.errno)
    return text or str(getattr(error, "reason", "") or error) or type(error).__name__


def _safe_cause(error):
    """Return an exception as a __cause__, or None if its text is made of what the server said."""
    import ssl

    return error if isinstance(error, (OSError, ssl.CertificateError)) else None


def _network_error(failed, request):
    """Return the CloudStackException for what the standard library raised."""
    kind, what, why = _describe_failure(failed, request)
    if failed.proxy:
        why += f" (proxy {_join_port(failed.proxy.host, failed.proxy.port)})"
    made = kind(f"{what} {_mask_address(request.endpoint)}", why)
    made.unsent = failed.unsent
    made.stale = failed.stale
    made.errno = getattr(failed.cause, "errno", None)
    return made


def _describe_failure(failed, request):
    """Return (exception class, what happened, why) of a _Failed."""
    import http.client
    import socket
    import ssl

    error = failed.cause
    lost, late = CloudStackConnectionError, CloudStackTimeoutError
    if _is_late(error):
        if isinstance(error, _Overdue):
            why = f"it was not whole after {request.total:g} s"
        elif failed.unsent:
            why = f"no answer within {request.timeout:g} s (timeout)"
        else:
            why = f"nothing for {request.timeout:g} s (timeout)"
        return late, "Cannot connect to" if failed.unsent else "No answer from", why
    if isinstance(error, (ssl.SSLError, ssl.CertificateError)):
        return lost, "TLS failure with", _describe_tls_error(error)
    if isinstance(error, socket.gaierror):
        return lost, "Cannot find", "name look-up: " + _error_text(error)
    if failed.unsent:
        why = _error_text(error) if isinstance(error, OSError) else type(error).__name__
        return lost, "Cannot connect to", why
    if isinstance(error, _TooLarge):
        why = f"it has more than max_response_size, {request.limit} bytes"
        return CloudStackException, "Too large an answer from", why
    if isinstance(error, http.client.IncompleteRead):
        return lost, "Broken answer from", "it is cut off"
    if isinstance(error, http.client.RemoteDisconnected):
        return lost, "Connection lost to", "closed without an answer"
    if isinstance(error, OSError):
        return lost, "Connection lost to", _error_text(error)
    return lost, "Broken answer from", f"not HTTP ({type(error).__name__})"


def _describe_tls_error(error):
    """Return why TLS failed, and the setting that may help."""
    why = getattr(error, "verify_message", None) or getattr(error, "reason", None)
    text = str(why or error)
    if text.isupper():  # OpenSSL's own name for it
        text = text.replace("_", " ").lower()
    if "certificate" in str(error).lower():
        text += "; `verify` names the CA certificates to trust"
    return text


# 6.5 A program's own session.


def _exchange_through(session, request):
    """Make the same exchange through an object with the interface of requests.Session.

    Its OSErrors, which all exceptions of requests are, become ours and are not chained: they quote
    the address, signature and all. Anything else it raises is the program's own and passes."""
    options = {}
    if request.verify is not True:
        options["verify"] = request.verify
    if request.cert:
        options["cert"] = request.cert
    try:
        answer = session.request(
            request.method,
            request.url,
            data=request.body,
            headers=request.headers,
            timeout=request.timeout,
            allow_redirects=False,
            **options,
        )
        content = answer.content
        if not isinstance(content, bytes):
            content = answer.text.encode("utf-8")
    except OSError as error:
        is_late = isinstance(error, TimeoutError) or "Timeout" in type(error).__name__
        kind = CloudStackTimeoutError if is_late else CloudStackConnectionError
        place = _mask_address(request.endpoint)
        failure = kind("No answer from " + place, "the session raised " + type(error).__name__)
    else:
        reason = _mask_reason(answer.reason, request)
        return _Response(answer.status_code, reason, answer.headers, content)
    raise failure


# --- 7 clients ------------------------------------------------------------------------------------


class CloudStack:
    """A client: any API command is a method, `cs.listZones(name="x")`, and returns plain JSON.

    Settings are described in SETTINGS and README; each may also be the string that an ini file
    gives. Most are attributes that may be set at any time, get_setting() and set_setting() serve
    all, and every call looks at them anew. Nothing is opened before the first call. One client may
    be used by many threads.

    Control arguments of a call, never sent:
      json=True             False: return the answer's text as it is
      opcode_name="command" the name of the parameter that holds the command
      fetch_list=False      True: fetch every page of a list, and return its rows as a list
      headers=None          more HTTP headers
      fetch_result=None     whether to wait for a job and return its result; None: as the client is
                            set

    Raises ValueError, before anything is sent, for what cannot be sent; else CloudStackException.
    """

    # The settings that are attributes, as they read; verify and cert are properties.
    endpoint: str
    key: "str | None"
    secret: "str | None"
    timeout: float
    method: str
    name: "str | None"
    retry: int
    retry_backoff: float
    job_timeout: "float | None"
    poll_interval: float
    expiration: "datetime.timedelta"
    trace: bool
    headers: "dict[str, Any]"
    session: "Any"
    fetch_result: bool

    def __init__(
        self, endpoint: "str | bytes", key: "_Text" = None, secret: "_Text" = None,
        timeout: "_Number" = 10, method: "str | None" = "get", verify: "_CaPath" = None,
        cert: "_PemPath" = None, cert_key: "_Path | None" = None, name: "_Text" = None,
        retry: "_Number" = 0, retry_backoff: "_Number" = 0.5, job_timeout: "_Number" = None,
        poll_interval: "_Number" = 2.0, expiration: "_Number | datetime.timedelta" = 600,
        trace: "_Flag" = False, dangerous_no_tls_verify: "_Flag" = False,
        headers: "Mapping[str, Any] | None" = None, session: "Any" = None,
        fetch_result: "_Flag" = False, *, theme: object = None, output: object = None,
        username: "_Text" = None, password: "_Text" = None, domain: "_Text" = None,
        concurrency: "_Number" = 128, max_response_size: "_Number" = 256 * 1024 * 1024,
        recover: "_Flag" = False
    ) -> None:  # fmt: skip
        # theme and output are taken and dropped: what an ini file holds, read_config() passes on.
        self._state = _ClientState()
        self._apply_settings(
            endpoint=endpoint, key=key, secret=secret, timeout=timeout, method=method,
            verify=verify, cert=cert, cert_key=cert_key, name=name, retry=retry,
            retry_backoff=retry_backoff, job_timeout=job_timeout, poll_interval=poll_interval,
            expiration=expiration, trace=trace, dangerous_no_tls_verify=dangerous_no_tls_verify,
            headers=headers, session=session, fetch_result=fetch_result, username=username,
            password=password, domain=domain, concurrency=concurrency,
            max_response_size=max_response_size, recover=recover,
        )  # fmt: skip

    def _apply_settings(self, **values):
        for name, value in values.items():
            self.set_setting(name, _CLIENT_SETTINGS[name].default if value is None else value)

    def __setattr__(self, name, value):
        """Convert and check settings wherever they are set; other attributes are the program's."""
        converter = _CONVERTERS.get(name)
        if converter is not None:
            value = _convert(name, converter, value)
        object.__setattr__(self, name, value)

    def get_setting(self, name: str) -> "Any":
        """Return the value of a setting, by its name in SETTINGS. Raises KeyError for another.

        (Settings for the command line alone are not the client's.)"""
        setting = _CLIENT_SETTINGS[name]
        return getattr(self._state if name in _NOT_ATTRIBUTES else self, setting.name)

    def set_setting(self, name: str, value: "Any") -> None:
        """Set a setting, by its name in SETTINGS.

        It is the only way for those that are not attributes, since subclasses use names such as
        `domain` for their own. Raises ValueError for a wrong value, KeyError for another name."""
        setting = _CLIENT_SETTINGS[name]
        if name in _NOT_ATTRIBUTES:
            setattr(self._state, name, _convert(name, setting.convert, value))
        else:
            setattr(self, name, value)  # which converts it, also for a subclass that steps in there

    def __getattr__(self, command: str) -> "_Method":
        if command.startswith("_"):
            raise AttributeError(command)

        def method(**params):
            return self._request(command, **params)

        method.__name__ = method.__qualname__ = command
        return method

    def __repr__(self):
        return f"<CloudStack: {self.name or _mask_address(self.endpoint or '')}>"

    def __getstate__(self):
        # Connections, threads and what was learned stay behind; a copy makes its own.
        return dict(self.__dict__, _state=self._state.copy())

    @property
    def verify(self) -> "bool | str":
        """True, or the path of the CA certificates, or False.

        False only if dangerous_no_tls_verify is set and there is no path."""
        return self._state.get_tls_files()[0]

    @verify.setter
    def verify(self, value: "_CaPath") -> None:
        self._state.ca_path = value

    @property
    def cert(self) -> "str | tuple[str, str] | None":
        """The client certificate's path, or a pair with its key's."""
        return self._state.get_tls_files()[1]

    @cert.setter
    def cert(self, value: "_PemPath") -> None:
        self._state.pem_path = value

    @property
    def _server(self):
        """What was learned about the present endpoint, as the present user."""
        state = self._state
        servers = state.in_this_process().servers
        place = (self.endpoint, self.key, state.username, state.password, state.domain)
        return servers.get(place) or servers.setdefault(place, _Server())

    def _request(
        self, command: str, json=True, opcode_name="command", fetch_list=False, headers=None,
        fetch_result=None, **params: "Any"
    ) -> "Any":  # fmt: skip
        """Carry out a command: all of them come through here, so that a subclass can step in.

        Pages, polls and log-in do not. fetch_list="walk" is iter_list's: it returns the walk."""
        steps = _run_command(
            self, command, params, json, opcode_name, fetch_list, headers, fetch_result
        )
        return self._drive(steps)

    def iter_list(self, command: str, **params: "Any") -> "Iterator[Any]":
        """Yield the rows of a list command one by one, with a page or two in memory.

        An answer that is not a list is one row. Takes what the command itself takes."""
        walk = self._request(command, fetch_list=_AS_WALK, **params)
        while True:
            rows = self._drive(walk.next_page())
            if rows is None:
                break
            yield from rows
        if not walk.is_list():
            yield walk.first

    def wait_job(self, jobid: str) -> "Any":
        """Wait for a job that was submitted earlier, as fetch_result does; returns its result."""
        return self._drive(_resume_wait(self, jobid))

    def close(self) -> None:
        """End the session, if there is one, and close the connections.

        The client may be used again."""
        CloudStack._drive(self, _log_out(self))
        self._state.close()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _exchange(self, request):
        """Send one request and return its answer; both clients and every thread come here."""
        request.prepare()
        trace = self.trace
        if trace:
            _trace_request(request)
        begun = _clock()
        try:
            if self.session is not None:
                response = _exchange_through(self.session, request)
            else:
                response = self._state.in_this_process().transport.send(request)
        except CloudStackException as error:
            if trace:
                _write_stderr(f"{error} ({(_clock() - begun) * 1000:.0f} ms)\n")
            raise
        if trace:
            _trace_response(request, response, _clock() - begun)
        return response

    def _drive(self, steps):
        """Drive a protocol generator to its end: do what it yields, in this thread."""
        result = error = None
        try:
            while True:
                done, step = _advance(steps, result, error)
                if done:
                    return step
                result = error = None
                try:
                    if isinstance(step, _Request):
                        result = self._exchange(step)
                    elif isinstance(step, list):
                        result = _map_in_threads(self._drive_quietly, step)
                    elif isinstance(step, _Pause):
                        _wait_in_thread(step)
                    else:
                        _sleep(step)
                except StopIteration:  # of a mock; a generator cannot take it
                    raise
                except BaseException as raised:
                    error = raised
        except KeyboardInterrupt as interrupt:
            # It may have come between two steps, where the generator does not see it: that adds the
            # job's id, and raises it again.
            steps.throw(interrupt)
            raise
        finally:
            error = None  # an exception and this frame would keep each other alive
            steps.close()

    def _drive_quietly(self, steps):
        """Drive a generator and return what comes of it, be it an exception."""
        try:
            return self._drive(steps)
        except Exception as error:
            return error


class _ClientState:
    """Keeps what a client has beside its attributes."""

    # The settings that are not attributes.
    cert_key: "str | None"
    dangerous_no_tls_verify: bool
    username: "str | None"
    password: "str | None"
    domain: "str | None"
    concurrency: int
    max_response_size: int
    recover: bool

    def __init__(self):
        self.ca_path = self.pem_path = None
        self.checked = None  # the settings that were last found to make sense together
        self.progress = None  # the command line's: ("rows", seen, total), ("job", command, seconds)
        self._by_process = {}

    def copy(self):
        """Return one with the same settings that has learned nothing yet."""
        fresh = _ClientState()
        for name in ("ca_path", "pem_path") + tuple(_NOT_ATTRIBUTES):
            setattr(fresh, name, getattr(self, name))
        return fresh

    def get_tls_files(self):
        """Return what CloudStack.verify and CloudStack.cert say."""
        verify = self.ca_path or not self.dangerous_no_tls_verify
        cert, key = self.pem_path, self.cert_key
        if key and isinstance(cert, str):
            cert = (cert, key)
        return verify, cert

    def in_this_process(self):
        """Return the _Kept of this process; a fork's child starts anew.

        Connections, locks and sessions are not for two processes. (setdefault is atomic: threads
        get the same one.)"""
        pid = os.getpid()
        kept = self._by_process.get(pid)
        if kept is None:
            kept = self._by_process.setdefault(pid, _Kept(self.concurrency))
            for other in set(self._by_process) - {pid}:
                self._by_process.pop(other, None)
        return kept

    def close(self):
        """Close the connections and forget what was learned."""
        kept = self._by_process.pop(os.getpid(), None)
        if kept is not None:
            kept.transport.close()
            kept.workers.close()


class _Kept:
    """Keeps what a client has learned and holds open, in one process."""

    def __init__(self, concurrency):
        self.servers = {}
        self.transport = _Transport(concurrency)
        self.workers = _Workers(concurrency)


def _advance(steps, result, error):
    """Take a generator one step on; returns (False, the step) or (True, what it returned)."""
    try:
        return False, steps.send(result) if error is None else steps.throw(error)
    except StopIteration as end:
        return True, end.value


def _wait_in_thread(pause):
    """Sleep in this thread until the pause is over or its signal was set."""
    woken = threading.Event()
    pause.signal.wakers.add(woken.set)
    try:
        if pause.signal.count == pause.count:
            woken.wait(pause.seconds)
    finally:
        pause.signal.wakers.discard(woken.set)


def _map_in_threads(function, items):
    """Return [function(item) for item in items], done at once as far as there are threads for it.

    An item that gets no thread (a limit of the system, the interpreter's exit) is done by the
    caller itself, one after another."""
    results = [None] * len(items)

    def work(index):
        results[index] = function(items[index])

    threads: list = []
    for index in range(len(items)):
        thread = threading.Thread(target=work, args=(index,), name="cs-page", daemon=True)
        try:
            thread.start()
        except (MemoryError, RuntimeError):
            break
        threads.append(thread)

    for index in range(len(threads), len(items)):
        work(index)
    for thread in threads:
        thread.join()
    return results


class _Workers:
    """Runs the threads of one AIOCloudStack: starts them as needed, ends them with the client.

    They are daemons, so that the interpreter's exit waits for none of them. If no thread can be
    started, a running one takes the work; without any, the caller does it itself: the executor of
    the standard library would refuse work that it has queued, and that may run all the same."""

    # For __del__, should an interrupt come before __init__ is done.
    _jobs: "Any" = None

    def __init__(self, most):
        self.most = most
        self.threads = []
        self._starting = threading.Lock()
        self._idle = []  # a locked Lock per idle worker: releasing it wakes it; last in, first out
        self._jobs = collections.deque()

    def do(self, job):
        """Have job(), which raises nothing, called by a worker."""
        self._jobs.append(job)
        if _wake_one(self._idle) or self._has_worker():
            return
        try:
            self._jobs.remove(job)
        except ValueError:  # a worker that was started meanwhile has taken it
            return
        job()

    def _has_worker(self):
        """Start a worker, if there may be more; tells whether there is any."""
        with self._starting:
            if len(self.threads) < self.most:
                # It knows nothing of the client or of this object, so that both can end.
                name, args = f"cs-{len(self.threads)}", (self._jobs, self._idle)
                thread = threading.Thread(target=_work, args=args, name=name, daemon=True)
                try:
                    thread.start()
                    self.threads.append(thread)
                except (MemoryError, RuntimeError):
                    pass
            return bool(self.threads)

    def close(self):
        """End the workers, when what they have been given is done."""
        if self._jobs is not None:
            self._jobs.append(None)
            while _wake_one(self._idle):
                pass

    __del__ = close


def _work(jobs, idle):
    """Do jobs until there is a None among them, which is left there for the other workers."""
    wake = threading.Lock()
    wake.acquire()
    while True:
        try:
            job = jobs.popleft()
        except IndexError:
            idle.append(wake)
            if jobs:  # one that came before this worker could be seen to wait
                _wake_one(idle)
            wake.acquire()
            continue

        if job is None:
            jobs.append(None)
            _wake_one(idle)
            return
        job()
        job = None  # it holds a request and its answer


def _wake_one(idle):
    """Wake the worker that became idle last; False if there is none."""
    try:
        idle.pop().release()
    except IndexError:
        return False
    return True


class AIOCloudStack(CloudStack):
    """The same client for asyncio: commands are coroutines, iter_list an asynchronous iterator.

    Jobs are waited for unless fetch_result=False. Exchanges run in at most `concurrency` threads
    of its own; waiting holds none. It is tied to no event loop. `async with` or `await aclose()`
    end a session and close connections, and may be left out."""

    if TYPE_CHECKING:

        def __getattr__(self, command: str) -> _AsyncMethod: ...

    def __init__(
        self, endpoint, key=None, secret=None, timeout=10, method="get", verify=None, cert=None,
        cert_key=None, name=None, retry=0, retry_backoff=0.5, job_timeout=None, poll_interval=2.0,
        expiration=600, trace=False, dangerous_no_tls_verify=False, headers=None, session=None,
        fetch_result=True, **options
    ):  # fmt: skip
        super().__init__(
            endpoint, key, secret, timeout, method, verify, cert, cert_key, name, retry,
            retry_backoff, job_timeout, poll_interval, expiration, trace, dangerous_no_tls_verify,
            headers, session, True if fetch_result is None else fetch_result, **options
        )  # fmt: skip

    async def _request(
        self, command: str, json=True, opcode_name="command", fetch_list=False, headers=None,
        fetch_result=None, **params: "Any"
    ) -> "Any":  # fmt: skip
        steps = _run_command(
            self, command, params, json, opcode_name, fetch_list, headers, fetch_result
        )
        return await self._drive(steps)

    _request.__doc__ = CloudStack._request.__doc__

    async def wait_job(self, jobid: str) -> "Any":
        return await self._drive(_resume_wait(self, jobid))

    wait_job.__doc__ = CloudStack.wait_job.__doc__

    async def iter_list(  # type: ignore[override]  # the price of being a CloudStack
        self, command: str, **params: "Any"
    ) -> "AsyncIterator[Any]":
        walk = await self._request(command, fetch_list=_AS_WALK, **params)
        while True:
            rows = await self._drive(walk.next_page())
            if rows is None:
                break
            for row in rows:
                yield row
        if not walk.is_list():
            yield walk.first

    iter_list.__doc__ = CloudStack.iter_list.__doc__

    async def _drive(self, steps):
        """Drive a protocol generator to its end, on an event loop."""
        import asyncio

        result = error = None
        try:
            while True:
                done, step = _advance(steps, result, error)
                if done:
                    return step
                result = error = None
                try:
                    if isinstance(step, _Request):
                        result = await self._exchange_in_worker(step)
                    elif isinstance(step, list):
                        result = await asyncio.gather(*map(self._drive_quietly, step))
                    elif isinstance(step, _Pause):
                        await _wait_on_loop(step)
                    else:
                        await asyncio.sleep(step)
                except BaseException as raised:
                    error = raised
        finally:
            error = None
            steps.close()

    async def _drive_quietly(self, steps):
        try:
            return await self._drive(steps)
        except Exception as error:
            return error

    async def _exchange_in_worker(self, request):
        """Send one request as asyncio.to_thread would, but in this client's own threads.

        The event loop's default ones are too few."""
        import asyncio

        loop = asyncio.get_event_loop()
        outcome = loop.create_future()
        job = _with_context(_report_outcome, self._exchange, request, loop, outcome)
        self._state.in_this_process().workers.do(job)
        try:
            response, error = await outcome
        except BaseException:  # cancelled, or closed with its event loop
            _cut_off(request)
            raise
        try:
            if error is not None:
                raise error
        finally:
            error = None  # it knows this frame
        return response

    async def aclose(self) -> None:
        """Do what close() does, without holding up the event loop."""
        await self._drive(_log_out(self))
        self._state.close()

    async def __aenter__(self) -> "Self":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


async def _wait_on_loop(pause):
    """Sleep on this event loop until the pause is over or a thread has set its signal."""
    import asyncio

    loop = asyncio.get_event_loop()
    woken = loop.create_future()

    def wake():
        try:
            loop.call_soon_threadsafe(_set_result, woken, None)
        except RuntimeError:  # the loop was closed while this waited
            pass

    pause.signal.wakers.add(wake)
    timer = loop.call_later(pause.seconds, _set_result, woken, None)
    try:
        if pause.signal.count == pause.count:
            await woken
    finally:
        timer.cancel()
        pause.signal.wakers.discard(wake)


def _report_outcome(exchange, request, loop, outcome):
    """Run an exchange and hand (response, error) to the event loop that waits for it."""
    response = error = None
    if request.cancelled:
        return
    try:
        response = exchange(request)
    except BaseException as raised:
        error = raised
    try:
        loop.call_soon_threadsafe(_set_result, outcome, (response, error))
    except RuntimeError:  # the loop is closed, so nobody waits any more
        pass
    finally:
        error = None  # it knows this frame


def _set_result(future, result):
    """Set a future's result, unless its task was cancelled meanwhile."""
    if not future.done():
        future.set_result(result)


def _with_context(function, *args):
    """Return the call, in a copy of the caller's context variables (which 3.6 does not have)."""
    try:
        from contextvars import copy_context
    except ImportError:
        return functools.partial(function, *args)
    return functools.partial(copy_context().run, function, *args)


# --- 8 configuration ------------------------------------------------------------------------------
# Layers, later ones win. Usually:
#     1 defaults, 2 environment, 3 section of the ini files, 4 the variables of the environment that
#     CLOUDSTACK_OVERRIDES names, 5 options of the command line.
# With CLOUDSTACK_ENDPOINT set, no explicit region and no CLOUDSTACK_OVERRIDES, as 5.2.0 has it:
#     1 defaults, 2 section of the ini files, 3 environment, 4 options of the command line;
#     with key and secret in the environment, too, no file is read.

_PREFIX = "CLOUDSTACK_"
_HEADER = "header_"
_DEFAULT_REGION = "cloudstack"
_CONFIG_KEYS = [setting.name for setting in SETTINGS if setting.given_in != "code"]

# Where a request goes, as whom, and whom it trusts: never mixed from two files. Else a file with
# nothing but an endpoint, left in a working directory, would be sent another file's key. (What the
# environment and the command line say is the user's own word, and goes with any file.)
_TOGETHER = frozenset(
    "endpoint key secret username password domain verify cert cert_key dangerous_no_tls_verify"
    " headers".split()
)
# read_config returns these even if nothing gives them.
_ALWAYS = (
    "timeout method retry verify cert cert_key name trace expiration poll_interval"
    " dangerous_no_tls_verify".split()
)


class _IniValues:
    """Gathers what the ini files say about one region."""

    def __init__(self):
        self.values = {}  # {key: text}
        self.origins = {}  # {key: path}
        self.unknown = []  # (key, path) of keys that no setting has
        self.regions = set()  # the sections of all files
        self.tried = []
        self.read = []
        self.has_section = False

    def add_file(self, path, parser, region):
        """Take in a region's section of a parsed file. Raises ValueError."""
        self.read.append(path)
        self.regions.update(parser.sections())
        if not parser.has_section(region):
            return
        self.has_section = True
        raw = dict(parser.items(region))
        for key, value in _expand_values(path, raw, region):
            is_header = key.startswith(_HEADER) and key != _HEADER
            if key in _CLIENT_SETTINGS and "\n" in value:
                # It may hold a secret that was meant for the next line.
                reason = "the value continues in the next, indented line; each setting stands on a"
                raise ValueError(f"{path!a}: {key}: {reason} line of its own")
            if key not in _CONFIG_KEYS and not is_header:
                used = any(f"%({key})s" in other for other in raw.values())
                if not used and key not in parser.defaults():
                    self.unknown.append((key, path))
            elif value:
                self.values[key] = value
                self.origins[key] = path

    def check_origins(self):
        """Raise ValueError if values that belong together come from two files."""
        by_file: dict = {}
        for key in sorted(self.values):
            if _group_of(key) in _TOGETHER:
                path = self.origins[key]
                by_file.setdefault(os.path.realpath(path), (key, path))
        if len(by_file) > 1:
            (key, path), (other, elsewhere) = list(by_file.values())[:2]
            raise ValueError(
                f"the files {path!a} ({key}) and {elsewhere!a} ({other}) cannot be combined: "
                "endpoint, credentials, certificates and headers must all come from one of them"
            )


def _group_of(key):
    """Return the name by which _TOGETHER and CLOUDSTACK_OVERRIDES know a key."""
    return "headers" if key.startswith(_HEADER) else key


def _list_ini_paths(config=None):
    """Return the files to read, in order, and the one among them that was named, or None.

    Later ones win. A file with a secret that others may read is warned of (in 9.2), and endpoint
    and credentials must come from one file (check_origins)."""
    paths = [os.path.expanduser("~/.cloudstack.ini")]
    try:
        paths.append(os.path.abspath("cloudstack.ini"))
    except OSError:  # the working directory is gone
        pass
    named = config or os.environ.get(_PREFIX + "CONFIG")
    if named:
        named = os.path.expanduser(named)
        paths.append(named)
    return paths, named or None


def _read_text(path, newline=None):
    """Return the text of a file; its line ends stay as they are if newline is "".

    Raises ValueError that says what is wrong with it, FileNotFoundError without one."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except UnicodeDecodeError:
        raise ValueError(f"cannot read {path!a}: it is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path!a}: {_error_text(error)}") from None


def _parse_ini(path, text):
    """Return a parser of the file as it stands, `%` and all.

    configparser's errors quote lines of the file, which may be secrets: the ValueError says line
    numbers only."""
    import configparser

    parser = configparser.RawConfigParser()
    try:
        parser.read_string(text, source=path)
    except configparser.MissingSectionHeaderError as error:
        reason = f"line {error.lineno} stands before any [section]"
    except (configparser.DuplicateOptionError, configparser.DuplicateSectionError) as error:
        reason = f"line {error.lineno} repeats {getattr(error, 'option', None) or error.section!a}"
    except configparser.ParsingError as error:
        reason = f"line {error.errors[0][0] if error.errors else '?'} is not 'name = value'"
    except configparser.Error as error:
        reason = type(error).__name__
    else:
        return parser
    raise ValueError(f"{path!a} is not an ini file: {reason}")


def _expand_values(path, raw, region):
    """Yield (key, text) for the raw values of a section.

    `%%` and `%(name)s` mean what they always mean in ini files, any other `%` stands for itself:
    `50%` is `50%`. Raises ValueError for a `%(name)s` that leads nowhere."""
    import configparser

    def double_lone_percent(found):
        return found.group() if len(found.group()) > 1 else "%%"

    parser = configparser.ConfigParser()
    pattern = r"%%|%\([^)]+\)s|%"
    values = {key: re.sub(pattern, double_lone_percent, value) for key, value in raw.items()}
    parser.read_dict({"section": values})
    for key in values:
        try:
            yield key, parser.get("section", key)
        except configparser.InterpolationError:
            reason = f"in [{region}], {key!a} refers to a name that is not there, or to itself"
            raise ValueError(f"{path!a}: {reason}") from None


def _read_ini_values(region, config=None):
    """Return the _IniValues of a region, out of the files of _list_ini_paths.

    Raises SystemExit if a file that was named is not there."""
    found = _IniValues()
    found.tried, named = _list_ini_paths(config)
    for path in found.tried:
        try:
            parser = _parse_ini(path, _read_text(path))
        except FileNotFoundError:
            continue
        found.add_file(path, parser, region)
    if named and named not in found.read:
        raise SystemExit("Config file not found. Tried " + named)
    return found


def _read_environment():
    """Return {key: text} of the CLOUDSTACK_* variables.

    Empty ones do not count, but for CLOUDSTACK_KEY: an empty one asks for unsigned requests."""
    values = {key: os.environ.get(_PREFIX + key.upper()) for key in _CONFIG_KEYS}
    for name, value in os.environ.items():
        if name.upper().startswith(_PREFIX + "HEADER_"):
            header = name[len(_PREFIX + "HEADER_") :].lower().replace("_", "-")
            values[_HEADER + header] = value
    if values["key"] == "":
        values["secret"] = None
    return {key: value for key, value in values.items() if value or (key == "key" and value == "")}


def _to_settings(values):
    """Return {key: text} as the constructor takes it.

    Headers are gathered, and the two booleans of read_config are parsed if they can be."""
    settings: dict = {}
    for key, value in values.items():
        if key.startswith(_HEADER):
            settings.setdefault("headers", {})[key[len(_HEADER) :]] = value
        else:
            settings[key] = value
    for key in ("trace", "dangerous_no_tls_verify"):
        try:
            settings[key] = strtobool(settings[key])
        except (KeyError, AttributeError, ValueError):
            pass
    return settings


def _overruled_by(layer):
    """Return the keys of lower layers that a layer decides about without giving them.

    There is a key or there is a user name; and an empty key means that there is no key."""
    if "key" in layer:
        return ["username", "password", "domain"] if layer["key"] else ["secret"]
    return ["key", "secret"] if "username" in layer else []


def _merge_layers(*layers):
    """Merge layers, lowest first."""
    merged: dict = {}
    for layer in layers:
        for key in _overruled_by(layer):
            merged.pop(key, None)
        merged.update(layer)
    return {key: value for key, value in merged.items() if value}


def _load_config(ini_group=None, flags=None, config=None):
    """Return (settings, _IniValues); see read_config.

    flags {key: text} are the command line's; config stands for CLOUDSTACK_CONFIG."""
    region = ini_group or os.environ.get(_PREFIX + "REGION") or _DEFAULT_REGION
    # The default's own name asks for nothing: Ansible's modules up to 2.9 always pass it.
    is_explicit = bool(ini_group) and ini_group != _DEFAULT_REGION
    overrides = os.environ.get(_PREFIX + "OVERRIDES", "").lower().replace(",", " ").split()
    env = _read_environment()
    env_first = "endpoint" in env and not is_explicit and not overrides
    above = {
        key: value
        for key, value in env.items()
        if env_first or key in overrides or _group_of(key) in overrides
    }
    above.update(flags or {})

    found = _IniValues()
    has_user = "username" in env and "password" in env
    is_complete = env.get("key") == "" or ("key" in env and "secret" in env) or has_user
    if not env_first or not is_complete or config:
        found = _read_ini_values(region, config)
        has_endpoint = "endpoint" in env or "endpoint" in above
        _check_region(found, region if is_explicit else None, has_endpoint)
    decided = set(above) | set(_overruled_by(above))
    found.values = {key: text for key, text in found.values.items() if key not in decided}
    found.check_origins()

    values = _merge_layers({} if env_first else env, found.values, above)
    if not values.get("endpoint"):
        where = ""
        if not found.has_section:
            where = f" (there is no section [{region}] in {', '.join(found.read)})"
        raise ValueError(f"the configuration is missing the following keys: endpoint{where}")
    settings = {key: _CLIENT_SETTINGS[key].default for key in _ALWAYS}
    settings["trace"] = None  # as 5.2.0 has it; the constructor takes it for False
    settings["name"] = region if found.has_section else None
    settings.update(_to_settings(values))
    return settings, found


def _check_region(found, region, has_endpoint):
    """Raise SystemExit without any file, NoSectionError if no file has the region asked for."""
    if not found.read and not has_endpoint:
        raise SystemExit(f"Config file not found. Tried {', '.join(found.tried)}")
    if region and not found.has_section:
        import configparser

        raise configparser.NoSectionError(region)


def read_config(ini_group: "str | None" = None) -> "dict[str, Any]":
    """Return the settings for `CloudStack(**read_config())`, from environment and ini files.

    ini_group is the region, a section of the ini files; the head of this room shows the layers.
    Raises SystemExit if there is no configuration at all, ValueError if it cannot be used,
    configparser.NoSectionError if ini_group is in no file."""
    return _load_config(ini_group)[0]


def read_config_from_ini(ini_group: "str | None" = None) -> "dict[str, Any]":
    """Return what a region's section holds in the ini files, plus `name` and `headers`.

    Without such a section that is {"name": None}."""
    region = ini_group or os.environ.get(_PREFIX + "REGION") or _DEFAULT_REGION
    found = _read_ini_values(region)
    found.check_origins()
    return dict(_to_settings(found.values), name=region if found.has_section else None)


# --- 9 command line -------------------------------------------------------------------------------
# A line of words becomes a checked call (_checked_call), the call is made (_make_call), its answer
# is printed (_print_answer). _Invocation holds what they share, and may serve one line after
# another with the same client.

__all__ += ["main"]


# 9.1 Options: the words of a line, taken apart.

# A new one is printed by _print_rows (9.3), else it comes out as a table; _HELP names it, too.
FORMATS = ("json", "jsonl", "table", "csv", "text")

# letter: its short form, if any; value: None for a flag, the only values there are, or the name
# under which help shows the value. _HELP shows each option, too.
_Option = collections.namedtuple("_Option", "name letter value")
_OPTIONS = (
    _Option("output", "o", FORMATS), _Option("columns", "c", "id,name,nic.0.ipaddress"),
    _Option("where", "", "CONDITION"), _Option("sort", "", "[-]COLUMN"), _Option("all", "", None),
    _Option("each", "", None), _Option("parallel", "", "COUNT"),
    _Option("stop-on-error", "", None),
    _Option("region", "r", "NAME"), _Option("profile", "p", "NAME"), _Option("config", "", "FILE"),
    _Option("endpoint", "", "URL"), _Option("timeout", "", "SECONDS"),
    _Option("retry", "", "COUNT"),
    _Option("async", "", None), _Option("wait", "", "JOBID"), _Option("post", "", None),
    _Option("dry-run", "", None), _Option("force", "", None),
    _Option("quiet", "q", None), _Option("trace", "t", None),
    _Option("color", "", ("auto", "always", "never")), _Option("theme", "", "STYLE"),
    _Option("list", "", None), _Option("sync", "", None), _Option("shell", "", None),
    _Option("configure", "", None), _Option("completion", "", ("bash", "zsh", "fish")),
    _Option("version", "", None), _Option("help", "h", None),
    _Option("complete", "", "LINE"),  # for the scripts of completion; help does not show it
)  # fmt: skip
_FLAGS = {"--" + option.name: option for option in _OPTIONS}
_FLAGS.update(("-" + option.letter, option) for option in _OPTIONS if option.letter)
# An empty value of any other is an unset variable of a script: it must not mean the usual region.
_MAY_BE_EMPTY = frozenset(["columns", "sort", "theme", "complete"])

_HELP = """\
cs [options] COMMAND [name=value ...]  call the CloudStack API, print its answer

  cs listVirtualMachines state=Running   any API command; name=@file is a file's
  cs startVirtualMachine id=name:web-01  the id of what has that name
  cs --list [words], cs COMMAND --help   the commands, and what each takes
  cs --configure, cs --shell             make the ini file; many lines at once

 -o, --output json|jsonl|table|csv|text  -c, --columns id,name,nic.0.ipaddress
     --where CONDITION  name~^web           --sort [-]COLUMN
     --all           every page of a list   --sync  refresh the known commands
     --each          a call for each row of standard input, {name} filled in;
     --parallel COUNT   of them at once     --stop-on-error
 -r, --region NAME   section of ini file -p, --profile NAME     the same
     --config FILE   --endpoint URL         --timeout SECONDS   --retry COUNT
     --async         do not wait for jobs   --wait JOBID   go on waiting for one
     --dry-run       show, do not send      --force    send what looks wrong
 -q, --quiet         only usage errors   -t, --trace   show each exchange
     --color auto|always|never              --theme STYLE  of Pygments
     --post          send by POST           --completion bash|zsh|fish
     --version       -h, --help

exit: 0 done  1 error answer  2 usage  3 no answer  4 job still runs  130 Ctrl-C
More: README.rst; the API: https://cloudstack.apache.org/api.html
"""


class _Usage(Exception):
    """The command line cannot be carried out as it was typed."""


@functools.lru_cache(maxsize=None)
def _make_parser():
    """Make the parser of all options in the table."""
    import argparse

    parser = argparse.ArgumentParser(prog="cs", add_help=False)
    parser.error = _refuse_arguments  # type: ignore[method-assign]
    for option in _OPTIONS:
        flags = ["-" + letter for letter in option.letter] + ["--" + option.name]
        action = "store_true" if option.value is None else "store"
        if option.name == "where":  # each one counts
            action = "append"
        parser.add_argument(*flags, dest=option.name, action=action, default=None)
    return parser


def _refuse_arguments(message):
    """Raise argparse's complaint, about an option's value, in the words of this program."""
    text = re.sub(r"argument (?:-\w/)?(\S+): ", r"option \1 ", message)
    text = text.replace("expected one argument", "needs a value")
    raise _Usage(text.replace("ignored explicit argument", "takes no value:") + "; see cs --help")


def _parse_arguments(args):
    """Return {option: value} and the words that are not options; they may stand in any order.

    Names are never completed, since tomorrow's options would change the meaning of today's
    abbreviations. (argparse can be told so since 3.8; before, that breaks -qt.)"""
    known: list = []
    waiting = collections.deque(args)
    while waiting:
        arg = waiting.popleft()
        flag = arg.partition("=")[0]
        if arg.startswith("--") and arg != "--" and flag not in _FLAGS:
            raise _unknown_option(flag)
        if arg == "--sort" and waiting:  # `--sort -name` is not an option -n
            arg += "=" + waiting.popleft()
        if arg != "--":
            known.append(arg)

    found, words = _make_parser().parse_known_args(known)
    for word in words:
        if word.startswith("-"):
            raise _unknown_option(word)
    values = vars(found)
    options = {option.name: _check_value(option, values[option.name]) for option in _OPTIONS}
    options["region"] = options["region"] or options["profile"]
    return options, words


def _unknown_option(flag):
    """Return the exception for an option that does not exist, with those it may be meant for."""
    near = _did_you_mean(_near(flag, set(_FLAGS) - {"--complete"}, most=1))
    return _Usage(f"there is no option {flag!a}{near or '; see cs --help'}")


def _merge_options(base, options):
    """Return the options of a line over those that hold for every line of a shell."""
    return {**base, **{name: value for name, value in options.items() if value is not None}}


def _check_value(option, value):
    """Return the value of an option. Raises _Usage for one that it cannot have."""
    if value == "" and option.name not in _MAY_BE_EMPTY:
        raise _Usage(f"option --{option.name} needs a value; see cs --help")
    if value is None or not isinstance(option.value, tuple):
        return value
    if value.lower() not in option.value:
        raise _Usage(f"--{option.name}: {value!a} is none of {', '.join(option.value)}")
    return value.lower()


def _parse_parameters(words):
    """Make keyword arguments of name=value words.

    The values of a repeated name are joined by commas, in the order given."""
    params: dict = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip()
        if not equals or not name:
            raise _Usage(f"{word!a} is not a correctly formatted option; it should be name=value")
        if name == "headers":
            hint = "set header_<name> in the ini file, or CLOUDSTACK_HEADER_<NAME>"
            raise _Usage(f"'headers' cannot be a parameter here; {hint}")
        if name in ("self", "command"):
            raise _Usage(f"{name!a} cannot be a parameter here")
        value = _parse_value(name, value.strip())
        params[name] = params[name] + "," + value if name in params else value

    for name in ("json", "fetch_list", "fetch_result"):
        if name in params:
            try:
                params[name] = strtobool(params[name])
            except ValueError:
                raise _Usage(f"{name}={params[name]!a} is neither true nor false") from None
    return params


class _Literal(str):
    """A value that was quoted, or read from a file: name:... in it stands for no id."""


def _parse_value(name, value):
    """Return the value of a name=value word: quotes taken off, @file and @- read, @@ made one @.

    Within quotes neither @ nor name: has a meaning."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return _Literal(value[1:-1])
    if not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    try:
        if value == "@-":
            text = _read_stdin()
        else:
            text = _read_text(os.path.expanduser(value[1:]), newline="")
    except FileNotFoundError:
        hint = "@@ stands for a plain @"
        raise _Usage(f"{name}: there is no file {value[1:]!a} ({hint})") from None
    except ValueError as error:
        raise _Usage(f"{name}: {error}") from None
    return _Literal(re.sub(r"\r?\n\Z", "", text))


def _read_stdin():
    """Return all that standard input holds. Raises ValueError."""
    if sys.stdin is None:
        raise ValueError("there is no standard input")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("standard input is not UTF-8 text") from None


# 9.2 Run and report.


def main(args: "Iterable[str] | None" = None) -> int:
    """Run the command line; returns the exit code.

    0 done; 1 an answer that is an error, or a failed job; 2 usage or configuration; 3 no answer; 4
    job still running at job_timeout; 130 interrupted."""
    if sys.stdout is None:  # closed by the process that started this one
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return _exit_code(_attempt(_Invocation(), _dispatch, sys.argv[1:] if args is None else args))


def _attempt(invocation, dispatch, line):
    """Do what a line asks for, and report what it raises. Returns that, or whether it succeeded."""
    outcome: Any = True
    try:
        try:
            outcome = dispatch(invocation, line)
        except (CloudStackException, _Usage, ValueError, OSError, KeyboardInterrupt) as error:
            outcome = error
            invocation.progress.close()
            _report(invocation, error)
        finally:
            invocation.progress.clear()
        _flush()
    except KeyboardInterrupt as again:  # while that was done
        outcome = again
    except _OutputFailed as failed:
        if not _exit_code(outcome):  # a failure before this one says more
            outcome = failed
        _report_unwritten(failed.args[0])
    return outcome


def _exit_code(outcome):
    """Return the exit code for what was raised, or for whether everything succeeded.

    They are listed in main's docstring, in _HELP and in README; --each gives 0, 1 or 130."""
    if isinstance(outcome, _OutputFailed):  # a reader that has seen enough is no failure
        return 0 if isinstance(outcome.args[0], BrokenPipeError) else 1
    if isinstance(outcome, KeyboardInterrupt):
        return 130
    if isinstance(outcome, CloudStackJobTimeout):
        return 4
    if isinstance(outcome, CloudStackException):
        return 3 if isinstance(outcome, OSError) else 1
    if isinstance(outcome, Exception):
        return 2
    return 0 if outcome else 1


def _dispatch(invocation, args):
    """Do what the arguments ask for. Returns whether it succeeded.

    For a shell it returns what became of the first line that failed."""
    options, words = _parse_arguments(map(_as_utf8, args))
    options = invocation.options = _merge_options(invocation.options, options)
    _check_each(options)
    if options["each"] and invocation.clients is not None:
        raise _Usage("--each reads standard input, which is the shell's own here")
    if options["version"]:
        _write(f"cs {__version__}\n")
    elif options["completion"]:
        _write(_SCRIPTS[options["completion"]])
    elif options["complete"] is not None:
        _print_completions(options["complete"])
    elif options["configure"]:
        if words:
            raise _Usage("--configure stands alone; --region names the section")
        return _configure(invocation)
    elif options["help"] and not words:
        _write(_HELP)
    elif _asks_for_shell(invocation, words):
        return _Shell(options).run()
    else:
        return _use_server(invocation, words)
    return True


def _as_utf8(arg):
    """Decode an argument that a C locale has left undecoded (Python 3.6, from cron)."""
    if re.search("[\ud800-\udfff]", arg):
        return os.fsencode(arg).decode("utf-8", "surrogateescape")
    return arg


def _use_server(invocation, words):
    """Do what needs a client. Returns whether it succeeded."""
    options = invocation.options
    invocation.conditions = [_Condition(text) for text in options["where"] or ()]
    if options["wait"] and words:
        raise _Usage("--wait stands alone: it waits for a job that is already running")
    if not (words or options["wait"] or options["list"] or options["sync"]):
        raise _Usage("no command given; see cs --help")
    if words and not options["list"] and not re.match(r"[\w.-]+\Z", words[0], re.ASCII):
        usage = "cs [options] COMMAND [name=value ...]"
        raise _Usage(f"{words[0]!a} stands where the command should be: {usage}")
    if words[:1] == ["help"] and not options["list"]:
        raise _Usage(f"help is an option: cs {''.join(word + ' ' for word in words[1:2])}--help")

    invocation.connect()
    invocation.format()  # a wrong one is refused before anything is sent
    with invocation:
        if options["list"]:
            return _list_commands(invocation, words)
        if options["help"]:
            return _describe_command(invocation, words[0])
        if options["sync"] and not options["dry-run"]:
            _fetch_catalog(invocation)
        invocation.checked = {}
        if options["each"]:
            return _carry_out_each(invocation, words)
        if options["wait"]:
            call = _CheckedCall("queryAsyncJobResult", {"jobid": options["wait"]}, [])
        elif words:
            call = _checked_call(invocation, words)
        else:
            call = None  # --sync alone
        if options["dry-run"]:
            _show_plan(invocation, call or _CheckedCall("listApis", {}, []))
        elif call is not None:
            return _carry_out(invocation, call)
    return True


class _Invocation:
    """Holds what one use of the command line has: options, settings, client, progress.

    Messages go through say(), so that -q has one place. Used with `with`, it closes its client at
    the end, unless that is one of a shell's: {what leads to a client: (its settings, it)}."""

    def __init__(self, options=None, clients=None):
        self.options = _parse_arguments([])[0] if options is None else options
        self.settings = {}
        self.conditions: list = []  # of --where
        self.checked: dict = {}  # what _check_once found
        self.ids: dict = {}  # what _id_of_name found
        self.client: Any = None
        self.clients = clients
        self.progress = _Progress()
        self.under_way = None  # the _CheckedCall that is under way

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.clients is None:
            self.client.close()

    def say(self, text):
        """Say something on standard error, unless -q."""
        if not self.options["quiet"]:
            self.progress.clear()
            _write_stderr(text)

    def connect(self):
        """Make the client that configuration and options describe. Raises _Usage, ValueError.

        In a shell it is the one that a line before had for them."""
        options = self.options
        place = tuple(options[name] for name in ("region", "config", "endpoint"))
        loaded, self.client = (self.clients or {}).get(place, (None, None))
        if loaded is None:
            loaded, found = self._load_settings()
            self._warn_of_readable_files(found)
            self._warn_of_unknown_keys(found)

        self.settings = {"recover": True, **loaded}
        for name in ("timeout", "retry"):
            self.settings[name] = options[name] or self.settings[name]
        if options["post"]:
            self.settings["method"] = "post"
        if options["trace"]:
            self.settings["trace"] = True
        if self.client is None:
            self.client = CloudStack(**self.settings)
        else:  # what the line before may have set
            names = ("timeout", "retry", "method", "trace", "recover")
            self.client._apply_settings(**{name: self.settings[name] for name in names})
        _check_client(self.client)
        if self.clients is not None:
            self.clients[place] = (loaded, self.client)

        is_shown = not (options["quiet"] or self.client.trace) and _is_terminal(sys.stderr)
        self.client._state.progress = self.progress if is_shown else None

    def _load_settings(self):
        """Return what _load_config does, its complaints in this program's words."""
        import configparser

        region, config = self.options["region"], self.options["config"]
        flags = {name: self.options[name] for name in ("endpoint",) if self.options[name]}
        try:
            return _load_config(region, flags, config)
        except SystemExit as error:
            hint = "`cs --configure` makes one, or set CLOUDSTACK_ENDPOINT, _KEY and _SECRET"
            raise _Usage(f"{error}; {hint}") from None
        except configparser.NoSectionError:
            regions = _regions(config)
            there = "; there are " + ", ".join(regions) if regions else ""
            raise _Usage(f"Error: region {region!a} not in config{there}") from None

    def _warn_of_readable_files(self, found):
        """Warn of files with a secret that others may read."""
        secrets = [key for key in ("secret", "password") if key in found.values]
        for path in sorted({found.origins[key] for key in secrets}):
            if os.name == "posix" and os.stat(path).st_mode & 0o044:
                hint = f"can be read by others; chmod 600 {path}"
                self.say(f"Warning: {path} holds a secret and {hint}")

    def _warn_of_unknown_keys(self, found):
        """Warn, in one line, of keys in the section that no setting has."""
        if found.unknown and not self.options["quiet"]:
            described = []
            for key, path in found.unknown:
                near = _near(key, _CONFIG_KEYS, most=1)
                described.append(f"{key!a} in {path}" + (f" ({near[0]}?)" if near else ""))
            self.say("Warning: not known as settings: " + ", ".join(described))

    def format(self):
        """Return the output format: option, environment or ini file, json. Raises ValueError."""
        name = str(self.options["output"] or self.settings.get("output") or "json").lower()
        if name not in FORMATS:
            raise ValueError(f"output: {name!a} is none of {', '.join(FORMATS)}")
        return name

    def is_colored(self):
        """Tell whether colours are wanted."""
        wish = self.options["color"] or "auto"
        if wish != "auto":
            return wish == "always"
        return _is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")


def _is_terminal(stream):
    """Return whether a stream is a terminal that can more than print."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


class _Progress:
    """Shows one line on standard error while pages or a job are waited for, and clears it then.

    The time is shown by a thread, so that it moves while the server is silent."""

    def __init__(self):
        # What is cleared must not be written again by a thread that is still at it.
        self._lock = threading.RLock()
        self._is_closed = False
        self._shown_at = None
        self._ended = None  # set when the wait for a job is over
        self.job = None  # what is waited for, where the command is not known

    def __call__(self, kind, what, more):
        if kind == "rows":
            now = _clock()
            if self._shown_at is None or now - self._shown_at >= 0.1:
                self.show(f"{what} of {more} rows" if more else f"{what} rows", now)
        elif self._ended is None:
            self._ended = threading.Event()
            args = (self._ended, self.job or what, _clock() - more)
            self._show_time(*args)
            try:
                threading.Thread(
                    target=self._tick, args=args, name="cs-progress", daemon=True
                ).start()
            except RuntimeError:  # a limit of threads: the time stands still
                pass

    def _tick(self, ended, what, started):
        """Show the time every second, until the wait has ended."""
        while not ended.wait(1.0 - (_clock() - started) % 1.0):
            self._show_time(ended, what, started)

    def _show_time(self, ended, what, started):
        """Show how long a job was waited for, unless the wait has ended."""
        with self._lock:
            if not ended.is_set():
                now = _clock()
                self.show(f"{what}: waiting for the job, {int(now - started)} s", now)

    def show(self, text, now):
        """Put a text in place of the line."""
        with self._lock:
            if self._is_closed:
                return
            self._shown_at = now
            try:
                sys.stderr.write("\r\x1b[K" + text)
                sys.stderr.flush()
            except (OSError, ValueError):
                pass

    def close(self):
        """Take the line away for good."""
        self.clear()
        self._is_closed = True

    def clear(self):
        """Take the line away."""
        with self._lock:
            if self._ended is not None:
                self._ended.set()
            self._ended = self.job = None
            if self._shown_at is not None:
                self.show("", None)


# words: the command and its parameters as they were typed.
_CheckedCall = collections.namedtuple("_CheckedCall", "command params words")


def _checked_call(invocation, words):
    """Turn words into a call that may be made.

    Raises _Usage for what is wrong with them, by themselves or by the list of commands."""
    options = invocation.options
    if len(words) > 1 and "=" not in words[1]:
        _refuse_parted_command(invocation, words)
    params = _parse_parameters(words[1:])
    command = _check_once(invocation, words[0], params)
    _fill_in_ids(invocation, command, params)
    if options["all"]:
        params["fetch_list"] = True
    if params.get("json") is False and (invocation.conditions or options["each"]):
        raise _Usage("json=false gives a text, in which --where and --each find no rows")
    if not _only_reads(command):  # there is nothing to page through, and no page to ask it for
        params.pop("fetch_list", None)
    params.setdefault("fetch_result", not (options["async"] or "async" in command.lower()))
    return _CheckedCall(command, params, [command] + words[1:])


def _carry_out(invocation, call):
    """Make a call and print the answer. Returns whether it succeeded."""
    invocation.under_way = call
    every = call.params.get("fetch_list")
    if every and invocation.format() == "jsonl" and not invocation.options["sort"]:
        _stream(invocation, call)
        return True

    answer = _make_call(invocation, call)
    invocation.progress.clear()
    _print_answer(invocation, answer, is_plain=call.params.get("json") is False)
    _warn_of_missing_rows(invocation, answer, call.params)
    return _tells_success(answer)


def _tells_success(answer):
    """Return whether an answer of status 200 is none that tells of a failure all the same."""
    said = answer if isinstance(answer, dict) else {}
    return "errortext" not in said and str(said.get("success")).lower() != "false"


def _make_call(invocation, call):
    """Return the answer: all pages of a list where they are wanted, the result of a job."""
    jobid = invocation.options["wait"]
    if jobid:
        invocation.progress.job = f"job {jobid}"
        return invocation.client.wait_job(jobid)
    answer = invocation.client._request(call.command, **call.params)
    is_plain = call.params.get("json") is False
    if is_plain and re.match(r"(?i)\s*<(?:!doctype )?html\b", answer):
        page = _masked_page(invocation, answer)
        raise CloudStackException("Unexpected response from CloudStack", f"a page of HTML: {page}")
    return answer


def _stream(invocation, call):
    """Write the rows of a whole list as they arrive, as jsonl."""
    control = ("fetch_list", "fetch_result")
    params = {name: value for name, value in call.params.items() if name not in control}
    columns = _chosen_columns(invocation)
    unseen = {*(columns or ()), *(condition.column for condition in invocation.conditions)}
    sample: list = []
    flushed_at = 0.0
    for row in invocation.client.iter_list(call.command, **params):
        unseen = {name for name in unseen if _pick(row, name) is None}
        if unseen and len(sample) < 100:
            sample.append(row)
        for shown in _only(_filtered(invocation, [row]), columns):
            invocation.progress.clear()
            _write(_json_text(shown, None) + "\n")
        if _clock() - flushed_at > 0.1:
            _flush()
            flushed_at = _clock()
    _warn_of_columns(invocation, sample, sorted(unseen))


def _warn_of_missing_rows(invocation, answer, params):
    """Say so if the server cut a list short."""
    rows = _find_rows(answer) or []
    total = answer.get("count") if rows else None
    if params.get("fetch_list") or {name.lower() for name in params} & {"page", "pagesize"}:
        return
    if isinstance(total, int) and total > len(rows):
        verb = "seen by --where" if invocation.conditions else "shown"
        invocation.say(f"{len(rows)} of {total} {verb}; --all for the rest")


def _show_plan(invocation, call):
    """Print what would be sent (--dry-run); nothing is."""
    params = dict(call.params)
    control = {name: params.pop(name) for name in ("json", "opcode_name") if name in params}
    for name in ("fetch_list", "fetch_result"):
        params.pop(name, None)
    planned = _Call(call.command, flatten(params), **control)
    planned.complete_page(PAGE_SIZE)
    request = _build_request(invocation.client, planned)
    request.prepare()

    lines = [request.method + " " + request.masked_url().partition("?")[0]]
    lines += [f"{name}={text}" for name, text in sorted(_mask_params(request.params).items())]
    _write("".join(_escape_unprintable(line) + "\n" for line in lines))


_NO_API = "Check the endpoint: it usually ends in /client/api."
_HINTS = {
    401: "Check endpoint, key and secret of this region, and this machine's clock; the server says "
    "the same where it does not know the command: cs --list.",
    404: _NO_API,
    405: _NO_API,
    429: "Ask less often, or let it be asked again: --retry 3.",
    430: "See cs {command} --help for what its parameters look like.",
    431: "See cs {command} --help for what it takes.",
    432: "Either there is no such command or your role may not use it: cs --sync, then cs --list.",
    503: "The server is in maintenance; nothing was done. Try again later, or with --retry 3.",
    530: "The management server's log says more.",
    531: "Your role or account may not do this.",
    532: "A limit of the account or project is reached: cs listResourceLimits.",
    533: "There is no room for it now: another zone, host or a smaller offering may do.",
    536: "Something else still uses it.",
}


def _report(invocation, error):
    """Say on standard error what was raised, and what can be done."""
    call = invocation.under_way
    if isinstance(error, KeyboardInterrupt):
        if getattr(error, "jobid", None):
            _write_stderr("Interrupted. " + _how_to_go_on(invocation, error))
        elif call and not _only_reads(call.command):
            hint = "may have run: look before it is sent again"
            _write_stderr(f"Interrupted. {call.command} {hint}.")
        elif invocation.clients is not None:  # the shell's next line begins below the ^C
            _write_stderr("Interrupted.")
    elif isinstance(error, CloudStackException):
        _report_failure(invocation, error)
    else:
        text = _error_text(error) if isinstance(error, OSError) else str(error)
        _write_stderr(text if text.startswith("Error: ") else "cs: " + text)


def _report_failure(invocation, error):
    """Say what failed: the message, what was asked, codes, a hint; then the server's own words."""
    lines = ["CloudStack error: " + _sentence(error)]
    asked = _asked(invocation, error)
    if asked:
        lines += ["  Asked: " + asked, "  Server: " + _mask_address(invocation.client.endpoint)]
    document = _server_error(error) or {}
    codes = [name for name in ("errorcode", "cserrorcode") if name in document]
    if codes:
        lines.append("  Codes: " + ", ".join(f"{name} {document[name]}" for name in codes))
    hint = _hint(invocation, error)
    if hint:
        lines.append("  Try: " + hint)
    invocation.say("\n".join(lines))

    if error.jobid and not isinstance(error, CloudStackApiException):
        _write_stderr(_how_to_go_on(invocation, error))  # also with -q: nothing else shows the id
    if error.response is not None and not isinstance(error, CloudStackJobTimeout):
        _print_error_answer(invocation, error)


def _server_error(error):
    """Return the document in which CloudStack itself states an error, or None."""
    document = getattr(error, "error", None)
    if isinstance(document, dict) and set(document) & {"errortext", "errorcode", "jobstatus"}:
        return document
    return None


def _sentence(error):
    """Return an exception in a line: its message, and the text of the server's error."""
    text = ": ".join(str(arg) for arg in error.args)
    document = _server_error(error)
    if document and document.get("errortext"):
        text += f": {document['errortext']}"
    return text


def _hint(invocation, error):
    """Return what can be tried after an error, or an empty text."""
    document = _server_error(error)
    if document is not None and _is_failed_login(error):
        return "Check user name, password and domain of this region."
    code = document.get("errorcode") if document else None
    if code == 432 and invocation.under_way is None:
        return "Your role may not list the commands; all else works without that."
    if isinstance(code, int):
        call = invocation.under_way or _CheckedCall("", {}, [])
        hint = _name_hint(call) if code == 431 else ""
        return hint or _HINTS.get(code, "").format(command=call.command)
    if document is None and _status_of(error) in (200, 404, 405):
        return _NO_API
    if error.outcome_unknown:
        return "Look whether it was done before you send it again."
    if error.unsent:
        return "Check the endpoint and the way there: the name, the network, proxies, --timeout."
    return ""


def _name_hint(call):
    """Return how a name is typed where an id belongs, if one was typed there without that."""
    for name, value in call.params.items():
        is_name = re.match(r"(?![0-9a-fA-F-]{36}\Z)[^\W\d][^:,]*\Z", str(value))
        if is_name and name.lower().endswith("id") and not isinstance(value, _Literal):
            return f"{name}={_shell_word('name:' + value)}, if that is a name and not an id."
    return ""


def _is_failed_login(error):
    """Return whether it is the log-in of a session that the server refused."""
    try:
        return "loginresponse" in error.response.json()
    except (AttributeError, TypeError, ValueError, RecursionError):
        return False


def _asked(invocation, error):
    """Return the call that failed as it can be typed again, secrets replaced.

    It is an empty text for a call that nobody typed."""
    call = invocation.under_way
    if _is_failed_login(error) and (call is None or call.command != "login"):
        user, domain = map(invocation.client.get_setting, ("username", "domain"))
        return _one_line(f"login username={user} domain={domain or '/'}")
    if call is None:
        return ""
    if invocation.options["wait"]:
        return _shell_line(invocation, ["--wait", invocation.options["wait"]])

    hidden = {name for name, text in _mask_params(call.params).items() if text == MASK}
    words = call.words[:1]
    for word in call.words[1:]:
        name, _, value = word.partition("=")
        is_file = re.match(r"\s*@(?!@)", value)
        words.append(f"{name}={MASK}" if name.strip() in hidden and not is_file else word)
    return _shell_line(invocation, words)


def _shell_line(invocation, words):
    """Return the line that has these words carried out with the same configuration."""
    line = ["cs"]
    for name in ("region", "config", "endpoint"):
        value = invocation.options[name]
        if value:
            line += ["--" + name, _mask_address(value) if name == "endpoint" else value]
    return " ".join(_shell_word(_cut(word, 500)) for word in line + words)


def _shell_word(word):
    """Quote a word for a shell; what a terminal must not see as bash, zsh and ksh write it."""
    import shlex

    if "\n" not in word and "\t" not in word and not _UNPRINTABLE.search(word):
        return shlex.quote(word)
    text = re.sub(r"[\\']", r"\\\g<0>", word).replace("\n", r"\n").replace("\t", r"\t")
    return "$'" + _UNPRINTABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", text) + "'"


def _how_to_go_on(invocation, error):
    """Return how to wait for a job that may still run."""
    line = _shell_line(invocation, ["--wait", error.jobid])
    call = invocation.under_way
    if isinstance(error, KeyboardInterrupt) and getattr(error, "outcome_unknown", False) and call:
        # Its answer was not there yet; and without the list of commands each is given an id.
        return f"{call.command} may have run; if it starts a job, this waits for it: {line}"
    return f"Job {error.jobid} may still be running; to go on waiting for it: {line}"


def _print_error_answer(invocation, error):
    """Print CloudStack's own JSON of an error on standard output.

    Not on a terminal, which has shown its text already. Any other answer goes to standard error,
    masked, and only its beginning."""
    document = _server_error(error)
    try:
        text = _json_text(error.response.json())
    except (ValueError, RecursionError):
        document = None
    if document is None:
        invocation.say(_masked_page(invocation, error.response.text))
    elif invocation.options["quiet"] or not (document.get("errortext") and sys.stdout.isatty()):
        _write(text + "\n")


def _masked_page(invocation, text):
    """Return the beginning of what is not CloudStack's: it may repeat the address, key and all."""
    # Masked first, lest a secret is cut in two.
    return _mask_text(text[:10000], _secrets_of(invocation.client))[:2000]


def _secrets_of(client):
    """Return the values that must not be shown of a client's requests."""
    return [client.key, client.secret, client.get_setting("password")]


def _report_unwritten(error):
    """Say that standard output could not be written.

    Not of a reader that has seen enough (head, a pager). What is still in its buffer goes nowhere:
    else the interpreter complains at its end."""
    out = sys.__stdout__
    try:
        if out is not None and out is sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    except (AttributeError, OSError, ValueError):
        pass
    if not isinstance(error, BrokenPipeError):
        _write_stderr(f"cs: cannot write the answer: {_error_text(error)}")


# 9.3 Formats.

# The columns of a table, as far as there are such; others come after them.
_PREFERRED = (
    "id jobid name state status allocationstate jobstatus type zonename account username"
    " nic.ipaddress ipaddress cidr hostname cpunumber memory size templatename serviceofferingname"
    " virtualmachinename vmname key value resourcetypename resourcetype max cmd level success"
    " displayname displaytext description created".split()
)
_MOST_COLUMNS = 8
_STATE_COLORS = (  # of the first pattern that fits: green, yellow, red
    ("32", "running|enabled|allocated|ready|up|implemented|connected|active|backedup"),
    ("33", r"\w+ing|\w*maintenance"),
    ("31", r"alert|down|disconnected|fault|\w*error\w*|\w*fail\w*"),
)
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?\Z", re.ASCII)


class _OutputFailed(Exception):
    """Standard output could not be written."""


def _write(text):
    """Write text on standard output, whatever it can show. Raises _OutputFailed."""
    out = sys.stdout
    try:
        try:
            out.write(text)
        except UnicodeEncodeError:
            if out.errors == "surrogateescape":  # Python 3.6 under a C locale; others take UTF-8
                text = text.encode("utf-8", "backslashreplace").decode("ascii", "surrogateescape")
            else:
                text = text.encode(out.encoding, "backslashreplace").decode(out.encoding)
            out.write(text)
    except OSError as error:
        raise _OutputFailed(error) from None


def _write_line(text):
    """Write a line whose characters are data: as they are, but escaped on a terminal."""
    _write((_escape_unprintable(text) if sys.stdout.isatty() else text) + "\n")


def _flush():
    """Flush standard output. Raises _OutputFailed."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _OutputFailed(error) from None


def _json_text(document, indent=2):
    """Return JSON as it is printed.

    Characters that a terminal must not see, or that standard output cannot show, are \\uXXXX."""
    text = jsonlib.dumps(document, indent=indent, sort_keys=True, ensure_ascii=False)
    text = _UNPRINTABLE.sub(lambda found: jsonlib.dumps(found.group())[1:-1], text)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = jsonlib.dumps(document, indent=indent, sort_keys=True)
    return text


def _highlighted(text, theme):
    """Return JSON coloured by Pygments, where it is installed."""
    try:
        from pygments import highlight
        from pygments.formatters import Terminal256Formatter
        from pygments.lexers import JsonLexer
        from pygments.util import ClassNotFound
    except ImportError:
        return text
    try:
        formatter = Terminal256Formatter(style=theme or "default")
    except ClassNotFound:
        formatter = Terminal256Formatter()
    return highlight(text, JsonLexer(), formatter).rstrip("\n")


def _print_answer(invocation, answer, is_plain=False):
    """Print an answer in the format asked for, or as the text it is (json=false)."""
    if is_plain:
        if answer:
            _write_line(answer.rstrip("\n"))
        return
    try:
        if answer not in ({}, [], None, ""):
            _print_document(invocation, answer)
        elif invocation.format() == "csv":
            _print_csv([], _chosen_columns(invocation))
    except RecursionError:
        raise CloudStackException("The answer is nested too deeply to be printed") from None


def _print_document(invocation, answer):
    """Print an answer that holds something, in the format asked for."""
    rows = _rows_of(answer)
    columns = _chosen_columns(invocation)
    named = [condition.column for condition in invocation.conditions] + (columns or [])
    _warn_of_columns(invocation, rows, dict.fromkeys(named))
    wanted = _sorted(invocation, _filtered(invocation, rows))
    is_object = not isinstance(answer, list) and _find_rows(answer) is None
    if is_object and not wanted:  # it does not meet --where
        return

    if invocation.format() == "json":
        is_changed = columns is not None or invocation.options["sort"] or invocation.conditions
        shown = _with_rows(answer, _only(wanted, columns)) if is_changed else answer
        if invocation.conditions and isinstance(shown, dict) and "count" in shown and not is_object:
            shown["count"] = len(wanted)  # else a script would look for the rest
        _print_json(invocation, shown)
    else:
        _print_rows(invocation, wanted, columns)


def _print_rows(invocation, rows, columns):
    """Print rows in one of the formats that have rows.

    A new one is named in FORMATS and _HELP (9.1); for no rows at all see _print_answer."""
    shape = invocation.format()
    if shape == "jsonl":
        _write("".join(_json_text(row, None) + "\n" for row in _only(rows, columns)))
    elif shape == "csv":
        _print_csv(rows, columns)
    elif shape == "text":
        _print_text(rows, columns or _default_columns(rows))
    elif rows:
        _print_table(invocation, rows, columns)


def _rows_of(answer):
    """Return what a table shows of an answer.

    That is the rows of a list, else the one object in it (the result of a job), else itself."""
    if isinstance(answer, list):
        return answer
    if not isinstance(answer, dict):
        return [answer]
    rows = _find_rows(answer)
    if rows is not None:
        return rows
    inner = list(answer.values())
    return inner if len(inner) == 1 and isinstance(inner[0], dict) else [answer]


def _with_rows(answer, rows):
    """Return the answer with other rows in the place of its own."""
    if isinstance(answer, list):
        return rows
    if not isinstance(answer, dict):
        return rows[0]
    keys = [key for key, value in answer.items() if isinstance(value, list)]
    if _find_rows(answer) is not None and keys:
        return dict(answer, **{keys[0]: rows})
    if not rows:
        return answer
    if len(answer) == 1 and isinstance(list(answer.values())[0], dict):
        return {list(answer)[0]: rows[0]}
    return rows[0]


def _pick(value, path):
    """Return what a dotted path leads to, or None.

    A list without an index gives all of its items."""
    head, _, rest = path.partition(".")
    if isinstance(value, list):
        if re.match("[0-9]{1,9}\\Z", head):
            inner = value[int(head)] if int(head) < len(value) else None
            return _pick(inner, rest) if rest else inner
        found = [_pick(item, path) for item in value]
        found = [item for item in found if item is not None]
        return found or None
    if not isinstance(value, dict):
        return None
    if path in value:  # a name with a dot of its own
        return value[path]
    inner = value.get(head)
    return _pick(inner, rest) if rest else inner


def _only(rows, columns):
    """Return rows with nothing but these columns; all of them where none were chosen."""
    if columns is None:
        return rows
    return [{name: _pick(row, name) for name in columns} for row in rows]


def _cell(value):
    """Return a value as text.

    Lists are joined by commas, objects are compact JSON, booleans are as the API spells them."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not any(isinstance(item, dict) for item in value):
        return ",".join(map(_cell, value))
    return jsonlib.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _default_columns(rows, is_complete=False):
    """Return sensible columns, id, name, state and the like first; for csv all that there are."""
    objects = [row for row in rows if isinstance(row, dict)]
    present = dict.fromkeys(key for row in objects for key in row)
    columns = [path for path in _PREFERRED if path.partition(".")[0] in present]
    rest = [key for key in present if key not in columns]
    if is_complete:
        return [path for path in columns if "." not in path] + rest or ["value"]

    unwanted = {"ipaddress"} if "nic" in present else set()  # nic.ipaddress is the same, and all
    if "jobstatus" in present and "cmd" not in present:  # of the job that made it, no job itself
        unwanted |= {"jobid", "jobstatus"}
    columns = [path for path in columns if path not in unwanted]
    nested = {key for row in objects for key in row if isinstance(row[key], (dict, list))}
    columns += [key for key in rest if key not in nested]
    return columns[:_MOST_COLUMNS] or ["value"]


def _near(name, names, most=3):
    """Return the names that a misspelt one may be meant for, the likeliest first."""
    import difflib

    lower = {other.lower(): other for other in names}
    found = difflib.get_close_matches(name.lower(), list(lower), most, 0.6)
    return [lower[match] for match in found]


def _did_you_mean(names):
    """Return the end of a message that suggests names; an empty text without any."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _field_names(rows):
    """Return every dotted path that leads somewhere in rows, one level into lists and objects."""
    names = {}
    for row in rows[:1000]:
        for key, value in row.items() if isinstance(row, dict) else ():
            names[key] = True
            for inner in value[:1] if isinstance(value, list) else [value]:
                if isinstance(inner, dict):
                    names.update((f"{key}.{field}", True) for field in inner)
    return list(names)


def _chosen_columns(invocation):
    """Return the columns asked for with -c; None where none were."""
    names = [name.strip() for name in (invocation.options["columns"] or "").split(",")]
    return [name for name in names if name] or None


def _warn_of_columns(invocation, rows, columns):
    """Say which columns no row has."""
    for name in columns or ():
        if rows and all(_pick(row, name) is None for row in rows):
            near = _did_you_mean(_near(name, _field_names(rows)))
            invocation.say(f"Warning: no row has {name!a}{near}")


def _sorted(invocation, rows):
    """Return the rows in the order of --sort; those without the column come last."""
    column = invocation.options["sort"]
    if not column:
        return rows
    backwards = column.startswith("-")
    column = column.lstrip("-")
    _warn_of_columns(invocation, rows, [column])
    present = [row for row in rows if _pick(row, column) is not None]
    missing = [row for row in rows if _pick(row, column) is None]
    present.sort(key=lambda row: _sort_key(_pick(row, column)), reverse=backwards)
    return present + missing


def _sort_key(value):
    """Return a key that puts numbers in their order, also where the API gives them as text."""
    text = _cell(value)
    if _NUMBER.match(text):
        return (0, float(text), text)
    return (1, 0, text.lower())


def _cells(rows, columns):
    """Yield the texts of each row in these columns."""
    for row in rows:
        is_bare = columns == ["value"] and not isinstance(row, dict)
        yield [_cell(row if is_bare else _pick(row, name)) for name in columns]


def _print_json(invocation, document):
    """Print JSON, coloured if colours are wanted."""
    text = _json_text(document)
    if invocation.is_colored():
        text = _highlighted(text, invocation.options["theme"] or invocation.settings.get("theme"))
    _write(text + "\n")


def _print_csv(rows, columns):
    """Print RFC 4180: a header, CRLF, quotes if they are needed.

    By hand, since the csv module of 3.10 refuses NUL characters."""
    end = "" if os.linesep == "\r\n" else "\r"  # there the stream itself makes CRLF of LF
    if columns is None:
        columns = _default_columns(rows, is_complete=True) if rows else []
    for cells in [columns, *_cells(rows, columns)] if columns else ():
        line = ",".join(map(_csv_field, cells)) or '""'
        _write_line(line + end)


def _csv_field(text):
    """Return a text as a field of CSV."""
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def _print_text(rows, columns):
    """Print the values of each row, separated by tabs."""
    escapes = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    for cells in _cells(rows, columns):
        _write_line("\t".join(cell.translate(escapes) for cell in cells))


def _widths(text):
    """Return how many columns of a terminal each character takes.

    Wide ones take two, combining ones none."""
    if len(text.encode("utf-8", "replace")) == len(text):  # ASCII
        return [1] * len(text)
    from unicodedata import category, east_asian_width

    widths = []
    for char in text:
        if category(char) in ("Mn", "Me", "Cf"):
            widths.append(0)
        else:
            widths.append(2 if east_asian_width(char) in "WF" else 1)
    return widths


def _width(text):
    """Return how many columns of a terminal a text takes."""
    return sum(_widths(text))


def _terminal_width(otherwise):
    """Return the columns of the terminal that standard output is, `otherwise` where it is none."""
    if not sys.stdout.isatty():
        return otherwise
    import shutil

    return shutil.get_terminal_size().columns


def _cut(text, width):
    """Return text made to fit a width, an ellipsis at its end where something is gone."""
    text = text[: 2 * width + 100]  # combining characters aside, more cannot be seen
    if _width(text) <= width:
        return text
    room = width - 1
    for index, columns in enumerate(_widths(text)):
        room -= columns
        if room < 0:
            return text[:index] + "…"
    return text


def _one_line(text):
    """Return text that is safe to show, on one line."""
    return _escape_unprintable(text.replace("\n", " ").replace("\t", " "))


def _print_table(invocation, rows, chosen):
    """Print aligned columns under a header.

    On a terminal it fits: default columns are left out from the end, and only then is anything cut.
    Elsewhere nothing is."""
    columns = chosen or _default_columns(rows)
    table = [list(map(_one_line, cells)) for cells in [columns] + list(_cells(rows, columns))]
    widths = [max(_width(line[index]) for line in table) for index in range(len(columns))]
    room = _terminal_width(None)
    if room:
        least = [
            width if name.endswith("id") else min(width, 20) for name, width in zip(columns, widths)
        ]
        while not chosen and len(least) > 2 and sum(least) + 2 * len(least) - 2 > room:
            least.pop()
        widths = _fitted(widths[: len(least)], columns, room - 2 * len(least) + 2)

    is_colored = invocation.is_colored()
    for number, line in enumerate(table):
        cells = [_cut(cell, width) for cell, width in zip(line, widths)]
        padded = [cell + " " * (width - _width(cell)) for cell, width in zip(cells, widths)]
        if is_colored and number:
            padded = [_colored_state(*cell) for cell in zip(columns, line, padded)]
        text = "  ".join(padded).rstrip()
        _write((f"\x1b[1m{text}\x1b[0m" if is_colored and not number else text) + "\n")


def _colored_state(name, state, padded):
    """Return the cell of a state in its colour; what stopped, or is no state, in none."""
    shown = padded.rstrip()
    for color, pattern in _STATE_COLORS if re.search(r"(?i)(?:state|status)\Z", name) else ():
        if re.match(rf"(?i)(?:{pattern})\Z", state):
            return f"\x1b[{color}m{shown}\x1b[0m" + padded[len(shown) :]
    return padded


def _fitted(widths, columns, room):
    """Return widths that add up to the room, if they can.

    The widest gives way first, down to four columns; ids, which are whole or useless, come last."""
    widths = [min(width, max(room, 4)) for width in widths]
    plain = [index for index, name in enumerate(columns[: len(widths)]) if not name.endswith("id")]
    for some in (plain, list(range(len(widths)))):
        while sum(widths) > room and some and max(widths[index] for index in some) > 4:
            widths[max(some, key=lambda index: widths[index])] -= 1
    return widths


# 9.4 The list of commands.
# What the server offers: listApis, reduced to what help, checks and completion need, and kept.

_CATALOG_VERSION = 1
_CATALOG_LIFE = 30 * 86400  # seconds; an older one only warns
_ALWAYS_KNOWN = frozenset(
    "response customjobid page pagesize expires signature signatureversion apikey sessionkey"
    " ctxuserid ctxaccountid ctxstarteventid ctxdetails uuid".split()
)
_CONTROL = frozenset(["json", "fetch_list", "fetch_result", "opcode_name"])

_Param = collections.namedtuple("_Param", "name type required description length since")


class _CommandSpec(
    collections.namedtuple("_CommandSpec", "name description is_async since params fields")
):
    """What is known of one command. params: a _Param each; fields: dotted names of the answer's."""

    @classmethod
    def from_json(cls, line):
        """Return the _CommandSpec of a line of a catalog's file."""
        name, description, is_async, since, params, fields = jsonlib.loads(line)
        params = [_Param(*param) for param in params]
        return cls(name, description, is_async, since, params, fields)

    def find_param(self, name):
        """Return the _Param of a name in any case, or None."""
        return next((param for param in self.params if param.name.lower() == name.lower()), None)

    def ordered_params(self):
        """Return the required ones first, each by name."""
        return sorted(self.params, key=lambda param: (not param.required, param.name))


class _Catalog:
    """Holds the commands of one account, as listApis gave them.

    On disk: a header line, a line of JSON for each command, a checksum; so that one command can be
    looked up without parsing all of them, and a damaged file is noticed (ValueError)."""

    def __init__(self, text):
        content, _, checksum = text.rpartition("\n")
        if checksum != _checksum(content):
            raise ValueError("damaged, or written by another version")
        head, _, lines = content.partition("\n")
        self.fetched_at = float(head)
        self._file = text
        self._text = "\n" + lines

    @classmethod
    def of_specs(cls, specs):
        """Return the _Catalog of these commands, fetched now."""
        lines = [str(int(time.time()))] + sorted(jsonlib.dumps(spec) for spec in specs)
        content = "\n".join(lines)
        return cls(content + "\n" + _checksum(content))

    def save(self, path):
        """Write the file. Raises OSError."""
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        _write_private(path, self._file)

    def is_old(self):
        """Tell whether it was fetched so long ago that it only warns."""
        return not 0 <= time.time() - self.fetched_at < _CATALOG_LIFE

    def names(self):
        """Return the names of all commands."""
        return re.findall(r'\n\["([^"]+)"', self._text)

    def summaries(self):
        """Return (name, description) of each command; its parameters are not made for that."""
        return [tuple(jsonlib.loads(line)[:2]) for line in self._text.split("\n") if line]

    def find(self, name):
        """Return the _CommandSpec of a name, in any case where only one fits; else None."""
        if f'\n["{name}",' not in self._text:
            alike = [other for other in self.names() if other.lower() == name.lower()]
            if len(alike) != 1:
                return None
            name = alike[0]
        start = self._text.index(f'\n["{name}",') + 1
        return _CommandSpec.from_json(self._text[start:].partition("\n")[0])


def _checksum(text):
    """Return the last line of a catalog's file, by which a damaged one is noticed."""
    checksum = crc32(text.encode("utf-8", "replace")) & 0xFFFFFFFF
    return f"cs-commands {_CATALOG_VERSION} {checksum:08x}"


def _cache_path(client, *more):
    """Return the path of a file of the cache for this endpoint and account.

    Its name is a hash, so that it says nothing about them."""
    import hashlib

    user = client.key or client.get_setting("username") or ""
    account = "\0".join([client.endpoint, user, client.get_setting("domain") or "", *more])
    name = hashlib.sha256(account.encode("utf-8")).hexdigest()[:32]
    return _own_path("XDG_CACHE_HOME", ".cache", name)


def _own_path(variable, otherwise, name):
    """Return the path of a file of this program, below what the variable names or in the home."""
    base = os.environ.get(variable) or ""
    if not os.path.isabs(base):  # the specification has a relative one ignored
        base = os.path.join(os.path.expanduser("~"), otherwise)
    return os.path.join(base, "cs", name)


def _write_private(path, text):
    """Replace a file as one step, readable by its owner only. Raises OSError."""
    import tempfile

    file, scratch = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".cs-")
    try:
        with os.fdopen(file, "w", encoding="utf-8", newline="\n") as out:
            out.write(text)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def _text_of(entry, name):
    """Return an entry's text, or an empty one for anything else."""
    value = entry.get(name)
    return value if isinstance(value, str) else ""


def _dicts(value):
    """Return the dicts in a list; none for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _reduced(api):
    """Return the _CommandSpec of one entry of listApis, whatever shape it has."""
    params = []
    for param in _dicts(api.get("params")):
        name, kind, meaning, since = (
            _text_of(param, key) for key in ("name", "type", "description", "since")
        )
        length = param.get("length") if isinstance(param.get("length"), int) else None
        params.append(_Param(name, kind, param.get("required") is True, meaning, length, since))

    fields = []
    for field in _dicts(api.get("response")):
        name = _text_of(field, "name")
        inner = [_text_of(entry, "name") for entry in _dicts(field.get("response"))]
        fields += [name] + [f"{name}.{other}" for other in inner]
    fields = [field for field in fields if field]

    name, description, since = (_text_of(api, key) for key in ("name", "description", "since"))
    return _CommandSpec(name, description, api.get("isasync") is True, since, params, fields)


def _fetch_catalog(invocation):
    """Ask the server for listApis and keep it.

    Raises CloudStackException, and ValueError if --sync cannot keep it."""
    client = invocation.client
    specs = [_reduced(row) for row in client.listApis(fetch_list=True) if isinstance(row, dict)]
    specs = [spec for spec in specs if re.match(r"[\w.-]+\Z", spec.name)]
    if not specs:
        detail = "listApis gave no commands"
        raise CloudStackException("Unexpected response from CloudStack", detail)
    catalog = _Catalog.of_specs(specs)
    try:
        catalog.save(_cache_path(client))
    except OSError as error:
        problem = f"cannot write the cache {_cache_path(client)!a}: {_error_text(error)}"
        if invocation.options["sync"]:
            raise ValueError(problem) from None
        invocation.say("Warning: " + problem)
    else:
        invocation.say(f"{len(specs)} commands of {_mask_address(client.endpoint)} are now known")
    return catalog


def _cached_catalog(client):
    """Return the _Catalog that is kept, or None.

    A damaged one is thrown away; one that cannot be read just now (too many open files) may be
    good."""
    path = _cache_path(client)
    try:
        found = os.stat(path)
        return _read_catalog(path, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
    except OSError:
        return None
    except ValueError:
        try:
            os.unlink(path)
        except OSError:
            pass
        return None


@functools.lru_cache(maxsize=4)
def _read_catalog(path, *file_state):
    """Read a _Catalog; once for all lines of a shell, until its file changes."""
    with open(path, encoding="utf-8") as file:
        return _Catalog(file.read())


def _check_once(invocation, command, params):
    """Return what _check_against_catalog does, once for all calls of one shape.

    It looks at names and at what is empty, no further: a thousand rows of --each are alike to it,
    and warned of once."""
    shape = (command, *((name, value == "") for name, value in params.items()))
    if not invocation.options["each"] or shape not in invocation.checked:
        invocation.checked[shape] = _check_against_catalog(invocation, command, params)
    return invocation.checked[shape]


def _check_against_catalog(invocation, command, params):
    """Return the command in its own spelling, and decide whether its lost answer may be recovered.

    Raises _Usage for what the list of commands knows to be wrong, unless --force."""
    catalog = _cached_catalog(invocation.client)
    if catalog is None:
        return command
    spec = catalog.find(command)
    if spec is None:
        problems, missing = [], []
        if command not in ("login", "logout"):  # which no server lists
            problems = [_unknown_command(catalog, command)]
    else:
        command = spec.name
        # Without a job there is nothing by which a lost answer could be found again.
        may_recover = spec.is_async and invocation.settings["recover"]
        invocation.client.set_setting("recover", may_recover)
        problems, missing = _unknown_params(spec, params), _missing_params(spec, params)
        problems += _unknown_columns(spec, invocation)

    if invocation.options["force"] or not (problems or missing):
        return command
    needs = [f"{command} needs {', '.join(missing)}"] if missing else []
    text = "\n    ".join(problems + needs)
    if catalog.is_old():
        days = (time.time() - catalog.fetched_at) / 86400
        hint = f"(known from {days:.0f} days ago; `cs --sync` looks again)"
        invocation.say(f"Warning: {text}\n    {hint}")
        return command
    if not problems:  # no newer list, and no --force, would help
        raise _Usage(f"{text}; see cs {command} --help")
    hint = "`cs --sync` looks again what the server offers; --force sends it all the same."
    raise _Usage(f"{text}\n    Nothing was sent. {hint}")


def _base_name(name):
    """Return the name under which the list of commands has a parameter: tags for tags[0].key."""
    return name.partition("[")[0].lower()


def _unknown_params(spec, params):
    """Return a sentence for each parameter that the server would ignore in silence."""
    known = {param.name.lower(): param.name for param in spec.params}
    problems = []
    for name in params:
        base = _base_name(name)
        if name not in _CONTROL and base not in known and base not in _ALWAYS_KNOWN:
            near = _did_you_mean(_near(base, known.values()))
            problems.append(f"{spec.name} has no parameter {name!a}{near}")
    return problems


def _unknown_columns(spec, invocation):
    """Return a sentence for each --where of a column that the answer cannot have.

    != would hold for every row, and a script would take all of them for those it wanted."""
    if invocation.options["each"] or not spec.fields:
        return []
    problems = []
    for condition in invocation.conditions:
        if condition.column.partition(".")[0] not in spec.fields:
            near = _did_you_mean(_near(condition.column, spec.fields))
            problems.append(f"{spec.name} returns no {condition.column!a}{near}")
    return problems


def _missing_params(spec, params):
    """Return the required parameters that have no value, or an empty one."""
    given = {_base_name(name) for name, value in params.items() if value != ""}
    names = [param.name for param in spec.params if param.required]
    return sorted(name for name in names if name.lower() not in given)


def _unknown_command(catalog, name):
    """Return the sentence about a command that the list of commands does not have."""
    near = _did_you_mean(_meant_commands(catalog, [name]) or _near(name, catalog.names()))
    return f"the server has no command {name!a} for you{near}"


def _meant_commands(catalog, words):
    """Return the command that habits from elsewhere spell as these words, if there is one.

    That is verb and noun apart, or the noun alone; in any case, singular or plural."""

    def bare(name):
        return re.sub(r"(?:ies|y|s*e?s*)\Z", "", name.lower())

    noun = _SHORT_NAMES.get(bare(words[-1]), words[-1])
    meant = bare("".join(words[:-1]) + noun)
    names = {bare(name): name for name in catalog.names()}
    return [names[name] for name in (meant, "list" + meant) if name in names][:1]


def _refuse_parted_command(invocation, words):
    """Raise _Usage if the words up to the first parameter mean one command together."""
    words = list(itertools.takewhile(lambda word: "=" not in word, words))
    catalog = _cached_catalog(invocation.client)
    meant = _meant_commands(catalog, words) if catalog else []
    if meant:
        raise _Usage(f"there is no command {' '.join(words)!a}{_did_you_mean(meant)}")


def _catalog_for_reading(invocation):
    """Return the catalog, fetched now if it is not there.

    --list and COMMAND --help ask for nothing else."""
    catalog = None if invocation.options["sync"] else _cached_catalog(invocation.client)
    return catalog or _fetch_catalog(invocation)


def _list_commands(invocation, words):
    """Print the commands in whose name or description all the words stand (--list).

    Returns whether there are any."""
    found = []
    for name, description in _catalog_for_reading(invocation).summaries():
        if all(word.lower() in f"{name} {description}".lower() for word in words):
            found.append((name, description))
    if not found:
        invocation.say(f"No command matches {' '.join(words)}")

    longest = max([len(name) for name, _ in found] or [0])
    width = _terminal_width(None)
    for name, description in found:
        line = _one_line(f"{name:{longest}}  {description.strip()}").rstrip()
        _write((_cut(line, width) if width else line) + "\n")
    return bool(found)


def _describe_command(invocation, name):
    """Print what a command takes and returns (COMMAND --help)."""
    catalog = _catalog_for_reading(invocation)
    spec = catalog.find(name)
    if spec is None:
        raise _Usage(_unknown_command(catalog, name) + "\n    `cs --list WORD` looks for one.")
    lines = _description_lines(spec, min(_terminal_width(100), 100))
    _write(_escape_unprintable("\n".join(lines)) + "\n")
    return True


def _description_lines(spec, width):
    """Yield the lines of COMMAND --help."""
    import textwrap

    yield spec.name + (f" (since {spec.since})" if spec.since else "")
    yield from textwrap.wrap(
        spec.description, width, initial_indent="  ", subsequent_indent="  "
    )
    if spec.is_async:
        yield "  It starts a job, which is waited for unless --async."

    params = spec.ordered_params()
    for heading, required in (("Required:", True), ("Optional:", False)):
        group = [param for param in params if param.required is required]
        if group:
            yield ""
            yield heading
        for param in group:
            text = f"  {param.name} ({_facts(param)})  {param.description}"
            yield from textwrap.wrap(text, width, subsequent_indent=" " * 6)

    top = ", ".join(field for field in spec.fields if "." not in field)
    if top:
        yield ""
        yield from textwrap.wrap("Returns: " + top, width, subsequent_indent="  ")
    yield ""
    examples = [_example(param) for param in params if param.required]
    yield "Example: cs " + " ".join([spec.name] + examples)


def _facts(param):
    """Return what is known of a parameter beside its description."""
    facts = [param.type] if param.type else []
    if param.length and param.type == "string" and param.length != 255:
        facts.append(f"at most {param.length}")
    if param.since:
        facts.append(f"since {param.since}")
    return ", ".join(facts)


def _example(param):
    """Return a parameter as an example has it."""
    if param.type == "map":
        return f"{param.name}[0].key=... {param.name}[0].value=..."
    kinds = {
        "boolean": "true", "integer": "1", "long": "1", "uuid": "ID", "date": "2026-01-31",
        "list": "A,B",
    }  # fmt: skip
    return f"{param.name}={kinds.get(param.type, '...')}"


# 9.5 Completion.
# The shells' scripts hand over the line up to the cursor and get lines of `word TAB description`.
# Words come partly from the server, and names from tenants: only words that no shell would evaluate
# are given, and the scripts never evaluate any.

_SCRIPTS = {
    "bash": r"""
_cs_complete() {
    local line text word cut="" ends="${COMP_WORDBREAKS//[^=:]/}" keep=""; local -a shown
    COMPREPLY=()
    word="${COMP_LINE:0:COMP_POINT}"; word="${word##*[[:space:]]}"
    # bash takes a word apart at = and : and replaces only the last part
    [[ -n "$ends" ]] && cut="${word%"${word##*[$ends]}"}"
    while IFS= read -r text; do
        line="${text%%$'\t'*}"; text="${text/$'\t'/  }"
        if [[ -z "$line" ]]; then shown=("${text#  }"); keep=1; continue; fi  # a message
        [[ "$line" == "$cut"* ]] || continue
        [[ "$line" == *= || "$line" == *, ]] && compopt -o nospace 2>/dev/null
        [[ "$line" == *=* && "$line" != "$word"* ]] && keep=1  # found by its name
        COMPREPLY+=("${line#"$cut"}"); text="${text#"$cut"}"; shown+=("${text:0:${COLUMNS:-80}-2}")
    done < <(CLOUDSTACK_TRACE= command "${COMP_WORDS[0]}" \
        --complete="${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
    (( ${#COMPREPLY[@]} == 1 )) && return
    # Descriptions only where words are listed, never where one of them is put on the line.
    case "$COMP_TYPE" in 63|33|64) COMPREPLY=("${shown[@]}") ;; esac
    # One that begins otherwise keeps what is typed: the beginning of several ids is not put there.
    [[ -n "$keep" && "$COMP_TYPE" != 37 ]] && (( ${#COMPREPLY[@]} )) && COMPREPLY+=(" ")
}
complete -o nosort -F _cs_complete cs 2>/dev/null || complete -F _cs_complete cs
""",
    "zsh": r"""#compdef cs
_cs() {
    local line word; local -a plain shown open any
    for line in "${(@f)$(CLOUDSTACK_TRACE= command "${words[1]}" \
        --complete="${(j: :)words[1,CURRENT-1]} ${PREFIX}" 2>/dev/null)}"; do
        [[ -n "$line" ]] || continue
        word="${line%%$'\t'*}"
        [[ -n "$word" ]] || { compadd -x "${${line#?}//\%/%%}"; continue }
        [[ "$word" == "$PREFIX"* ]] || any=(-U)
        if [[ "$word" == *= || "$word" == *, ]]; then open+=("$word"); continue; fi
        plain+=("$word"); shown+=("${line//$'\t'/  -- }")
    done
    (( $#open )) && compadd $any -V cs -S '' -- "${open[@]}"
    (( $#plain )) && compadd $any -V cs -l -d shown -- "${plain[@]}"
    # the beginning of several ids must not take the place of the name that is typed
    (( $#any && $#plain > 1 )) && [[ $PREFIX == *=* ]] && compstate[insert]= compstate[list]=list
}
if [[ "$funcstack[1]" = _cs ]]; then _cs "$@"; else compdef _cs cs; fi
""",
    "fish": r"""
function __cs_complete
    set -l line (commandline -cp)
    set -l found (env CLOUDSTACK_TRACE= (commandline -opc)[1] --complete="$line" 2>/dev/null)
    if string match -q \t'*' -- "$found"  # a message
        printf '\n%s\n' (string trim -- "$found") >&2; commandline -f repaint
    else
        string join \n -- $found
    end
end
complete -c cs -k -f -a '(__cs_complete)'
""",
}
_SAFE_WORD = re.compile(r"[A-Za-z0-9_.,:/@%+=\[\]-]+\Z")
_PATIENCE_AT_A_KEY = 1.0  # seconds to connect and as many for the answer
_REMEMBERED = 60.0  # seconds for which ids are not asked for again
_SHORT_NAMES = {"vm": "virtualmachine", "parentdomain": "domain"}

# pending: the option whose value is being typed, or None; front: `--name=` where the value follows
# it in the same word; current: the word, or the value, that is being typed.
_NO_OPTION = _Option("", "", None)
_Line = collections.namedtuple("_Line", "options pending front command words current")


def _read_line(text):
    """Take a line apart as far as it is typed; mistakes on it are passed over."""
    typed = text.split()[1:]
    current = typed.pop() if typed and not text[-1].isspace() else ""
    pending = _FLAGS.get(typed[-1]) if typed else None
    front = ""
    if pending is not None and pending.value is not None:
        typed.pop()
    elif current.startswith("--") and "=" in current:
        flag, _, current = current.partition("=")
        pending, front = _FLAGS.get(flag, _NO_OPTION), flag + "="
    else:
        pending = None

    known = [arg for arg in typed if arg[:1] != "-" or arg.partition("=")[0] in _FLAGS]
    try:
        options, words = _parse_arguments(known)
    except _Usage:
        options, words = _parse_arguments([arg for arg in known if arg[:1] != "-"])
    options["quiet"] = True
    return _Line(options, pending, front, words[0] if words else None, words[1:], current)


def _print_completions(text):
    """Print the words that may stand where the cursor is, at the end of the text."""
    try:
        for word, description in _completions(_read_line(text)):
            _write(word + ("\t" + description if description else "") + "\n")
    except _Usage as error:  # no word, so that no shell puts it on the line
        _write(f"\t{_one_line(str(error))}\n")


def _completions(line):
    """Yield (word, description) of what may stand at the end of a line.

    Raises _Usage as _candidates does."""
    words = set()
    for word, description in _starting(_candidates(line), line.current):
        if word not in words and _SAFE_WORD.match(line.front + word):
            words.add(word)
            yield line.front + word, _cut(" ".join(_escape_unprintable(description).split()), 60)


def _starting(pairs, prefix):
    """Return the pairs whose word begins so.

    For a value those count, too, whose description does: the name of an id."""
    typed = re.sub(r".*[=,]", "", prefix) if "=" in prefix else ""

    def fits(pair, to):
        return to(pair[0]).startswith(to(prefix)) or typed and to(pair[1]).startswith(to(typed))

    return _fitting(pairs, fits)


def _fitting(items, fits):
    """Return the items that fit as they are spelled; if none does, in any case of letters."""
    as_spelled = [item for item in items if fits(item, str)]
    return as_spelled or [item for item in items if fits(item, str.lower)]


def _candidates(line):
    """Return (word, description) pairs of what may stand there, whatever it begins with.

    Raises _Usage if the list of commands is missing."""
    if line.pending is not None:
        return [(word, "") for word in _option_values(line)]
    if line.current.startswith("-"):
        return [(flag, "") for flag in sorted(_FLAGS) if flag[1] == "-" and flag != "--complete"]
    invocation, catalog = _known_commands(line)
    if line.command is None:
        return catalog.summaries() if catalog else []
    spec = catalog.find(line.command) if catalog else None
    if spec is None:
        return []

    name, equals, value = line.current.partition("=")
    if not equals:
        used = {word.partition("=")[0].lower() for word in line.words}
        unused = [param for param in spec.ordered_params() if param.name.lower() not in used]
        return [(param.name + "=", param.description) for param in unused]
    param = spec.find_param(name)
    if param and param.type == "boolean":
        return [(name + "=true", ""), (name + "=false", "")]
    if not name.lower().endswith(("id", "ids")):
        return []
    typed = value[value.rfind(",") + 1 :] if name.lower().endswith("s") else value
    front = line.current[: len(line.current) - len(typed)]
    pairs = _ids(invocation, catalog, spec, name)
    if typed.startswith("name:"):
        return [(front + "name:" + text, ident) for ident, text in pairs if text]
    return [(front + ident, text) for ident, text in pairs]


def _option_values(line):
    """Return the values that the option before the cursor may have."""
    option = line.pending
    if isinstance(option.value, tuple):
        return option.value
    if option.name in ("region", "profile"):
        return _regions(line.options["config"])
    if option.name in ("columns", "sort") and line.command is not None:
        catalog = _known_commands(line)[1]
        spec = catalog.find(line.command) if catalog else None
        front = line.current[: line.current.rfind(",") + 1]
        return [front + field for field in (spec.fields if spec else ())]
    return []


def _known_commands(line):
    """Return the invocation that a line describes and its _Catalog.

    Both are None if it cannot be used. Raises _Usage if only the _Catalog is missing."""
    invocation = _Invocation(line.options)
    try:
        invocation.connect()
    except (_Usage, ValueError):
        return None, None
    catalog = _cached_catalog(invocation.client)
    if catalog is None:
        raise _Usage(f"to have commands completed, type: {_shell_line(invocation, ['--sync'])}")
    return invocation, catalog


def _regions(config):
    """Return the names of all sections in the ini files that can be read."""
    found = set()
    for path in _list_ini_paths(config)[0]:
        try:
            found.update(_parse_ini(path, _read_text(path)).sections())
        except (OSError, ValueError):
            pass
    return sorted(found)


def _ids(invocation, catalog, spec, name):
    """Return (id, name) of what an ...id parameter may be, asked of the list command that fits.

    It is remembered for a minute, as is that it could not be had: a server that hangs is not waited
    for at every key, nor a wrong password tried."""
    lister = _lister(catalog, spec.name, name)
    if lister is None:
        return []
    client = invocation.client
    path, refused = _cache_path(client, "ids", lister.name), _cache_path(client, "ids")
    rows = _remembered(refused)
    if rows is None:
        rows = _remembered(path)
    if rows is not None:
        return rows

    try:
        with client:
            rows = _ask_ids(client, lister)
    except CloudStackException:
        rows, path = [], refused
    try:
        _write_private(path, jsonlib.dumps({"at": int(time.time()), "rows": rows}))
    except OSError:
        pass
    return rows


def _remembered(path):
    """Return the rows that a file of ids holds, None unless it is less than a minute old."""
    try:
        with open(path, encoding="utf-8") as file:
            kept = jsonlib.load(file)
        if 0 <= time.time() - kept["at"] < _REMEMBERED:
            rows = [(ident, text) for ident, text in kept["rows"]]
            return rows if all(isinstance(part, str) for row in rows for part in row) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _ask_ids(client, lister):
    """Ask a list command for (id, name) of what it has, within a person's patience at a key."""
    params = {}
    if lister.find_param("listall"):
        params["listall"] = "true"
    if lister.find_param("templatefilter"):
        params["templatefilter"] = "executable"
    client.timeout, client.retry = _PATIENCE_AT_A_KEY, 0
    call = _Call(lister.name, params)
    call.total = _PATIENCE_AT_A_KEY

    found = []
    for row in _dicts(_find_rows(client._drive(_send_with_retries(client, call)))):
        if isinstance(row.get("id"), str):
            found += [(row["id"], name) for name in reversed(_names(row) or [""])]
    return found


def _lister(catalog, command, name):
    """Return the list command whose ids a parameter takes, or None.

    It is listZones for zoneid, and for a plain id that of the command's own object."""
    thing = re.sub(r"ids?\Z", "", name.lower())
    if not thing:
        thing = re.sub(r"\A[a-z]+", "", command).lower()
    thing = _SHORT_NAMES.get(thing, thing)
    wanted = [f"list{thing}s", f"list{thing}", f"list{thing}es", f"list{thing[:-1]}ies"]
    spelled = {other.lower(): other for other in catalog.names()}
    return next((catalog.find(spelled[other]) for other in wanted if other in spelled), None)


# 9.6 Configure.

_QUESTIONS = (
    ("endpoint", "Endpoint (https://host/client/api): "),
    ("key", "API key: "),
    ("secret", "Secret key (not shown): "),
)


def _configure(invocation):
    """Ask for a section, try it with one call, add it to ~/.cloudstack.ini (--configure).

    Returns whether it was written."""
    options = invocation.options
    region = options["region"] or os.environ.get(_PREFIX + "REGION") or _DEFAULT_REGION
    if not re.match(r"[^\[\]\s][^\[\]\r\n]*\Z", region) or region == "DEFAULT":
        raise _Usage(f"{region!a} cannot be the name of a section")
    path = os.path.realpath(os.path.expanduser(options["config"] or "~/.cloudstack.ini"))
    _text_without_section(path, region)

    answers = {name: _ask_until_usable(name, question) for name, question in _QUESTIONS}
    text = _text_without_section(path, region)  # as it is now, minutes later
    text += f"[{region}]\n"
    for name, answer in answers.items():
        text += f"{name} = {answer.replace('%', '%%')}\n"
    if not _works(invocation, path, text, region):
        answer = _ask_person("Save them all the same? [y/N] ")
        if answer.lower() not in ("y", "yes"):
            invocation.say("Nothing was written.")
            return False
    try:
        _write_private(path, text)
    except OSError as error:
        raise ValueError(f"cannot write {path!a}: {_error_text(error)}") from None
    invocation.say(f"Section [{region}] of {path} is written.")
    return True


def _text_without_section(path, region):
    """Return the text that a section can be added to.

    Raises _Usage if the file has the section: a person's work is theirs to edit; ValueError for a
    broken file."""
    try:
        text = _read_text(path)
    except FileNotFoundError:
        return ""
    if _parse_ini(path, text).has_section(region):
        heads = [line.startswith(f"[{region}]") for line in text.split("\n")]
        line = heads.index(True) + 1 if True in heads else "?"
        hint = "edit it there, or give another name with --region"
        raise _Usage(f"[{region}] stands in {path}, line {line}; {hint}")
    text = text.rstrip("\n")
    return text + "\n\n" if text else ""


def _ask_until_usable(name, question):
    """Ask again until an answer makes sense.

    It is never repeated in a message: pasted a line too early, it is the secret."""
    while True:
        answer = _ask_person(question, is_hidden=name == "secret")
        if not answer:
            problem = "nothing was typed"
        elif name == "endpoint" and not _is_endpoint(answer):
            problem = "that is not an http:// or https:// address without user and password"
        else:
            return answer
        _write_stderr(f"  {problem}; once more, or Ctrl-C to end")


def _is_endpoint(text):
    """Tell whether a text can be an endpoint."""
    try:
        _check_client(CloudStack(text))
    except ValueError:
        return False
    return True


def _ask_person(question, is_hidden=False):
    """Return a person's answer to a question. Raises _Usage without one."""
    try:
        if is_hidden and sys.stdin.isatty():
            from getpass import getpass

            return getpass(question, sys.stderr).strip()
        sys.stderr.write(question)
        sys.stderr.flush()
        answer = sys.stdin.readline()
    except (AttributeError, EOFError):  # no standard input, or Ctrl-D
        answer = ""
    if not answer:
        raise _Usage(f"no answer to '{question.strip()}'; nothing was written")
    return answer.strip()


def _works(invocation, path, text, region):
    """Try a section with one call, and with what [DEFAULT] adds to it, such as certificates.

    Raises ValueError if it cannot be used."""
    found = _IniValues()
    found.add_file(path, _parse_ini(path, text), region)
    invocation.client = CloudStack(**{"endpoint": None, **_to_settings(found.values)})
    _check_client(invocation.client)
    try:
        with invocation.client:
            invocation.client.listCapabilities()
    except CloudStackException as error:
        _write_stderr(f"They do not work: {_sentence(error)}")
        return False
    invocation.say(f"They work: {_mask_address(invocation.client.endpoint)} answered.")
    return True


# 9.7 Names for ids.
# name:web-01 where an id belongs is looked up before the call, by the list command that completion
# asks, too.

_TELLING_APART = ("zonename", "domain", "project", "account", "state")
_PLACES = ("zoneid", "domainid", "account", "projectid")  # known first, they tell others apart
# A keyword may be a pattern to the server, which may compare what is not ASCII in its own ways.
_SAFE_KEYWORD = re.compile(r"[\w .()/-]+\Z", re.ASCII)


def _fill_in_ids(invocation, command, params):
    """Put ids where names were typed. Raises _Usage for a name that nothing has, or several."""
    catalog = None
    for param in sorted(params, key=lambda param: param.lower() not in _PLACES):
        parts = _split_names(param, params[param])
        if not any(part.startswith("name:") for part in parts):
            continue
        catalog = catalog or _cached_catalog(invocation.client)
        if catalog is None:
            raise _Usage(f"{param}: names need {_shell_line(invocation, ['--sync'])} first")

        lister = _lister(catalog, command, param)
        if lister is None and not invocation.options["force"]:
            hint = f"""give an id, or {param}='"name:..."' for the text itself"""
            raise _Usage(f"{param}: there is no list command to look a name up by; {hint}")
        for index, part in enumerate(parts if lister else ()):
            if part.startswith("name:"):
                parts[index] = _id_of_name(invocation, lister, f"{param}={part}", params)
        params[param] = ",".join(parts)
    invocation.under_way = None


def _id_of_name(invocation, lister, typed, params):
    """Return what _look_up_id does, once for all rows of --each that ask for the same."""
    places = sorted((name, value) for name, value in params.items() if name.lower() in _PLACES)
    key = (lister.name, typed.partition("=")[2], *places)
    if key not in invocation.ids:
        invocation.ids[key] = _look_up_id(invocation, lister, typed, params)
    return invocation.ids[key]


def _split_names(param, value):
    """Return the parts of what an ...id parameter is given; [] for what can hold no name.

    In a list a comma ends a name only before another name or an id: others are the name's own."""
    if isinstance(value, _Literal) or not re.search("ids?\\Z", param.lower()):
        return []
    end = r",(?=name:|[0-9a-fA-F-]{36}(?:,|\Z))"
    return re.split(end, value) if param.lower().endswith("s") else [value]


def _look_up_id(invocation, lister, typed, params):
    """Return the id of what has the name in a word such as zoneid=name:x. Raises _Usage."""
    name = typed.partition("=name:")[2]
    given = {param.lower(): value for param, value in params.items()}
    seen: dict = {}
    for question in _questions(lister, name, given):
        _add_rows(invocation, lister, question, seen)
        if any(name in _names(row) for row in seen.values()):
            break

    found = _fitting(seen.values(), lambda row, to: to(name) in map(to, _names(row)))
    for key in _PLACES:
        found = [row for row in found if key in given and row.get(key) == given[key]] or found
    if len(found) == 1:
        return str(found[0]["id"])
    problem = f"{typed}: {lister.name} has {len(found) or 'nothing'} of this name"
    if not found:
        owners = {other: row for row in seen.values() for other in _names(row)}
        near = _near(name, owners) + [other for other in owners if name.lower() in other.lower()]
        found = list({id(owners[other]): owners[other] for other in near}.values())
    problem += "; did you mean one of these? Give its id:" if found else ""
    lines = [_one_line(problem), *_candidate_lines(found), "The call was not sent."]
    raise _Usage("\n    ".join(lines))


def _questions(lister, name, given):
    """Yield the parameters of ever wider questions to a list command.

    First what holds the word, then what can be used, then what there is. What belongs to a project
    is in the lists for projects only."""
    has = lister.find_param
    asked = {"listall": "true"} if has("listall") else {}
    filters = [param for param in ("templatefilter", "isofilter") if has(param)]
    words = ("executable", "self", "all") if filters else ("",)
    projects = [given["projectid"], ""] if "projectid" in given else ["", "-1"]

    for keyword in [name, ""] if has("keyword") and _SAFE_KEYWORD.match(name) else [""]:
        for project in projects if has("projectid") else [""]:
            for word in words[:1] if keyword else words:
                more = {"keyword": keyword, "projectid": project, **dict.fromkeys(filters, word)}
                yield {**asked, **{param: value for param, value in more.items() if value}}


def _add_rows(invocation, lister, question, seen):
    """Ask a list command for all its pages, and add its rows to those that were seen: {id: row}."""
    words = [lister.name] + [f"{param}={value}" for param, value in question.items()]
    invocation.under_way = _CheckedCall(lister.name, question, words)
    try:
        rows = _dicts(list(invocation.client.iter_list(lister.name, **question)))
        seen.update((str(row["id"]), row) for row in rows if isinstance(row.get("id"), (str, int)))
    except CloudStackApiException:
        if not {"all", "-1"} & set(question.values()):  # which not everybody may ask for
            raise
    invocation.progress.clear()


def _names(row):
    """Return the names of a row; a user has but the one to log in with."""
    names = [row.get("name"), row.get("displayname")]
    names = [name for name in names if name] or [row.get("username")]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def _candidate_lines(rows):
    """Return a line for each of the first rows: id, names, and the fields that tell them apart."""
    fields = [key for key in _TELLING_APART if len({_cell(row.get(key)) for row in rows}) > 1]
    for row in rows[:10]:
        facts = ", ".join(f"{key} {_cell(row[key])}" for key in fields if key in row)
        yield _one_line(f"  {row['id']}  {' / '.join(_names(row))}  {facts}").rstrip()


# 9.8 Rows that meet conditions: --where.

# Compiled when it is used. A new sign has its first character in [^...], too, and its meaning in
# _Condition; one that _ORDERS lacks means `=`.
_CONDITION = r"([^=!<>~]+)(!=|<=|>=|=?~|==?|[<>])(.*)\Z"
_ORDERS = {"<": (-1,), "<=": (-1, 0), ">": (1,), ">=": (0, 1)}  # what comparing may give


class _Condition:
    """One --where: a column, a sign and a value. Raises _Usage for what cannot be one."""

    def __init__(self, text):
        found = re.match(_CONDITION, text, re.DOTALL)
        if not found or not found.group(1).strip():
            raise _Usage(f"--where {text!a}: it should be COLUMN=VALUE, or != ~ < <= > >= for =")
        self.column, self.sign, wanted = (part.strip() for part in found.groups())
        self.wanted = _comparable(wanted)
        try:
            self.pattern = re.compile(wanted, re.IGNORECASE) if "~" in self.sign else None
        except (re.error, OverflowError, RecursionError) as error:
            raise _Usage(f"--where {wanted!a}: no regular expression: {error}") from None

    def is_met(self, row):
        """Tell whether a row meets it.

        Of a list any item may, but for != none may be equal; what a row does not have counts as the
        empty text."""
        holds = any(map(self._holds, _texts(_pick(row, self.column))))
        return holds != (self.sign == "!=")

    def _holds(self, text):
        """Tell whether one text meets the condition; for != whether it is equal."""
        if self.pattern:
            return self.pattern.search(text) is not None
        given, wanted = _comparable(text), self.wanted
        order = (given > wanted) - (given < wanted)
        return given[0] == wanted[0] and order in _ORDERS.get(self.sign, (0,))


def _texts(value):
    """Return the texts that a condition compares: that of a value, or those of a list's items."""
    if isinstance(value, list) and value:
        return [text for item in value for text in _texts(item)]
    return [_cell(value)]


def _comparable(text):
    """Return (kind, value). Numbers compare with numbers, texts with texts, nothing with itself."""
    if not _NUMBER.match(text):
        return (1 if text else 2, text)
    try:
        return (0, int(text))
    except ValueError:  # a fraction; or more digits than int() takes
        return (0, float(text))


def _filtered(invocation, rows):
    """Return the rows that meet every --where."""
    for condition in invocation.conditions:
        rows = [row for row in rows if condition.is_met(row)]
    return rows


# 9.9 Many at once: --each.

_FIELD = r"\{\{|\}\}|\{([^{}]*)\}|[{}]"
_PARALLEL = 10


def _check_each(options):
    """Raise _Usage for options that do not go with --each, or not without it."""
    word = "with" if options["each"] else "without"
    others = {"with": "columns sort wait list shell", "without": "parallel stop-on-error"}
    for name in others[word].split():
        if options[name]:
            raise _Usage(f"--{name} does not go {word} --each")
    count = options["parallel"]
    if count and not re.match(r"0*[1-9][0-9]{0,5}\Z", count, re.ASCII):
        raise _Usage(f"--parallel {count!a}: it should be a number from 1 up")


def _carry_out_each(invocation, words):
    """Make the call once for each row of standard input. Returns whether all succeeded."""
    template = [words[0]] + [_word_template(word) for word in words[1:]]
    given = _read_rows(invocation)
    for condition in invocation.conditions:  # != of a column that is not there would hold for all
        if given and all(_pick(row, condition.column) is None for row in given):
            near = _did_you_mean(_near(condition.column, _field_names(given)))
            raise _Usage(f"--where: no row has {condition.column!a}{near}; nothing was sent")
    rows = _filtered(invocation, given)
    if not rows:
        problem = "None of the rows meets --where" if given else "No rows on standard input"
        invocation.say(problem + ": nothing to do")

    is_dry = invocation.options["dry-run"]
    for number, row in enumerate(rows, 1):  # all of them before the first is sent
        try:
            call = _row_call(invocation, template, row)
            _Call(call.command, flatten(call.params))  # refuses what the server would
        except (_Usage, ValueError) as error:
            raise _Usage(f"row {number}, {_cut(_json_text(row, None), 60)}: {error}") from None
        if is_dry:
            _show_plan(invocation, call)
    return is_dry or not rows or _Batch(invocation, template, rows).run()


def _word_template(word):
    """Return a name=value word with {field} in it.

    The filled-in text stands in quotes, so that a row's own @ or name: is text and nothing else; a
    file is read once, and its braces are text."""
    name, _, value = word.partition("=")
    value = value.strip()
    if value == "@-":
        raise _Usage(f"{name.strip()}: @- does not go with --each, whose rows are standard input")
    is_file = re.match("@(?!@)", value)
    if not is_file and (value.startswith("name:") or not re.search("[{}]", value)):
        return word
    text = _parse_value(name.strip(), value)
    return f'{name}="' + (re.sub("[{}]", r"\g<0>\g<0>", text) if is_file else text) + '"'


def _row_call(invocation, template, row):
    """Return the checked call for a row. Raises _Usage for a field that it lacks."""

    def fill(found):
        field = found.group(1)
        if found.group() in ("{", "}"):
            raise _Usage(f"a single {found.group()}; a brace that is text is written twice")
        if field is None:
            return found.group()[0]
        value = _pick(row, field) if field else row
        if value is None:
            near = _near(field, _field_names([row]))
            raise _Usage(f"there is no {field!a}{_did_you_mean(near)}")
        return _cell(value)

    return _checked_call(invocation, [re.sub(_FIELD, fill, word) for word in template])


def _read_rows(invocation):
    """Return the rows of standard input: JSON, one document or many, else its lines."""
    if _is_terminal(sys.stdin):
        invocation.say("Type the rows, then Ctrl-D")
    text = _read_stdin().strip()
    if not re.match(r'[\[{"]', text):
        return [line.strip() for line in text.split("\n") if line.strip()]

    rows: list = []
    index = 0
    while index < len(text):
        try:
            document, index = jsonlib.JSONDecoder().raw_decode(text, index)
        except (ValueError, RecursionError):
            line = text.count("\n", 0, index) + 1
            raise _Usage(f"standard input, line {line}: it begins as JSON and is none") from None
        rows += _rows_in(document)
        while text[index : index + 1].isspace():
            index += 1
    return rows


def _rows_in(document):
    """Return the rows of a JSON document: a list, an answer, or a row.

    A row may also be one that an earlier --each has not sent."""
    if isinstance(document, dict) and set(document) == {"row", "unsent"}:
        return [document["row"]]
    if isinstance(document, dict) and len(set(document) - {"count"}) > 1:
        return [document]
    return _rows_of(document)


class _Batch:
    """The calls for rows that were checked, some at once, on one event loop."""

    def __init__(self, invocation, template, rows):
        self.invocation, self.template, self.rows = invocation, template, rows
        self.started = 0  # how many rows were
        self.counts: dict = collections.Counter()  # of what became of them, or is becoming
        self.table = {}  # number of a row: what is shown of it at the end
        self.left = []  # the exceptions of jobs that may still run
        self.is_ending = self.is_interrupted = False  # nothing more is started
        self.unwritten = None  # why standard output could not be written

    def run(self):
        """Make the calls, and say what became of them. Returns whether all succeeded."""
        import asyncio
        import signal

        def interrupt(*_):
            signal.signal(signal.SIGINT, usual)  # the next one ends everything at once
            self.is_ending = self.is_interrupted = True
            for task in tasks:
                loop.call_soon_threadsafe(task.cancel)

        most = int(self.invocation.options["parallel"] or _PARALLEL)
        client = AIOCloudStack(**self.invocation.settings, concurrency=min(most, 128))
        client.set_setting("recover", self.invocation.client.get_setting("recover"))
        usual = signal.getsignal(signal.SIGINT)  # it may be ignored (nohup), or a program's own
        may_catch = usual is signal.default_int_handler
        may_catch = may_catch and threading.current_thread() is threading.main_thread()
        loop = asyncio.new_event_loop()
        tasks = [loop.create_task(self._work(client)) for _ in self.rows[:most]]
        try:
            if may_catch:
                signal.signal(signal.SIGINT, interrupt)
            loop.run_until_complete(asyncio.wait(tasks))
            loop.run_until_complete(client.aclose())
        finally:
            if may_catch:
                signal.signal(signal.SIGINT, usual)
            loop.close()
        return self._conclude()

    async def _work(self, client):
        """Take one row after another, as long as there are any."""
        import asyncio

        while self.started < len(self.rows) and not self.is_ending:
            number = self.started
            self.started += 1
            self.counts["running"] += 1
            self._show_progress()
            try:
                call = _row_call(self.invocation, self.template, self.rows[number])
                answer = await client._request(call.command, **call.params)
                if not _tells_success(answer):
                    raise CloudStackApiException(_cell(answer), error=answer)
                state, outcome = "done", {"result": answer}
            except (Exception, asyncio.CancelledError) as error:  # the latter is Ctrl-C
                state, outcome = self._read_failure(error)
            self.counts["running"] -= 1
            self._note(number, state, outcome)

    def _read_failure(self, error):
        """Return (state, outcome) of a call that failed or was broken off."""
        words = dict(_server_error(error) or {"message": _sentence(error) or "interrupted"})
        is_unknown = getattr(error, "outcome_unknown", not _only_reads(self.template[0]))
        state = "unknown" if is_unknown else "failed"
        if getattr(error, "jobid", None):
            words["jobid"] = error.jobid
            if not isinstance(error, CloudStackApiException):
                self.left.append(error)
                state = "running"
        return state, {"error": words, "outcome_unknown": is_unknown}

    def _note(self, number, state, outcome):
        """Count what became of a row, and show it: as JSON now, in other formats at the end."""
        row = self.rows[number]
        self.counts[state] += 1
        if state != "done" and self.invocation.options["stop-on-error"]:
            self.is_ending = True
        if self.invocation.format() in ("json", "jsonl"):
            self._write_line(_json_text(dict(outcome, row=row), None), state)
        else:
            error = outcome.get("error", {})
            text = error.get("errortext") or error.get("message") or ""
            (cells,) = _cells([row], _default_columns([row])[:1])
            self.table[number] = {"row": cells[0], "state": state, "error": text}
        self._show_progress()

    def _write_line(self, line, state):
        """Write a line at once; if nobody takes it, on standard error, and start nothing more."""
        self.invocation.progress.clear()
        try:
            if self.unwritten is None:
                _write(line + "\n")
                _flush()
                return
        except _OutputFailed as failed:
            self.unwritten, self.is_ending = failed.args[0], True
        if state != "unsent" or self.is_interrupted:
            _write_stderr(line)

    def _show_progress(self):
        """Show the counts on a terminal."""
        if self.invocation.client._state.progress:
            self.invocation.progress.show(self._counted(), _clock())

    def _counted(self):
        """Return the counts in words."""
        counted = [f"{count} {state}" for state, count in sorted(self.counts.items()) if count]
        return f"{', '.join(counted)}, of {len(self.rows)}"

    def _conclude(self):
        """Show what was not sent, and say what is left. Returns whether all succeeded."""
        for number in range(self.started, len(self.rows)):
            self._note(number, "unsent", {"unsent": True})
        self.invocation.progress.clear()
        try:
            table = [row for _, row in sorted(self.table.items())]
            _print_rows(self.invocation, table, ["row", "state", "error"])
            _flush()
        except _OutputFailed as failed:
            self.unwritten = failed.args[0]

        is_done = self.counts["done"] == len(self.rows)
        lines = [("Interrupted: " if self.is_interrupted else "") + self._counted() + " rows"]
        lines += [_how_to_go_on(self.invocation, error) for error in self.left]
        if self.counts["unsent"] and (self.unwritten is None or self.is_interrupted):
            lines.append('Those that say "unsent" can be piped in again.')
        if not is_done:
            may_be_quiet = not (self.left or self.counts["unsent"])
            say = self.invocation.say if may_be_quiet else _write_stderr
            say("\n".join(lines))
        if self.unwritten is not None:
            _report_unwritten(self.unwritten)
        if self.is_interrupted and not is_done:
            raise KeyboardInterrupt
        return is_done and self.unwritten is None


# 9.10 The shell.
# Lines are carried out as arguments are, but with the same clients: {what leads to one: (its
# settings, the client)}.

_SHELL_HELP = "In the shell: help [COMMAND], list [WORDS], use REGION, exit. Tab completes."
# What a word stands for among arguments, and what Tab offers. _Shell._dispatch does `use`, and
# _Shell.run `exit` and `quit`: a word that is not an option needs such a place, too; _SHELL_HELP
# names them.
_SHELL_WORDS = {"help": "--help", "list": "--list", "use": "--region", "exit": "exit"}
_HISTORY_LINES = 1000


def _asks_for_shell(invocation, words):
    """Return whether the shell is to be opened: by --shell, or with nothing to do on a terminal."""
    options, is_inside = invocation.options, invocation.clients is not None
    is_idle = not (words or options["wait"] or options["list"] or options["sync"])
    if options["shell"] and (is_inside or not is_idle):
        raise _Usage("--shell stands alone: it reads line by line what is to be done")
    return options["shell"] or (is_idle and not is_inside and _is_at_terminal())


def _is_at_terminal():
    """Tell whether a person sits at both ends."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


class _Shell:
    """Carries out one line after another (--shell)."""

    def __init__(self, options):
        self.options = {**options, "shell": None}  # they hold for every line
        self.clients = {}
        self.place = options["region"] or _DEFAULT_REGION  # for the prompt
        self.has_history = True

    def run(self):
        """Carry out the lines. Returns what became of the first that failed, as far as nobody saw
        it; what a person interrupts is one line, elsewhere it is all."""
        is_typed = _is_at_terminal()
        ends = _OutputFailed if is_typed else (_OutputFailed, KeyboardInterrupt)
        first = True
        try:
            for line in self._typed_lines() if is_typed else _piped_lines():
                line = re.sub(r"\A\s*(?:cs\s+|#.*)?", "", line).rstrip()
                if line in ("exit", "quit"):
                    break
                invocation = _Invocation(dict(self.options), self.clients)
                outcome = _attempt(invocation, self._dispatch, line) if line else True
                if first is True and _exit_code(outcome):
                    first = outcome
                if isinstance(outcome, ends):
                    break
        finally:
            for _, client in self.clients.values():
                client.close()
        return is_typed or first

    def _dispatch(self, invocation, line):
        """Do what a line asks for: `use` here, the rest as arguments. Returns as _dispatch does."""
        words = _split_line(line)
        if words[0] != "use":
            return _dispatch(invocation, [_SHELL_WORDS.get(words[0], words[0])] + words[1:])

        region = invocation.options["region"] = " ".join(words[1:])
        invocation.connect()
        self.options["region"] = region
        named = not self.options["endpoint"] and invocation.client.name
        self.place = named or urlsplit(invocation.client.endpoint).hostname
        return True

    def _typed_lines(self):
        """Yield what a person types. Ctrl-C clears a line, Ctrl-D is the end."""
        readline = self._prepare()
        _Invocation(self.options).say(_SHELL_HELP)
        yield "use " + _shell_word(self.options["region"] or "")
        while True:
            try:
                line = input(f"cs {_one_line(self.place)}> ")
            except EOFError:
                _write_stderr("")
                return
            except (KeyboardInterrupt, UnicodeError):
                _write_stderr("")
                continue
            if readline and line.strip() and not self._holds_secret(line):
                readline.add_history(line)
                self._keep_history(line)
            yield line

    def _prepare(self):
        """Have lines completed and remembered. Returns readline, None if Python lacks it."""
        try:
            import readline

            readline.set_auto_history(False)  # not every line is to be remembered
        except (ImportError, AttributeError):  # PyPy has one that cannot be asked for that
            return None

        found: list = []

        def complete(word, number):
            if number == 0:
                found[:] = self._complete(readline.get_line_buffer()[: readline.get_endidx()])
            return found[number] if number < len(found) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" \t\n")  # `=` and `:` are part of a word
        is_editline = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if is_editline else "tab: complete")
        for line in self._keep_history():
            readline.add_history(line)
        return readline

    def _complete(self, typed):
        """Return what may stand in place of the word at the end, or the one that does.

        Several come with descriptions, which stay on the screen since they differ."""
        first, space, rest = typed.lstrip().partition(" ")
        found = [] if space else [(word, "") for word in _SHELL_WORDS if word.startswith(first)]
        line = _read_line(f"cs {_SHELL_WORDS.get(first, first) if space else first}{space}{rest}")
        line = line._replace(options=_merge_options(self.options, line.options))
        try:
            found += _completions(line)
        except _Usage as error:
            return [_one_line(str(error)), " "]
        if len(found) == 1:
            return [found[0][0] + ("" if found[0][0].endswith(("=", ",")) else " ")]
        by_name = any("=" in word and not word.startswith(line.current) for word, _ in found)
        # One more that differs has readline keep a name, though its ids begin otherwise.
        shown = [f"{word}  {text}".rstrip() for word, text in found]
        return shown + [" "] if by_name else shown

    def _holds_secret(self, line):
        """Return whether a line, be it one that is not understood, holds a secret's value."""
        text = re.sub(r"\S+=@(?!@)\S*", "", line)  # the value stands in a file
        try:
            words = _split_line(text)
        except _Usage:
            words = text.split()
        pairs = (word.partition("=") for word in words if "=" in word)
        params = {name.strip(): value.strip("\"' ") for name, _, value in pairs}
        mistaken = rf"(?i){_SECRET}[\"']?\s*[=:]\s*\S"  # such as `password = x`
        if any(_secret_names(params)) or re.search(mistaken, text):
            return True
        own = [_secrets_of(client) for _, client in self.clients.values()]
        return _mask_text(text, itertools.chain(*own)) != text

    def _keep_history(self, *new):
        """Add lines to the history's file, and return its lines.

        It is read anew, since other shells add to it, too. That there can be none is said once."""
        path = _own_path("XDG_STATE_HOME", os.path.join(".local", "state"), "history")
        lines = []
        try:
            if self.has_history:
                usual = os.umask(0o077)  # the folders above it are for their owner only, too
                try:
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                finally:
                    os.umask(usual)
                if os.path.exists(path):
                    with open(path, encoding="utf-8", errors="replace") as file:
                        lines = file.read().splitlines()
                lines = [*lines, *new][-_HISTORY_LINES:]
                _write_private(path, "".join(line + "\n" for line in lines))
        except (OSError, ValueError) as error:
            self.has_history = False
            _write_stderr(f"Warning: no history is kept: {_error_text(error)}")
        return lines


def _split_line(line):
    """Return the words of a line, as a shell takes it apart. Raises _Usage."""
    import shlex

    try:
        return shlex.split(line)
    except ValueError as error:
        raise _Usage(f"the line cannot be taken apart: {error}") from None


def _piped_lines():
    """Yield the lines of standard input; the rest of it may be for a line's name=@-."""
    for line in sys.stdin.buffer if sys.stdin else ():
        yield line.decode("utf-8-sig", "surrogateescape")


if __name__ == "__main__":
    sys.exit(main())
