#!/usr/bin/env python3
"""cs: a CloudStack API client in one file, for Python 3.6 and later, standard library only.

    from cs import CloudStack, read_config

    cs = CloudStack(endpoint="https://cloud.example/client/api", key="...", secret="...")
    for vm in cs.iter_list("listVirtualMachines", state="Running"):
        print(vm["name"])
    cs.createSecurityGroup(name="web", description="HTTP traffic")
    cs.deployVirtualMachine(zoneid=..., templateid=..., serviceofferingid=..., fetch_result=True)

Every API call, present or future, is a method; AIOCloudStack has the same ones as coroutines. On the command line:
`cs listZones`, `python -m cs listZones` or `python cs.py listZones`.

Contents: 1 settings, 2 errors, 3 parameters, signature and what may be shown, 4 protocol, 5 transport, 6 clients,
7 configuration, 8 command line. Data flows one way: keyword arguments -> parameters -> signed request -> exchange ->
decoded answer -> page or job loop -> result. The protocol decides everything and does no I/O; the transport is the only
room with sockets.

License: BSD, see LICENSE.
"""

import collections
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
    "main",
    "read_config",
    "read_config_from_ini",
]

__version__ = "6.0.0"

EXPIRES_FORMAT = "%Y-%m-%dT%H:%M:%S%z"

# Tests replace these three: the clock for every duration, the sleep between two steps, and the lots.
_clock = time.monotonic
_sleep = time.sleep


def _random():
    """A number from 0 to 1; random costs milliseconds to import, and only a retry needs it."""
    import random

    return random.random()


# --- 1 settings -----------------------------------------------------------------------------------------------------
# One table drives the constructor's conversions, the environment, the ini keys, read_config's defaults and README.


def strtobool(value):
    """The bool that a word stands for: y yes t true on 1, n no f false off 0, in any case. Else ValueError."""
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return True
    if word in ("n", "no", "f", "false", "off", "0"):
        return False
    raise ValueError("invalid truth value {!r}".format(value))


def _flag(value):
    """Return the bool a setting stands for; None and an empty text, as an ini file may hold it, are False."""
    if value is None or value == "" or isinstance(value, bool):
        return bool(value)
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    try:
        return strtobool(value)
    except (AttributeError, ValueError):
        raise ValueError("{!r} is neither true nor false".format(value)) from None


def _number(value, most=1e9):
    """An int or float out of a number or of the string an ini file gives; never nan, infinity or more than `most`."""
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str):
            value = float(value) if re.search("[.eEnN]", value) else int(value)
        if not abs(value) <= most:  # beyond 1e9 the platform's own clocks give up
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError("{!r} is not a number of seconds".format(value)) from None
    return value if isinstance(value, (int, float)) else float(value)


def _seconds(value):
    number = _number(value)
    if number < 0:
        raise ValueError("{!r} is negative".format(value))
    return number


def _positive_seconds(value):
    number = _number(value)
    if number <= 0:
        raise ValueError("{!r} is not more than 0 seconds".format(value))
    return number


def _optional_seconds(value):
    return None if value in (None, "") else _seconds(value)


def _count(value, least=0):
    try:
        if isinstance(value, bool):
            raise ValueError
        number = int(value)
        if number != float(value) or number < least:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError("{!r} is not a whole number of {} or more".format(value, least)) from None
    return number


def _positive_count(value):
    return _count(value, least=1)


def _lifetime(value):
    """A timedelta out of seconds or a timedelta."""
    import datetime

    if isinstance(value, datetime.timedelta):
        return value
    try:
        return datetime.timedelta(seconds=_number(value, 1e15))
    except OverflowError:
        raise ValueError("{!r} is too long".format(value)) from None


def _verb(value):
    if not isinstance(value, str) or value.lower() not in ("get", "post"):
        raise ValueError("{!r} is neither get nor post".format(value))
    return value.lower()


def _text_or_none(value):
    """Text, or None for none; refused without being quoted, since it may be a secret."""
    try:
        value = bytes.decode(value, "utf-8") if isinstance(value, bytes) else value
        if value is not None and not isinstance(value, str):
            raise ValueError("text was expected, got {}".format(type(value).__name__))
        if value:
            str.encode(value, "utf-8")
    except UnicodeError:
        raise ValueError("it holds something that is not UTF-8") from None
    return str.__str__(value) if value else None


def _ca_path(value):
    """A path, or None for the system's CA certificates. No value turns verification off: an ini file's
    `verify = false` reads as None, and only dangerous_no_tls_verify does what it seems to say."""
    if value is None or isinstance(value, bool):
        return None
    value = os.fsdecode(value)
    try:
        strtobool(value)
    except ValueError:
        return value or None
    return None


def _pem_path(value):
    if value is None or value == "":
        return None
    if isinstance(value, (tuple, list)):
        certificate, key = map(os.fsdecode, value)
        return certificate, key
    return os.fsdecode(value)


def _header_map(value):
    if value is not None and not hasattr(value, "items"):
        raise ValueError("a dict was expected, got {}".format(type(value).__name__))
    headers = dict(value or {})
    for name, content in headers.items():
        _check_header(name, content)  # and again when they are sent: the map is the program's to change
    return headers


_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")


def _check_header(name, content):
    """Refuse what would break out of its header line (RFC 9110, 5.5), without ever quoting the content."""
    if not isinstance(name, str) or not _TOKEN.match(name):
        raise ValueError("{!r} is no header name".format(name))
    if name.lower() in ("content-length", "transfer-encoding"):
        raise ValueError("{!r} belongs to the transport".format(name))
    text = content.decode("latin-1") if isinstance(content, bytes) else content
    if not isinstance(text, (str, int, float, type(None))):
        raise ValueError("the value of {!r} is no text".format(name))
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f]|[^\x00-\xff]", str(text)):
        raise ValueError("the value of {!r} holds a line break, a control character or one beyond Latin-1".format(name))


def _session_object(value):
    if type(value).__module__.partition(".")[0] == "aiohttp":
        raise ValueError("an aiohttp session cannot be used; leave it out, or give a requests.Session")
    return value


_Setting = collections.namedtuple("_Setting", "name default convert where meaning")

# where: "both" is read from the environment (CLOUDSTACK_<NAME>) and from ini files under its name; "code" is not.
SETTINGS = (
    _Setting("endpoint", None, _text_or_none, "both", "URL of the API, http or https"),
    _Setting("key", None, _text_or_none, "both", "API key; without key and user name requests go out unsigned"),
    _Setting("secret", None, _text_or_none, "both", "secret key that belongs to the API key"),
    _Setting("timeout", 10, _positive_seconds, "both", "seconds to connect, and of silence; ten times that in all"),
    _Setting("method", "get", _verb, "both", "HTTP verb, get or post; post is used by itself where get cannot do"),
    _Setting(
        "verify", None, _ca_path, "both", "CA certificates to trust, a file or a directory; the system's if unset"
    ),
    _Setting("cert", None, _pem_path, "both", "client certificate, a PEM file"),
    _Setting("cert_key", None, _pem_path, "both", "private key of the client certificate, where it has its own file"),
    _Setting("name", None, _text_or_none, "code", "what repr() calls the client; read_config() fills in the region"),
    _Setting("retry", 0, _count, "both", "how often to send again what may safely be sent again"),
    _Setting("retry_backoff", 0.5, _seconds, "both", "seconds before the first retry; doubles, with jitter, up to 30"),
    _Setting("job_timeout", None, _optional_seconds, "both", "seconds to wait for a job; no limit if unset"),
    _Setting("poll_interval", 2.0, _seconds, "both", "most seconds between two looks at a job; the first come sooner"),
    _Setting("expiration", 600, _lifetime, "both", "seconds a signature is valid; negative: for ever"),
    _Setting("trace", False, _flag, "both", "show each exchange on standard error, secrets replaced"),
    _Setting("dangerous_no_tls_verify", False, _flag, "both", "do not verify the server's certificate"),
    _Setting("headers", None, _header_map, "code", "more HTTP headers; one each as HEADER_<NAME> or header_<name>"),
    _Setting("session", None, _session_object, "code", "object with requests.Session's interface to send with"),
    _Setting("fetch_result", False, _flag, "code", "wait for jobs and return their results; True for AIOCloudStack"),
    _Setting("username", None, _text_or_none, "both", "log in with this user name, instead of key and secret"),
    _Setting("password", None, _text_or_none, "both", "password of that user"),
    _Setting("domain", None, _text_or_none, "both", "domain path of that user; / if unset"),
    _Setting("concurrency", 128, _positive_count, "code", "connections kept; worker threads of AIOCloudStack"),
    _Setting("max_response_size", 256 * 1024 * 1024, _positive_count, "both", "bytes an answer may have, unpacked"),
    _Setting("recover", False, _flag, "both", "find the job of a lost answer again; on for the command line"),
)
# These are no attributes of a client: 5.2.0 had none of these names, and subclasses use them for their own.
_NO_ATTRIBUTES = frozenset(
    "cert_key dangerous_no_tls_verify username password domain concurrency max_response_size recover".split()
)


def _converted(name, convert, value):
    """convert(value); what is wrong with it is told as a ValueError under the name it was given by."""
    try:
        return convert(value)
    except (TypeError, ValueError) as error:
        raise ValueError("{}: {}".format(name, error)) from None


_SETTING = {setting.name: setting for setting in SETTINGS}
_ATTRIBUTES = {name: setting for name, setting in _SETTING.items() if name not in _NO_ATTRIBUTES}


# --- 2 errors -------------------------------------------------------------------------------------------------------


class CloudStackException(Exception):
    """The root of everything this client raises about an exchange.

    CloudStackException                 an answer that is not CloudStack's: HTML, broken JSON, a redirect
     +-- CloudStackApiException         the server's own error, or a failed job: see .error
     +-- CloudStackConnectionError      name look-up, refused, reset, TLS; also a ConnectionError
     +-- CloudStackTimeoutError         no answer in time; also a TimeoutError
          +-- CloudStackJobTimeout      the job still ran at job_timeout: see .jobid

    Arguments and settings that cannot be used are a ValueError, before anything is sent.

    .response         the answer (status_code, reason, headers, text, json()), None where there was none
    .jobid            the job's id, on everything raised after a job was submitted; else None
    .outcome_unknown  True where a command that changes something may have run although this was raised
    .unsent           True where the server surely never saw the request
    """

    jobid = None
    outcome_unknown = False
    unsent = False

    def __init__(self, *args, response=None):
        super().__init__(*args)
        self.response = response

    def __str__(self):
        # OSError's own would print two arguments as "[Errno first] second".
        return ": ".join(str(arg) for arg in self.args)


class CloudStackApiException(CloudStackException):
    """The server refused a command, or a job failed. error: the dict with errorcode, errortext, or what stood there."""

    def __init__(self, *args, error=None, response=None):
        super().__init__(*args, response=response)
        self.error = error

    def __str__(self):
        return "{}, error: {}".format(super().__str__(), self.error)


class CloudStackConnectionError(CloudStackException, ConnectionError):
    """No connection, or one that broke before the answer was whole."""

    errno = strerror = None  # OSError would take two arguments for these; set where the cause had one
    stale = False  # the connection was a kept one that the server had closed by then


class CloudStackTimeoutError(CloudStackException, TimeoutError):
    """The server was silent for `timeout` seconds, or took ten times that in all."""

    errno = strerror = None


class CloudStackJobTimeout(CloudStackTimeoutError):
    """The job was still running after job_timeout seconds; args are the message and the job's id."""


# --- 3 parameters, signature, and what may be shown -----------------------------------------------------------------


def cs_encode(value):
    """Percent-encode as the server does before it verifies a signature (ApiServer.verifyRequest: Java's URLEncoder,
    then %20 for +): all but A-Z a-z 0-9 . - _ * is encoded, `~` too, which Python 3.7 and later would leave."""
    if isinstance(value, str) and _UNRESERVED.match(value):
        return value
    return quote(value, safe="*").replace("~", "%7E")


_UNRESERVED = re.compile(r"[A-Za-z0-9._*-]*\Z")


def check_key(key, allowed):
    """True where the key is one of the allowed names, or matches one of them as a shell pattern."""
    import fnmatch

    return any(key == pattern or fnmatch.fnmatchcase(key, pattern) for pattern in allowed)


def _scalar(name, value):
    """The text of one value. The base type's own conversion is used, whatever a subclass (an Enum, Ansible's tagged
    types) makes of str(). Raises ValueError that names the parameter and the type, never the value."""
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
            raise ValueError("parameter {!r}: bytes that are not UTF-8".format(name)) from None
    raise ValueError("parameter {!r}: a value of type {} cannot be sent".format(name, type(value).__name__))


def _joined(name, values):
    """A list as the server reads it: commas, no escaping. Sets have no order of their own, so they are sorted."""
    texts = [_scalar(name, value) for value in values if value is not None]
    return ",".join(sorted(texts) if isinstance(values, (set, frozenset)) else texts)


_LISTS = (list, tuple, set, frozenset)


def _map_entries(name, index, entry):
    """(`name[index].field`, text) for each field of a dict; what is empty is left out."""
    if not isinstance(entry, dict):
        raise ValueError("parameter {!r}: {} among dicts".format(name, type(entry).__name__))
    for field, value in entry.items():
        full = "{}[{}].{}".format(name, index, field)
        if isinstance(value, _LISTS):
            text = _joined(full, value)
            if text or any(item is not None for item in value):
                yield full, text
        elif value is not None:
            yield full, _scalar(full, value)


def _flat_pairs(name, value):
    """The (name, text) pairs that one keyword argument stands for on the wire; none for None and for what is empty."""
    if value is None:
        return
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, _LISTS):
        yield name, _scalar(name, value)
        return
    items = [item for item in value if item is not None]
    if any(isinstance(item, dict) for item in items):
        for index, item in enumerate(items):
            yield from _map_entries(name, index, item)
    elif items:
        yield name, _joined(name, value)


def flatten(params):
    """Keyword arguments -> {name: text} as CloudStack wants them: dicts and lists of dicts as `name[0].field`, other
    lists joined by commas, booleans as true and false, None and empty ones left out. Raises ValueError."""
    return {str(key): text for name, value in params.items() for key, text in _flat_pairs(name, value)}


def transform(params):
    """flatten(), in place; bytes at the top stay as they are."""
    flat = flatten({name: value for name, value in params.items() if not isinstance(value, bytes)})
    for name in [name for name, value in params.items() if not isinstance(value, bytes)]:
        del params[name]
    params.update(flat)


# The server answers 431 to control characters (ApiServer.checkCharacterInkParams); lone surrogates have no UTF-8.
_UNSENDABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def _check_text(name, text):
    for part in (name, text):
        found = _UNSENDABLE.search(part)
        if found:
            raise ValueError(
                "parameter {!a}: the server refuses the character U+{:04X}".format(name, ord(found.group()))
            )


def _java_order(pair):
    """The server sorts names as Java compares strings: by UTF-16 code units, case-sensitive."""
    return pair[0].encode("utf-16-be")


def sign(params, secret):
    """The signature (base64, not yet percent-encoded) of {name: text}, as ApiServer.verifyRequest computes it: sorted
    by the raw name, values encoded but names not, the whole lower-cased, HMAC-SHA1."""
    ordered = sorted(params.items(), key=_java_order)
    canonical = "&".join(name + "=" + cs_encode(text) for name, text in ordered).lower()
    digest = hmac.new(secret.encode("utf-8"), canonical.encode("utf-8"), "sha1").digest()
    return b2a_base64(digest).decode("ascii").strip()


def _wire_form(params):
    """Query string or form body; sorted, so that the same call gives the same bytes."""
    return "&".join(cs_encode(name) + "=" + cs_encode(text) for name, text in sorted(params.items()))


# Names whose values are nobody's business; they are told by how they end: `details[0].password`, `usersecretkey`.
_SECRET = (
    r"(?:password|passwd|passphrase|secret|secret[_-]?key|private[_-]?key|user[_-]?data|session[_-]?key|jsessionid"
    r"|signature|api[_-]?key|access[_-]?key|token|credentials?|psk|pre[_-]?shared[_-]?key|bind[_-]?pass|secret[_-]?code"
    r"|code[_-]?for[_-]?2fa|config[_-]?data)"
)
_SECRET_NAME = re.compile(r"(?i)" + _SECRET + r"\Z")
_SECRET_HEADER = re.compile(r"(?i)(?:" + _SECRET + r"|auth|authorization|cookie|key)\Z")
_SECRET_FIELD = re.compile(r'(?i)("[\w.\[\]-]*' + _SECRET + r'"\s*:\s*)"(?:[^"\\]|\\.)*"?')
_SECRET_ELEMENT = re.compile(r"(?i)(<[\w.-]*" + _SECRET + r">)[^<]*")
MASK = "***"


def _is_secret(name):
    return _SECRET_NAME.search(name) is not None


def _secret_names(params):
    """The parameters whose values must not be shown: by their own name, or by the one they are given as the value of
    (tags[0].key=password tags[0].value=..., updateConfiguration's name and value)."""
    lower = {name.lower(): text for name, text in params.items()}
    for name in params:
        front = name.lower()[: -len("value")] if name.lower().endswith("value") else None
        titles = [] if front is None else [lower.get(front + "key"), lower.get(front + "name")]
        if _is_secret(name) or any(isinstance(title, str) and _is_secret(title) for title in titles):
            yield name


def _shown_params(params):
    secret = set(_secret_names(params))
    return {name: MASK if name in secret else text for name, text in params.items()}


def _masked_header(name, value):
    return "{}: {}".format(name, MASK if _SECRET_HEADER.search(name) else value)


def _masked_text(text, secrets):
    """Text with the values of secret fields, and the given secrets wherever they stand, replaced."""
    text = _SECRET_FIELD.sub(r'\1"' + MASK + '"', text)
    text = _SECRET_ELEMENT.sub(r"\1" + MASK, text)
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        if len(secret) > 3:  # shorter ones stand in half of all words
            for form in (secret, cs_encode(secret), quote(secret), jsonlib.dumps(secret)[1:-1]):
                text = text.replace(form, MASK)
    return text


def _trace_request(request):
    lines = ["{} {}".format(request.method, request.shown_url())]
    lines += [_masked_header(name, value) for name, value in request.headers.items()]
    lines += ["", _wire_form(request.shown_params()), ""] if request.method == "POST" else [""]
    _to_stderr("\n".join(lines))


def _trace_response(request, response, seconds):
    lines = ["{} {}".format(response.status_code, response.reason)]
    lines += [_masked_header(name, value) for name, value in response.headers.items()]
    lines += ["", response.text, "", "({:.0f} ms)".format(seconds * 1000), ""]
    _to_stderr(_masked_text("\n".join(lines), request.all_secrets()))


def _to_stderr(text):
    """One write, so that threads do not write into each other's lines; a broken stderr is no reason to fail."""
    try:
        sys.stderr.write(_printable(text) + "\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass


def _printable(text):
    """Text as a terminal may safely be shown it: control characters but line breaks and tabs, C1 controls,
    bidirectional overrides and lone surrogates escaped."""
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], text)


_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


# --- 4 protocol -----------------------------------------------------------------------------------------------------
# Generators that decide everything and do no I/O. What they yield is done by a driver (section 6), which sends back
# what came of it or throws what was raised: a _Request becomes its _Response, a number of seconds is slept, a list of
# generators is run at once and becomes the list of their results and exceptions.

PAGE_SIZE = 500  # the server's default.page.size, unless the site changed it
LONGEST_WAIT = 30.0  # seconds: no retry waits longer, and a server that asks for more gets an error instead
LONGEST_HEAD = 8000  # bytes of request line and headers; the server answers 414 over 8192
_SIGNED = 150  # of them are kept for expiry, signature, and the words of the request line
NEXT_LOOK = 0.5  # of the time a job was waited for passes until the next look at it,
SOONEST_LOOK = 0.1  # but at least these seconds and at most poll_interval
OWN_LOOK = 15  # poll_intervals after which a job is asked for by itself, whatever a list of jobs says
LEASE = 3.0  # seconds after which who does something for all is no longer waited for
MOST_PAGES = 100000  # of one list; a walk of more is one in circles
PATIENCE = 10  # looks at a job in a row that may go wrong where no job_timeout limits them (a server's restart)
PAGES_AHEAD = 4  # page requests of one fetch_list that may be under way at once
_LAZY = object()  # as fetch_list: do not collect, give the walk itself (iter_list)

# GET is refused for all but these where enforce.post.requests.and.timestamps is set (ApiServlet, since 4.20).
_READING = re.compile(r"(?i)(?:get|list|query|find)\w+\Z")
_READING_TOO = frozenset(
    "isaccountallowedtocreateofferingswithtags quotabalance quotaisenabled quotastatement quotasummary quotatarifflist"
    " cloudianisenabled readyforshutdown verifyoauthcodeandgetuser".split()
)
_CHANGING = re.compile(r"(?i)(?:getUploadParamsFor\w*|getDiagnosticsData|listAndSwitchSamlAccount)\Z")
_RETRY_AFTER = re.compile(r"(?i)retry after\s*\[?\s*([0-9]+)\s*\]?\s*ms")
_PAGE_LIMIT = re.compile(r"(?i)page ?size.*max allowed.*?([0-9]{1,9})")


def _get_allowed(command):
    return bool(_READING.match(command)) or command.lower() in _READING_TOO


def _only_reads(command):
    """Whether a command may be repeated: a reading name, and none of those that change something under one."""
    return bool(_READING.match(command)) and not _CHANGING.match(command)


class _Call:
    """One command: what to send, and how its answer is to be read."""

    def __init__(self, command, params, json=True, opcode_name="command", headers=None):
        self.command = command
        self.json = json
        self.opcode_name = opcode_name
        self.headers = _converted("headers", _header_map, headers)
        self.reads = _only_reads(command)
        self.secret = command.lower() == "login" or any(_secret_names(params))
        self.params = {}
        self.expires = None
        for name, text in params.items():
            self._take(name, text)
        self.retries = None  # how often it may be sent again; None: as the client is set
        self.job_id = None  # the id its job gets, where the caller may choose it
        self.total = None  # seconds for one exchange in all, where that is less than ten times the timeout
        self.response = None  # the last answer

    def _take(self, name, text):
        _check_text(name, text)
        lower = name.lower()
        if lower == "expires":
            self.expires = text
        elif not (lower in ("signature", "signatureversion") or (self.json and lower == "response")):
            self.params[name] = text

    def given(self, name):
        """The value of a parameter, its name in any case, or None; the server compares them so after verification."""
        return next((text for key, text in self.params.items() if key.lower() == name), None)

    def give(self, **values):
        for name, value in values.items():
            for key in [key for key in self.params if key.lower() == name]:
                del self.params[key]
            self.params[name] = str(value)

    def choose_job_id(self):
        """Have the job of a command that changes something get an id that is known before the answer is, so that it
        can be found should the answer be lost. The server takes a `customjobid` from anybody, and ignores it where
        there is no job (seen on 4.23)."""
        if self.reads or not self.json or self.command.lower() in ("login", "logout"):
            return
        if self.given("customjobid") is None:
            import uuid

            self.give(customjobid=uuid.uuid4())
        self.job_id = self.given("customjobid")

    def complete_page(self, size):
        """The server refuses page without pagesize."""
        if self.given("page") is not None and self.given("pagesize") is None:
            self.give(pagesize=size)

    def with_page(self, page, size):
        """The same call for one page."""
        import copy

        call = copy.copy(self)
        call.params = dict(self.params)
        call.give(page=page, pagesize=size)
        return call


class _Server:
    """What was learned about the server behind one endpoint, kept for as long as the client."""

    def __init__(self):
        self.post_only = False  # commands that change something must be POST
        self.page_limit = PAGE_SIZE
        self.login = None  # a _Login, while there is a session
        self.login_error = None
        self.log_in = _Turn()
        self.jobs = _JobList()


_Login = collections.namedtuple("_Login", "key cookies")


class _Signal:
    """What many wait for at once, in threads and event loops alike. A driver waits (section 6), any thread sets it."""

    def __init__(self):
        self.count = 0  # how often it was set: who saw it before looking misses nothing
        self._wakers = set()

    def add(self, wake):
        self._wakers.add(wake)

    def discard(self, wake):
        self._wakers.discard(wake)

    def set(self):
        self.count += 1
        for wake in list(self._wakers):
            wake()


class _Pause:
    """A step of the protocol: sleep for `seconds`, less where the signal was set more than `count` times."""

    def __init__(self, seconds, signal, count):
        self.seconds = seconds
        self.signal = signal
        self.count = count


class _Turn:
    """Work that one caller does for all who need it. It is lent for LEASE seconds: the one who has it may be a task of
    an event loop that was stopped, and must not hold up the others for ever. `done` tells that it was given back."""

    def __init__(self):
        self.done = _Signal()
        self._lock = threading.Lock()
        self._holder = None
        self._until = 0.0

    def take(self):
        """Return a token for give_back(), or None while somebody else has the turn."""
        with self._lock:
            if self._holder is not None and _clock() < self._until:
                return None
            self._until = _clock() + LEASE
            self._holder = object()
            return self._holder

    def give_back(self, token):
        with self._lock:
            if self._holder is token:
                self._holder = None
        self.done.set()


class _Request:
    """One HTTP request, ready to be sent: method, url, body and headers as they go out; what a person may see of it is
    made only when it is looked at."""

    cancelled = False  # by _cut_off(); and `socket` is set while the exchange is under way

    def __init__(self, client, call, params, secrets, sign=None):
        self.endpoint = client.endpoint.partition("#")[0]
        self.params = params
        self.method = "GET"
        self.headers = {}
        self.secrets = secrets  # other values that must not be shown
        self.timeout = client.timeout
        self.total = 10 * client.timeout if call.total is None else min(call.total, 10 * client.timeout)
        self.verify = client.verify
        self.cert = client.cert
        self.limit = client._own.max_response_size
        self._add_signature = sign
        self._query = None

    @property
    def query(self):
        """The parameters as they go out, signed when they are first looked at: by then a call of AIOCloudStack has its
        thread, and what waited for one longer than a signature is valid would be refused (finding 11)."""
        if self._query is None:
            if self._add_signature is not None:
                self._add_signature(self.params)
            self._query = _wire_form(self.params)
        return self._query

    @property
    def url(self):
        return self.endpoint if self.method == "POST" else self._with_query(self.endpoint, self.query)

    @property
    def body(self):
        return self.query.encode("ascii") if self.method == "POST" else None

    @staticmethod
    def _with_query(endpoint, query):
        return endpoint + ("&" if "?" in endpoint else "?") + query

    def shown_params(self):
        """The parameters as they go out, secrets replaced."""
        return _shown_params(self.params) if self.query else {}

    def shown_url(self):
        shown = _shown(self.endpoint, with_path_slash=True)
        return shown if self.method == "POST" else shown + "?" + _wire_form(self.shown_params())

    def all_secrets(self):
        return self.secrets + [self.params[name] for name in _secret_names(self.params)]

    def add_headers(self, *maps):
        """Later ones win; names compare without regard to case; None takes one out."""
        merged = {name.lower(): (name, value) for headers in maps for name, value in headers.items()}
        for name, value in merged.values():
            _check_header(name, value)
            if value is not None:
                self.headers[name] = value.decode("latin-1") if isinstance(value, bytes) else str(value)

    def is_long(self):
        """Whether request line and headers may be more than a server takes in a GET."""
        size = len(self.endpoint) + sum(len(name) + len(value) + 4 for name, value in self.headers.items())
        raw = sum(len(name) + len(text) + 2 for name, text in self.params.items())
        if size + 9 * raw < LONGEST_HEAD - _SIGNED:  # a character is nine bytes at the most, and mostly one
            return False
        return size + len(_wire_form(self.params)) > LONGEST_HEAD - _SIGNED


def _shown(endpoint, with_path_slash=False):
    """An address without what may be secret in it: user and password, query, fragment. Takes any text."""
    scheme, host, path = re.findall(r"\A((?:[A-Za-z][\w+.-]*:)?//)?([^/?#]*)([^?#]*)", endpoint)[0]
    return scheme + host.rpartition("@")[2] + (path or "/" * with_path_slash)


def _check_client(client):
    """Refuse, before anything is sent, settings that make no sense together. Raises ValueError that names them."""
    endpoint, own = client.endpoint, client._own
    together = (endpoint, client.key, client.secret, own.username, own.password, client.cert, own.cert_key)
    if own.checked == together:
        return
    if not endpoint:
        raise ValueError("endpoint: missing; it is the URL of the API, such as https://host/client/api")
    try:
        parts = urlsplit(endpoint)
        proper = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        proper = False
    if not proper or re.search(r"[^\x21-\x7e]", endpoint):
        raise ValueError("endpoint: {!a} is no http:// or https:// address".format(_shown(endpoint)))
    if parts.username is not None:
        raise ValueError("endpoint: a user name or password cannot be part of the address")
    for pair in (("key", "secret"), ("username", "password")):
        missing = [name for name in pair if client.get_setting(name) is None]
        if len(missing) == 1:
            raise ValueError("{}: missing; {} and {} go together".format(missing[0], *pair))
    if own.cert_key is not None and client.cert is None:
        raise ValueError("cert: missing, although cert_key is given; they go together")
    if client.key is not None and own.username is not None:
        raise ValueError("username: given together with key; use either key and secret or username and password")
    own.checked = together


def _build(client, call, login=None, post=False):
    """A signed _Request; built anew for each attempt, since `expires` must be fresh."""
    params = dict(call.params)
    params[call.opcode_name] = call.command
    if call.json:
        params["response"] = "json"
    secrets = [client._own.password]
    add_signature = None
    if login is not None:
        params["sessionkey"] = login.key
        secrets += login.cookies.values()
    elif client.key is not None and client._own.username is None:
        for name in [name for name in params if name.lower() == "apikey"]:
            del params[name]
        params["apiKey"] = client.key
        add_signature = _signer(client.secret, client.expiration, call.expires)
        secrets += [client.secret]
    if call.expires is not None:
        params["expires"] = call.expires
    request = _Request(client, call, params, secrets, add_signature)
    _add_headers(client, call, request, login)
    if _needs_post(client, call, request, post):
        request.method = "POST"
        request.headers["Content-Type"] = "application/x-www-form-urlencoded"
    return request


def _is_anonymous(client, call):
    return client.key is None and client._own.username is None and call.command.lower() != "login"


def _needs_post(client, call, request, post):
    """Whether GET cannot do. What is sent without credentials goes to the integration port, which reads no body; but
    for login, which takes nothing else than POST."""
    if _is_anonymous(client, call):
        return False
    return (
        post
        or call.secret
        or client.method == "post"
        or (client._server.post_only and not _get_allowed(call.command))
        or request.is_long()
    )


def _signer(secret, expiration, expires):
    """Return the function that adds expiry and signature to the parameters of a request."""
    seconds = expiration.total_seconds()

    def add_signature(params):
        if expires is not None or seconds >= 0:
            params["signatureVersion"] = "3"
            moment = time.gmtime(min(time.time() + seconds, 253402300799))  # the year 9999, as far as the format goes
            params["expires"] = expires or time.strftime("%Y-%m-%dT%H:%M:%S+0000", moment)
        params["signature"] = sign(params, secret)

    return add_signature


_LOOPBACK = re.compile(r"https?://(?:127\.|localhost(?:[:/?]|\Z)|\[::1\])")  # where packing costs more than it saves


def _add_headers(client, call, request, login):
    local = _LOOPBACK.match(request.endpoint)
    own = {"User-Agent": "cs/" + __version__, "Accept-Encoding": "identity" if local else "gzip"}
    if login is not None and login.cookies:  # an empty header would hide the cookies that a `session` keeps itself
        own["Cookie"] = "; ".join(name + "=" + value for name, value in login.cookies.items())
    request.add_headers(own, client.headers, call.headers)


# strict=False: the server leaves raw control characters in strings. NaN and Infinity are no JSON.
def _no_constant(name):
    raise ValueError(name + " is no JSON")


_JSON = jsonlib.JSONDecoder(strict=False, parse_constant=_no_constant)


class _CollectorPause:
    """Python's cyclic garbage collector, stopped while a long answer is decoded: that makes thousands of containers
    that can hold no cycle, and looking through them again and again took half the time of a long list. Counted, since
    several threads may be at it; where the program has turned the collector off, it stays off."""

    def __init__(self):
        self._lock = threading.Lock()
        self._start_anew()
        if hasattr(os, "register_at_fork"):  # a child must not inherit a collector stopped by another thread
            os.register_at_fork(after_in_child=self._leave_all)

    def _start_anew(self):
        self._inside = 0
        self._stopped = False

    def __enter__(self):
        with self._lock:
            self._inside += 1
            if gc.isenabled():
                self._stopped = True
                gc.disable()

    def __exit__(self, *exc_info):
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._stopped:
                self._stopped = False
                gc.enable()

    def _leave_all(self):
        self._lock = threading.Lock()
        if self._stopped:
            gc.enable()
        self._start_anew()


_collector_stopped = _CollectorPause()
_LONG_ANSWER = 1 << 16  # characters; below, the collector hardly runs


def _parse(response):
    """The answer as JSON. Raises ValueError or RecursionError."""
    text = response.content.decode("utf-8-sig", "replace")
    if len(text) < _LONG_ANSWER:
        return _JSON.decode(text)
    with _collector_stopped:
        return _JSON.decode(text)


def _advice(client):
    return "Make sure endpoint URL {!r} is correct.".format(_shown(client.endpoint))


def _decode(client, call, response):
    """The value under the answer's single top-level key, or the CloudStackException that the answer amounts to.

    About 85 commands answer under another key than their own, so whatever single key there is, is taken; and bodies of
    any status may be the servlet container's HTML, so it is parsing that tells, not the status."""
    code = response.status_code
    status = "HTTP {} {}".format(code, response.reason)
    if 300 <= code < 400 and response.headers.get("Location"):
        raise CloudStackException(status, _redirect_text(response), response=response)
    if not call.json:
        if code != 200:
            raise CloudStackApiException(_api_text(code), error=response.text, response=response)
        return response.text
    kind = response.headers.get("Content-Type")
    if code == 200 and not response.content:
        raise CloudStackException(
            status, "The answer is empty: an unexpected error inside the server.", response=response
        )
    if code == 200 and kind and "json" not in kind.lower() and "javascript" not in kind.lower():
        raise CloudStackException("JSON (application/json) was expected, got {!r}".format(kind), response=response)
    try:
        document = _parse(response)
    except (ValueError, RecursionError):
        broken = "Malformed JSON document. " if code == 200 else ""
        raise CloudStackException(status, broken + _advice(client), response=response) from None
    if not isinstance(document, dict) or len(document) != 1:
        detail = "a single top-level key was expected"
        raise CloudStackException("Unexpected response from CloudStack", detail, response=response)
    (value,) = document.values()
    if code != 200:
        raise CloudStackApiException(_api_text(code), error=value, response=response)
    return value


def _api_text(code):
    text = "HTTP {} response from CloudStack".format(code)
    if code == 511:
        text += " (two-factor authentication is required: use an API key and secret, which it does not apply to)"
    return text


def _redirect_text(response):
    place = _shown(response.headers.get("Location"))
    return "Redirects are not followed; the new address is {!a}. Set the endpoint to where the API is.".format(place)


def _status(error):
    return getattr(error.response, "status_code", None)


def _refused(error):
    """Whether the server said that it did not run the command: throttled, or itself in maintenance."""
    said = isinstance(error, CloudStackApiException) and isinstance(error.error, dict) and "errorcode" in error.error
    return _status(error) == 429 or (_status(error) == 503 and said)


def _passing(error):
    """Whether the same reading request may well succeed a little later."""
    if error.response is None:
        return isinstance(error, OSError)
    return _status(error) in (429, 502, 503, 504)


def _asked_wait(error):
    """Seconds the server asked to wait, by the text of its 429 or by Retry-After; None where it did not say."""
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


def backoff(attempt, first):
    """Seconds before retry number `attempt` (0 is the first): exponential, half of it jitter, at most LONGEST_WAIT."""
    return min(LONGEST_WAIT, first * 2.0 ** min(attempt, 32)) * (0.5 + _random() / 2)


def _retry_delay(client, call, error, attempt):
    """Seconds until the call may be sent again, or None where it may not. A command that changes something is sent
    again only where the server surely did not run it."""
    if not (error.unsent or _refused(error) or (call.reads and _passing(error))):
        return None
    asked = _asked_wait(error)
    if asked is not None and asked > LONGEST_WAIT:
        return None
    return max(asked or 0.0, backoff(attempt, client.retry_backoff))


def _wants_post(error):
    return (
        isinstance(error, CloudStackApiException)
        and _status(error) == 400
        and "using post request" in error.response.text.lower()
    )


def _mark(call, error):
    """Say on the exception whether the command may have run."""
    if error.outcome_unknown:
        return
    answered = isinstance(getattr(error, "error", None), dict) or 300 <= (_status(error) or 0) < 500
    error.outcome_unknown = not (call.reads or error.unsent or answered)
    if error.outcome_unknown and error.response is None and error.args:
        _add_hint(error, f"{call.command} may have run, its outcome is unknown: look before it is sent again")


def _add_hint(error, hint):
    """Put a hint behind what an exception says; of an OSError's arguments a third would be lost."""
    error.args = (error.args[0], "; ".join([str(arg) for arg in error.args[1:]] + [hint]))


def _ask(client, call):
    """Send one command until it is answered or may not be sent again; returns the decoded answer."""
    attempt = 0
    post = renewed = replayed = False
    retries = client.retry if call.retries is None else call.retries
    while True:
        login = None if call.command == "login" else (yield from _current_login(client))
        try:
            call.response = yield _build(client, call, login, post)
            return _decode(client, call, call.response)
        except CloudStackException as error:
            if _wants_post(error) and not post and not _is_anonymous(client, call):
                post = client._server.post_only = True
                continue
            if login is not None and _status(error) == 401 and not renewed:
                renewed = True
                _forget_login(client, login)
                continue
            if call.reads and not replayed and getattr(error, "stale", False):
                replayed = True
                continue
            delay = None if attempt >= retries else _retry_delay(client, call, error, attempt)
            if delay is None:
                _mark(call, error)
                raise
        attempt += 1
        yield delay


# Sessions: user name and password instead of key and secret.


def _current_login(client):
    """The session to send with, made if there is none; None where the client has no user name. Of many callers one logs
    in and the others wait for it, and share its failure: wrong passwords in a row would lock the account."""
    if client._own.username is None:
        return None
    server = client._server
    turn = server.log_in
    while server.login is None:
        count = turn.done.count
        token = turn.take()
        if token is not None:
            yield from _log_in_for_all(client, server, token)
            continue

        yield _Pause(LEASE, turn.done, count)
        if server.login is None and server.login_error is not None:
            import copy

            raise copy.copy(server.login_error)  # each caller writes the id of its own job on it
    return server.login


def _log_in_for_all(client, server, token):
    try:
        if server.login is None:
            server.login_error = None
            server.login = yield from _log_in(client)
    except CloudStackException as error:
        server.login_error = error
        raise
    finally:
        server.log_in.give_back(token)


def _log_in(client):
    own = client._own
    params = {"username": own.username, "password": own.password, "domain": own.domain or "/"}
    call = _Call("login", params)
    answer = yield from _ask(client, call)
    key = answer.get("sessionkey") if isinstance(answer, dict) else None
    if not isinstance(key, str) or not key or _UNSENDABLE.search(key):
        detail = "login gave no session key"
        raise CloudStackException("Unexpected response from CloudStack", detail, response=call.response)
    return _Login(key, call.response.cookies())  # type: ignore[union-attr]


def _forget_login(client, login):
    if client._server.login is login:  # else somebody else has renewed it already
        client._server.login = None


def _log_out(client):
    """End the session, if there is one, as well as may be: the server ends it by itself after half an hour idle."""
    login = client._server.login
    if login is None:
        return
    client._server.login = None
    try:
        yield _build(client, _Call("logout", {}), login, post=True)
    except CloudStackException:
        pass


# Pages.


def _rows(answer):
    """The answer's rows: its only list, whatever its name. None where it is an object, not a list."""
    if not isinstance(answer, dict):
        return None
    lists = [value for value in answer.values() if isinstance(value, list)]
    if len(lists) == 1 and "id" not in answer:  # else an object that holds a list
        return lists[0]
    return [] if not set(answer) - {"count"} else None


def _is_same_page(rows, page):
    """Whether two pages hold the same rows in the same order: equal ones, or ones that go by the same ids and names
    while figures in them have moved. The id alone would not do: templates repeat it for every zone."""
    if len(rows) != len(page):
        return False
    if rows == page:
        return True
    if len(rows) < 2 or [_row_id(row) for row in rows] != [_row_id(row) for row in page]:
        return False
    return all(_row_id(row) is not None for row in rows) and list(map(_identity, rows)) == list(map(_identity, page))


def _row_id(row):
    return row.get("id") if isinstance(row, dict) else None


def _identity(row):
    return {name: value for name, value in row.items() if name.endswith(("id", "name"))}


class _Walk:
    """All pages of one list, in order; `yield from next_page()` gives a list of rows, or None after the last.

    A page is never taken for the last by its length alone: `count` is the total for most commands, the length of this
    page for some, and missing for others. So the walk goes on while a page is full or fewer than `count` rows were
    seen, and ends with an empty page, with one that repeats the one before it or the first (commands that ignore
    `page`, servers that begin anew), or with one that is longer than asked for (those, again)."""

    def __init__(self, client, call, ahead=1, report=None):
        self.client = client
        self.call = call
        self.ahead = ahead
        self.report = report
        self.page = self._given("page", 1)
        self.size = self._given("pagesize", client._server.page_limit)
        self.first = None  # the first answer, for what is no list
        self.total = None  # what the server says there is
        self.seen = 0
        self.pages = 0
        self.first_rows = self.previous = None
        self.buffered = []
        self.done = False

    def _given(self, name, default):
        text = self.call.given(name)
        try:
            return _count(text, least=1) if text else default
        except ValueError as error:
            raise ValueError("parameter {!r}: {}".format(name, error)) from None

    def next_page(self):
        while not self.done:
            if not self.buffered:
                yield from self._fetch()
            answer = self.buffered.pop(0)
            if isinstance(answer, BaseException):
                self.done = True
                raise answer
            rows = self._take(answer)
            if rows:
                if self.report:
                    self.report("rows", self.seen, self.total)
                return rows
        return None

    def _fetch(self):
        pages = self._sure_pages()
        if len(pages) > 1:
            yield from self._fetch_at_once(pages)
        if not self.buffered:
            self.buffered = [(yield from self._ask_within_limit(self.call.with_page(self.page, self.size)))]

    def _fetch_at_once(self, pages):
        todo = iter(pages)
        answers, halt = {}, []  # type: dict, list
        try:
            outcomes = yield [self._lane(todo, answers, halt) for _ in pages[: self.ahead]]
        finally:
            halt.append(True)  # whoever was interrupted wants no more of them
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        # Up to the first gap: what follows one is read again, from there.
        self.buffered = [answers[page] for page in itertools.takewhile(answers.__contains__, pages)]

    def _sure_pages(self):
        """The pages to come that may be asked for at once: only where a full page and a count above it say that they
        are there, and never through a program's own session, which may not be made for threads."""
        if self.ahead < 2 or not self.total or len(self.previous or ()) < self.size or self.client.session is not None:
            return ()
        # And the one after the last, which has to be looked at where the last is full.
        return range(self.page, self.page + (self.total - self.seen) // self.size + 1)

    def _lane(self, todo, answers, halt):
        """One of several that share the pages to do. The first page that is not full, or repeats the one before all
        of these, is the end, whatever the count said: nothing more is asked for then."""
        while not halt:  # looked at first: a page that was taken is asked for, or its rows were lost (finding 04)
            page = next(todo, None)
            if page is None:
                break
            try:
                answers[page] = yield from _ask(self.client, self.call.with_page(page, self.size))
                rows = _rows(answers[page])
                good = rows is not None and len(rows) == self.size and not self._repeats(rows)
            except CloudStackException as error:
                answers[page], good = error, False
            if self.report:
                self.report("rows", min(self.seen + len(answers) * self.size, self.total), self.total)
            if not good:
                halt.append(page)

    def _ask_within_limit(self, call):
        """One page; where the server says on the first that its limit is lower, with that one, which is remembered."""
        try:
            return (yield from _ask(self.client, call))
        except CloudStackApiException as error:
            found = _PAGE_LIMIT.search(error.response.text) if _status(error) == 431 else None
            if not found or self.first is not None or not 0 < int(found.group(1)) < self.size:
                raise
            limit = int(found.group(1))
        self.page = (self.page - 1) * self.size // limit + 1
        self.client._server.page_limit = self.size = limit
        return (yield from _ask(self.client, call.with_page(self.page, limit)))

    def _take(self, answer):
        """The new rows of one answer; notes whether it was the last."""
        rows = _rows(answer)
        if self.first is None:
            self.first = answer
        if not rows or self._repeats(rows):
            self.done = True
            return None
        self.pages += 1
        if self.pages > MOST_PAGES:
            self.done = True
            raise CloudStackException("Unexpected response from CloudStack", f"a list of more than {MOST_PAGES} pages")
        self.seen += len(rows)
        count = answer.get("count")
        if isinstance(count, int) and count > len(rows):
            self.total = count
        self.done = len(rows) > self.size or (len(rows) < self.size and self.seen >= (self.total or 0))
        self.previous = rows
        self.first_rows = self.first_rows or rows
        self.page += 1
        return rows

    def _repeats(self, rows):
        """Whether a page is the one before it, or the first, once more."""
        return any(_is_same_page(rows, page) for page in (self.previous, self.first_rows) if page)

    def is_list(self):
        return _rows(self.first) is not None


def _collect(client, call):
    """Every row of a list; what is no list, as it is."""
    walk = _Walk(client, call, PAGES_AHEAD, client._own.progress)
    everything = []  # type: list
    while True:
        rows = yield from walk.next_page()
        if rows is None:
            return everything if walk.is_list() else walk.first
        everything += rows


# Jobs.


class _JobList:
    """Which jobs are pending, found out once for all who wait: listAsyncJobs tells in one request what single looks
    would ask for each. It serves threads and event loops alike: who needs news first fetches them, and all others are
    woken to look at them.

    A job that is not, or no longer, in the list is asked for singly, so that whatever the list leaves out (another
    account's jobs, rows that moved between pages) costs a request and nothing else."""

    FEWEST = 4  # waiters; for fewer, asking singly is as cheap
    USELESS = 600.0  # seconds to do without a list that does not help

    def __init__(self):
        self.waiting = set()
        self.needed = self.FEWEST  # waiters, for the list to be worth its requests
        self.reading = _Turn()
        self.pending = set()  # type: set
        self.asked_at = float("-inf")  # when the list was asked for: what it says is at least as new as that
        self.off_until = 0.0
        self.failures = 0  # in a row
        self.in_vain = 0  # looks at jobs that the list had not shown, though they were pending

    def join(self, poll):
        self.waiting.add(poll)

    def leave(self, poll):
        self.waiting.discard(poll)
        if not self.waiting:
            self.needed = self.FEWEST

    def is_used(self):
        return len(self.waiting) >= self.needed and self.off_until <= _clock()

    def pause(self, seconds):
        """The step that sleeps until the list was read anew, or for so many seconds."""
        return _Pause(seconds, self.reading.done, self.reading.done.count)

    def refresh(self, client, call):
        """Read the list, or wait for the one who is at it. Whoever called looks afterwards whether there are news."""
        pause = self.pause(max(SOONEST_LOOK, client.poll_interval))
        token = self.reading.take()
        if token is None:
            yield pause
            return
        try:
            yield from self._read(client, call)
        finally:
            self.reading.give_back(token)

    def _read(self, client, call):
        """Read the list; where that fails, do without for a while."""
        asked_at = _clock()
        listing = _Call("listAsyncJobs", {}, opcode_name=call.opcode_name, headers=call.headers)
        listing.retries = 0
        listing.total = max(1.0, client.poll_interval)  # one that takes longer saves nobody anything
        try:
            rows = yield from self._rows(client, listing)
        except CloudStackException as error:
            # Passing trouble passes; a role that may not list jobs stays a while.
            self.failures += 1
            passing = _passing(error) and self.failures < PATIENCE
            self.off_until = _clock() + (client.poll_interval if passing else self.USELESS)
            return
        self.failures = 0
        if rows is None:
            return
        # Servers up to 4.19 list finished jobs, too (finding 01).
        self.pending = {str(row.get("jobid")) for row in rows if str(row.get("jobstatus", 0)) == "0"}
        self.asked_at = asked_at

    def _rows(self, client, listing):
        """All rows of the list; None where, with the jobs of others, it takes more requests than it saves: it is tried
        again when there are twice as many waiters."""
        walk = _Walk(client, listing)
        found = []
        while not walk.done and walk.pages < len(self.waiting) // 2:
            rows = yield from walk.next_page()
            found += [row for row in rows or () if isinstance(row, dict)]
        if not walk.done:
            self.needed = 2 * len(self.waiting)
            return None
        if not walk.is_list():
            raise CloudStackException("listAsyncJobs is of no use here")
        return found

    def note_unlisted(self):
        """Note a pending job that the list did not show: with too many of them it is not worth its requests."""
        self.in_vain += 1
        if self.in_vain > len(self.waiting):
            self.in_vain = 0
            self.off_until = _clock() + self.USELESS


class _Wait:
    """One waiter's looks at its job: when the next is due, what the last one told, and how long trouble lasts."""

    def __init__(self, client):
        self.client = client
        self.started = self.due = self.looked = _clock()
        self.news = self.started - 1e-6  # a list that is asked for at the same moment shows the job already
        limit = client.job_timeout
        self.deadline = float("inf") if limit is None else self.started + limit
        self.was_listed = False
        self.is_missing = False  # from a list that should show it
        self.trouble = 0

    def found_pending(self, at):
        """Set the next look, after one of that moment found the job pending."""
        self.news = at
        self.trouble = 0
        self.due = _clock() + _distance(self.client, at - self.started)

    def rides_out(self, error):
        """Set the next look after one that went wrong; False where the error says something about the job, or where
        trouble has lasted for too long."""
        patient = self.client.job_timeout is not None or self.trouble + 1 < PATIENCE
        if not _rideable(error) or not patient:
            return False
        asked = _asked_wait(error) or 0.0
        self.due = _clock() + min(LONGEST_WAIT, max(asked, self.client.poll_interval * 2.0**self.trouble))
        self.trouble += 1
        return True

    def left(self):
        """Seconds until the next look."""
        return max(0.0, min(self.due, self.deadline) - _clock())


def _distance(client, waited):
    """Seconds between two looks at a job: they grow with the time it was waited for, so that a short one is seen early
    and a long one costs few looks."""
    return min(client.poll_interval, max(SOONEST_LOOK, NEXT_LOOK * waited))


def _is_job(answer):
    """Whether an answer is that of a submitted job; queryAsyncJobResult's own also holds a jobid, and a status."""
    return isinstance(answer, dict) and "jobid" in answer and "jobstatus" not in answer


def _poll_call(call, jobid):
    """The call that looks at a job, sent as the one that started it was. Raises ValueError."""
    poll = _Call("queryAsyncJobResult", {"jobid": str(jobid)}, True, call.opcode_name, call.headers)
    poll.retries = 0
    return poll


def _await_job(client, call, jobid):
    """The jobresult of a job, waited for; whatever is raised meanwhile carries the job's id."""
    jobs = client._server.jobs
    poll = None
    try:
        try:
            poll = _poll_call(call, jobid)
        except ValueError as error:
            raise CloudStackException("Unexpected response from CloudStack", str(error)) from None
        jobs.join(poll)
        return (yield from _look_until_done(client, call, poll))
    except BaseException as error:
        setattr(error, "jobid", str(jobid))  # noqa: B010  (KeyboardInterrupt and CancelledError, too)
        raise
    finally:
        jobs.leave(poll)


def _look_until_done(client, call, poll):
    """Look until the job is done, at once and then at growing distances, and once more at the deadline. Trouble on the
    way (no answer, none of CloudStack's, 429, 503) is ridden out for as long as the deadline allows, or PATIENCE times
    in a row where there is none."""
    wait = _Wait(client)
    answered = None
    while True:
        if client._own.progress:
            client._own.progress("job", call.command, _clock() - wait.started)
        if (yield from _is_listed(client, call, poll, wait)):
            continue
        wait.looked = _clock()
        last = wait.looked >= wait.deadline
        poll.total = max(0.0, wait.deadline - wait.looked) + client.timeout
        try:
            answer = yield from _ask(client, poll)
            answered = poll.response
            finished, result = _job_outcome(answer, answered)
            if finished:
                return result
            wait.found_pending(wait.looked)
            if wait.is_missing:
                client._server.jobs.note_unlisted()
        except CloudStackException as error:
            answered = error.response or answered
            if not wait.rides_out(error):
                raise
        if last:
            response = answered and answered.replaced(408, "Request Timeout")
            raise CloudStackJobTimeout("Timeout waiting for async job result", poll.params["jobid"], response=response)


def _is_listed(client, call, poll, wait):
    """Sleep until a look is due; True where the list of jobs has meanwhile shown the job as pending. Else it is to be
    asked for singly: where there is no list, where the list no longer shows it, and now and then in any case."""
    jobs = client._server.jobs
    wait.is_missing = False
    while jobs.is_used() and not wait.trouble:
        pause = jobs.pause(wait.left())
        if jobs.asked_at > wait.news:
            if poll.params["jobid"] in jobs.pending:
                return _note_listed(client, jobs, wait)
            if wait.was_listed or not pause.seconds:
                wait.was_listed, wait.is_missing = False, True
                return False

        if pause.seconds:
            yield pause
        elif _clock() >= wait.deadline:
            return False
        elif _clock() - jobs.asked_at < min(SOONEST_LOOK, client.poll_interval):
            yield jobs.pause(SOONEST_LOOK)
        elif _clock() > wait.due + max(1.0, client.poll_interval):  # somebody is at it, and does not come back
            return False
        else:
            yield from jobs.refresh(client, call)

    if wait.left():
        yield wait.left()
    return False


def _note_listed(client, jobs, wait):
    """Set the next look at a job that the list shows; True unless it is to be asked for singly all the same: at the
    deadline, and now and then, since no list is to be believed for ever (finding 01)."""
    wait.was_listed, jobs.in_vain = True, 0
    wait.found_pending(jobs.asked_at)
    own_look = wait.looked + OWN_LOOK * max(SOONEST_LOOK, client.poll_interval)
    return _clock() < min(own_look, wait.deadline)


def _rideable(error):
    """Whether a look at a job that went wrong says nothing about the job. Errors the server states in JSON do."""
    if isinstance(error, CloudStackApiException):
        return error.args[0] != "Job failure" and (_status(error) in (429, 503) or not isinstance(error.error, dict))
    return True


def _job_status(answer, response):
    """Return jobstatus out of queryAsyncJobResult's answer. Raises CloudStackException where it has none."""
    try:
        return int(answer["jobstatus"])
    except (KeyError, OverflowError, TypeError, ValueError):
        detail = "queryAsyncJobResult gave no jobstatus"
        raise CloudStackException("Unexpected response from CloudStack", detail, response=response) from None


def _job_outcome(answer, response):
    """(finished, result) out of queryAsyncJobResult's answer. A failed job may come without jobresult: the server was
    restarted, its queue cancelled. Raises CloudStackApiException with what the server said."""
    status = _job_status(answer, response)
    result = answer.get("jobresult")
    if status == 0:
        return False, None
    if status == 1:
        return True, {} if result is None else result
    raise CloudStackApiException("Job failure", error=answer if result is None else result, response=response)


def _command(client, call, fetch_list, fetch_result):
    """A whole call: the answer, all rows of a list, or the result of a job."""
    _check_client(client)
    if fetch_list is _LAZY:
        return _Walk(client, call, report=client._own.progress)
    call.complete_page(client._server.page_limit)
    if client._own.recover:
        call.choose_job_id()
    if call.job_id is not None:
        answer = yield from _submit(client, call)
    else:
        answer = yield from _collect(client, call) if fetch_list else _ask(client, call)
    if fetch_result and _is_job(answer):
        answer = yield from _await_job(client, call, answer["jobid"])
    return answer


# Recovery: the job of a command whose answer was lost is found by the id that the command gave it. It is only asked
# for: sent again, even under the same id, the command would be refused and yet leave a second machine (seen on 4.23).


def _submit(client, call):
    """The answer of a command that changes something, or the like of it where the job shows that it was accepted."""
    try:
        try:
            return (yield from _ask(client, call))
        except CloudStackException as error:
            if not error.outcome_unknown:
                raise
            lost = error
        return (yield from _find_job(client, call, lost))
    except CloudStackException:
        raise
    except BaseException as error:  # Ctrl-C, a cancelled task: the answer may be on its way
        setattr(error, "jobid", call.job_id)  # noqa: B010
        raise


def _find_job(client, call, lost):
    """Ask for the job at once and at growing distances, and ride out trouble as the wait for a job does. Raises the
    error by which the answer was lost, where the server has not known the job for `timeout` seconds in a row."""
    poll = _poll_call(call, call.job_id)
    wait = _Wait(client)
    unknown_since = None
    while True:
        asked_at = _clock()
        try:
            answer = yield from _ask(client, poll)
            _job_status(answer, poll.response)
            return _submission(answer, call.job_id)
        except CloudStackException as error:
            if isinstance(error, CloudStackApiException) and _status(error) == 431:
                unknown_since = asked_at if unknown_since is None else unknown_since
                wait.due = _clock() + _distance(client, asked_at - wait.started)
                is_over = asked_at - unknown_since >= client.timeout
            else:
                unknown_since = None
                is_over = not wait.rides_out(error)

        if is_over or asked_at >= wait.deadline:
            break
        yield wait.left()

    lost.jobid = call.job_id
    said = "could not be asked for" if unknown_since is None else "knows no"
    _add_hint(lost, f"the server {said} job {call.job_id}; wait_job() or `cs --wait {call.job_id}` asks again later")
    raise lost


def _submission(job, job_id):
    """The answer that the submission of a job had, made of what is known of the job."""
    ident = job.get("jobinstanceid")
    return {"jobid": job_id} if ident is None else {"id": ident, "jobid": job_id}


def _resume(client, jobid):
    _check_client(client)
    return (yield from _await_job(client, _Call("queryAsyncJobResult", {"jobid": str(jobid)}), jobid))


# --- 5 transport ----------------------------------------------------------------------------------------------------
# Everything that opens a socket: 5.1 the route to an endpoint, 5.2 connections, 5.3 reading against the clock,
# 5.4 failures in words, 5.5 a program's own session. http.client only reads answers here: it could not be cut off
# while it connects, and takes a proxy for what it is only when it is told in private.

IDLE = 20.0  # seconds after which a kept connection is not used again; the server closes it after 30
_CHUNK = 1 << 18
_BUFFER = 1 << 14  # the longest record of TLS: with less, some of one could be left where a poll does not see it


class _Response:
    """An answer, read to its end: status_code, reason, headers (mapping, names in any case), content (bytes), text, ok,
    json(), as requests has them."""

    def __init__(self, status_code, reason, headers, content):
        self.status_code = status_code
        self.reason = reason
        self.headers = headers
        self.content = content

    def __repr__(self):
        return "<Response [{}]>".format(self.status_code)

    @property
    def text(self):
        return self.content.decode("utf-8", "replace")

    @property
    def ok(self):
        return self.status_code < 400

    def json(self):
        return _parse(self)

    def replaced(self, status_code, reason):
        """The same answer under another status."""
        return _Response(status_code, reason, self.headers, self.content)

    def cookies(self):
        lines = self.headers.get_all("Set-Cookie") if hasattr(self.headers, "get_all") else None
        pairs = [line.partition(";")[0].partition("=") for line in lines or []]
        return {name.strip(): value.strip() for name, _, value in pairs if name.strip()}


# 5.1 The route.

_Place = collections.namedtuple("_Place", "secure host port")  # secure: TLS is spoken there
_Proxy = collections.namedtuple("_Proxy", "secure host port authorization")
_PROXY_ADDRESS = re.compile(
    r"(?:([^/]*)@)?"  # user:password
    r"(\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\]]+)(?::([0-9]{1,5}))?"
    r"(?:[/?#][^@]*)?\Z"  # an @ in here says that the password holds a slash: then nothing is what it seems
)


class _Route:
    """How requests get to one endpoint: straight to its host, as absolute URLs to an http proxy, or through the tunnel
    that a proxy makes for https."""

    def __init__(self, endpoint):
        parts = urlsplit(endpoint)
        secure = parts.scheme == "https"
        self.origin = _Place(secure, parts.hostname, parts.port or _default_port(secure))
        self.proxy = _find_proxy(parts)
        self.tunnel = secure and self.proxy is not None
        self.absolute = self.proxy is not None and not secure
        self.host = _join_port(parts.hostname, parts.port if parts.port != _default_port(secure) else None)
        self._start = len(parts.scheme) + len("://") + len(parts.netloc)  # of the target in a URL

    def head(self, request):
        """The request line and headers, as bytes."""
        target = request.url
        if not self.absolute:
            target = target[self._start :]
            if target[:1] != "/":
                target = "/" + target

        lines = [f"{request.method} {target} HTTP/1.1"]
        if "host" not in map(str.lower, request.headers):
            lines.append("Host: " + self.host)
        lines += [f"{name}: {value}" for name, value in request.headers.items()]
        if self.absolute and self.proxy.authorization:
            lines.append("Proxy-Authorization: " + self.proxy.authorization)
        if request.body is not None:
            lines.append(f"Content-Length: {len(request.body)}")

        return "\r\n".join(lines + ["", ""]).encode("latin-1")


def _default_port(secure):
    return 443 if secure else 80


def _join_port(host, port):
    if ":" in host:
        host = f"[{host}]"
    return host if port is None else f"{host}:{port}"


def _find_proxy(parts):
    """Find the _Proxy for an address in the environment (elsewhere than on Unix in the system's settings, too), or
    None. Raises OSError where it is of no use. ALL_PROXY counts where the scheme has no proxy of its own, as curl and
    requests have it."""
    asks_system = os.name != "posix" or sys.platform == "darwin"
    names = (parts.scheme + "_proxy", "all_proxy")
    if not asks_system and not any(name.lower() in names for name in os.environ):
        return None  # importing urllib.request costs as much as a call

    import urllib.request

    proxies = urllib.request.getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or urllib.request.proxy_bypass(parts.netloc) or _is_excluded(parts.hostname, proxies.get("no", "")):
        return None
    return _parse_proxy(address)


def _is_excluded(host, no_proxy):
    """Whether NO_PROXY covers the host by what urllib does not know: a bare IPv6 address, a range such as 10.0.0.0/8,
    or * in a list."""
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
    """Parse a proxy's address; raises OSError, whose text never quotes it, for one that cannot be used."""
    scheme, place = re.match(r"(?:([A-Za-z][\w+.-]*)://)?(.*)", address, re.DOTALL).groups()  # type: ignore[union-attr]
    scheme = (scheme or "http").lower()
    if scheme not in ("http", "https"):
        raise OSError(f"{scheme} proxies cannot be used; http and https ones can")
    found = _PROXY_ADDRESS.match(place)
    if not found or not 0 < int(found.group(3) or 1) < 65536:
        raise OSError("the address of the proxy cannot be used; it is to be http://[user:password@]host:port")

    from urllib.parse import unquote

    login, host, port = found.groups()
    authorization = None
    if login:
        user, _, password = map(unquote, login.partition(":"))
        code = b2a_base64(f"{user}:{password}".encode("utf-8"), newline=False)
        authorization = "Basic " + code.decode("ascii")
    secure = scheme == "https"
    return _Proxy(secure, host.strip("[]"), int(port or _default_port(secure)), authorization)


# 5.2 Connections.


class _Transport:
    """exchange(_Request) -> _Response, over kept connections. Safe to share between threads (deque's append and pop
    are atomic) and across a fork (the child starts without connections)."""

    _idle = {}  # type: dict  # for __del__, should an interrupt come before _start()

    def __init__(self, keep):
        self.keep = keep
        self._start()

    def _start(self):
        self._idle = {}  # (origin, proxy, verify, cert) -> deque of (socket, since); last in, first out
        self._contexts = {}
        self._routes = {}  # the environment is looked at once for each endpoint
        self._pid = os.getpid()

    def __del__(self):
        self.close()

    def close(self):
        for idle in list(self._idle.values()):
            while idle:
                try:
                    idle.pop()[0].close()
                except (IndexError, OSError):  # another thread was faster
                    pass

    def exchange(self, request):
        """Send and read one answer of any status. Raises CloudStackConnectionError, CloudStackTimeoutError, or
        ValueError for a setting (verify, cert) that cannot be used."""
        if self._pid != os.getpid():
            self.close()
            self._start()
        try:
            return self._send(request, _clock() + request.total)
        except _Failed as raised:
            failed = raised
        # Raised out here, so that what http.client quoted is not its context either.
        raise _network_error(failed, request) from _quotable(failed.cause)

    def _send(self, request, deadline):
        """One exchange over a kept or a new connection. Raises _Failed."""
        route = self._routes.get(request.endpoint) or self._add_route(request.endpoint)
        key = (route.origin, route.proxy, request.verify, request.cert)
        sock = self._checkout(key)
        kept = sock is not None
        if not kept:
            sock = self._connect(route, request, deadline)

        sent = False
        try:
            _hold(request, sock)
            _set_timeout(sock, request, deadline)
            sent = True
            sock.sendall(route.head(request) + (request.body or b""))
            response, reusable = _read_response(sock, request, deadline)
        except BaseException as error:
            _let_go(request)
            sock.close()
            if not _is_failure(error):
                raise
            stale = sent and kept and isinstance(error, ConnectionError)
            raise _Failed(_overdue_or(error, deadline), unsent=not sent, stale=stale) from None

        # Who cancelled it meanwhile has taken the socket away, to shut it down.
        if _let_go(request) and reusable:
            self._keep(key, sock)
        else:
            sock.close()
        return response

    def _add_route(self, endpoint):
        try:
            route = self._routes[endpoint] = _Route(endpoint)
        except OSError as error:
            raise _Failed(error, unsent=True) from None
        return route

    def _checkout(self, key):
        """The connection that was used last, if it is still good."""
        idle = self._idle.get(key)
        while idle:
            try:
                sock, since = idle.pop()
            except IndexError:  # another thread was faster
                return None
            if _clock() - since < IDLE and not _dropped(sock):
                return sock
            sock.close()
        return None

    def _keep(self, key, sock):
        idle = self._idle.setdefault(key, collections.deque())
        idle.append((sock, _clock()))
        if len(idle) > self.keep:
            try:
                idle.popleft()[0].close()
            except IndexError:
                pass

    def _context(self, verify, cert):
        """The one SSLContext for these settings; making it costs tens of milliseconds."""
        key = (verify, cert)
        if key not in self._contexts:
            self._contexts[key] = _make_context(verify, cert)
        return self._contexts[key]

    def _connect(self, route, request, deadline):
        """A new connection to the origin: TLS to the proxy, tunnel and TLS are done where the route asks for them.
        Raises _Failed(unsent=True), or ValueError for a setting."""
        origin, proxy = route.origin, route.proxy
        context = self._context(request.verify, request.cert) if origin.secure else None
        outer = self._context(request.verify, None) if proxy and proxy.secure else None  # our certificate is not for it
        sock = None
        try:
            sock = _dial(proxy or origin, request, deadline)
            if outer:
                sock = _wrap(outer, sock, proxy.host)
                _shake_hands(sock, request, deadline)
            if route.tunnel:
                _ask_for_tunnel(sock, route, request, deadline)
            if context:
                sock = _wrap(context, sock, origin.host)
                _shake_hands(sock, request, deadline)
        except BaseException as error:
            if sock is not None:
                _let_go(request)
                sock.close()
            if not _is_failure(error):
                raise
            raise _Failed(_overdue_or(error, deadline), unsent=True, proxy=proxy) from None
        return sock


def _dropped(sock):
    """Whether an idle connection was closed by the server, or said something unasked."""
    import select

    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([sock], [], [], 0)[0])


def _dial(place, request, deadline):
    """Connect to the first address of a place that answers, as socket.create_connection does; but each socket is known
    before it connects, so that it can be cut off."""
    import socket

    addresses = socket.getaddrinfo(place.host, place.port, 0, socket.SOCK_STREAM)
    while len(addresses) > 1:
        try:
            return _dial_address(addresses.pop(0), request, deadline)
        except OSError:
            continue
    return _dial_address(addresses[0], request, deadline)


def _dial_address(found, request, deadline):
    import socket

    family, kind, protocol, _, address = found
    sock = socket.socket(family, kind, protocol)
    try:
        _hold(request, sock)
        _set_timeout(sock, request, deadline)
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        _let_go(request)
        sock.close()
        raise
    return sock


def _ask_for_tunnel(sock, route, request, deadline):
    """Have the proxy connect to the origin: CONNECT (RFC 9110, 9.3.6)."""
    import http.client

    place = _join_port(route.origin.host, route.origin.port)
    lines = [f"CONNECT {place} HTTP/1.1", "Host: " + place]
    if route.proxy.authorization:
        lines.append("Proxy-Authorization: " + route.proxy.authorization)
    _set_timeout(sock, request, deadline)
    sock.sendall("\r\n".join(lines + ["", ""]).encode("latin-1"))

    answer = _Answer(_Clocked(sock, request, deadline), _BUFFER)
    response = http.client.HTTPResponse(answer, method="CONNECT")  # type: ignore[arg-type]
    try:
        response.begin()
    finally:
        response.close()
    if not 200 <= response.status < 300:
        reason = _masked_text(response.reason, (route.proxy.authorization or "").split())
        raise OSError(f"Tunnel connection failed: {response.status} {reason}")


def _wrap(context, sock, host):
    """TLS over a connection, its handshake yet to come: it must be known by then, so that it can be cut off."""
    if hasattr(sock, "do_handshake"):
        return _TlsInside(context, sock, host)
    return context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)


class _TlsInside:
    """TLS inside a TLS connection, that to an https proxy, over which SSLContext.wrap_socket cannot be used."""

    def __init__(self, context, outer, host):
        import ssl

        self.outer = outer
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self.gettimeout, self.settimeout = outer.gettimeout, outer.settimeout
        self.fileno, self.close = outer.fileno, outer.close

    def _call(self, function, *args):
        """Call a method of the TLS object until it has all it needs; carry to and fro what it reads and writes."""
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
        self._call(self._tls.do_handshake)

    def sendall(self, content):
        rest = memoryview(content)
        while rest:
            rest = rest[self._call(self._tls.write, rest[:_BUFFER]) :]

    def recv_into(self, buffer):
        import ssl

        try:
            return self._call(self._tls.read, len(buffer), buffer)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):  # an end without a farewell, as SSLSocket takes it
            return 0

    def pending(self):
        return self._tls.pending() + self._incoming.pending


def _shake_hands(sock, request, deadline):
    _hold(request, sock)
    _set_timeout(sock, request, deadline)
    sock.do_handshake()


def _make_context(verify, cert):
    """Raises ValueError that names the setting whose file cannot be used."""
    import ssl

    path = verify if isinstance(verify, str) else None
    try:
        if path and os.path.isdir(path):
            context = ssl.create_default_context(capath=path)
        else:
            context = ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:
        raise ValueError(f"verify: cannot read CA certificates from {path!a}: {_reason(error)}") from None
    if sys.version_info < (3, 10):  # later ones have this least version themselves
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cert:
        _load_certificate(context, *(cert if isinstance(cert, tuple) else (cert, None)))
    return context


def _load_certificate(context, own, key):
    questions = []  # type: list

    def ask_nobody():  # OpenSSL would ask on the terminal
        questions.append("password")
        return ""

    try:
        context.load_cert_chain(own, key, password=ask_nobody)
    except (OSError, ValueError) as error:
        why = _reason(error)
        if questions:
            why = "its private key is encrypted; decrypt it first, as `openssl pkey -in KEY -out NEWKEY` does"
        raise ValueError(f"cert: cannot use client certificate {own!a}: {why}") from None


# Cutting off. A request holds the socket of its exchange; to take it away is one atomic step, so that either the thread
# that exchanges or the one that cancels has it, and no connection that is kept again is ever cut off.


def _hold(request, sock):
    request.socket = getattr(sock, "outer", sock)
    if request.cancelled:
        raise ConnectionAbortedError("cancelled")


def _let_go(request):
    """Take the socket back; None where it was taken away."""
    return vars(request).pop("socket", None)


def _cut_off(request):
    """Wake the thread that connects or reads for a caller who has gone away."""
    import socket

    request.cancelled = True
    sock = _let_go(request)
    if sock is not None:
        try:
            # The plain socket's method: SSLSocket's would pull the TLS layer from under the reading thread.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
        except OSError:
            pass


# 5.3 Reading against the clock.


def _set_timeout(sock, request, deadline):
    """Give a socket's next step the seconds it may take: those of a silence, or those left of the whole exchange."""
    left = deadline - _clock()
    if left <= 0:
        raise _Overdue
    seconds = min(request.timeout, left)
    if sock.gettimeout() != seconds:  # setting it is a system call, asking is none
        sock.settimeout(seconds)


class _Clocked(io.RawIOBase):
    """The reading side of a socket under two clocks, each silence and the exchange in all, and with an end: http.client
    takes a chunk of negative size for "all that comes"."""

    def __init__(self, sock, request, deadline):
        self._sock = sock
        self._request = request
        self._deadline = deadline
        self._room = request.limit + (1 << 20)  # for status, headers and chunk sizes
        self.over = False

    def readable(self):
        return True

    def readinto(self, buffer):
        if self.over:
            return 0
        _set_timeout(self._sock, self._request, self._deadline)
        if self._room <= 0:
            raise _TooLarge
        count = self._sock.recv_into(memoryview(buffer)[: self._room])
        self._room -= count
        return count


class _Answer(io.BufferedReader):
    """What http.client reads an answer from, in place of a socket. http.client closes it at the answer's end, when
    bytes beyond that must still be seen."""

    def makefile(self, mode):
        return self

    def close(self):
        pass


def _read_response(sock, request, deadline):
    """Read the answer: (_Response, whether the connection can be used again)."""
    import http.client

    clocked = _Clocked(sock, request, deadline)
    answer = _Answer(clocked, _BUFFER)
    response = http.client.HTTPResponse(answer, method=request.method)  # type: ignore[arg-type]
    try:
        response.begin()
        content = _read_body(response, request.limit)
    finally:
        response.close()

    reason = response.reason
    if reason != http.client.responses.get(response.status):
        reason = _mask_reason(reason, request)
    # Bytes beyond the answer, which a poll of the socket cannot see, say that the connection is out of step.
    clocked.over = True
    reusable = not (response.will_close or answer.peek(1) or (hasattr(sock, "pending") and sock.pending()))
    return _Response(response.status, reason, response.headers, content), reusable


def _mask_reason(reason, request):
    """The reason phrase without secrets: a server may repeat the request line in it."""
    return _masked_text(reason, request.all_secrets()) if isinstance(reason, str) else reason


def _read_body(response, limit):
    """The whole body, unpacked. Raises _TooLarge beyond the limit, IncompleteRead where the end is missing."""
    import http.client

    packed = response.headers.get("Content-Encoding", "").strip().lower() in ("gzip", "x-gzip")
    if response.length is not None and response.length > limit:
        raise _TooLarge
    if response.length is not None and not packed:
        return response.read()
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
    if response.length:  # read(amount) does not complain of a body that ends before its Content-Length
        raise http.client.IncompleteRead(b"", response.length)
    if gunzip and parts and not gunzip.is_whole():
        raise http.client.IncompleteRead(b"")
    return b"".join(parts)


class _Gunzip:
    """Unpacks gzip of one member or several (RFC 1952, 2.2); what follows them and is none is left, as gzip does."""

    MOST = 10000  # members, since each costs a copy of what follows it

    def __init__(self):
        self._members = 0
        self._next_member()

    def _next_member(self):
        import zlib

        self._members += 1
        self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def unpack(self, part, most):
        """The next part, unpacked: at most so many bytes of it."""
        unpacked = self._decompress(part, most)
        while self._member.unused_data[:1] == b"\x1f" and len(unpacked) < most:
            if self._members >= self.MOST:
                raise ValueError("gzip of too many members")
            rest = self._member.unused_data
            self._next_member()
            unpacked += self._decompress(rest, most - len(unpacked))
        return unpacked

    def _decompress(self, part, most):
        import zlib

        try:
            return self._member.decompress(part, most)
        except zlib.error:  # no ValueError
            raise ValueError("bad gzip") from None

    def is_whole(self):
        return self._member.eof


# 5.4 Failures in words.


class _Failed(Exception):
    """An exchange that failed: what was raised, and what it says about the request."""

    def __init__(self, cause, unsent=False, stale=False, proxy=None):
        super().__init__()
        self.cause = cause
        self.unsent = unsent
        self.stale = stale
        self.proxy = proxy


class _Overdue(TimeoutError):
    """The exchange took too long in all."""


class _TooLarge(ValueError):
    """The answer has more bytes than it may have."""


def _is_failure(error):
    """Whether an exception is an exchange's failure: neither the program's end nor a mistake in it."""
    import http.client

    # ssl.CertificateError is a ValueError on 3.6.
    return isinstance(error, (OSError, OverflowError, ValueError, http.client.HTTPException))


def _is_late(error):
    import socket

    return isinstance(error, (socket.timeout, TimeoutError))  # one and the same since 3.10


def _overdue_or(error, deadline):
    """The error, or _Overdue where it is that of the step for which only the rest of all the time was left."""
    return _Overdue() if _is_late(error) and _clock() >= deadline else error


def _reason(error):
    """What went wrong, in words, without a Python class or an [Errno ..] around it."""
    return getattr(error, "strerror", None) or str(getattr(error, "reason", "") or error) or type(error).__name__


def _quotable(error):
    """The exception as a __cause__, where its text is not made of what the server said."""
    import ssl

    return error if isinstance(error, (OSError, ssl.CertificateError)) else None  # the latter is no OSError on 3.6


def _network_error(failed, request):
    """The CloudStackException for what the standard library raised."""
    kind, what, why = _describe_failure(failed, request)
    if failed.proxy:
        why += f" (proxy {_join_port(failed.proxy.host, failed.proxy.port)})"
    made = kind(f"{what} {_shown(request.endpoint)}", why)
    made.unsent = failed.unsent
    made.errno = getattr(failed.cause, "errno", None)
    if isinstance(made, CloudStackConnectionError):
        made.stale = failed.stale
    return made


def _describe_failure(failed, request):
    """(exception class, what happened, why) of a _Failed."""
    import http.client
    import socket
    import ssl

    error = failed.cause
    lost, late = CloudStackConnectionError, CloudStackTimeoutError
    if _is_late(error):
        if isinstance(error, _Overdue):
            why = f"it was not whole after {request.total:g} s"
        elif failed.unsent:
            why = f"no answer within {request.timeout} s (timeout)"
        else:
            why = f"nothing for {request.timeout} s (timeout)"
        return late, "Cannot connect to" if failed.unsent else "No answer from", why
    if isinstance(error, (ssl.SSLError, ssl.CertificateError)):
        return lost, "TLS failure with", _tls_reason(error)
    if isinstance(error, socket.gaierror):
        return lost, "Cannot find", "name look-up: " + _reason(error)
    if failed.unsent:
        return lost, "Cannot connect to", _reason(error) if isinstance(error, OSError) else type(error).__name__
    if isinstance(error, _TooLarge):
        why = f"it has more than max_response_size, {request.limit} bytes"
        return CloudStackException, "Too large an answer from", why
    if isinstance(error, http.client.IncompleteRead):
        return lost, "Broken answer from", "it ends before its end"
    if isinstance(error, http.client.RemoteDisconnected):
        return lost, "Connection lost to", "closed without an answer"
    if isinstance(error, OSError):
        return lost, "Connection lost to", _reason(error)
    return lost, "Broken answer from", f"not HTTP ({type(error).__name__})"


def _tls_reason(error):
    text = str(getattr(error, "verify_message", None) or getattr(error, "reason", None) or error)
    hint = "; `verify` names the CA certificates to trust" if "certificate" in str(error).lower() else ""
    return (text.replace("_", " ").lower() if text.isupper() else text) + hint


# 5.5 A program's own session.


def _session_exchange(session, request):
    """The same exchange through an object with the interface of requests.Session. Its OSErrors, which all exceptions of
    requests are, are told as ours and not chained: they quote the address, signature and all. What else it raises is
    the program's own."""
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
        content = answer.content if isinstance(answer.content, bytes) else answer.text.encode("utf-8")
    except OSError as error:
        late = isinstance(error, TimeoutError) or "Timeout" in type(error).__name__
        kind = CloudStackTimeoutError if late else CloudStackConnectionError
        raise_as = kind("No answer from " + _shown(request.url), "the session raised " + type(error).__name__)
    else:
        return _Response(answer.status_code, _mask_reason(answer.reason, request), answer.headers, content)
    raise raise_as


# --- 6 clients ------------------------------------------------------------------------------------------------------


class CloudStack:
    """A client: any API command is a method, `cs.listZones(name="x")`, and returns plain JSON.

    Settings are described in SETTINGS and README; each may also be the string an ini file gives, each is an attribute
    that may be set at any time, and every call looks at them anew. Nothing is opened before the first call. One client
    may be used by many threads.

    Control arguments of a call, never sent:
      json=True             False: the answer's text as it is
      opcode_name="command" name of the parameter that holds the command
      fetch_list=False      True: every page of a list, as a list
      headers=None          more HTTP headers
      fetch_result=None     whether to wait for a job and return its result; None: as the client is set

    Raises ValueError, before anything is sent, for what cannot be sent; CloudStackException for the rest, see there.
    """

    def __init__(
        self, endpoint, key=None, secret=None, timeout=10, method="get", verify=None, cert=None, cert_key=None,
        name=None, retry=0, retry_backoff=0.5, job_timeout=None, poll_interval=2.0, expiration=600, trace=False,
        dangerous_no_tls_verify=False, headers=None, session=None, fetch_result=False, *,
        theme=None, output=None, username=None, password=None, domain=None, concurrency=128,
        max_response_size=256 * 1024 * 1024, recover=False
    ):  # fmt: skip
        given = dict(locals())
        self._own = _Own()
        for setting in SETTINGS:
            value = given[setting.name]
            self.set_setting(setting.name, setting.default if value is None else value)

    def __setattr__(self, name, value):
        """Settings are converted and checked wherever they are set; other attributes are the program's own."""
        setting = _ATTRIBUTES.get(name)
        if setting is not None:
            value = _converted(name, setting.convert, value)
        object.__setattr__(self, name, value)

    def get_setting(self, name):
        """Return the value of a setting, by its name in SETTINGS. Raises KeyError where there is none of that name."""
        return getattr(self._own if _SETTING[name].name in _NO_ATTRIBUTES else self, name)

    def set_setting(self, name, value):
        """Set one: the way for those settings that are no attributes, since subclasses use names such as `domain` and
        `username` for their own. Raises ValueError for what it cannot be, KeyError where there is none of that name."""
        if name in _NO_ATTRIBUTES:
            setattr(self._own, name, _converted(name, _SETTING[name].convert, value))
        else:
            setattr(self, _SETTING[name].name, value)

    def __getattr__(self, command):
        if command.startswith("_"):
            raise AttributeError(command)

        def call(**params):
            return self._request(command, **params)

        call.__name__ = call.__qualname__ = command
        return call

    def __repr__(self):
        return "<CloudStack: {}>".format(self.name or _shown(self.endpoint or ""))

    def __getstate__(self):
        # Connections, threads and what was learned stay behind; a copy makes its own.
        state = {name: value for name, value in self.__dict__.items() if name not in ("_connections", "_pool")}
        return dict(state, _own=self._own.copy())

    @property
    def verify(self):
        """True, or the path of the CA certificates; False only where dangerous_no_tls_verify is set and no path."""
        return self._ca or not self._own.dangerous_no_tls_verify

    @verify.setter
    def verify(self, value):
        self._ca = value

    @property
    def cert(self):
        """The client certificate's path, or a pair with its key's."""
        key = self._own.cert_key
        return (self._pem, key) if key and isinstance(self._pem, str) else self._pem

    @cert.setter
    def cert(self, value):
        self._pem = value

    @property
    def _server(self):
        """What was learned about the present endpoint, as the present user."""
        own = self._own
        place = (self.endpoint, self.key, own.username, os.getpid())  # locks and sessions are not for a fork's child
        return own.servers.get(place) or own.servers.setdefault(place, _Server())

    @property
    def _transport(self):
        own = self.__dict__.get("_connections")
        return own or self.__dict__.setdefault("_connections", _Transport(self._own.concurrency))

    def _request(
        self, command, json=True, opcode_name="command", fetch_list=False, headers=None, fetch_result=None, **params
    ):
        """Every command goes through here, which makes it the place for a subclass to step in; pages, polls and log-in
        are this client's own and do not."""
        return self._run(self._steps(command, json, opcode_name, fetch_list, headers, fetch_result, params))

    def _steps(self, command, json, opcode_name, fetch_list, headers, fetch_result, params):
        """The protocol generator of a command."""
        call = _Call(command, flatten(params), json, opcode_name, headers)
        wait = self.fetch_result if fetch_result is None else _converted("fetch_result", _flag, fetch_result)
        every = fetch_list if fetch_list is _LAZY else _converted("fetch_list", _flag, fetch_list)
        return _command(self, call, every, wait)

    def iter_list(self, command, **params):
        """The rows of a list command one by one, page after page, with a page or two in memory; what is no list is
        one row. Takes what the command itself takes."""
        walk = self._request(command, fetch_list=_LAZY, **params)
        while True:
            rows = self._run(walk.next_page())
            if rows is None:
                break
            yield from rows
        if not walk.is_list():
            yield walk.first

    def wait_job(self, jobid):
        """The result of a job submitted earlier, waited for as fetch_result does."""
        return self._run(_resume(self, jobid))

    def close(self):
        """End the session, if one was logged in to, and close the connections. The client may be used again."""
        CloudStack._run(self, _log_out(self))
        self._own.servers = {}
        own = self.__dict__.pop("_connections", None)
        if own is not None:
            own.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _exchange(self, request):
        """One request, one answer, wherever it is sent from; both clients and every thread come through here."""
        trace = self.trace
        if trace:
            _trace_request(request)
        begun = _clock()
        try:
            if self.session is not None:
                response = _session_exchange(self.session, request)
            else:
                response = self._transport.exchange(request)
        except CloudStackException as error:
            if trace:
                _to_stderr("{} ({:.0f} ms)\n".format(error, (_clock() - begun) * 1000))
            raise
        if trace:
            _trace_response(request, response, _clock() - begun)
        return response

    def _run(self, steps):
        """Drive a protocol generator to its end: do what it yields, send in what came of it, throw what was raised."""
        result = error = None
        try:
            while True:
                try:
                    step = steps.send(result) if error is None else steps.throw(error)
                except StopIteration as end:
                    return end.value
                result = error = None
                try:
                    if isinstance(step, _Request):
                        result = self._exchange(step)
                    elif isinstance(step, list):
                        result = _in_threads(self._outcome, step)
                    elif isinstance(step, _Pause):
                        _wait(step)
                    else:
                        _sleep(step)
                except BaseException as raised:
                    error = raised
        finally:
            error = None  # an exception that knows this frame, and this frame it, would keep both alive
            steps.close()

    def _outcome(self, steps):
        try:
            return self._run(steps)
        except Exception as error:
            return error


class _Own:
    """What a client keeps beside its attributes: the settings that are none, and what it has learned."""

    cert_key: "str | None"
    dangerous_no_tls_verify: bool
    username: "str | None"
    password: "str | None"
    domain: "str | None"
    concurrency: int
    max_response_size: int
    recover: bool

    def __init__(self):
        self.servers = {}
        self.checked = None  # the settings that were last found to make sense together
        self.progress = None  # the command line's: ("rows", seen, total), ("job", command, seconds)

    def copy(self):
        """Return one with the same settings that has learned nothing yet."""
        fresh = _Own()
        for name in _NO_ATTRIBUTES:
            setattr(fresh, name, getattr(self, name))
        return fresh


def _wait(pause):
    """Sleep in this thread until the pause is over or its signal was set."""
    woken = threading.Event()
    pause.signal.add(woken.set)
    try:
        if pause.signal.count == pause.count:
            woken.wait(pause.seconds)
    finally:
        pause.signal.discard(woken.set)


def _in_threads(function, items):
    """Return [function(item) for item in items], done at once as far as there are threads for it. What gets none (a
    limit of the system, the interpreter's exit) the caller does itself, one after another."""
    results = [None] * len(items)

    def work(index):
        results[index] = function(items[index])

    threads = []  # type: list
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
    """The threads of one AIOCloudStack, started as they are needed and ended when their client is. They are daemons, so
    that the interpreter's exit waits for none of them. Work that gets no new thread waits for one of those there are;
    where there is none, who brings it does it: what is refused could not be told from what runs all the same."""

    _jobs = _idle = ()  # type: ignore[var-annotated]  # for __del__, should an interrupt come before they are made

    def __init__(self, most):
        self.most = most
        self.threads = []  # type: list
        self.pid = os.getpid()  # threads do not survive a fork
        self._starting = threading.Lock()
        self._jobs = collections.deque()
        self._idle = []  # the locks that workers without work wait for, the last one first

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
        """Whether there is a worker to do what there is; starts one, if there may be more."""
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
        if self._jobs != ():
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
    try:
        idle.pop().release()
    except IndexError:
        return False
    return True


class AIOCloudStack(CloudStack):
    """The same client for asyncio: commands are coroutines, iter_list an asynchronous iterator, and jobs are waited
    for unless fetch_result=False. Exchanges run in at most `concurrency` threads of its own; waiting holds none. It is
    tied to no event loop. `async with` or `await aclose()` end a session and close connections; leaving them out is
    no harm."""

    def __init__(
        self, endpoint, key=None, secret=None, timeout=10, method="get", verify=None, cert=None, cert_key=None,
        name=None, retry=0, retry_backoff=0.5, job_timeout=None, poll_interval=2.0, expiration=600, trace=False,
        dangerous_no_tls_verify=False, headers=None, session=None, fetch_result=True,
        **options
    ):  # fmt: skip
        given = {name: value for name, value in locals().items() if name not in ("self", "options", "__class__")}
        given["fetch_result"] = True if fetch_result is None else fetch_result
        super().__init__(**given, **options)

    async def _request(
        self, command, json=True, opcode_name="command", fetch_list=False, headers=None, fetch_result=None, **params
    ):
        steps = self._steps(command, json, opcode_name, fetch_list, headers, fetch_result, params)
        return await self._run(steps)

    _request.__doc__ = CloudStack._request.__doc__

    async def wait_job(self, jobid):
        return await self._run(_resume(self, jobid))

    wait_job.__doc__ = CloudStack.wait_job.__doc__

    async def _run(self, steps):
        """As CloudStack._run, on an event loop."""
        import asyncio

        result = error = None
        try:
            while True:
                try:
                    step = steps.send(result) if error is None else steps.throw(error)
                except StopIteration as end:
                    return end.value
                result = error = None
                try:
                    if isinstance(step, _Request):
                        result = await self._in_worker(step)
                    elif isinstance(step, list):
                        result = await asyncio.gather(*map(self._outcome, step))
                    elif isinstance(step, _Pause):
                        await _wait_async(step)
                    else:
                        await asyncio.sleep(step)
                except BaseException as raised:
                    error = raised
        finally:
            error = None
            steps.close()

    async def _outcome(self, steps):
        try:
            return await self._run(steps)
        except Exception as error:
            return error

    async def _in_worker(self, request):
        """As asyncio.to_thread has it, but with this client's own threads; the default ones are too few."""
        import asyncio

        loop = asyncio.get_event_loop()
        outcome = loop.create_future()
        self._workers().do(_with_context(_report_outcome, self._exchange, request, loop, outcome))
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

    def _workers(self):
        workers = self.__dict__.get("_pool")
        if workers is None or workers.pid != os.getpid():
            workers = self.__dict__["_pool"] = _Workers(self._own.concurrency)
        return workers

    async def iter_list(self, command, **params):
        walk = await self._request(command, fetch_list=_LAZY, **params)
        while True:
            rows = await self._run(walk.next_page())
            if rows is None:
                break
            for row in rows:
                yield row
        if not walk.is_list():
            yield walk.first

    iter_list.__doc__ = CloudStack.iter_list.__doc__

    def close(self):
        super().close()
        workers = self.__dict__.pop("_pool", None)
        if workers is not None:
            workers.close()

    async def aclose(self):
        """close(), without holding up the event loop."""
        await self._run(_log_out(self))
        self.close()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        await self.aclose()


async def _wait_async(pause):
    """Sleep on this event loop until the pause is over or its signal was set, in whatever thread."""
    import asyncio

    loop = asyncio.get_event_loop()
    woken = loop.create_future()

    def wake():
        try:
            loop.call_soon_threadsafe(_set_result, woken, None)
        except RuntimeError:  # the loop was closed while this waited
            pass

    pause.signal.add(wake)
    timer = loop.call_later(pause.seconds, _set_result, woken, None)
    try:
        if pause.signal.count == pause.count:
            await woken
    finally:
        timer.cancel()
        pause.signal.discard(wake)


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
    if not future.done():
        future.set_result(result)


def _with_context(function, *args):
    """The call, in a copy of the caller's context variables, as asyncio.to_thread has it (3.6 has none)."""
    import functools

    try:
        from contextvars import copy_context
    except ImportError:
        return functools.partial(function, *args)
    return functools.partial(copy_context().run, function, *args)


# --- 7 configuration ------------------------------------------------------------------------------------------------

_PREFIX = "CLOUDSTACK_"
_DEFAULT_REGION = "cloudstack"
_INI_KEYS = [setting.name for setting in SETTINGS if setting.where == "both"] + ["theme", "output"]
# Where the request goes, as whom, and whom it trusts: never mixed from two files, else a file that holds nothing but
# an endpoint, left in a working directory, would be sent another file's key.
_TOGETHER = frozenset(
    "endpoint key secret username password domain verify cert cert_key dangerous_no_tls_verify headers".split()
)
_ALWAYS = (
    "timeout method retry verify cert cert_key name trace expiration poll_interval dangerous_no_tls_verify".split()
)


class _Found:
    """What the ini files say about one region: values {key: text}, and origins {key: path}."""

    def __init__(self):
        self.values = {}
        self.origins = {}
        self.tried = []
        self.read = []
        self.has_section = False

    def add(self, path, items):
        self.has_section = True
        for key, value in items:
            if key in _SETTING and "\n" in value:  # it may hold a secret that was meant for the next line
                reason = "the value goes on in the next, indented line; each setting stands on a line of its own"
                raise ValueError("{!a}: {}: {}".format(path, key, reason))
            if value and (key in _INI_KEYS or key[: len("header_")] == "header_" != key):
                self.values[key] = value
                self.origins[key] = path

    def forget(self, keys):
        for key in keys:
            self.values.pop(key, None)

    def check_origins(self):
        """Raises ValueError where values that belong together come from two files."""
        first = {}  # type: dict
        for key in sorted(self.values):
            if _group(key) in _TOGETHER:
                first.setdefault(os.path.realpath(self.origins[key]), (key, self.origins[key]))
        if len(first) > 1:
            (key, path), (other, elsewhere) = list(first.values())[:2]
            raise ValueError(
                "the files {!a} ({}) and {!a} ({}) cannot be combined: endpoint, credentials, certificates and headers "
                "must all come from one of them".format(path, key, elsewhere, other)
            )


def _group(key):
    return "headers" if key.startswith("header_") else key


def _ini_paths(config=None):
    """(the files to read, in order; the one among them that was named, or None)"""
    paths = [os.path.expanduser("~/.cloudstack.ini")]
    try:
        paths.append(os.path.abspath("cloudstack.ini"))
    except OSError:  # the working directory is gone
        pass
    named = config or os.environ.get(_PREFIX + "CONFIG")
    named = os.path.expanduser(named) if named else None
    return paths + [named] * bool(named), named


def _read_text(path, newline=None):
    """The text of a file, its line ends as they are where newline is "". Raises ValueError that says what is wrong
    with it; FileNotFoundError where there is none."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except UnicodeDecodeError:
        raise ValueError("cannot read {!a}: it is not UTF-8 text".format(path)) from None
    except (OSError, ValueError) as error:
        raise ValueError("cannot read {!a}: {}".format(path, _reason(error))) from None


def _parse_ini(path, text):
    """A parser of the file as it stands, `%` and all. configparser's errors quote lines of the file, which may be
    secrets: the ValueError tells line numbers only."""
    import configparser

    parser = configparser.RawConfigParser()
    try:
        parser.read_string(text, source=path)
    except configparser.MissingSectionHeaderError as error:
        reason = "line {} stands before any [section]".format(error.lineno)
    except (configparser.DuplicateOptionError, configparser.DuplicateSectionError) as error:
        reason = "line {} repeats {!a}".format(error.lineno, getattr(error, "option", None) or error.section)
    except configparser.ParsingError as error:
        reason = "line {} is no 'name = value'".format(error.errors[0][0] if error.errors else "?")
    except configparser.Error as error:
        reason = type(error).__name__
    else:
        return parser
    raise ValueError("{!a} is no ini file: {}".format(path, reason))


def _section_items(path, raw, region):
    """The (key, text) pairs of a section. `%%` and `%(name)s` mean what they always mean in ini files, any other `%`
    stands for itself. Raises ValueError for a `%(name)s` that leads nowhere."""
    import configparser

    def doubled(found):
        return found.group() if len(found.group()) > 1 else "%%"

    parser = configparser.ConfigParser()
    values = {key: re.sub(r"%%|%\([^)]+\)s|%", doubled, value) for key, value in raw.items(region)}
    parser.read_dict({"section": values})
    for key in values:
        try:
            yield key, parser.get("section", key)
        except configparser.InterpolationError:
            reason = "in [{}], {!a} refers to a name that is not there".format(region, key)
            raise ValueError("{!a}: {}".format(path, reason)) from None


def _from_files(region, config=None):
    """What ~/.cloudstack.ini, ./cloudstack.ini and $CLOUDSTACK_CONFIG say about a region; later files win."""
    found = _Found()
    found.tried, named = _ini_paths(config)
    for path in found.tried:
        try:
            parser = _parse_ini(path, _read_text(path))
        except FileNotFoundError:
            continue
        found.read.append(path)
        if parser.has_section(region):
            found.add(path, _section_items(path, parser, region))
    if named and named not in found.read:
        raise SystemExit("Config file not found. Tried " + named)
    return found


def _from_environment():
    values = {key: os.environ.get(_PREFIX + key.upper()) for key in _INI_KEYS}
    for name, value in os.environ.items():
        if name.upper().startswith(_PREFIX + "HEADER_"):
            values["header_" + name[len(_PREFIX + "HEADER_") :].lower().replace("_", "-")] = value
    return {key: value for key, value in values.items() if value}


def _as_settings(values):
    """{key: text} as the constructor takes it: headers gathered, and the two booleans parsed where they can be."""
    settings = {key: value for key, value in values.items() if not key.startswith("header_")}
    headers = {key[len("header_") :]: value for key, value in values.items() if key.startswith("header_")}
    if headers:
        settings["headers"] = headers
    for key in ("trace", "dangerous_no_tls_verify"):
        try:
            settings[key] = strtobool(settings[key])
        except (KeyError, AttributeError, ValueError):
            pass
    return settings


def _load_config(ini_group=None, flags=None, config=None):
    """(settings, what the files said). See read_config; flags {key: text} beat everything, config stands for
    CLOUDSTACK_CONFIG."""
    flags = flags or {}
    region = ini_group or os.environ.get(_PREFIX + "REGION") or _DEFAULT_REGION
    if ini_group == _DEFAULT_REGION:  # asks for nothing: Ansible's modules up to 2.9 always pass it, whatever there is
        ini_group = None
    overrides = [word.strip().lower() for word in os.environ.get(_PREFIX + "OVERRIDES", "").split(",") if word.strip()]
    env = _from_environment()
    env_first = "endpoint" in env and not ini_group and not overrides
    unsigned = os.environ.get(_PREFIX + "KEY") == "" and (env_first or "key" in overrides)
    complete = ("key" in env and "secret" in env) or ("username" in env and "password" in env)
    if env_first and (unsigned or complete) and not config:
        found = _Found()
    else:
        found = _from_files(region, config)
        _check_region(found, ini_group, "endpoint" in env or "endpoint" in flags)
    winners = dict(env) if env_first else {key: env[key] for key in env if key in overrides or _group(key) in overrides}
    winners.update(flags)
    if unsigned:
        env.pop("secret", None)
    found.forget(list(winners) + _rivals(winners, unsigned))
    found.check_origins()
    for key in _rivals(found.values):
        env.pop(key, None)
    values = dict(env, **found.values)
    values.update(flags)
    if not values.get("endpoint"):
        where = "" if found.has_section else " (there is no section [{}] in {})".format(region, ", ".join(found.read))
        raise ValueError("the configuration is missing the following keys: endpoint" + where)
    settings = {key: _SETTING[key].default for key in _ALWAYS}
    settings["trace"] = None
    settings["name"] = region if found.has_section else None
    settings.update(_as_settings(values))
    return settings, found


def _rivals(winners, unsigned=False):
    """The credentials that do not go with those that won: there is a key, or there is a user name."""
    if unsigned:
        return ["key", "secret"]
    if "key" in winners:
        return ["username", "password", "domain"]
    return ["key", "secret"] if "username" in winners else []


def _check_region(found, ini_group, has_endpoint):
    if not found.read and not has_endpoint:
        raise SystemExit("Config file not found. Tried {}".format(", ".join(found.tried)))
    if ini_group and not found.has_section:
        import configparser

        raise configparser.NoSectionError(ini_group)


def read_config(ini_group=None):
    """The settings for `CloudStack(**read_config())`, from the environment and ini files; ini_group is the region.

    With CLOUDSTACK_ENDPOINT set, no ini_group and no CLOUDSTACK_OVERRIDES, the environment wins and files fill what it
    leaves open; with key and secret there too, no file is read. Otherwise the files win, but for the keys that
    CLOUDSTACK_OVERRIDES names. Raises SystemExit where there is no configuration at all, ValueError where it cannot be
    used, configparser.NoSectionError where ini_group is in no file."""
    return _load_config(ini_group)[0]


def read_config_from_ini(ini_group=None):
    """What the section of a region holds in the ini files, plus `name` and `headers`; {"name": None} without it."""
    region = ini_group or os.environ.get(_PREFIX + "REGION") or _DEFAULT_REGION
    found = _from_files(region)
    found.check_origins()
    return dict(_as_settings(found.values), name=region if found.has_section else None)


# --- 9 command line -------------------------------------------------------------------------------
# 9.1 options, 9.2 run and report, 9.3 formats, 9.4 the list of commands, 9.5 completion,
# 9.6 configure. A line of words becomes a checked call (_checked_call), the call is made
# (_make_call), its answer is printed (_print_answer); _Invocation holds what they share, and may
# serve one line after another with the same client.

# 9.1 options ......................................................................................

FORMATS = ("json", "jsonl", "table", "csv", "text")

# value: None for a flag, the only values there are, or the name under which help shows the value.
_Option = collections.namedtuple("_Option", "name letter value")
_OPTIONS = (
    _Option("output", "o", FORMATS), _Option("columns", "c", "id,name,nic.0.ipaddress"),
    _Option("sort", "", "[-]COLUMN"), _Option("all", "", None),
    _Option("region", "r", "NAME"), _Option("config", "", "FILE"), _Option("endpoint", "", "URL"),
    _Option("async", "", None), _Option("wait", "", "JOBID"),
    _Option("timeout", "", "SECONDS"), _Option("retry", "", "COUNT"), _Option("post", "", None),
    _Option("dry-run", "", None), _Option("force", "", None),
    _Option("quiet", "q", None), _Option("trace", "t", None),
    _Option("color", "", ("auto", "always", "never")), _Option("theme", "", "STYLE"),
    _Option("list", "", None), _Option("sync", "", None), _Option("configure", "", None),
    _Option("completion", "", ("bash", "zsh", "fish")), _Option("version", "", None),
    _Option("help", "h", None),
    _Option("complete", "", "LINE"),  # for the scripts of completion; help does not show it
)  # fmt: skip
_FLAGS = {"--" + option.name: option for option in _OPTIONS}
_FLAGS.update(("-" + option.letter, option) for option in _OPTIONS if option.letter)
# An empty value of any other is an unset variable of a script: it must not mean the usual region.
_MAY_BE_EMPTY = frozenset(["columns", "sort", "theme", "complete"])

_HELP = """\
cs [options] COMMAND [name=value ...]  call the CloudStack API, print its answer

  cs listVirtualMachines state=Running  any API command; name=@file reads a file
  cs COMMAND --help                     what a command takes and returns
  cs --list [words]                     the commands that match
  cs --configure                        ask for endpoint, key, secret; save them

 -o, --output json|jsonl|table|csv|text  -c, --columns id,name,nic.0.ipaddress
     --sort [-]COLUMN                        --all      every page of a list
 -r, --region NAME   section of ini file     --config FILE    --endpoint URL
     --async         do not wait for jobs    --wait JOBID  go on waiting for one
     --timeout SECONDS    --retry COUNT      --post     send by POST
     --dry-run       show, do not send       --force    send what looks wrong
 -q, --quiet         only usage errors   -t, --trace    show each exchange
     --color auto|always|never               --theme STYLE  of Pygments
     --sync          fetch the list of commands for help, checks, completion
     --completion bash|zsh|fish              --version  -h, --help

exit: 0 done  1 error answer  2 usage  3 no answer  4 job still runs  130 Ctrl-C
More: README.rst; the API: https://cloudstack.apache.org/api.html
"""


class _Usage(Exception):
    """The command line cannot be carried out as it was typed."""


def _parse_arguments(args):
    """Take arguments apart into {option: value} and the words that are no options, in any order.

    By hand: argparse completes names, so that tomorrow's options would change the meaning of
    today's abbreviations; before Python 3.8 it cannot do without and still understand -qt."""
    options = dict.fromkeys(option.name for option in _OPTIONS)
    words = []
    waiting = collections.deque(args)
    while waiting:
        arg = waiting.popleft()
        if not arg.startswith("-"):
            words.append(arg)
        elif arg != "--":
            options.update(_read_option(arg, waiting))
    return options, words


def _read_option(arg, waiting):
    """Yield the (name, value) pairs in an argument: `--name`, `--name=value`, or letters as in
    `-qo csv`. A value that does not stand in it is taken from the arguments that are waiting."""
    if arg.startswith("--"):
        flag, equals, value = arg.partition("=")
        option = _find_option(flag)
        if option.value is None and equals:
            raise _Usage(f"option {flag} takes no value: {value!a}; see cs --help")
        yield option.name, option.value is None or _value_of(option, value, equals, waiting)
        return

    letters = arg[1:] or "-"
    while letters:
        option, letters = _find_option("-" + letters[0]), letters[1:]
        if option.value is None:
            yield option.name, True
        else:
            value = letters[1:] if letters.startswith("=") else letters
            yield option.name, _value_of(option, value, letters, waiting)
            return


def _find_option(flag):
    if flag not in _FLAGS:
        raise _Usage(f"there is no option {flag!a}; see cs --help")
    return _FLAGS[flag]


def _value_of(option, value, is_given, waiting):
    """Return the value of an option. Raises _Usage where there is none, or one that cannot be."""
    if not is_given and waiting and (option.name == "sort" or not re.match(r"-\D", waiting[0])):
        value, is_given = waiting.popleft(), True
    if not is_given or not (value or option.name in _MAY_BE_EMPTY):
        raise _Usage(f"--{option.name} needs a value; see cs --help")
    if isinstance(option.value, str):
        return value
    if value.lower() not in option.value:
        raise _Usage(f"--{option.name}: {value!a} is none of {', '.join(option.value)}")
    return value.lower()


def _parse_parameters(words):
    """Make keyword arguments of name=value words; values of a repeated name are joined by commas,
    in the order given."""
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


def _parse_value(name, value):
    """Take the quotes off a value; read @file and @-, and take @@ for one @."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
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
    return re.sub(r"\r?\n\Z", "", text)


def _read_stdin():
    if sys.stdin is None:
        raise ValueError("there is no standard input")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("standard input is not UTF-8 text") from None


# 9.2 run and report ...............................................................................


def main(args=None):
    """Run the command line. Returns the exit code: 0 done; 1 an answer that is an error, or a
    failed job; 2 usage or configuration; 3 no answer; 4 job still running at job_timeout; 130
    interrupted."""
    if sys.stdout is None:  # closed by the process that started this one
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    invocation = _Invocation()
    try:
        try:
            outcome = _dispatch(invocation, sys.argv[1:] if args is None else args)
        except (CloudStackException, _Usage, ValueError, OSError, KeyboardInterrupt) as error:
            outcome = error
            _report(invocation, error)
        finally:
            invocation.progress.clear()
        _flush()
    except _OutputFailed as failed:
        outcome = failed
        _report_unwritten(failed.args[0])
    return _exit_code(outcome)


def _exit_code(outcome):
    """Return the exit code for what was raised, or for whether everything succeeded."""
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
    """Do what the arguments ask for. Returns whether it succeeded."""
    invocation.options, words = _parse_arguments(map(_as_utf8, args))
    options = invocation.options
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
    if options["wait"] and words:
        raise _Usage("--wait stands alone: it waits for a job that is already running")
    if not (words or options["wait"] or options["list"] or options["sync"]):
        raise _Usage("no command given; see cs --help")
    if words and not options["list"] and not re.match(r"[\w.-]+\Z", words[0], re.ASCII):
        usage = "cs [options] COMMAND [name=value ...]"
        raise _Usage(f"{words[0]!a} stands where the command should be: {usage}")

    invocation.connect()
    invocation.format()  # a wrong one is refused before anything is sent
    with invocation.client:
        if options["list"]:
            return _list_commands(invocation, words)
        if options["help"]:
            return _describe_command(invocation, words[0])
        if options["sync"] and not options["dry-run"]:
            _fetch_catalog(invocation)
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
    """What one use of the command line has: options, settings, client, progress. Messages go
    through say(), so that -q has one place."""

    def __init__(self, options=None):
        self.options = _parse_arguments([])[0] if options is None else options
        self.settings = {}
        self.client = None
        self.progress = _Progress()
        self.under_way = None  # the _CheckedCall that is under way

    def say(self, text):
        if not self.options["quiet"]:
            self.progress.clear()
            _to_stderr(text)

    def connect(self):
        """Make the client that configuration and options describe. Raises _Usage, ValueError."""
        options = self.options
        flags = {name: options[name] for name in ("endpoint", "timeout", "retry") if options[name]}
        self.settings, found = self._load_settings(flags)
        self._warn_of_readable_files(found)
        self._warn_of_unknown_keys(found)

        self.settings.setdefault("recover", True)
        if options["post"]:
            self.settings["method"] = "post"
        if options["trace"]:
            self.settings["trace"] = True
        self.client = CloudStack(**self.settings)
        _check_client(self.client)
        if not options["quiet"] and not self.client.trace and _is_terminal(sys.stderr):
            self.client._own.progress = self.progress

    def _load_settings(self, flags):
        import configparser

        region, config = self.options["region"], self.options["config"]
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
        secrets = [key for key in ("secret", "password") if key in found.values]
        for path in sorted({found.origins[key] for key in secrets}):
            if os.name == "posix" and os.stat(path).st_mode & 0o044:
                hint = f"can be read by others; chmod 600 {path}"
                self.say(f"Warning: {path} holds a secret and {hint}")

    def _warn_of_unknown_keys(self, found):
        unknown = getattr(found, "unknown", ())
        if unknown and not self.options["quiet"]:
            names = [setting.name for setting in SETTINGS if setting.where == "both"]
            described = []
            for key, path in unknown:
                near = _near(key, names + ["output", "theme"], most=1)
                described.append(f"{key!a} in {path}" + (f" ({near[0]}?)" if near else ""))
            self.say("Warning: not known as settings: " + ", ".join(described))

    def format(self):
        """Return the output format: option, environment or ini file, json. Raises ValueError."""
        name = str(self.options["output"] or self.settings.get("output") or "json").lower()
        if name not in FORMATS:
            raise ValueError(f"output: {name!a} is none of {', '.join(FORMATS)}")
        return name

    def is_colored(self):
        wish = self.options["color"] or "auto"
        if wish != "auto":
            return wish == "always"
        return _is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")


def _is_terminal(stream):
    """Return whether a stream is a terminal that can more than print."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


class _Progress:
    """One line on standard error that is rewritten while pages or a job are waited for, and gone
    afterwards. The time is shown by a thread, so that it moves while the server is silent."""

    def __init__(self):
        self._lock = threading.Lock()  # what is cleared must not be written again by the thread
        self._shown_at = None
        self._ended = None  # set when the wait for a job is over
        self.job = None  # what is waited for, where the command is not known

    def __call__(self, kind, what, more):
        if kind == "rows":
            now = _clock()
            if self._shown_at is None or now - self._shown_at >= 0.1:
                self._show(f"{what} of {more} rows" if more else f"{what} rows", now)
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
        while not ended.wait(1.0 - (_clock() - started) % 1.0):
            self._show_time(ended, what, started)

    def _show_time(self, ended, what, started):
        with self._lock:
            if not ended.is_set():
                now = _clock()
                self._show(f"{what}: waiting for the job, {int(now - started)} s", now)

    def _show(self, text, now):
        self._shown_at = now
        try:
            sys.stderr.write("\r\x1b[K" + text)
            sys.stderr.flush()
        except (OSError, ValueError):
            pass

    def clear(self):
        with self._lock:
            if self._ended is not None:
                self._ended.set()
            self._ended = self.job = None
            if self._shown_at is not None:
                self._show("", None)


# words: the command and its parameters as they were typed.
_CheckedCall = collections.namedtuple("_CheckedCall", "command params words")


def _checked_call(invocation, words):
    """Turn words into a call that may be made. Raises _Usage for what is wrong with them, by
    themselves or by the list of commands."""
    options = invocation.options
    params = _parse_parameters(words[1:])
    command = _check_against_catalog(invocation, words[0], params)
    if options["all"]:
        params["fetch_list"] = True
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
    said = answer if isinstance(answer, dict) else {}  # a 200 may tell of a failure all the same
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
    unseen = set(columns or ())
    sample: list = []
    flushed_at = 0.0
    for row in invocation.client.iter_list(call.command, **params):
        invocation.progress.clear()
        unseen = {name for name in unseen if _pick(row, name) is None}
        if unseen and len(sample) < 100:
            sample.append(row)
        shown = {name: _pick(row, name) for name in columns} if columns else row
        _write(_json_text(shown, None) + "\n")
        if _clock() - flushed_at > 0.1:
            _flush()
            flushed_at = _clock()
    _warn_of_columns(invocation, sample, sorted(unseen))


def _warn_of_missing_rows(invocation, answer, params):
    rows = _rows(answer) or []
    total = answer.get("count") if rows else None
    if params.get("fetch_list") or {name.lower() for name in params} & {"page", "pagesize"}:
        return
    if isinstance(total, int) and total > len(rows):
        invocation.say(f"{len(rows)} of {total} shown; --all for the rest")


def _show_plan(invocation, call):
    """Print what would be sent (--dry-run); nothing is."""
    params = dict(call.params)
    control = {name: params.pop(name) for name in ("json", "opcode_name") if name in params}
    for name in ("fetch_list", "fetch_result"):
        params.pop(name, None)
    planned = _Call(call.command, flatten(params), **control)
    planned.complete_page(PAGE_SIZE)
    request = _build(invocation.client, planned)

    lines = [f"{request.method} {_shown(invocation.client.endpoint, True)}"]
    lines += [f"{name}={text}" for name, text in sorted(request.shown_params().items())]
    _write("".join(_printable(line) + "\n" for line in lines))


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
    invocation.progress.clear()
    if isinstance(error, KeyboardInterrupt):
        if getattr(error, "jobid", None):
            _to_stderr("Interrupted. " + _how_to_go_on(invocation, error))
    elif isinstance(error, CloudStackException):
        _report_failure(invocation, error)
    else:
        text = _reason(error) if isinstance(error, OSError) else str(error)
        _to_stderr(text if text.startswith("Error: ") else "cs: " + text)


def _report_failure(invocation, error):
    """Say what failed: the message, what was asked, codes, a hint; then the server's own words."""
    lines = ["CloudStack error: " + _sentence(error)]
    asked = _asked(invocation, error)
    if asked:
        lines += ["  Asked: " + asked, "  Server: " + _shown(invocation.client.endpoint)]
    document = _server_error(error) or {}
    codes = [name for name in ("errorcode", "cserrorcode") if name in document]
    if codes:
        lines.append("  Codes: " + ", ".join(f"{name} {document[name]}" for name in codes))
    hint = _hint(invocation, error)
    if hint:
        lines.append("  Try: " + hint)
    invocation.say("\n".join(lines))

    if error.jobid and not isinstance(error, CloudStackApiException):
        _to_stderr(_how_to_go_on(invocation, error))  # also with -q: nothing else shows the id
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
    document = _server_error(error)
    if document is not None and _is_failed_login(error):
        return "Check user name, password and domain of this region."
    code = document.get("errorcode") if document else None
    if code == 432 and invocation.under_way is None:
        return "Your role may not list the commands; all else works without that."
    if isinstance(code, int):
        command = invocation.under_way.command if invocation.under_way else ""
        return _HINTS.get(code, "").format(command=command)
    if document is None and _status(error) in (200, 404, 405):
        return _NO_API
    if error.outcome_unknown:
        return "Look whether it was done before you send it again."
    if error.unsent:
        return "Check the endpoint and the way there: the name, the network, proxies, --timeout."
    return ""


def _is_failed_login(error):
    """Return whether it is the log-in of a session that the server refused."""
    try:
        return "loginresponse" in error.response.json()
    except (AttributeError, TypeError, ValueError, RecursionError):
        return False


def _asked(invocation, error):
    """Return the call that failed as it can be typed again, secrets replaced; "" where it is none
    that was typed."""
    call = invocation.under_way
    if _is_failed_login(error) and (call is None or call.command != "login"):
        user, domain = map(invocation.client.get_setting, ("username", "domain"))
        return _one_line(f"login username={user} domain={domain or '/'}")
    if call is None:
        return ""
    if invocation.options["wait"]:
        return _shell_line(invocation, ["--wait", invocation.options["wait"]])

    hidden = {name for name, text in _shown_params(call.params).items() if text == MASK}
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
            line += ["--" + name, _shown(value) if name == "endpoint" else value]
    return " ".join(_cut(_shell_word(word), 500) for word in line + words)


def _shell_word(word):
    """Quote a word for a shell; what a terminal must not see as bash, zsh and ksh write it."""
    import shlex

    if "\n" not in word and "\t" not in word and not _UNPRINTABLE.search(word):
        return shlex.quote(word)
    text = re.sub(r"[\\']", r"\\\g<0>", word).replace("\n", r"\n").replace("\t", r"\t")
    return "$'" + _UNPRINTABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", text) + "'"


def _how_to_go_on(invocation, error):
    line = _shell_line(invocation, ["--wait", error.jobid])
    return f"Job {error.jobid} may still be running; to go on waiting for it: {line}"


def _print_error_answer(invocation, error):
    """Print CloudStack's own JSON on standard output, but on a terminal, where its text was shown
    already; anything else masked on standard error, the beginning of it."""
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
    client = invocation.client
    secrets = [client.key, client.secret, client.get_setting("password")]
    text = _masked_text(text[:10000], secrets)  # more than is shown, lest one is cut in two

    def mask(found):
        name, equals, value = found.groups()
        return name + equals + _shown_params({name: value})[name]

    for equals, end in (("=", "&"), ("%3D", "%26")):  # as it is, and within another address
        pattern = rf"([\w.\[\]-]{{1,60}})({equals})((?:(?!{end})[^&\s\"'<>;\\])+)"
        text = re.sub(pattern, mask, text, flags=re.IGNORECASE)
    return text[:2000]


def _report_unwritten(error):
    """Say that standard output could not be written, but for a reader that has seen enough (head, a
    pager). What is still in its buffer goes nowhere: else the interpreter complains at its end."""
    out = sys.__stdout__
    try:
        if out is not None and out is sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    except (AttributeError, OSError, ValueError):
        pass
    if not isinstance(error, BrokenPipeError):
        _to_stderr(f"cs: cannot write the answer: {_reason(error)}")


# 9.3 formats ......................................................................................

# The columns of a table, as far as there are such; others come after them.
_PREFERRED = (
    "id jobid name state status allocationstate jobstatus type zonename account username"
    " nic.ipaddress ipaddress cidr hostname cpunumber memory size templatename serviceofferingname"
    " virtualmachinename vmname key value resourcetypename resourcetype max cmd level success"
    " displayname displaytext description created".split()
)
_MOST_COLUMNS = 8
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
            out.write(text.encode(out.encoding, "backslashreplace").decode(out.encoding))
    except OSError as error:
        raise _OutputFailed(error) from None


def _write_line(text):
    """Write a line whose characters are data: as they are, but escaped on a terminal."""
    _write((_printable(text) if sys.stdout.isatty() else text) + "\n")


def _flush():
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _OutputFailed(error) from None


def _json_text(document, indent=2):
    """Return JSON as it is printed: what a terminal must not see, and what standard output cannot
    show, as \\uXXXX."""
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
    rows = _rows_of(answer)
    wanted = _sorted(invocation, rows)
    columns = _chosen_columns(invocation)
    _warn_of_columns(invocation, rows, columns)

    shape = invocation.format()
    if shape == "json":
        is_changed = columns is not None or invocation.options["sort"]
        shown = _with_rows(answer, _only(wanted, columns)) if is_changed else answer
        _print_json(invocation, shown)
    elif shape == "jsonl":
        _write("".join(_json_text(row, None) + "\n" for row in _only(wanted, columns)))
    elif shape == "csv":
        _print_csv(wanted, columns)
    elif shape == "text":
        _print_text(wanted, columns or _default_columns(wanted))
    elif rows:
        _print_table(invocation, wanted, columns)


def _rows_of(answer):
    """Return what a table shows of an answer: the rows of a list, else the one object in it (the
    result of a job), else itself."""
    if isinstance(answer, list):
        return answer
    if not isinstance(answer, dict):
        return [answer]
    rows = _rows(answer)
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
    if _rows(answer) is not None and keys:
        return dict(answer, **{keys[0]: rows})
    if not rows:
        return answer
    if len(answer) == 1 and isinstance(list(answer.values())[0], dict):
        return {list(answer)[0]: rows[0]}
    return rows[0]


def _pick(value, path):
    """Return what a dotted path leads to, None where there is nothing; a list without an index
    gives all of its items."""
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
    """Return a value as text: lists joined by commas, objects as compact JSON, booleans as the API
    spells them."""
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
    import difflib

    lower = {other.lower(): other for other in names}
    found = difflib.get_close_matches(name.lower(), list(lower), most, 0.6)
    return [lower[match] for match in found]


def _did_you_mean(names):
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
    for row in rows:
        is_bare = columns == ["value"] and not isinstance(row, dict)
        yield [_cell(row if is_bare else _pick(row, name)) for name in columns]


def _print_json(invocation, document):
    text = _json_text(document)
    if invocation.is_colored():
        text = _highlighted(text, invocation.options["theme"] or invocation.settings.get("theme"))
    _write(text + "\n")


def _print_csv(rows, columns):
    """Print RFC 4180: a header, CRLF, quotes where they are needed. By hand, since the csv module
    of 3.10 refuses NUL characters."""
    end = "" if os.linesep == "\r\n" else "\r"  # there the stream itself makes CRLF of LF
    if columns is None:
        columns = _default_columns(rows, is_complete=True) if rows else []
    for cells in [columns, *_cells(rows, columns)] if columns else ():
        line = ",".join(map(_csv_field, cells)) or '""'
        _write_line(line + end)


def _csv_field(text):
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def _print_text(rows, columns):
    escapes = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    for cells in _cells(rows, columns):
        _write_line("\t".join(cell.translate(escapes) for cell in cells))


def _widths(text):
    """Return how many columns of a terminal each character takes: wide ones two, combining ones
    none."""
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
    return _printable(text.replace("\n", " ").replace("\t", " "))


def _print_table(invocation, rows, chosen):
    """Print aligned columns under a header. On a terminal it fits: default columns are left out
    from the end, and only then is anything cut; elsewhere nothing is."""
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

    for number, line in enumerate(table):
        cells = [_cut(cell, width) for cell, width in zip(line, widths)]
        padded = [cell + " " * (width - _width(cell)) for cell, width in zip(cells, widths)]
        text = "  ".join(padded).rstrip()
        is_bold = number == 0 and invocation.is_colored()
        _write((f"\x1b[1m{text}\x1b[0m" if is_bold else text) + "\n")


def _fitted(widths, columns, room):
    """Return widths that add up to the room, if they can: the widest gives way first, down to four
    columns, and ids, which are whole or useless, last."""
    widths = [min(width, max(room, 4)) for width in widths]
    plain = [index for index, name in enumerate(columns[: len(widths)]) if not name.endswith("id")]
    for some in (plain, list(range(len(widths)))):
        while sum(widths) > room and some and max(widths[index] for index in some) > 4:
            widths[max(some, key=lambda index: widths[index])] -= 1
    return widths


# 9.4 the list of commands .........................................................................
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
    """The commands of one account. On disk: a header line, a line of JSON for each command, a
    checksum; so that one command can be looked up without parsing all of them, and a damaged file
    is noticed. Raises ValueError for one."""

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
        lines = [str(int(time.time()))] + sorted(jsonlib.dumps(spec) for spec in specs)
        content = "\n".join(lines)
        return cls(content + "\n" + _checksum(content))

    def save(self, path):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        _write_private(path, self._file)

    def is_old(self):
        return not 0 <= time.time() - self.fetched_at < _CATALOG_LIFE

    def names(self):
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
    checksum = crc32(text.encode("utf-8", "replace")) & 0xFFFFFFFF
    return f"cs-commands {_CATALOG_VERSION} {checksum:08x}"


def _cache_path(client, *more):
    """Return the path of a file of the cache for this endpoint and account; its name is a hash, so
    that it says nothing about them."""
    import hashlib

    base = os.environ.get("XDG_CACHE_HOME") or ""
    if not os.path.isabs(base):  # the specification has a relative one ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    user = client.key or client.get_setting("username") or ""
    account = "\0".join([client.endpoint, user, client.get_setting("domain") or "", *more])
    return os.path.join(base, "cs", hashlib.sha256(account.encode("utf-8")).hexdigest()[:32])


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
    value = entry.get(name)
    return value if isinstance(value, str) else ""


def _dicts(value):
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
    """Ask the server for listApis and keep it. Raises CloudStackException, ValueError where --sync
    cannot keep it."""
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
        problem = f"cannot write the cache {_cache_path(client)!a}: {_reason(error)}"
        if invocation.options["sync"]:
            raise ValueError(problem) from None
        invocation.say("Warning: " + problem)
    else:
        invocation.say(f"{len(specs)} commands of {_shown(client.endpoint)} are now known")
    return catalog


def _cached_catalog(client):
    """Return the _Catalog that is kept, or None. A damaged one is thrown away; one that cannot be
    read just now (too many open files) may be good."""
    path = _cache_path(client)
    try:
        with open(path, encoding="utf-8") as file:
            return _Catalog(file.read())
    except OSError:
        return None
    except ValueError:
        try:
            os.unlink(path)
        except OSError:
            pass
        return None


def _check_against_catalog(invocation, command, params):
    """Return the command in its own spelling. Raises _Usage for what the list of commands knows to
    be wrong, unless --force."""
    catalog = _cached_catalog(invocation.client)
    if catalog is None:
        return command
    spec = catalog.find(command)
    if spec is None:
        is_silent = command in ("login", "logout")  # which no server lists
        problems, missing = ([] if is_silent else [_unknown_command(catalog, command)]), []
    else:
        command = spec.name
        # Without a job there is nothing by which a lost answer could be found again.
        may_recover = spec.is_async and invocation.settings["recover"]
        invocation.client.set_setting("recover", may_recover)
        problems, missing = _unknown_params(spec, params), _missing_params(spec, params)

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


def _missing_params(spec, params):
    """Return the required parameters that have no value, or an empty one."""
    given = {_base_name(name) for name, value in params.items() if value != ""}
    names = [param.name for param in spec.params if param.required]
    return sorted(name for name in names if name.lower() not in given)


def _unknown_command(catalog, name):
    near = _did_you_mean(_near(name, catalog.names()))
    return f"the server has no command {name!a} for you{near}"


def _catalog_for_reading(invocation):
    """Return the catalog, fetched now where there is none: --list and COMMAND --help ask for
    nothing else."""
    catalog = None if invocation.options["sync"] else _cached_catalog(invocation.client)
    return catalog or _fetch_catalog(invocation)


def _list_commands(invocation, words):
    """Print the commands in whose name or description all the words stand (--list). Returns whether
    there are any."""
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
    _write(_printable("\n".join(lines)) + "\n")
    return True


def _description_lines(spec, width):
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
    facts = [param.type] if param.type else []
    if param.length and param.type == "string" and param.length != 255:
        facts.append(f"at most {param.length}")
    if param.since:
        facts.append(f"since {param.since}")
    return ", ".join(facts)


def _example(param):
    if param.type == "map":
        return f"{param.name}[0].key=... {param.name}[0].value=..."
    kinds = {
        "boolean": "true", "integer": "1", "long": "1", "uuid": "ID", "date": "2026-01-31",
        "list": "A,B",
    }  # fmt: skip
    return f"{param.name}={kinds.get(param.type, '...')}"


# 9.5 completion ...................................................................................
# The shells' scripts hand over the line up to the cursor and get lines of `word TAB description`.
# Words come partly from the server, and names from tenants: only words that no shell would evaluate
# are given, and the scripts never evaluate any.

_SCRIPTS = {
    "bash": r"""
_cs_complete() {
    local line word cut="" cur="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=()
    word="${COMP_LINE:0:COMP_POINT}"; word="${word##*[[:space:]]}"
    # bash takes a word apart at = and : and replaces only the last part
    case "$COMP_WORDBREAKS" in *=*) [[ "$word" == *=* ]] && cut="${word%"${word##*=}"}" ;; esac
    while IFS= read -r line; do
        line="${line%%$'\t'*}"
        [[ "$line" == *= || "$line" == *, ]] && compopt -o nospace 2>/dev/null
        COMPREPLY+=("${line#"$cut"}")
    done < <(CLOUDSTACK_TRACE= command "${COMP_WORDS[0]}" \
        --complete="${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
}
complete -F _cs_complete cs
""",
    "zsh": r"""#compdef cs
_cs() {
    local line word; local -a plain shown open
    for line in "${(@f)$(CLOUDSTACK_TRACE= command "${words[1]}" \
        --complete="${(j: :)words[1,CURRENT-1]} ${PREFIX}" 2>/dev/null)}"; do
        [[ -n "$line" ]] || continue
        word="${line%%$'\t'*}"
        if [[ "$word" == *= || "$word" == *, ]]; then open+=("$word"); continue; fi
        plain+=("$word"); shown+=("${line//$'\t'/  -- }")
    done
    (( $#open )) && compadd -S '' -- "${open[@]}"
    (( $#plain )) && compadd -l -d shown -- "${plain[@]}"
}
if [[ "$funcstack[1]" = _cs ]]; then _cs "$@"; else compdef _cs cs; fi
""",
    "fish": r"""
function __cs_complete
    set -l line (commandline -cp)
    env CLOUDSTACK_TRACE= (commandline -opc)[1] --complete="$line" 2>/dev/null
end
complete -c cs -f -a '(__cs_complete)'
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
    pending, front = _FLAGS.get(typed[-1]) if typed else None, ""
    if pending is not None and pending.value is not None:
        typed.pop()
    elif current.startswith("--") and "=" in current:
        flag, _, current = current.partition("=")
        pending, front = _FLAGS.get(flag, _NO_OPTION), flag + "="
    else:
        pending = None

    options, words = _parse_arguments([])
    waiting = collections.deque(typed)
    while waiting:
        arg = waiting.popleft()
        if not arg.startswith("-"):
            words.append(arg)
            continue
        try:
            options.update(_read_option(arg, waiting))
        except _Usage:
            pass
    options["quiet"] = True
    return _Line(options, pending, front, words[0] if words else None, words[1:], current)


def _print_completions(text):
    """Print the words that may stand where the cursor is, at the end of the text."""
    line = _read_line(text)
    for word, description in _starting(_candidates(line), line.current):
        if _SAFE_WORD.match(line.front + word):
            description = _cut(" ".join(_printable(description).split()), 60)
            _write(line.front + word + ("\t" + description if description else "") + "\n")


def _starting(pairs, prefix):
    fitting = [pair for pair in pairs if pair[0].startswith(prefix)]
    return fitting or [pair for pair in pairs if pair[0].lower().startswith(prefix.lower())]


def _candidates(line):
    """Return (word, description) pairs of what may stand there, whatever it begins with."""
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
    front = name + "=" + value[: value.rfind(",") + 1]
    return [(front + ident, text) for ident, text in _ids(invocation, catalog, spec, name)]


def _option_values(line):
    option = line.pending
    if isinstance(option.value, tuple):
        return option.value
    if option.name == "region":
        return _regions(line.options["config"])
    if option.name in ("columns", "sort") and line.command is not None:
        catalog = _known_commands(line)[1]
        spec = catalog.find(line.command) if catalog else None
        front = line.current[: line.current.rfind(",") + 1]
        return [front + field for field in (spec.fields if spec else ())]
    return []


def _known_commands(line):
    """Return the invocation that a line describes and its _Catalog; None for what cannot be had."""
    invocation = _Invocation(line.options)
    try:
        invocation.connect()
    except (_Usage, ValueError):
        return None, None
    return invocation, _cached_catalog(invocation.client)


def _regions(config):
    """Return the names of all sections in the ini files that can be read."""
    found = set()
    for path in _ini_paths(config)[0]:
        try:
            found.update(_parse_ini(path, _read_text(path)).sections())
        except (OSError, ValueError):
            pass
    return sorted(found)


def _ids(invocation, catalog, spec, name):
    """Return (id, name) of what an ...id parameter may be, asked of the list command that fits. It
    is remembered for a minute, as is that it could not be had: a server that hangs is not waited
    for at every key, nor a wrong password tried."""
    lister = _lister(catalog, spec, name)
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
            return [(ident + "", text + "") for ident, text in kept["rows"]]  # else it is damaged
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _ask_ids(client, lister):
    params = {}
    if lister.find_param("listall"):
        params["listall"] = "true"
    if lister.find_param("templatefilter"):
        params["templatefilter"] = "executable"
    client.timeout, client.retry = _PATIENCE_AT_A_KEY, 0
    call = _Call(lister.name, params)
    call.total = _PATIENCE_AT_A_KEY

    found = []
    for row in _dicts(_rows(client._run(_ask(client, call)))):
        ident, text = row.get("id"), row.get("displayname") or row.get("name")
        if isinstance(ident, str):
            found.append((ident, text if isinstance(text, str) else ""))
    return found


def _lister(catalog, spec, name):
    """Return the list command whose ids a parameter takes: listZones for zoneid; for a plain id the
    one of the command's own object."""
    thing = re.sub(r"ids?\Z", "", name.lower())
    if not thing:
        thing = re.sub(r"\A[a-z]+", "", spec.name).lower()
    thing = _SHORT_NAMES.get(thing, thing)
    wanted = [f"list{thing}s", f"list{thing}", f"list{thing}es", f"list{thing[:-1]}ies"]
    spelled = {other.lower(): other for other in catalog.names()}
    return next((catalog.find(spelled[other]) for other in wanted if other in spelled), None)


# 9.6 configure ....................................................................................

_QUESTIONS = (
    ("endpoint", "Endpoint (https://host/client/api): "),
    ("key", "API key: "),
    ("secret", "Secret key (not shown): "),
)


def _configure(invocation):
    """Ask for a section, try it with one call, add it to ~/.cloudstack.ini (--configure). Returns
    whether it was written."""
    options = invocation.options
    region = options["region"] or os.environ.get(_PREFIX + "REGION") or _DEFAULT_REGION
    if not re.match(r"[^\[\]\s][^\[\]\r\n]*\Z", region) or region == "DEFAULT":
        raise _Usage(f"{region!a} cannot be the name of a section")
    path = os.path.realpath(os.path.expanduser(options["config"] or "~/.cloudstack.ini"))
    text = _text_without_section(path, region)

    answers = {name: _ask_until_usable(name, question) for name, question in _QUESTIONS}
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
        raise ValueError(f"cannot write {path!a}: {_reason(error)}") from None
    invocation.say(f"Section [{region}] of {path} is written.")
    return True


def _text_without_section(path, region):
    """Return the text that a section can be added to. Raises _Usage where the file has it: what
    stands in it is a person's work, and is theirs to edit; ValueError for a broken file."""
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
    """Ask again until an answer makes sense. It is never repeated in a message: pasted a line too
    early, it is the secret."""
    while True:
        answer = _ask_person(question, is_hidden=name == "secret")
        if not answer:
            problem = "nothing was typed"
        elif name == "endpoint" and not _is_endpoint(answer):
            problem = "that is not an http:// or https:// address without user and password"
        else:
            return answer
        _to_stderr(f"  {problem}; once more, or Ctrl-C to end")


def _is_endpoint(text):
    try:
        _check_client(CloudStack(text))
    except ValueError:
        return False
    return True


def _ask_person(question, is_hidden=False):
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
    """Try a section with one call, and with what [DEFAULT] adds to it, such as the certificates of
    an authority. Raises ValueError where it cannot be used."""
    found = _Found()
    found.add(path, _section_items(path, _parse_ini(path, text), region))
    invocation.client = CloudStack(**{"endpoint": None, **_as_settings(found.values)})
    _check_client(invocation.client)
    try:
        with invocation.client:
            invocation.client.listCapabilities()
    except CloudStackException as error:
        _to_stderr(f"They do not work: {_sentence(error)}")
        return False
    invocation.say(f"They work: {_shown(invocation.client.endpoint)} answered.")
    return True


if __name__ == "__main__":
    sys.exit(main())
