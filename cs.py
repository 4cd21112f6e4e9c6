#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the cs authors. See LICENSE.
"""cs: a CloudStack API client in one file, for Python 3.6 and later, standard library only.

    from cs import CloudStack, read_config

    cs = CloudStack(endpoint="https://cloud.example/client/api", key="...", secret="...")
    for vm in cs.iter_list("listVirtualMachines", state="Running"):
        print(vm["name"])
    cs.createSecurityGroup(name="web", description="HTTP traffic")
    cs.deployVirtualMachine(zoneid=..., templateid=..., serviceofferingid=..., fetch_result=True)

Every API call, present or future, is a method; AIOCloudStack has the same ones as coroutines.
On the command line: `cs listZones`, `python -m cs listZones` or `python cs.py listZones`.

The sections of this file
    1 errors            the tree of exceptions
    2 parameters        keyword arguments to names and texts, and their signature
    3 clients           CloudStack, AIOCloudStack, and the events that they report
    4 protocol          4.1 call and request, 4.2 answer, 4.3 retry, 4.4 session, 4.5 pages,
                        4.6 jobs, 4.7 recovery
    5 transport         5.1 route, 5.2 connections, 5.3 failures in words, 5.4 a program's session
    6 redaction, trace  what a person may see of a request and its answer
    7 settings          7.1 the table of settings, 7.2 configuration: environment and ini files
    8 command line      the tool `cs`, which a library can do without: 8.1 options and exit codes,
                        8.2 run, progress and reports, 8.3 formats, 8.4 the list of commands,
                        8.5 completion, 8.6 configure, 8.7 names for ids, 8.8 --where, 8.9 --each,
                        8.10 the shell

A call, by names
    cs.listZones(name="x")              CloudStack.__getattr__ makes the method
    -> CloudStack._request              every command comes through here; subclasses step in
    -> _run_command                     4.6: one answer, all pages, or a job's result
    -> _Call                            4.1: the parameters as texts, and this call's settings
    -> _send_with_retries               4.3: until it is answered, or may not be sent again
    -> Request                          4.1: credentials and headers, for one attempt
    -> CloudStack._exchange             signs (Request.prepare), reports events, sends
    -> _Transport.send                  5.2: a kept or a new connection, one request, one answer
    -> _decode_answer                   4.2: the value, or the exception that the answer means
Sections 1, 2 and 4 do no I/O. The protocol is made of coroutines that await _send(), _pause() and
_together() of their client; CloudStack's never suspend, so _run() carries one out at once.

Words
    command    what the API calls it: listZones        call      one use of a command, with pages,
    request    one HTTP request; a call may send many            retries and polls
    exchange   a request and its answer                job       work that goes on in the server
    poll       to ask for a job's state                unsent    the server never saw the request

Invariants
    A command that changes something is sent once. The only places that allow another request are
    _retry_delay (the server did not see it, or said that it did not run it) and, before that, the
    answers 400 "use POST" and 401 "session expired", which come before anything is done.
    only_reads decides what changes something; unknown commands do.
    Secrets stay in settings, sessions and requests: what is shown or raised goes through section 6.
    An exception of what was sent says outcome_unknown or unsent if it is so.
    Every exchange ends: each silence after `timeout`, the whole after ten times that. (How long a
    name is looked up is the system's to say, and a program's `session` has no limit for the whole.)

For the auditor
    Sockets are opened in section 5 only. Files are read in sections 5 (certificates, by ssl), 7
    (ini files) and 8 (what @file and --configure name, the cache, the shell's history); files are
    written in section 8 only: the ini file of --configure, the cache of commands in ~/.cache/cs or
    $XDG_CACHE_HOME/cs, and that history in ~/.local/state/cs or $XDG_STATE_HOME/cs.
    There is no eval, no exec, no subprocess, no pickle. Nothing runs at import but definitions.
    A copy of this file that ends before the banner of section 8 is a whole library under any name.
"""

import collections
import functools
import io
import itertools
import json as jsonlib
import os
import re
import sys
import threading
import time
from binascii import b2a_base64
from urllib.parse import quote, urlsplit

__all__ = [
    "AIOCloudStack",
    "CloudStack",
    "CloudStackApiException",
    "CloudStackConnectionError",
    "CloudStackException",
    "CloudStackJobTimeout",
    "CloudStackTimeoutError",
    "load_config",
    "read_config",
    "read_config_from_ini",
]

__version__ = "6.0.0"

# The types of public names stand in setup.py, which writes the wheel's stub.
TYPE_CHECKING = False  # type checkers take it for true; importing typing costs milliseconds
if TYPE_CHECKING:
    from typing import Any

# Tests replace these two: the clock that measures exchanges and waits, and the sleep between steps.
_clock = time.monotonic
_sleep = time.sleep


# --- 1 errors -------------------------------------------------------------------------------------


class CloudStackException(Exception):
    """The root of everything this client raises about an exchange.

    CloudStackException                 an answer that is not CloudStack's: HTML, broken JSON, ...
     +-- CloudStackApiException         the server's own error, or a failed job: see .error
     +-- CloudStackConnectionError      name look-up, refused, reset, TLS; also a ConnectionError
     +-- CloudStackTimeoutError         no answer in time; also a TimeoutError
          +-- CloudStackJobTimeout      the job still ran at job_timeout: see .jobid

    Arguments and settings that cannot be used are a ValueError, before anything is sent.

    .response         the answer (status_code, reason, headers, text, json()), None without one
    .shown            error as a person may see it: what the request held of secrets is replaced
    .error            the server's own words about a failure: a dict with errorcode and errortext,
                      or what stood in its place; None but for CloudStackApiException
    .jobid            the job's id, on everything raised after a job was submitted; else None
    .jobinstanceid    of a failed job: what it was about, such as the machine of a deployment
    .jobinstancetype  of a failed job: what kind of thing that is
    .outcome_unknown  True if a command that changes something may have run although this was raised
    .unsent           True if the server never saw the request
    .job_failed       True if the job itself failed, not the request for its state
    .stale            True if a kept connection had been closed by the server when it was used again
    """

    # All have a default, so that nobody has to ask with getattr.
    response: "Any" = None
    error: "Any" = None
    shown: "Any" = None
    jobid: "str | None" = None
    jobinstanceid: "str | None" = None
    jobinstancetype: "str | None" = None
    outcome_unknown = unsent = stale = job_failed = False
    # OSError would take two arguments for these; they are set if the cause had an errno.
    errno: "Any" = None
    strerror: "Any" = None

    def __init__(self, *args, error=None, response=None):
        super().__init__(*args)
        self.error, self.response = error, response

    def __str__(self):
        # OSError's own would print two arguments as "[Errno first] second".
        return ": ".join(str(arg) for arg in self.args)


class CloudStackApiException(CloudStackException):
    """The server refused a command, or a job failed: `error` holds its own words."""

    def __str__(self):
        shown = self.error if self.shown is None else self.shown
        return f"{super().__str__()}, error: {shown}"


class CloudStackConnectionError(CloudStackException, ConnectionError):
    """There was no connection, or it broke before the answer was whole."""


class CloudStackTimeoutError(CloudStackException, TimeoutError):
    """The server was silent for `timeout` seconds, or took ten times that in all."""


class CloudStackJobTimeout(CloudStackTimeoutError):
    """The job was still running after job_timeout seconds; args are the message and its id."""


# --- 2 parameters and signature -------------------------------------------------------------------
# Pure functions. The rules are the server's: ApiServer.verifyRequest for the signature,
# ApiDispatcher for lists and maps.

_LISTS = (list, tuple, set, frozenset)

# The server answers 431 to control characters but LF and CR (ApiServer.checkCharacterInkParams; its
# versions differ about a tab, which is therefore sent). Lone surrogates have no UTF-8.
_UNSENDABLE = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]"


def flatten(params):
    """Turn keyword arguments into {name: text} as CloudStack wants them.

    Dicts and lists of dicts become `name[0].field`, other lists are joined by commas, booleans are
    true and false. None and empty lists are left out, an empty text is not. Raises ValueError that
    names the parameter and the type that cannot be sent, never the value."""
    flat: dict = {}
    for name, value in params.items():
        pairs = [(name, value)] if type(value) is str else _flatten_value(name, value)
        flat.update([pair for pair in pairs if pair[1] is not None])
    return flat


def _flatten_value(name, value):
    """Yield the (name, text) pairs of a parameter; text is None where there is nothing to send."""
    entries = _entries(value)
    if not any(isinstance(entry, dict) for entry in entries):
        yield name, _encode_value(name, value)
        return
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"parameter {name!r}: {type(entry).__name__} among dicts")
        for field, item in entry.items():
            full = f"{name}[{index}].{field}"
            yield full, _encode_value(full, item)


def _entries(value):
    """Return what a list holds, or the one value; None is nothing."""
    entries = value if isinstance(value, _LISTS) else [value]
    return [entry for entry in entries if entry is not None]


def _encode_value(name, value):
    """Return the text of a value or a list, None for nothing.

    The server splits lists at commas, without escaping or trimming."""
    texts = [_encode_scalar(name, entry) for entry in _entries(value)]
    if isinstance(value, (set, frozenset)):  # which have no order: the same call, the same bytes
        texts.sort()
    return ",".join(texts) if texts else None


def _encode_scalar(name, value):
    """Return the text of one value.

    The base type's own conversion is used, whatever a subclass (an Enum, Ansible's tagged types)
    makes of str(). The server takes nothing but "true", in any case, for true."""
    if isinstance(value, bool):
        return "true" if value else "false"
    for kind, convert in ((str, str.__str__), (int, int.__repr__), (float, float.__repr__)):
        if isinstance(value, kind):
            return convert(value)
    if isinstance(value, bytes):
        try:
            return bytes.decode(value, "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"parameter {name!r}: bytes that are not UTF-8") from None
    raise ValueError(f"parameter {name!r}: a value of type {type(value).__name__} cannot be sent")


def cs_encode(value):
    """Percent-encode as the server does before it verifies a signature.

    That is Java's URLEncoder, then %20 for +: everything but A-Z a-z 0-9 . - _ * is encoded, `~`
    too, which Python 3.7 and later would leave."""
    if isinstance(value, str) and value.encode("utf-8").isalnum():  # of bytes: ASCII only
        return value
    return quote(value, safe="*").replace("~", "%7E")


def sign(params, secret):
    """Return the signature of {name: text}: base64, not yet percent-encoded.

    As ApiServer.verifyRequest computes it: sorted by the raw name, values encoded but names not,
    the whole lower-cased, HMAC-SHA1. Request.prepare() calls it, after it has added the expiry."""
    import hmac

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


# --- 3 clients ------------------------------------------------------------------------------------

# What CloudStack.on_event is called with. A request is a Request (prepare() describes it).
# Of Rows, seen includes the rows before the first page asked for; total is None if not known.
Sent = collections.namedtuple("Sent", "request")
Answered = collections.namedtuple("Answered", "request response seconds")
Failed = collections.namedtuple("Failed", "request error seconds")
Rows = collections.namedtuple("Rows", "command seen total")
Waiting = collections.namedtuple("Waiting", "command jobid seconds")


def _run(coroutine):
    """Run a coroutine of the protocol whose every step is done at once; returns its result."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    finally:
        coroutine.close()


class CloudStack:
    """A client: any API command is a method, `cs.listZones(name="x")`, and returns plain JSON.

    Settings are described in SETTINGS and README; each may also be the string that an ini file
    gives. Those that cs 5.2.0 had are attributes too; get_setting() and set_setting() serve all.
    Every call reads them anew. Nothing is opened before the first call. Threads may share a client.

    Control arguments of a call, never sent:
      json=True             False: return the answer's text as it is
      opcode_name="command" the name of the parameter that holds the command
      fetch_list=False      True: fetch every page of a list, and return its rows as a list
      headers=None          more HTTP headers
      fetch_result=None     whether to wait for a job and return its result; None: as the client is
                            set

    on_event, if it is set, is called with a Sent, Answered, Failed, Rows or Waiting whenever one
    of these happens, in the thread in which it happens. What it raises ends the call.

    Raises ValueError, before anything is sent, for what cannot be sent; else CloudStackException.
    """

    on_event: "Any" = None

    def __init__(
        self, endpoint, key=None, secret=None, timeout=10, method="get", verify=None, cert=None,
        cert_key=None, name=None, retry=0, retry_backoff=0.5, job_timeout=None, poll_interval=2.0,
        expiration=600, trace=False, dangerous_no_tls_verify=False, headers=None, session=None,
        fetch_result=None, *, theme=None, output=None, username=None, password=None, domain=None,
        concurrency=128, max_response_size=256 * 1024 * 1024, recover=False
    ):  # fmt: skip
        # theme and output are the command line's; read_config() returns them all the same.
        given: Any = locals()
        self._by_process: Any = {}
        if fetch_result is None:
            given["fetch_result"] = isinstance(self, AIOCloudStack)
        for name, setting in _CLIENT_SETTINGS.items():
            self.set_setting(name, setting.default if given[name] is None else given[name])

    def get_setting(self, name):
        """Return the value of a setting, by its name in SETTINGS. Raises KeyError for another.

        (Settings for the command line alone are not the client's.)"""
        return getattr(self, name) if name in _ATTRIBUTES else self._settings[name]

    def set_setting(self, name, value):
        """Set a setting, by its name in SETTINGS.

        It is the only way for those that are not attributes, since subclasses use names such as
        `domain` for their own. Raises ValueError for a wrong value, KeyError for another name."""
        converted = _convert(name, _CLIENT_SETTINGS[name].convert, value)
        self.__dict__.setdefault("_settings", {})[name] = converted
        self.__dict__["_checked"] = False

    def __setattr__(self, name, value):
        if name in _ATTRIBUTES:
            self.set_setting(name, value)
        else:
            object.__setattr__(self, name, value)

    def __getattr__(self, name):
        """Return a command, or a setting: neither is in the instance's dict."""
        if name in _ATTRIBUTES:
            return self._settings[name]
        if name.startswith("_"):
            raise AttributeError(name)

        def method(**params):
            return self._request(name, **params)

        method.__name__ = method.__qualname__ = name
        return method

    def __repr__(self):
        return f"<CloudStack: {self.name or mask_address(self.endpoint or '')}>"

    def __getstate__(self):
        # Connections, threads and what was learned stay behind; a copy makes its own.
        return dict(self.__dict__, _settings=dict(self._settings), _by_process={})

    @property
    def verify(self):
        """True, or the path of the CA certificates, or False.

        False only if dangerous_no_tls_verify is set and there is no path."""
        return _tls_files(*[self._settings[name] for name in _TLS_SETTINGS])[0]

    @property
    def cert(self):
        """The client certificate's path, or a pair with its key's."""
        return _tls_files(*[self._settings[name] for name in _TLS_SETTINGS])[1]

    def _request(
        self, command, json=True, opcode_name="command", fetch_list=False, headers=None,
        fetch_result=None, _options=None, **params
    ):  # fmt: skip
        """Carry out a command: all of them come through here, so that a subclass can step in.

        Pages, polls and log-in do not. `_options` holds what call() and pages() add."""
        options = dict(
            _options or {}, json=json, opcode_name=opcode_name, fetch_list=fetch_list,
            headers=headers, fetch_result=fetch_result
        )  # fmt: skip
        return self._drive(_run_command(self, command, params, options))

    def call(self, command, params=None, *, pages=None, wait=None, **options):
        """Carry out a command with options of its own, and return what its method would.

        pages and wait are fetch_list and fetch_result. The options are json, opcode_name and
        headers as above, and in the place of the client's settings, None meaning these: timeout,
        retry, job_timeout, poll_interval and recover; post=True sends by POST. Raises TypeError
        for another option."""
        options = _given_options(options, fetch_list=pages, fetch_result=wait)
        return self._request(command, **_request_arguments(params, options))

    def pages(self, command, params=None, **options):
        """Yield the rows of a list command page by page, as lists, with a page or two in memory.

        An answer that is not a list comes as a tuple that holds it. Options are those of call()."""
        options = _given_options(options, as_pages=True)
        pages = self._request(command, **_request_arguments(params, options))
        try:
            while True:
                yield _run(pages.__anext__())
        except StopAsyncIteration:
            pass

    def iter_list(self, command, **params):
        """Yield the rows of a list command one by one, with a page or two in memory.

        An answer that is not a list is one row. Takes what the command itself takes."""
        for rows in self.pages(command, params):
            yield from rows

    def prepare(self, command, params=None, **options):
        """Return the Request that a call would send now, signed: method, url, headers, ...

        masked_url() and masked_params() are what a person may see of it. Nothing is sent; it has no
        session key, if it would need one."""
        request = Request(self, _Call(self, command, params or {}, _given_options(options)))
        request.prepare()
        return request

    def check(self):
        """Raise ValueError, which names them, for settings that do not go together."""
        settings = self._settings
        _check_endpoint(settings["endpoint"])
        pairs = "key secret/secret key/username password/password username/cert_key cert"
        for given, missing in map(str.split, pairs.split("/")):
            if settings[given] is not None and settings[missing] is None:
                raise ValueError(f"{missing}: missing; {given} and {missing} go together")
        if settings["key"] is not None and settings["username"] is not None:
            advice = "use key and secret, or username and password"
            raise ValueError(f"username: given together with key; {advice}")
        self.__dict__["_checked"] = True

    def find_id(self, list_command, name, **params):
        """Return the id of the one row of a list that has this name; params are the command's own.

            zoneid = cs.find_id("listZones", "Zurich-1")

        Raises LookupError, which lists the candidates, for a name that no row or several have."""
        rows = list(self.iter_list(list_command, **params))
        return str(pick_row(list_command, name, rows)["id"])

    def wait_job(self, jobid, **options):
        """Wait for a job that was submitted earlier, as fetch_result does, and return its result.

        The options are those of call()."""
        return self._drive(_resume_wait(self, jobid, _given_options(options)))

    def close(self):
        """End the session, if there is one, and close the connections.

        The client may be used again."""
        _run(_close(self, functools.partial(CloudStack._send, self)))

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _notify(self, event):
        """Pass an event to the observers: the trace, and the program's own."""
        if self._settings["trace"]:
            trace_event(event)
        if self.on_event is not None:
            self.on_event(event)

    def _exchange(self, request):
        """Send one request and return its answer; both clients and every thread come here."""
        request.attach(None)  # refuses one that was cancelled before it came here
        request.prepare()
        is_observed = self.on_event is not None or self._settings["trace"]
        if is_observed:
            self._notify(Sent(request))
        begun = _clock()
        try:
            if self._settings["session"] is not None:
                response = _exchange_through(self._settings["session"], request)
            else:
                response = self._kept.send(request)
        except CloudStackException as error:
            if is_observed:
                self._notify(Failed(request, error, _clock() - begun))
            raise
        if is_observed:
            self._notify(Answered(request, response, _clock() - begun))
        return response

    @property
    def _kept(self):
        """What is held open in this process. A fork's child starts anew: connections, locks and
        sessions are not for two processes. (setdefault is atomic: threads get the same one.)"""
        pid = os.getpid()
        kept = self._by_process.get(pid)
        if kept is None:
            kept = self._by_process.setdefault(pid, _Transport(self._settings["concurrency"]))
            for other in set(self._by_process) - {pid}:
                self._by_process.pop(other, None)
        return kept

    @property
    def _server(self):
        """What was learned about the present endpoint, as the present user."""
        servers = self._kept.servers
        names = ("endpoint", "key", "username", "password", "domain")
        user = tuple([self._settings[name] for name in names])
        return servers.get(user) or servers.setdefault(user, _Server(user[0]))

    def _forget(self):
        """Close the connections and forget what was learned."""
        kept = self._by_process.pop(os.getpid(), None)
        if kept is not None:
            kept.close()

    _drive = staticmethod(_run)  # a coroutine of the protocol; AIOCloudStack's callers await it

    # What the protocol awaits. Here it is done at once, so that _run() ends at the first step.

    async def _send(self, request):
        return self._exchange(request)

    async def _pause(self, seconds):
        _sleep(seconds)

    async def _together(self, coroutines):
        """Run coroutines at once; returns what came of each: its result, or what it raised."""
        outcomes: list = []
        for coroutine in coroutines:
            try:
                outcomes.append(self._kept.submit(_run, coroutine))
            except CloudStackException as error:
                coroutine.close()
                outcomes.append(error)
        for index, future in enumerate(outcomes):
            if not isinstance(future, BaseException):
                outcomes[index] = future.exception() or future.result()
        return outcomes


# The options of one call: control arguments, and settings in place of the client's.
_CONTROLS = ("json", "opcode_name", "headers", "fetch_list", "fetch_result")
_OWN_SETTINGS = ("timeout", "retry", "job_timeout", "poll_interval", "recover")
_CALL_OPTIONS = _CONTROLS[:3] + _OWN_SETTINGS + ("post",)


def _given_options(options, **more):
    """Return the options that are not None. Raises TypeError for an unknown one."""
    for name in options:
        if name not in _CALL_OPTIONS:
            raise TypeError(f"a call has no option {name!r}; parameters go in a dict")
    more.update(options)
    if more.pop("post", None) is not None:
        more["method"] = "post" if options["post"] else "get"
    return {name: value for name, value in more.items() if value is not None}


def _request_arguments(params, options):
    """Return the keyword arguments for _request(), where a subclass sees and may change them.

    Parameters that are named like one of its arguments go beside the options, in `_options`."""
    params, taken = dict(params or {}), _CONTROLS + ("self", "command", "_options")
    named = {name: params.pop(name) for name in taken if name in params}
    controls = {name: options.pop(name) for name in _CONTROLS if name in options}
    if named:
        options["params"] = named
    return {**params, **controls, "_options": options or None}


class AIOCloudStack(CloudStack):
    """The same client for asyncio: commands are coroutines, iter_list an asynchronous iterator.

    Jobs are waited for unless fetch_result=False. Exchanges run in at most `concurrency` threads
    of its own; waiting holds none. It is tied to no event loop. `async with` or `await aclose()`
    end a session and close connections, and may be left out."""

    async def _request(self, command, *args, **params):
        return await super()._request(command, *args, **params)

    async def pages(self, command, params=None, **options):
        options = _given_options(options, as_pages=True)
        async for rows in await self._request(command, **_request_arguments(params, options)):
            yield rows

    async def iter_list(self, command, **params):
        async for rows in self.pages(command, params):
            for row in rows:
                yield row

    async def find_id(self, list_command, name, **params):
        rows = [row async for row in self.iter_list(list_command, **params)]
        return str(pick_row(list_command, name, rows)["id"])

    _drive = staticmethod(lambda coroutine: coroutine)

    async def _send(self, request):
        """Send one request as asyncio.to_thread would, but in this client's own threads.

        The event loop's default ones are too few."""
        import asyncio

        try:
            future = self._kept.submit(self._exchange_in_thread, request)
            return await asyncio.wrap_future(future)
        except BaseException:
            request.cancel()  # for a caller who was cancelled, and where no thread was to be had
            raise

    def _exchange_in_thread(self, request):
        # No future takes a StopIteration (of a mock, or of on_event), but no coroutine lets it out.
        return _run(super()._send(request))

    async def _together(self, coroutines):
        import asyncio

        tasks = [asyncio.ensure_future(one) for one in coroutines]  # 3.6 would start them unordered
        return await asyncio.gather(*tasks, return_exceptions=True)

    async def _pause(self, seconds):
        import asyncio

        await asyncio.sleep(seconds)

    async def aclose(self):
        """Do what close() does, without holding up the event loop."""
        await _close(self, self._send)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        await self.aclose()


# --- 4 protocol -----------------------------------------------------------------------------------
# Coroutines that decide everything and do no I/O: for that they await the client's _send(),
# _pause() and _together(), which CloudStack does at once and AIOCloudStack on the event loop.

PAGE_SIZE = 500  # the server's default.page.size, unless the site changed it
PAGES_AHEAD = 4  # page requests of one fetch_list that may be under way at once
MOST_PAGES = 100000  # of one list: a longer one goes in circles

# The longest wait, in seconds, before a retry or after a failed poll. If the server asks for more
# before a retry, the error is raised.
LONGEST_WAIT = 30.0
LONGEST_HEAD = 8000  # bytes of request line and headers; the server answers 414 over 8192
LONGEST_FORM = 1 << 20  # bytes of a POST's body; the server answers 404 over it

# A job is polled at once, then at growing intervals.
POLL_GROWTH = 0.5  # of the time waited so far passes before the next poll
SHORTEST_POLL = 0.1  # seconds between two polls at least; poll_interval is the most
DIRECT_POLL = 15  # poll_intervals after which a job is polled by itself, whatever a job list says
MOST_FAILED_POLLS = 10  # in a row, of a job without job_timeout (long enough for a restart)


# 4.1 Call and request: what is to be sent, and how.

# GET is refused for all but these where enforce.post.requests.and.timestamps is set (ApiServlet,
# since 4.20): names that begin so, and a few commands that are annotated.
_READING = ("get", "list", "query", "find")
_READING_TOO = frozenset(
    "isaccountallowedtocreateofferingswithtags quotabalance quotaisenabled quotastatement"
    " quotasummary quotatarifflist cloudianisenabled readyforshutdown"
    " verifyoauthcodeandgetuser".split()
)
# These change something under a reading name, so they must never be repeated.
_CHANGING = ("getuploadparamsfor", "getdiagnosticsdata", "listandswitchsamlaccount")


@functools.lru_cache(maxsize=1024)
def only_reads(command):
    """Return whether a command may be repeated: it is known to read and changes nothing."""
    lower = command.lower()
    is_get = lower in _READING_TOO or (lower.startswith(_READING) and lower not in _READING)
    return is_get and not lower.startswith(_CHANGING)


class _Call:
    """One command: what to send, and how its answer is to be read.

    Raises ValueError for what the server would refuse: control characters."""

    cancelled = False
    job_id = None  # the id its job gets, if the caller chooses it
    total = float("inf")  # seconds for one exchange, if less than ten times the timeout
    request: "Any" = None  # the last one
    response: "Any" = None  # the last answer

    def __init__(self, client, command, params, options=None):
        if not client._checked:
            client.check()
        params = flatten(params)
        self.command = command
        self.options = options = options or {}
        self.json = options.get("json", True)
        self.opcode_name = options.get("opcode_name", "command")
        own = {}
        for name, value in options.items():
            if value is not None and name in _CLIENT_SETTINGS:
                own[name] = _convert(name, _CLIENT_SETTINGS[name].convert, value)
        self.headers = own.pop("headers", None)  # which come on top of the client's
        # The client's are at every moment as they are then.
        self.settings = collections.ChainMap(own, client._settings) if own else client._settings
        self.reads = only_reads(command)
        self.is_login = command.lower() == "login"
        self.is_secret = self.is_login or any(_secret_names(params))
        self.params = {}
        dropped = {"signature", "signatureversion"} | ({"response"} if self.json else set())
        for name, text in params.items():
            if not (name.isprintable() and text.isprintable()):  # which is faster than to search
                _check_sendable(name, text)
            lower = name.lower()
            if lower not in dropped:
                self.params["expires" if lower == "expires" else name] = text
        names = set(map(str.lower, self.params))
        if "page" in names and "pagesize" not in names:  # the server refuses it alone (431)
            self.set_params(pagesize=client._server.page_limit)
        if self.settings["recover"]:
            self.choose_job_id()

    def get_param(self, name):
        """Return the text of the parameter of this lower-case name, in any case, or None."""
        return next((text for key, text in self.params.items() if key.lower() == name), None)

    def set_params(self, **values):
        """Set parameters, in place of those that differ by case only."""
        for name, value in values.items():
            for key in [key for key in self.params if key.lower() == name]:
                del self.params[key]
            self.params[name] = str(value)

    def with_page(self, page, size, **options):
        """Return the same call for one page."""
        import copy

        call = copy.copy(self)
        call.settings = collections.ChainMap(options, self.settings)
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

    def cancel(self):
        """Let nothing more be sent, and end the exchange that is under way in another thread."""
        self.cancelled = True
        if self.request is not None:
            self.request.cancel()


def _check_sendable(name, text):
    """Raise ValueError for a parameter that the server would refuse."""
    found = re.search(_UNSENDABLE, name) or re.search(_UNSENDABLE, text)
    if found:
        problem = f"the server refuses the character U+{ord(found.group()):04X}"
        raise ValueError(f"parameter {name!a}: {problem}")


class Request:
    """One HTTP request: method, url, body and headers as they go out, once it is prepared.

    A call makes one anew for each attempt. params are those of the query or form; masked_url() and
    masked_params() may be shown."""

    cancelled = anonymous = False
    method = "GET"
    url: "Any" = None
    body: "Any" = None
    signing: "Any" = None  # (secret, expiration), if it is to be signed
    deadline = 0.0  # when the exchange must be over
    _socket: "Any" = None  # of the exchange while it is under way

    def __init__(self, client, call, login=None, post=False):
        settings, server = call.settings, client._server
        self.endpoint = settings["endpoint"].partition("#")[0]
        self.timeout = settings["timeout"]
        self.total = min(call.total, 10 * self.timeout)
        self.tls = tuple([settings[name] for name in _TLS_SETTINGS])
        self.limit = settings["max_response_size"]
        self._lock = threading.Lock()
        # On the management host itself packing takes longer than the bytes it saves.
        packing = "identity" if server.is_loopback else "gzip"
        self.headers = {"User-Agent": "cs/" + __version__, "Accept-Encoding": packing}
        self.params = params = dict(call.params)
        params[call.opcode_name] = call.command
        if call.json:
            params["response"] = "json"

        # Values that must not be shown, beside those of secret parameters.
        self.secrets = [settings["password"]]
        if login is not None:
            params["sessionkey"] = login.key
            self.secrets += login.cookies.values()
            if login.cookies:  # an empty header would hide those of a `session`
                self.headers["Cookie"] = login.header
        elif settings["key"] is not None and settings["username"] is None:
            for name in [name for name in params if name.lower() == "apikey"]:
                del params[name]
            params["apiKey"] = settings["key"]
            self.secrets.append(settings["secret"])
            self.signing = (settings["secret"], settings["expiration"])
        else:
            # With a user name it gets a session before it is sent; prepare() shows it without one.
            self.anonymous = not call.is_login and settings["username"] is None
        if settings["headers"] or call.headers:
            self.headers = _merge_headers(self.headers, settings["headers"], call.headers or {})

        # The integration port does not read bodies: there secrets stay in the URL.
        required = call.is_secret or (server.post_only and not call.reads)
        if not self.anonymous and (post or required or settings["method"] == "post"):
            self.method = "POST"

    def prepare(self):
        """Sign the parameters and write out url and body.

        This comes when the request is about to be sent, by which time a call of AIOCloudStack has
        its thread: one that waited for it longer than a signature is valid would be refused."""
        if self.signing is not None:
            secret, expiration = self.signing
            expires, seconds = self.params.get("expires"), expiration.total_seconds()
            if expires is None and seconds >= 0:
                # The year 9999 is as far as the format goes.
                moment = time.gmtime(min(time.time() + seconds, 253402300799))
                expires = time.strftime("%Y-%m-%dT%H:%M:%S+0000", moment)
            if expires is not None:
                self.params.update(signatureVersion="3", expires=expires)
            self.params["signature"] = sign(self.params, secret)

        query = _join_query(self.params)
        self.url = self.endpoint
        head = sum([len(name) + len(value) + 4 for name, value in self.headers.items()])
        if not self.anonymous and len(self.url) + len(query) + head > LONGEST_HEAD:
            self.method = "POST"
        if self.method == "POST":
            self.body = query.encode("ascii")
            self.headers["Content-Type"] = "application/x-www-form-urlencoded"
        else:
            self.url += ("&" if "?" in self.endpoint else "?") + query

    def __repr__(self):
        address = mask_address(self.endpoint)
        return f"<Request {self.method} {address}?{_join_query(self.masked_params())}>"

    def masked_url(self):
        """Return the url as a person may see it."""
        url = mask_address(self.endpoint)
        if not urlsplit(self.endpoint).path:
            url += "/"
        if self.method == "POST":
            return url
        return url + "?" + _join_query(self.masked_params())

    def masked_params(self):
        """Return the parameters as a person may see them."""
        return mask_params(self.params)

    def all_secrets(self):
        """Return the values that must not be shown."""
        return self.secrets + [self.params[name] for name in _secret_names(self.params)]

    def attach(self, sock):
        """Take the socket of the exchange. Raises ConnectionAbortedError after a cancel()."""
        with self._lock:
            if self.cancelled:
                raise ConnectionAbortedError("cancelled")
            self._socket = sock

    def detach(self):
        """Give up the socket; returns whether it is still good, so that it may be kept."""
        with self._lock:
            self._socket = None
            return not self.cancelled

    def cancel(self):
        """Wake the thread that sends or reads, for a caller who has left; nothing more is sent."""
        import socket

        with self._lock:
            self.cancelled = True
            try:
                if self._socket is not None:
                    # The plain socket's: SSLSocket's own would pull TLS from under the thread.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            except OSError:
                pass


_TLS_SETTINGS = ("verify", "dangerous_no_tls_verify", "cert", "cert_key")


def _tls_files(ca_path, is_dangerous, cert, key):
    """Return what `verify` and `cert` come to, together with the settings beside them."""
    return ca_path or not is_dangerous, (cert, key) if key and isinstance(cert, str) else cert


def _merge_headers(*maps):
    """Merge headers: later ones win, names compare without case, None takes one out."""
    pairs = [pair for headers in maps for pair in headers.items()]
    for name, value in pairs:
        _check_header(name, value)  # again: client.headers is the program's to change
    merged = {name.lower(): (name, value) for name, value in pairs}
    return {
        name: value.decode("latin-1") if isinstance(value, bytes) else str(value)
        for name, value in merged.values()
        if value is not None
    }


def _check_endpoint(endpoint):
    """Raise ValueError for an endpoint that cannot be used, without its secret parts."""
    if not endpoint:
        example = "https://host/client/api"
        raise ValueError(f"endpoint: missing; it is the URL of the API, such as {example}")
    try:
        parts = urlsplit(endpoint)
        proper = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        proper = False
    if not proper or not all("!" <= character <= "~" for character in endpoint):
        problem = "is not an http:// or https:// address"
        if proper and max(endpoint) > "\x7f":
            problem = "must be ASCII: write the host name as xn--..., other characters as %XX"
        raise ValueError(f"endpoint: {mask_address(endpoint)!a} {problem}")
    if parts.username is not None:
        raise ValueError("endpoint: a user name or password cannot be part of the address")


# 4.2 Answer: what an HTTP response means.

_LONG_ANSWER = 1 << 13  # bytes; below, the garbage collector hardly runs
_DEEPEST = 100  # lists and dicts within each other; the server nests about six
_MOST_COUNT = 1 << 63  # Java's longest integer ends below


def _refuse_constant(name):
    """Refuse NaN and Infinity, which Python's decoder would take."""
    raise ValueError(f"{name} is not JSON")


def _parse_float(digits):
    """Refuse numbers such as 1e999, which Python's decoder would take for Infinity."""
    number = float(digits)
    if abs(number) == float("inf"):
        _refuse_constant(digits)
    return number


def _parse_short_int(digits):
    """Refuse integers that older Pythons take minutes for; later ones do that by themselves."""
    if len(digits) > 4300:
        raise ValueError("a number of too many digits")
    return int(digits)


# strict=False: the server leaves raw control characters in strings.
_JSON = jsonlib.JSONDecoder(
    strict=False,
    parse_constant=_refuse_constant,
    parse_float=_parse_float,
    parse_int=None if hasattr(sys, "get_int_max_str_digits") else _parse_short_int,
)


_NO_BRACKETS = bytes(set(range(256)) - set(b'[]{}"'))


def _check_depth(left):
    """Refuse lists in lists in lists: what walks through them would recurse too deeply.

    Takes an answer's brackets and quotes. Texts are removed first; most hold no bracket, and are
    two quotes. Each round then removes the innermost pairs of brackets."""
    left = re.sub(rb'"[^"]*"', b"", left.replace(b'""', b""))
    for _ in range(_DEEPEST):
        shorter = left.replace(b"[]", b"").replace(b"{}", b"")
        if shorter == left:  # all are gone, or some have no other half
            return
        left = shorter
    raise ValueError("nested too deeply")


def _parse_json(response):
    """Return the answer as JSON. Raises ValueError or RecursionError.

    The garbage collector rests while a long answer is decoded: that makes thousands of containers
    that can hold no cycle, and searching them again and again took half the time of a long list.
    (The decoder is C code that no other thread interrupts.)"""
    import gc

    content = response.content
    text = content.decode("utf-8", "replace")
    text = text[1:] if text[:1] == "\ufeff" else text  # a byte order mark
    if b"\\" in content:  # a search is nothing beside a replacement
        content = content.replace(rb"\\", b"").replace(rb"\"", b"")
    brackets = content.translate(None, _NO_BRACKETS)
    if len(brackets) > 2 * _DEEPEST:
        _check_depth(brackets)
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
        address = mask_address(response.headers.get("Location"))
        detail = f"Redirects are not followed; the new address is {address!a}. Set the endpoint to"
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
        why = _why_no_json(client, call, code)
        raise CloudStackException(status, *why, response=response) from None

    if not isinstance(document, dict) or len(document) != 1:
        raise _unexpected("a single top-level key was expected", response)
    (value,) = document.values()
    if code != 200:
        raise _make_api_error(code, value, response)
    count = value.get("count") if isinstance(value, dict) else None
    if isinstance(count, int) and count >= _MOST_COUNT:
        raise _unexpected("the count is out of range", response)
    return value


def _why_no_json(client, call, code):
    """Return what may be the reason for an answer that is not CloudStack's, as a list."""
    size = len(call.request.body or b"")
    if code == 404 and size > LONGEST_FORM:
        limit = f"The server takes forms of {LONGEST_FORM} bytes (its request.content.size)"
        return [f"{limit}; this one had {size}."]
    if code >= 500 and not call.reads:
        return []  # that it may have run says more
    endpoint = mask_address(client._settings["endpoint"])
    broken = "Malformed JSON document. " if code == 200 else ""
    return [f"{broken}Make sure endpoint URL {endpoint!r} is correct."]


def _make_api_error(code, error, response):
    """Return the exception for an answer that is the server's own error."""
    message = f"HTTP {code} response from CloudStack"
    if code == 511:
        message += " (two-factor authentication is required: use an API key and secret, which it"
        message += " does not apply to)"
    return CloudStackApiException(message, error=error, response=response)


def _unexpected(detail, response=None):
    """Return the exception for JSON that CloudStack would not answer."""
    return CloudStackException("Unexpected response from CloudStack", detail, response=response)


def find_rows(answer):
    """Return the answer's rows: its only list, whatever its name. None for an object."""
    if not isinstance(answer, dict):
        return None
    lists = [value for value in answer.values() if isinstance(value, list)]
    if len(lists) == 1 and "id" not in answer:  # with an id it is an object that holds a list
        return lists[0]
    return None if set(answer) - {"count"} else []  # nothing but a count is an empty list


def dicts(value):
    """Return the dicts in a list; none for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


# 4.3 Retry: whether and when a command is sent again.


def _status_of(error):
    """Return the HTTP status behind an exception, or None."""
    return getattr(error.response, "status_code", None)


def _was_rejected(error):
    """Return whether the server says that it did not run the command: throttled, in maintenance.

    Only what certainly did not run: a mere "try later" belongs to _is_transient."""
    is_stated = isinstance(error.error, dict) and "errorcode" in error.error
    return _status_of(error) == 429 or (_status_of(error) == 503 and is_stated)


def _is_transient(error):
    """Return whether the same reading request may well succeed a little later.

    For a command that changes something see _was_rejected, for a poll _JobWait.may_continue."""
    if error.response is None:
        return isinstance(error, OSError)
    return _status_of(error) in (429, 502, 503, 504)


def _asked_delay(error):
    """Return the seconds that the server asked to wait, 0 if it did not.

    They stand in the text of its answer (ApiRateLimitServiceImpl's 429) or in Retry-After."""
    if error.response is None:
        return 0.0
    pattern = r"(?i)retry after[\s\[]{0,9}([0-9]{1,5000})[\s\]]{0,9}ms"
    found = re.search(pattern, error.response.text)
    if found:
        return float(found.group(1)) / 1000.0
    after = (error.response.headers.get("Retry-After") or "").strip()
    return float(after) if re.match(r"[0-9]+\Z", after) else 0.0


def _random():
    """Return a number from 0 to 1. Importing random costs milliseconds; only a retry needs it."""
    import random

    return random.random()


def backoff(attempt, first):
    """Return the seconds before retry number `attempt`, counted from 0.

    Exponential, half of it jitter, at most LONGEST_WAIT."""
    return min(LONGEST_WAIT, first * 2.0 ** min(attempt, 32)) * (0.5 + _random() / 2)


def _retry_delay(call, error, attempt):
    """Return the seconds until a call may be sent again, or None if it may not.

    A command that changes something is sent again only if the server did not run it."""
    may_run_again = error.unsent or _was_rejected(error) or (call.reads and _is_transient(error))
    if attempt >= call.settings["retry"] or call.cancelled or not may_run_again:
        return None
    asked = _asked_delay(error)
    delay = max(asked, backoff(attempt, call.settings["retry_backoff"]))
    return delay if asked <= LONGEST_WAIT else None


def _wants_post(request, error):
    """Return whether the server refused a GET and asks for POST (ApiServlet, since 4.20)."""
    if request.method == "POST" or request.anonymous or _status_of(error) != 400:
        return False
    is_stated = isinstance(error, CloudStackApiException)
    return is_stated and "using post request" in error.response.text.lower()


def _mark_outcome(call, error):
    """Set on the exception whether the command may have run."""
    answered = isinstance(error.error, dict) or 300 <= (_status_of(error) or 0) < 500
    error.outcome_unknown = not (call.reads or error.unsent or answered)
    status = _status_of(error)
    if error.outcome_unknown and error.args and (status is None or status >= 500):
        hint = f"{call.command} may have run, its outcome is unknown: check before it is sent again"
        _add_hint(error, hint)


def _add_hint(error, hint):
    """Add a hint to an exception's message, as part of the second: OSError drops a third."""
    error.args = (error.args[0], "; ".join([str(arg) for arg in error.args[1:]] + [hint]))


def _set_shown(call, error):
    """Set on the exception what a person may see of the server's words."""
    if isinstance(error, CloudStackApiException):
        error.shown = mask_values(error.error, call.request.all_secrets() if call.request else [])


async def _send_with_retries(client, call):
    """Send one command until it is answered or may not be sent again; returns the answer."""
    attempt = 0
    post = renewed = replayed = False
    while True:
        login = None
        if client._settings["username"] is not None and not call.is_login:
            login = await _current_login(client)
        request = call.request = Request(client, call, login, post)
        if call.cancelled:
            request.cancel()
        try:
            call.response = await client._send(request)
            return _decode_answer(client, call, call.response)
        except CloudStackException as error:
            if _wants_post(request, error):
                post = client._server.post_only = True
                continue
            if login is not None and _status_of(error) == 401 and not renewed:
                renewed = True
                with client._server.lock:
                    if client._server.login is login:  # nobody else has renewed it
                        client._server.login = None
                continue
            if call.reads and error.stale and not replayed:
                replayed = True
                continue
            delay = _retry_delay(call, error, attempt)
            if delay is None:
                _mark_outcome(call, error)
                _set_shown(call, error)
                raise
        attempt += 1
        await client._pause(delay)


# 4.4 Session: user name and password instead of key and secret; and what callers share.


# A session: its key, and the cookies {name: value} that go beside it, in one header.
_Login = collections.namedtuple("_Login", "key cookies header")


class _Server:
    """Keeps what was learned about the server behind one endpoint, as one user."""

    def __init__(self, endpoint):
        loopback = r"(?i)https?://(?:localhost|127\.[0-9.]+|\[::1\])(?:[:/]|\Z)"
        self.is_loopback = re.match(loopback, endpoint or "") is not None
        self.post_only = False  # commands that change something must be POST
        self.page_limit = PAGE_SIZE
        self.login = None  # a _Login, while there is a session
        self.attempt = {"until": float("-inf")}  # the last one to log in: its end, its error
        self.lock = threading.Lock()
        self.jobs = _JobList()


async def _current_login(client):
    """Return the session to send with, made if there is none yet.

    Of many callers one logs in, for ten timeouts at the most; the others poll for its outcome and
    share its failure, since wrong passwords in a row would lock the account."""
    server = client._server
    while True:
        with server.lock:
            if server.login is not None:
                return server.login
            attempt, now = server.attempt, _clock()
            is_mine = now >= attempt["until"]
            if is_mine:
                attempt = server.attempt = {"until": now + 10 * client._settings["timeout"]}
        if is_mine:
            try:
                login = server.login = await _log_in(client)
                return login
            except CloudStackException as error:
                attempt["error"] = error
                raise
            finally:
                attempt["until"] = float("-inf")
        await client._pause(SHORTEST_POLL)
        if "error" in attempt:
            import copy

            raise copy.copy(attempt["error"])  # each caller writes its own job's id on it


async def _log_in(client):
    """Log in and return the _Login. Raises CloudStackException for one that cannot be used."""
    params = {name: client._settings[name] for name in ("username", "password", "domain")}
    call = _Call(client, "login", dict(params, domain=params["domain"] or "/"))
    answer = await _send_with_retries(client, call)
    key = answer.get("sessionkey") if isinstance(answer, dict) else None
    if not isinstance(key, str) or not key:
        raise _unexpected("login gave no session key", call.response)
    cookies = call.response.cookies()
    header = "; ".join([name + "=" + value for name, value in cookies.items()])
    try:  # what comes from the server and goes out again is checked like a program's own
        _check_sendable("sessionkey", key)
        _check_header("Cookie", header)
    except ValueError:
        raise _unexpected("login gave a session that cannot be sent", call.response) from None
    return _Login(key, cookies, header)


async def _close(client, send):
    """End the session, if there is one, and close the connections.

    A log-out that fails does not matter: the server ends a session after half an hour idle."""
    login, client._server.login = client._server.login, None
    try:
        if login:
            request = Request(client, _Call(client, "logout", {}), login, post=True)
            await send(request)
    except CloudStackException:
        pass
    finally:
        client._forget()


# 4.5 Pages: all rows of a list, and the one that has a name.


def _is_same_page(rows, page):
    """Return whether two pages hold the same rows in the same order.

    Rows are the same if they are equal, or go by the same ids and names while figures in them
    have moved. The id alone would not do: listTemplates repeats it for every zone."""
    if rows == page:
        return True
    pairs = zip(map(_identity, rows), map(_identity, page))
    # A page of one row says too little.
    return len(rows) == len(page) > 1 and all(one and one == other for one, other in pairs)


def _identity(row):
    """Return the part of a row that stays while its figures move, as a text; None without an id."""
    if not isinstance(row, dict) or row.get("id") is None:
        return None
    stays = {name: value for name, value in row.items() if name.endswith(("id", "name"))}
    return jsonlib.dumps(stays, sort_keys=True)


async def _fetch_pages(client, call, ahead=1, most=None):
    """Yield the rows of a list, page by page; an answer that is not a list in a tuple.

    A page is never taken for the last by its length alone: `count` is the total for most commands,
    the length of this page for some, and missing for others. So more pages are fetched while a page
    is full or fewer than `count` rows were seen. It ends with an empty page, with one that repeats
    the one before it or the first (commands that ignore `page`, servers that begin anew), or with
    one that is longer than asked for (commands that ignore `pagesize`, too)."""
    page = _read_number(call, "page", 1)
    size = _read_number(call, "pagesize", client._server.page_limit)
    first = previous = None
    seen, total, skip, pages = (page - 1) * size, 0, 0, 0  # seen: the rows before are, too
    while True:
        # More pages are certain only if this one is full and the count is higher.
        is_sure = previous is not None and len(previous) >= size and total > seen
        sure = min(ahead, (total - seen) // size + 1) if is_sure else 1
        try:
            answers = await _fetch_batch(client, call, range(page, page + sure), size)
        except CloudStackApiException as error:
            limit = _lower_limit(error)
            if first is not None or not 0 < limit < size:
                raise
            page, skip = 1 + (page - 1) * size // limit, (page - 1) * size % limit
            client._server.page_limit = size = limit  # for the client's other lists, too
            seen -= skip
            continue

        for answer in answers:
            rows = find_rows(answer)
            if rows is None and first is None:
                yield (answer,)
            if not rows or any(_is_same_page(rows, other) for other in (previous, first) if other):
                return
            pages += 1
            if pages > MOST_PAGES:
                raise _unexpected(f"a list of more than {MOST_PAGES} pages")
            seen += len(rows)
            count = answer.get("count")
            if isinstance(count, int) and count > len(rows):
                total = count
            client._notify(Rows(call.command, seen, total or None))
            yield rows[skip:] if skip else rows
            if len(rows) > size or (len(rows) < size and seen >= total) or pages == most:
                return
            first, previous, skip, page = first or rows, rows, 0, page + 1


async def _fetch_batch(client, call, pages, size):
    """Return the answers for these pages, which are asked for at once, and without retries.

    The first that failed is then asked for again by itself, if that may be, and is the last."""
    if len(pages) == 1 or client._settings["session"] is not None:  # not safe in threads, perhaps
        return [await _send_with_retries(client, call.with_page(pages[0], size))]
    calls = [call.with_page(page, size, retry=0) for page in pages]
    try:
        outcomes = await client._together([_send_with_retries(client, one) for one in calls])
    finally:
        for one in calls:
            one.cancel()
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, CloudStackException) and _retry_delay(call, outcome, 0) is not None:
            again = call.with_page(pages[number], size)
            return outcomes[:number] + [await _send_with_retries(client, again)]
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def _read_number(call, name, default):
    """Return a parameter that is a number from 1 up."""
    text = call.get_param(name)
    return _convert(f"parameter {name!r}", _number(1, whole=True), text) if text else default


def _lower_limit(error):
    """Return the page size that the server says is the most; 0 if it says nothing of the kind."""
    if _status_of(error) != 431:
        return 0
    # For another wording put an alternative in front of the group: (?:page ?size ...|another ...)
    pattern = r"(?i)page ?size.{0,200}?max allowed.{0,200}?([0-9]{1,9})"
    found = re.search(pattern, error.response.text)
    return int(found.group(1)) if found else 0


async def _collect_rows(client, call):
    """Return every row of a list; any other answer as it is.

    Some lists have no fixed order (listVolumes of 4.19, by `created` in seconds): then a row may
    come twice and another not at all, although their number is that of `count`. If whole rows are
    repeated, the list is fetched again, twice at the most, and new rows are added."""
    rows: Any = None
    for _ in range(3):
        found: list = []
        async for page in _fetch_pages(client, call, PAGES_AHEAD):
            if isinstance(page, tuple):
                return page[0]
            found += page
        unique = _without_repeats(found)
        if rows is None:
            rows = first = found
        else:
            known = set(map(_identity, rows))
            new = [row for row in unique if _identity(row) not in known]
            rows = _without_repeats(rows) + new if new else rows
        if len(unique) == len(found) or (rows is not first and len(rows) >= len(first)):
            return rows
    client._notify(Rows(call.command, len(_without_repeats(rows)), len(first)))
    return rows


def _without_repeats(rows):
    """Return the rows without those that came before, whole and under the same id."""
    try:
        if len({row["id"] for row in rows}) == len(rows):
            return rows
    except (KeyError, TypeError):  # rows without an id are not compared
        return rows
    return list({jsonlib.dumps(row, sort_keys=True): row for row in rows}.values())


# Fields that show which of several rows of one name is meant.
_FACTS = "path zonename domain project account vpcname vmname volumename state created".split()


def row_names(row):
    """Return the names of a row; a domain's path is one, a user's name is the username."""
    names = [row.get("name"), row.get("displayname")]
    if re.match(r"ROOT(/|\Z)", str(row.get("path"))):
        names += [row["path"], row["path"][4:] or "/"]
    names = [name for name in names if name] or [row.get("username"), row.get("ipaddress")]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def rows_named(rows, name):
    """Return the rows of a name, one for each id; if none has it as it is spelled, in any case."""
    for to in (str, str.lower):
        found = [row for row in rows if to(name) in map(to, row_names(row))]
        if found:
            break
    return _one_for_each_id(found)


def _one_for_each_id(rows):
    """Return the last row of each id."""
    return list({str(row["id"]): row for row in rows}.values())


def pick_row(list_command, name, rows, found=None):
    """Return the one row that has a name; found: the rows that do, if that is known better.

    Raises LookupError, which lists the candidates: these, or those of names like it."""
    rows = _one_for_each_id(row for row in dicts(rows) if "id" in row)
    found = rows_named(rows, name) if found is None else found
    if len(found) == 1:
        return found[0]
    text = f"{list_command} has {len(found) or 'nothing'} of this name"
    near = found or _rows_like(rows, name)
    if not near:
        raise LookupError(text)
    fields = [key for key in _FACTS if len({str(row.get(key)) for row in near}) > 1]
    lines = [text + "; did you mean one of these? Give its id:"]
    for row in near[:10]:
        facts = ", ".join(f"{key} {row[key]}" for key in fields if key in row)
        lines.append(f"  {row['id']}  {' / '.join(row_names(row))}  {facts}".rstrip())
    lines += [f"  and {len(near) - 10} more"] if len(near) > 10 else []
    raise LookupError("\n    ".join(escape_unprintable(line.replace("\n", " ")) for line in lines))


def _rows_like(rows, name):
    """Return the rows whose names are like a name, or hold it."""
    import difflib

    names = {other.lower() for row in rows for other in row_names(row)}
    near = difflib.get_close_matches(name.lower(), names)
    near += [other for other in names if name.lower() in other]
    return [row for row in rows if set(near) & set(map(str.lower, row_names(row)))]


# 4.6 Jobs: submit, poll, wait.


async def _run_command(client, command, params, options):
    """Carry out a whole call: returns the answer, all rows of a list, or the result of a job.

    The option as_pages asks for the pages of a list; the option params holds more parameters."""
    fetch_list = options["fetch_list"]
    if type(fetch_list) is not bool:
        fetch_list = _convert("fetch_list", _parse_flag, fetch_list)
    call = _Call(client, command, {**params, **options.get("params", {})}, options)
    if "as_pages" in options:
        if not call.reads:  # a second page would carry it out a second time
            raise ValueError(f"{command} changes something; it cannot be read page by page")
        return _fetch_pages(client, call)

    if call.job_id is not None:
        answer = await _submit(client, call)
    elif fetch_list and call.reads:
        answer = await _collect_rows(client, call)
    else:
        answer = await _send_with_retries(client, call)
    # A submission's answer has a jobid and no status, which queryAsyncJobResult's own has.
    if call.settings["fetch_result"] and isinstance(answer, dict) and "jobid" in answer:
        if "jobstatus" not in answer:
            answer = await _await_job(client, call, answer["jobid"])
    return answer


class _JobList:
    """The pending jobs, asked for once for all callers that wait for one.

    A job that is not in the list is polled by itself, so that whatever the list leaves out (another
    account's jobs, rows of further pages) costs a request and nothing else."""

    FEWEST = 4  # waiters; for fewer, a poll for each is as cheap
    USELESS = 30.0  # seconds to do without a list that does not help

    def __init__(self):
        self.waiting = []  # the ids of the jobs
        self.pending: frozenset = frozenset()
        self.asked_at = self.listed_at = self.off_until = float("-inf")
        self.rest = 0.0  # seconds after lists in a row that did not help

    def is_useful(self):
        """Return whether there are enough waiters, and a list that helps."""
        return len(self.waiting) >= self.FEWEST and _clock() >= self.off_until

    def step(self):
        """Return the least number of seconds between two lists, and between a waiter's looks."""
        return max(SHORTEST_POLL, len(self.waiting) / 2000)

    def lifetime(self, poll_interval):
        """Return the age at which the list is refreshed although nobody is due to poll.

        All waiters together then send a quarter of the requests of one poll for each, or fewer."""
        return max(self.step(), poll_interval * max(0.25, 4 / len(self.waiting)))

    async def refresh(self, client, call, age):
        """Ask for the list if it is of this age; who comes meanwhile goes by the old one."""
        now = _clock()
        if now - self.asked_at < age:
            return
        self.asked_at = now
        listing = _make_poll(client, call, "listAsyncJobs")
        listing.total = max(1.0, call.settings["poll_interval"])  # a slower one is no use
        most = len(self.waiting) // 4  # pages that are worth it
        seconds = self.USELESS
        try:
            pages = [dicts(rows) async for rows in _fetch_pages(client, listing, most=most)]
        except CloudStackException as error:
            if _is_transient(error):
                seconds = call.settings["poll_interval"]
        else:
            # Servers up to 4.19 list finished jobs, too.
            rows = [row for page in pages for row in page if str(row.get("jobstatus", 0)) == "0"]
            before, self.pending = self.pending, frozenset(str(row.get("jobid")) for row in rows)
            self.listed_at = now
            helps = len((before | self.pending).intersection(self.waiting)) >= self.FEWEST
            # It may help later: more pages of it are read for more waiters.
            seconds = self.rest = 0.0 if helps else min(self.USELESS, 4 * self.rest + 0.3)
        self.off_until = _clock() + seconds


class _JobWait:
    """One caller's wait for a job: when to poll next, the first time at once."""

    def __init__(self, client, call, jobid):
        self.client, self.settings, self.jobid = client, call.settings, jobid
        self.started = self.due = self.polled = _clock()
        self.failures = 0  # in a row

    @property
    def deadline(self):
        limit = self.settings["job_timeout"]
        return float("inf") if limit is None else self.started + limit

    def set_due(self, at):
        """Set the next poll, at growing intervals.

        So a short job is seen early, and a long one costs few polls."""
        growing = max(SHORTEST_POLL, POLL_GROWTH * (at - self.started))
        self.due = _clock() + min(self.settings["poll_interval"], growing)

    def may_continue(self, error):
        """Set the next poll after one that failed; False if that ends the wait.

        It does if polls have failed for too long, or if CloudStack states an error in JSON: that is
        about the job, but for a 429 or 503. (_is_transient would be too wide.)"""
        is_stated = isinstance(error.error, dict) and _status_of(error) not in (429, 503)
        has_no_limit = self.deadline == float("inf")
        if is_stated or (has_no_limit and self.failures + 1 >= MOST_FAILED_POLLS):
            return False
        # Growing also where poll_interval is 0, and not beyond what a float holds.
        growing = max(0.001, self.settings["poll_interval"]) * 2.0 ** min(self.failures, 32)
        self.due = _clock() + min(LONGEST_WAIT, max(_asked_delay(error), growing))
        self.failures += 1
        return True

    def seconds_left(self):
        """Return the seconds until the next poll."""
        return max(0.0, min(self.due, self.deadline) - _clock())

    def notify(self, call):
        self.client._notify(Waiting(call.command, self.jobid, _clock() - self.started))

    async def until_due(self, call, jobs):
        """Sleep until the job is to be polled by itself; a list of jobs may put that off."""
        self.notify(call)
        while True:
            if jobs.listed_at > self.polled and self.jobid not in jobs.pending:
                return
            interval = self.settings["poll_interval"]
            direct = min(self.deadline, self.polled + DIRECT_POLL * max(SHORTEST_POLL, interval))
            may_list = jobs.is_useful() and not self.failures and _clock() < direct
            if self.seconds_left() <= 0:
                if may_list:
                    await jobs.refresh(self.client, call, jobs.step())
                if not may_list or self.jobid not in jobs.pending:
                    return
                self.set_due(_clock())
                self.notify(call)
            elif may_list and self.jobid in jobs.pending:
                await jobs.refresh(self.client, call, jobs.lifetime(interval))
                await self.client._pause(min(self.seconds_left(), jobs.step()))
            else:
                await self.client._pause(self.seconds_left())


def _make_poll(client, call, command="queryAsyncJobResult", **params):
    """Return a call that polls, sent as the call that started the job was. Raises ValueError."""
    return _Call(client, command, params, dict(call.options, json=True, retry=0))


async def _await_job(client, call, jobid):
    """Wait for a job; returns its jobresult. Anything raised meanwhile carries the job's id."""
    waiting = client._server.jobs.waiting
    waiting.append(str(jobid))
    try:
        try:
            poll = _make_poll(client, call, jobid=str(jobid))
        except ValueError as error:
            raise _unexpected(str(error)) from None
        return await _poll_until_done(client, call, poll)
    except BaseException as error:  # KeyboardInterrupt and CancelledError, too
        error.jobid = str(jobid)  # type: ignore[attr-defined]
        is_refused = isinstance(error, CloudStackApiException) and not error.job_failed
        if is_refused and _status_of(error) != 431:  # which says that there is no such job
            _add_hint(error, f"job {jobid} may still run")
        raise
    finally:
        waiting.remove(str(jobid))


async def _poll_until_done(client, call, poll):
    """Poll a job at once, then at growing intervals, and once more at the deadline.

    Failed polls (no answer, one that is not CloudStack's, 429, 503) are ridden out for as long as
    the deadline allows, or MOST_FAILED_POLLS times in a row if there is none."""
    jobs = client._server.jobs
    wait = _JobWait(client, call, poll.params["jobid"])
    answered = None
    while True:
        await wait.until_due(call, jobs)
        wait.polled = _clock()
        poll.total = max(0.0, wait.deadline - wait.polled) + wait.settings["timeout"]
        try:
            answer = await _send_with_retries(client, poll)
            answered = poll.response
            status = _read_job_status(answer, answered)
        except CloudStackException as error:
            answered = error.response or answered
            if not wait.may_continue(error):
                raise
        else:
            if status != 0:
                return _read_job(call, status, answer, answered)
            wait.failures = 0
            wait.set_due(wait.polled)
        if wait.polled >= wait.deadline:
            response = answered and answered.with_status(408, "Request Timeout")
            message = "Timeout waiting for async job result"
            raise CloudStackJobTimeout(message, wait.jobid, response=response)


def _read_job_status(answer, response):
    """Return jobstatus out of queryAsyncJobResult's answer. Raises CloudStackException without."""
    try:
        return int(answer["jobstatus"])
    except (KeyError, OverflowError, TypeError, ValueError):
        raise _unexpected("queryAsyncJobResult gave no jobstatus", response) from None


def _read_job(call, status, answer, response):
    """Return the result of a job that has ended.

    Raises CloudStackApiException for a failed one. That may come without jobresult: the server was
    restarted, or its queue cancelled."""
    result = answer.get("jobresult")
    if status == 1:
        return {} if result is None else result
    error = answer if result is None else result
    failure = CloudStackApiException("Job failure", error=error, response=response)
    failure.job_failed = True
    failure.jobinstanceid = answer.get("jobinstanceid")
    failure.jobinstancetype = answer.get("jobinstancetype")
    _set_shown(call, failure)
    raise failure


async def _resume_wait(client, jobid, options):
    """Wait for a job that was submitted earlier."""
    call = _Call(client, "queryAsyncJobResult", {"jobid": str(jobid)}, options)
    return await _await_job(client, call, jobid)


# 4.7 Recovery: the job of a command whose answer was lost is found by the id that the command gave
# it. It is only asked for: sent again, even under the same id, the command would be refused and yet
# leave a second machine behind (seen on 4.23).


async def _submit(client, call):
    """Send a command that changes something; returns its answer, or one made of its job."""
    try:
        try:
            return await _send_with_retries(client, call)
        except CloudStackException as error:
            if not error.outcome_unknown:
                raise
            return await _find_job(client, call, error)
    except BaseException as error:
        if call.request is not None and not hasattr(error, "unsent"):  # Ctrl-C, a cancelled task
            error.jobid, error.outcome_unknown = call.job_id, True  # type: ignore[attr-defined]
        raise


async def _find_job(client, call, lost):
    """Poll for the job at once and at growing intervals; failed polls count as in a wait.

    Raises the error by which the answer was lost, once the server has not known the job for
    `timeout` seconds in a row."""
    poll = _make_poll(client, call, jobid=call.job_id)
    wait = _JobWait(client, call, call.job_id)
    unknown_since = None
    while True:
        asked_at = _clock()
        try:
            answer = await _send_with_retries(client, poll)
            _read_job_status(answer, poll.response)
            entity = answer.get("jobinstanceid")
            found = {"jobid": call.job_id}  # as the submission's answer was
            return found if entity is None else dict(found, id=entity)
        except CloudStackException as error:
            if isinstance(error, CloudStackApiException) and _status_of(error) == 431:
                unknown_since = asked_at if unknown_since is None else unknown_since
                wait.set_due(asked_at)
                is_over = asked_at - unknown_since >= wait.settings["timeout"]
            else:
                unknown_since = None
                is_over = not wait.may_continue(error)

        if is_over or asked_at >= wait.deadline:
            break
        wait.notify(call)
        await client._pause(wait.seconds_left())

    lost.jobid = call.job_id
    is_unknown = unknown_since is not None
    verb = "the server knows no job" if is_unknown else "the server could not be asked for job"
    later = f"wait_job() or `cs --wait {call.job_id}` asks again later"
    _add_hint(lost, f"{verb} {call.job_id}; {later}")
    raise lost


# --- 5 transport ----------------------------------------------------------------------------------
# Everything that opens a socket: http.client's connections, kept.

IDLE = 20.0  # seconds after which a kept connection is not used again; the server closes it at 30
_CHUNK = 1 << 18


class _Response:
    """Holds an answer, read to its end, with the names that requests gives to its parts.

    status_code, reason, headers (a mapping, names in any case), content (bytes), text, ok, json()
    """

    def __init__(self, status_code, reason, headers, content, request=None):
        if request is not None and reason != "OK" and isinstance(reason, str):
            # A server may repeat what was asked, secrets and all.
            reason = mask_text(reason, request.all_secrets())
        self.status_code, self.reason = status_code, reason
        self.headers, self.content = headers, content

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


# 5.1 Route: how requests get to an endpoint.

# headers: what the proxy wants, in a request to it or in the one for a tunnel.
_Proxy = collections.namedtuple("_Proxy", "host port headers secrets")


class _Route:
    """Knows how to reach one endpoint: directly, or by an http proxy.

    An http proxy is sent full URLs for an http endpoint, and asked for a tunnel to an https one."""

    def __init__(self, endpoint):
        parts = urlsplit(endpoint)
        self.secure = parts.scheme == "https"
        self.default_port = 443 if self.secure else 80
        self.host, self.port = parts.hostname, parts.port or self.default_port
        self.proxy = _find_proxy(parts)
        # What comes with each request, and where its target starts in the url.
        self.headers, self.start = {}, len(parts.scheme + "://" + parts.netloc)
        if self.proxy and not self.secure:
            self.headers, self.start = self.proxy.headers, 0

    def open(self, request, context_of):
        """Return a new http.client connection, with the tunnel and TLS that it needs.

        The name of a host is passed on as bytes: for text Python would import its IDNA tables."""
        import socket
        from http.client import HTTPConnection

        context = context_of(*request.tls) if self.secure else None
        place = self.proxy or self
        connection: Any = HTTPConnection(place.host, place.port)
        connection.auto_open = 0  # it must never connect by itself, and send what was sent before
        connection.default_port = self.default_port
        if self.proxy and self.secure:
            connection.set_tunnel(self.host, self.port, headers=self.proxy.headers)
        sock = socket.create_connection((place.host.encode("ascii"), place.port), request.timeout)
        try:
            request.attach(sock)
            stream = connection.stream = _TimedStream(request, sock)
            connection._create_connection = lambda *args: stream
            connection.connect()
            if context:
                sock = context.wrap_socket(
                    sock, server_hostname=self.host, do_handshake_on_connect=False
                )
                request.attach(sock)
                sock.do_handshake()
                connection.sock = connection.stream = _TimedStream(request, sock)
        except BaseException:
            request.detach()
            sock.close()
            raise
        return connection


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
    is_excluded = _is_excluded(parts.hostname, proxies.get("no", ""))
    if not address or is_excluded or urllib.request.proxy_bypass(parts.netloc):
        return None
    return _parse_proxy(address)


def _is_excluded(host, no_proxy):
    """Return whether NO_PROXY covers a host in a way that urllib does not know.

    That is: by a bare IPv6 address, by a range such as 10.0.0.0/8, or by * in a list."""
    import ipaddress

    for entry in re.sub(r"[\s\[\]]", "", no_proxy).split(","):
        try:
            if entry == "*" or ipaddress.ip_address(host) in ipaddress.ip_network(entry, False):
                return True
        except ValueError:  # a name
            pass
    return False


def _parse_proxy(address):
    """Return the _Proxy of an address. Raises OSError, which never quotes it, for a wrong one."""
    from urllib.parse import unquote_to_bytes

    try:
        parts = urlsplit(address if "://" in address else "http://" + address)
        scheme, host, port = parts.scheme, parts.hostname, parts.port or 80
    except ValueError:
        scheme, host = "http", None
    if scheme != "http":
        raise OSError(f"{scheme} proxies cannot be used; http ones can")
    if not host or "@" in parts.path + parts.query + parts.fragment:  # a password with a slash
        wanted = "http://[user:password@]host:port"
        raise OSError(f"the address of the proxy cannot be used; it is to be {wanted}")
    headers, secrets = {}, []
    if parts.username:
        # fsencode: the environment may hold bytes that are not UTF-8.
        texts = (parts.username, parts.password or "")
        login = b":".join(unquote_to_bytes(os.fsencode(text)) for text in texts)
        code = b2a_base64(login, newline=False).decode("ascii")
        headers["Proxy-Authorization"] = "Basic " + code
        secrets = [code, texts[1], login.partition(b":")[2].decode("utf-8", "replace")]
    return _Proxy(host, port, headers, secrets)


# 5.2 Connections: kept ones, new ones, TLS, and how they are cut off.


class _Transport:
    """Sends a Request and returns its _Response, over kept connections.

    It keeps what a client has learned and holds open, in one process. Threads may share it:
    deque's append and pop are atomic."""

    _executor: "Any" = None
    _idle: "Any" = {}  # an interrupt may dispose of it before __init__ has ended

    def __init__(self, concurrency):
        self.concurrency = concurrency  # of threads, and of idle connections
        self.servers = {}  # {(endpoint, user ...): _Server}
        self._idle = collections.defaultdict(collections.deque)  # key: (connection, since) ...
        # A context takes tens of ms to make; the environment is read once for each endpoint.
        self._context_of = functools.lru_cache(None)(_make_context)
        self._route_to = functools.lru_cache(None)(_Route)

    def close(self):
        """Close the connections that are not in use, and end the threads."""
        self._close_idle(0.0, 0)
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    __del__ = close

    def submit(self, function, argument):
        """Have a thread run a function: an exchange of AIOCloudStack, a page. Returns the future.

        Context variables are those of the caller. Raises CloudStackConnectionError if the system
        has no thread left to give; what was submitted may then be run all the same."""
        if self._executor is None:
            from concurrent.futures import ThreadPoolExecutor

            self._executor = ThreadPoolExecutor(self.concurrency, "cs")
        work = functools.partial(function, argument)
        contextvars = sys.modules.get("contextvars")  # whoever has such variables has imported it
        if contextvars is not None:
            work = functools.partial(contextvars.copy_context().run, work)
        try:
            return self._executor.submit(work)
        except RuntimeError as error:
            failure = CloudStackConnectionError("Cannot start a thread", str(error))
            failure.unsent = True
            raise failure from None

    def _close_idle(self, seconds, keep):
        """Close connections that were idle for so long, and the oldest beyond so many."""
        for idle in list(self._idle.values()):
            try:
                while len(idle) > keep or (idle and _clock() - idle[0][1] >= seconds):
                    idle.popleft()[0].stream.sock.close()
            except IndexError:  # another thread was faster
                pass

    def send(self, request):
        """Send and read one answer of any status.

        Raises CloudStackConnectionError, CloudStackTimeoutError, or ValueError for a setting
        (verify, cert) that cannot be used. What a program's signal handler raises passes, if it is
        a function that is still installed; what others raise is taken for the network's."""
        key = (request.endpoint, request.tls)
        request.deadline = _clock() + request.total
        route = connection = None
        unsent, stale = True, False
        try:
            route = self._route_to(request.endpoint)
            connection = self._checkout(key)
            stale = connection is not None
            connection = connection or route.open(request, self._context_of)
            request.attach(connection.stream.sock)
            unsent = False
            response, content = _round_trip(connection, route, request)
        except BaseException as error:
            request.detach()
            if connection is not None:
                connection.stream.sock.close()
            if isinstance(error, _UnusableFile) or not _is_failure(error):
                raise
            failure = _network_error(error, request, unsent, route and route.proxy)
            failure.stale = stale and isinstance(error, ConnectionError)
        else:
            if request.detach() and connection.sock is not None:
                self._idle[key].append((connection, _clock()))
                if len(self._idle) > 1 or len(self._idle[key]) > 1:
                    self._close_idle(IDLE, self.concurrency)
            else:
                connection.stream.sock.close()
            return _Response(response.status, response.reason, response.headers, content, request)
        try:
            # Raised out here, so that what http.client quoted is not its context either.
            raise failure
        finally:
            failure = None  # its traceback holds this frame, which would hold it

    def _checkout(self, key):
        """Return the connection that was used last, if it is still good; else None.

        It is not if it can be read from: the server closed it, or sent what nobody asked for."""
        import select

        while True:
            try:
                connection, since = self._idle[key].pop()
            except IndexError:
                return None
            sock = connection.stream.sock
            if hasattr(select, "poll"):  # select() itself cannot take numbers over 1023
                poll = select.poll()
                poll.register(sock, select.POLLIN)
                is_readable = poll.poll(0)
            else:
                is_readable = select.select([sock], [], [], 0)[0]
            if _clock() - since < IDLE and not is_readable:
                return connection
            sock.close()


def _round_trip(connection, route, request):
    """Send a request over a connection; returns http.client's response and the body, unpacked.

    Raises _TooLarge, or IncompleteRead for a body without its end."""
    target = request.url[route.start :]
    if not route.start:
        target = "http" + target[4:]  # spelled otherwise, http.client would name the proxy as host
    elif target[:1] != "/":
        target = "/" + target
    connection.stream.request = request
    connection.stream.sock.settimeout(request.timeout)
    headers = {**request.headers, **route.headers}
    connection.request(request.method, target, request.body, headers)
    response = connection.getresponse()
    try:
        if response.length is None:
            parts, left = [], request.limit
            for part in iter(lambda: response.read1(_CHUNK), b""):
                parts.append(part)
                left -= len(part)
                if left < 0:
                    raise _TooLarge
            content = b"".join(parts)
        elif response.length > request.limit:
            raise _TooLarge
        else:
            content = response.read()
    finally:
        # Which frees the connection for another request. One that is left open is told of on
        # standard error by Python 3.13, when it disposes of it together with an exception.
        response.close()
    packing = response.headers.get("Content-Encoding", "").strip().lower()
    if content and packing in ("gzip", "x-gzip"):
        content = _unpack(content, request.limit)
    return response, content


class _TimedStream:
    """What http.client takes for its socket: one on which every read keeps the time limits.

    http.client closes it after each answer, and while one that ends the connection is yet to be
    read; so that does nothing, and `sock` is closed by whoever is done with it."""

    def __init__(self, request, sock):
        self.request, self.sock = request, sock  # the request that is under way
        self.sendall, self.setsockopt = sock.sendall, sock.setsockopt

    def makefile(self, mode):
        reader = _TimedReader()
        reader.stream = self
        return io.BufferedReader(reader)

    def close(self):
        pass


class _TimedReader(io.RawIOBase):
    """The file of one answer. It has no close() of its own: when Python disposes of a file it drops
    what is raised there, and so a Ctrl-C at that moment."""

    stream: "Any"

    def readable(self):
        return True

    def readinto(self, buffer):
        request, sock = self.stream.request, self.stream.sock
        left = request.deadline - _clock()
        if left <= 0:
            raise TimeoutError
        seconds = min(request.timeout, left)
        if sock.gettimeout() != seconds:  # setting it is a system call, asking is none
            sock.settimeout(seconds)
        return sock.recv_into(buffer)


class _UnusableFile(ValueError):
    """Says which TLS setting names a file that cannot be used."""

    unsent = True


def _make_context(*tls):
    """Return the SSLContext for a request's TLS settings. Raises _UnusableFile."""
    import ssl

    verify, cert = _tls_files(*tls)
    path = verify if isinstance(verify, str) else None
    kind = "capath" if path and os.path.isdir(path) else "cafile"
    try:
        context = ssl.create_default_context(**{kind: path})  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        why, name = error_text(error), getattr(error, "filename", None)
        if path and name != os.environ.get("SSLKEYLOGFILE", ""):
            why = f"verify: cannot read CA certificates from {path!a}: {why}"
        else:  # because of SSLKEYLOGFILE, or of OpenSSL's own configuration
            why = f"TLS cannot be set up: {why}" + (f": {name!a}" if name else "")
        raise _UnusableFile(why) from None

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
    """Load a client certificate. Raises _UnusableFile; an encrypted private key is refused."""
    questions: list = []

    def refuse_to_ask():  # OpenSSL would ask for the passphrase on the terminal
        questions.append("passphrase")  # an exception would get lost on the way out in 3.6
        return ""

    try:
        context.load_cert_chain(own, key, password=refuse_to_ask)
    except (OSError, ValueError) as error:
        advice = "decrypt it first, as `openssl pkey -in KEY -out NEWKEY` does"
        encrypted = f"its private key is encrypted; {advice}"
        why = encrypted if questions else error_text(error)
        raise _UnusableFile(f"cert: cannot use client certificate {own!a}: {why}") from None


def _unpack(content, limit):
    """Return what gzip has packed. Raises _TooLarge, or IncompleteRead for what is damaged."""
    import contextlib
    import http.client
    import zlib

    gunzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
    with contextlib.suppress(zlib.error):
        content = gunzip.decompress(content, limit + 1)
        if len(content) > limit:
            raise _TooLarge
        if gunzip.eof and not gunzip.unused_data:
            return content
    raise http.client.IncompleteRead(b"")


# 5.3 Failures in words.


class _TooLarge(ValueError):
    """Says that an answer has more bytes than it may have."""


def _is_failure(error):
    """Return whether an exception is a failure of the network or of what came from there.

    Others, such as Ctrl-C, pass, and so does any that a program's signal handler raised."""
    import http.client
    import signal

    # A host name that cannot be, and ssl.CertificateError on 3.6, are a ValueError.
    if not isinstance(error, (OSError, ValueError, OverflowError, http.client.HTTPException)):
        return False
    handlers = (signal.getsignal(number) for number in range(1, signal.NSIG))
    codes = {getattr(handler, "__code__", None) for handler in handlers} - {None}
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code not in codes:
        trace = trace.tb_next
    return trace is None


def error_text(error):
    """Return what went wrong, in words, without a Python class or an [Errno ..] around it."""
    text = getattr(error, "strerror", None)  # an OSError's; ssl and Unicode errors have a reason
    if text == "" and error.errno:  # as PyPy's ssl has it
        text = os.strerror(error.errno)
    return text or str(getattr(error, "reason", "") or error) or type(error).__name__


def _network_error(error, request, unsent, proxy):
    """Return the CloudStackException for what the standard library raised."""
    kind, what, why = _describe_failure(error, request, unsent)
    secrets = request.all_secrets() + (proxy.secrets if proxy else [])
    if proxy and unsent:
        why = f"{mask_secrets(why, secrets)} (proxy {proxy.host}:{proxy.port})"
    made = kind(f"{what} {mask_address(request.endpoint)}", why)
    made.unsent = unsent
    made.errno = getattr(error, "errno", None)
    # What is made of bytes that were received may repeat the request, or the proxy's login.
    is_harmless = mask_secrets(str(error), secrets) == str(error)
    made.__cause__ = error if is_harmless and (unsent or isinstance(error, OSError)) else None
    return made


def _describe_failure(error, request, unsent):
    """Return (exception class, what happened, why)."""
    import http.client
    import socket
    import ssl

    lost, late = CloudStackConnectionError, CloudStackTimeoutError
    if isinstance(error, (socket.timeout, TimeoutError)):  # one and the same since 3.10
        why = f"nothing for {request.timeout:g} s (timeout)"
        if _clock() >= request.deadline:
            why = f"it was not whole after {request.total:g} s"
        return late, "Cannot connect to" if unsent else "No answer from", why
    if isinstance(error, (ssl.SSLError, ssl.CertificateError)):
        return lost, "TLS failure with", _describe_tls_error(error)
    if isinstance(error, socket.gaierror):
        return lost, "Cannot find", "name look-up: " + error_text(error)
    if unsent:
        why = error_text(error) if isinstance(error, OSError) else type(error).__name__
        return lost, "Cannot connect to", why
    if isinstance(error, _TooLarge):
        why = f"it has more than max_response_size, {request.limit} bytes"
        return CloudStackException, "Too large an answer from", why
    if isinstance(error, http.client.IncompleteRead):
        return lost, "Broken answer from", "it is cut off"
    if isinstance(error, OSError):
        return lost, "Connection lost to", error_text(error)
    return lost, "Broken answer from", f"not HTTP ({type(error).__name__})"


def _describe_tls_error(error):
    """Return why TLS failed, and the setting that may help."""
    text = str(getattr(error, "verify_message", None) or getattr(error, "reason", None) or error)
    if text.isupper():  # OpenSSL's own name for it
        text = text.replace("_", " ").lower()
    if "certificate" in str(error).lower():
        text += "; `verify` names the CA certificates to trust"
    return text


# 5.4 A program's own session.


def _exchange_through(session, request):
    """Make the same exchange through an object with the interface of requests.Session.

    Its OSErrors, which all exceptions of requests are, become ours and are not chained: they quote
    the address, signature and all. Anything else it raises is the program's own and passes."""
    verify, cert = _tls_files(*request.tls)
    options = {"timeout": request.timeout, "allow_redirects": False}
    if verify is not True:
        options["verify"] = verify
    if cert:
        options["cert"] = cert
    try:
        answer = session.request(
            request.method, request.url, data=request.body, headers=request.headers, **options
        )
        content = answer.content
        if not isinstance(content, bytes):
            content = answer.text.encode("utf-8")
        return _Response(answer.status_code, answer.reason, answer.headers, content, request)
    except OSError as error:
        is_late = isinstance(error, TimeoutError) or "Timeout" in type(error).__name__
        kind = CloudStackTimeoutError if is_late else CloudStackConnectionError
        place = mask_address(request.endpoint)
        failure = kind("No answer from " + place, "the session raised " + type(error).__name__)
    raise failure


# --- 6 redaction and trace ------------------------------------------------------------------------
# What a person may get to see of a request, an address, or an answer in a trace goes through here.
# (An answer on standard output is the user's, and is shown as it came.)

MASK = "***"

# Names with secret values are known by how they end: `details[0].password`, `usersecretkey`. In
# place of a hyphen there may be an underscore or nothing. A command with such a parameter also
# goes out by POST, to stay out of the logs of proxies.
_SECRET_WORDS = (
    "password passwd passphrase secret secret-key private-key user-data session-key jsessionid"
    " signature api-key access-key token credential credentials psk pre-shared-key bind-pass"
    " secret-code code-for-2fa config-data"
)
_SECRET_ENDS = tuple(_SECRET_WORDS.replace("-", "").split())
_SECRET_HEADER_ENDS = _SECRET_ENDS + ("auth", "authorization", "cookie", "key")

# Control characters but line breaks and tabs, C1 controls, bidirectional overrides, surrogates.
_UNPRINTABLE = (
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff]"
)


def _is_secret(name, ends=_SECRET_ENDS):
    """Return whether a name belongs to a secret value."""
    return name.lower().replace("-", "").replace("_", "").endswith(ends)


def _secret_names(params):
    """Yield the names of parameters whose values must not be shown.

    A parameter is secret by its own name, or by the name it is given as the value of:
    tags[0].key=password tags[0].value=..., updateConfiguration's name and value."""
    lower: dict = {}
    for name in params:
        if _is_secret(name):
            yield name
        elif name.lower().endswith("value"):
            front = name.lower()[: -len("value")]
            lower = lower or {other.lower(): text for other, text in params.items()}
            titles = (lower.get(front + "key"), lower.get(front + "name"))
            if any(isinstance(title, str) and _is_secret(title) for title in titles):
                yield name


def mask_params(params):
    """Return the parameters with secret values replaced."""
    secret = set(_secret_names(params))
    return {name: MASK if name in secret else text for name, text in params.items()}


def _mask_headers(headers):
    """Return the lines of headers, values that may be secret replaced."""
    shown = {name: MASK for name in headers if _is_secret(name, _SECRET_HEADER_ENDS)}
    return [f"{name}: {shown.get(name, value)}" for name, value in headers.items()]


def mask_address(endpoint):
    """Return an address without user and password, query and fragment. Takes any text.

    A password may hold / ? or #, so everything up to the last @ goes."""
    pattern = r"((?:[A-Za-z][\w+.-]*:)?//)?(.*)"
    scheme, rest = re.match(pattern, endpoint, re.DOTALL).groups("")  # type: ignore[union-attr]
    return scheme + re.split("[?#]", rest.rpartition("@")[2])[0]


def mask_values(value, secrets):
    """Return a value of JSON with the given secrets, wherever its texts hold them, replaced."""
    if isinstance(value, str):
        return mask_secrets(value, secrets)
    if isinstance(value, list):
        return [mask_values(item, secrets) for item in value]
    if isinstance(value, dict):
        return {name: mask_values(item, secrets) for name, item in value.items()}
    return value


def mask_secrets(text, secrets):
    """Return text with the given secrets, wherever they stand, replaced."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        if len(secret) > 3:  # shorter ones stand in half of all words
            for form in (secret, cs_encode(secret), quote(secret), jsonlib.dumps(secret)[1:-1]):
                text = text.replace(form, MASK)
    return text


@functools.lru_cache(maxsize=None)
def _secret_patterns():
    """Return (pattern, replacement) pairs that find the values of secret names in any text.

    Each takes time in proportion to the text, whatever a server makes of it."""
    secret = "(?:" + "|".join(_SECRET_WORDS.replace("-", "[_-]?").split()) + ")"
    # A field of JSON, also of JSON within a text (three backslashes deep); then a value beside the
    # secret name that it belongs to. A look-ahead and its group keep what they have matched.
    text = r'\\{0,3}"(?:[^"\\]|\\.)*"?'
    title = rf'"(?:name|key)"\s*:\s*"[\w.\[\]-]*{secret}"'
    field = rf'\\{{0,3}}"[\w.\[\]-]*{secret}\\{{0,3}}"\s*:\s*'
    patterns = [
        (rf"({field})(?:{text}|[\[{{][^\[\]{{}}]*[\]}}]?|[^\s,}}\]\[{{]+)", rf'\1"{MASK}"'),
        (rf'({title}[^{{}}]{{0,200}}?"value"\s*:\s*){text}', rf'\1"{MASK}"'),
        (rf'("value"\s*:\s*)(?=({text}))\2([^{{}}]{{0,200}}?{title})', rf'\1"{MASK}"\3'),
        (rf"(<[\w.-]*{secret}>)[^<]*", rf"\1{MASK}"),  # an element of XML
    ]
    for equals, end in (("=", "&"), ("%3D", "%26")):  # a query, and one within a query
        patterns.append((rf"({secret}{equals})(?:(?!{end})[^&\s\"'<>;\\])+", rf"\1{MASK}"))
    return [(re.compile("(?i)" + pattern), mask) for pattern, mask in patterns]


def mask_text(text, secrets):
    """Return text with secret fields, and the given secrets wherever they stand, replaced."""
    for pattern, mask in _secret_patterns():
        text = pattern.sub(mask, text)
    return mask_secrets(text, secrets)


def escape_unprintable(text):
    """Return text that is safe for a terminal to show."""
    return re.sub(_UNPRINTABLE, lambda found: ascii(found.group())[1:-1], text)


def write_stderr(text):
    """Write a line to standard error; a broken standard error does not stop a program.

    One write for all of it, so that threads do not write into each other's lines."""
    try:
        sys.stderr.write(escape_unprintable(text) + "\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass


def trace_event(event):
    """Show a request as it goes out and its answer as it came, secrets replaced in place."""
    if isinstance(event, Sent):
        request: Any = event.request
        lines = [f"{request.method} {request.masked_url()}", *_mask_headers(request.headers), ""]
        if request.method == "POST":
            lines += [_join_query(request.masked_params()), ""]
        write_stderr("\n".join(lines))
    elif isinstance(event, Answered):
        response = event.response
        lines = [f"{response.status_code} {response.reason}", *_mask_headers(response.headers)]
        lines += ["", response.text, "", f"({event.seconds * 1000:.0f} ms)", ""]
        write_stderr(mask_text("\n".join(lines), event.request.all_secrets()))
    elif isinstance(event, Failed):
        write_stderr(f"{event.error} ({event.seconds * 1000:.0f} ms)\n")


# --- 7 settings and configuration -----------------------------------------------------------------
# 7.1 Settings.
# One table drives the constructor's conversions, the environment, the ini keys, read_config's
# defaults and README (a test compares). A converter takes what a program or an ini file gives and
# returns what the client works with; it raises ValueError, and never quotes what may be a secret.


_TRUE, _FALSE = "y yes t true on 1".split(), "n no f false off 0".split()
_BOOLEANS = {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}


def strtobool(value):
    """Parse a boolean word: y yes t true on 1, n no f false off 0, in any case.

    Raises ValueError for any other word, AttributeError for what is not text."""
    if value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    raise ValueError(f"invalid truth value {value!r}")


def _parse_flag(value):
    """Return the bool that a setting means; None and an empty ini value are False."""
    if value in (None, "", 0, 1):  # False and True are among them
        return bool(value)
    return strtobool(value if isinstance(value, str) else repr(value))


def _number(least=float("-inf"), most=1e9, whole=False, optional=False):
    """Return a converter to a number between the two; nan, booleans and words are refused.

    Beyond 1e9 seconds the platform's own clocks give up."""

    def convert(value):
        if optional and value in (None, ""):
            return None
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
            if least <= number <= most and not (whole and number % 1):
                return number if number % 1 else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
        kind = "whole number" if whole else "number"
        raise ValueError(f"{value!r} is not a {kind} from {least:g} to {most:g}")

    return convert


def _parse_lifetime(value):
    """Return a timedelta, made of seconds if it is none yet."""
    import datetime

    if isinstance(value, datetime.timedelta):
        return value
    return datetime.timedelta(seconds=_number(-1e13, 1e13)(value))


def _parse_method(value):
    """Return "get" or "post"."""
    if isinstance(value, str) and value.lower() in ("get", "post"):
        return value.lower()
    raise ValueError(f"{value!r} is neither get nor post")


def _parse_text(value):
    """Return plain text, or None for none and for empty text."""
    if value is not None and not isinstance(value, (str, bytes)):
        raise ValueError(f"text was expected, got {type(value).__name__}")
    try:
        # The base type's own conversions: a subclass (Ansible's tagged text) may have others.
        text = bytes.decode(value) if isinstance(value, bytes) else str.__str__(value or "")
        text.encode("utf-8")
    except UnicodeError:
        raise ValueError("it holds something that is not UTF-8") from None
    return text or None


def _parse_domain(value):
    """Return a domain's path as log-in wants it: the server's own spelling ROOT/sub means /sub.

    Seen on 4.23: answers say `domainpath: ROOT/sub`, and log-in refuses exactly that (531)."""
    path = _parse_text(value)
    return path and (re.sub(r"\AROOT(?=/|\Z)", "", path) or "/")


def _parse_ca_path(value):
    """Return a path, or None for the system's CA certificates.

    A boolean word, such as an ini file's `verify = false`, reads as None: only
    dangerous_no_tls_verify turns verification off. (A file of such a name needs ./ before it.)"""
    path = None if isinstance(value, bool) else _parse_path(value)
    return path if path and path.lower() not in _BOOLEANS else None


def _parse_pem_path(value):
    """Return a path, a pair of paths (certificate, private key), or None."""
    if isinstance(value, (tuple, list)):
        certificate, key = map(os.fsdecode, value)
        return certificate, key
    return _parse_path(value)


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


def _check_header(name, content):
    """Refuse a header that would break out of its line (RFC 9110, 5.5), never quoting its value."""
    if not isinstance(name, str) or not re.match(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z", name):
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
        raise ValueError("an aiohttp session cannot be used; give a requests.Session, or none")
    return value


def _convert(name, converter, value):
    """Return converter(value). Raises ValueError that begins with the name it was given by."""
    try:
        return converter(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


_Setting = collections.namedtuple("_Setting", "name default convert given_in traits")

# given_in: "both" is read from the environment (CLOUDSTACK_<NAME>) and from ini files under its
# name; "code" is an argument of the constructor only; "tool" is as "both", but for the command line
# alone, which finds its text in _Invocation.settings. CloudStack.__init__ has an argument of that
# name, too, and drops it, since read_config() passes it on; a flag for it stands in _USAGE.
# traits: an "attribute" of a client is what cs 5.2.0 had as one (the names of the others belong to
# the subclasses written for it, as in `self.domain = {...}`); read_config returns "always" even
# what nothing gives; "together" come those that say where a request goes, as whom, and whom it
# trusts. They are never mixed from two files: else a file with nothing but an endpoint, left in a
# working directory, would be sent another file's key. (What the environment and the command line
# say is the user's own word, and goes with any file.)
# fmt: off
SETTINGS: "tuple[Any, ...]" = (
    _Setting("endpoint", None, _parse_text, "both", "attribute together"),
    _Setting("key", None, _parse_text, "both", "attribute together"),
    _Setting("secret", None, _parse_text, "both", "attribute together"),
    _Setting("timeout", 10, _number(0.001), "both", "attribute always"),
    _Setting("method", "get", _parse_method, "both", "attribute always"),
    _Setting("verify", None, _parse_ca_path, "both", "attribute together always"),
    _Setting("cert", None, _parse_pem_path, "both", "attribute together always"),
    _Setting("cert_key", None, _parse_path, "both", "together always"),
    _Setting("name", None, _parse_text, "code", "attribute always"),
    _Setting("retry", 0, _number(0, whole=True), "both", "attribute always"),
    _Setting("retry_backoff", 0.5, _number(0), "both", "attribute"),
    _Setting("job_timeout", None, _number(0, optional=True), "both", "attribute"),
    _Setting("poll_interval", 2.0, _number(0), "both", "attribute always"),
    _Setting("expiration", 600, _parse_lifetime, "both", "attribute always"),
    _Setting("trace", False, _parse_flag, "both", "attribute always"),
    _Setting("dangerous_no_tls_verify", False, _parse_flag, "both", "together always"),
    _Setting("headers", None, _parse_headers, "code", "attribute together"),
    _Setting("session", None, _parse_session, "code", "attribute"),
    _Setting("fetch_result", False, _parse_flag, "code", "attribute"),
    _Setting("username", None, _parse_text, "both", "together"),
    _Setting("password", None, _parse_text, "both", "together"),
    _Setting("domain", None, _parse_domain, "both", "together"),
    _Setting("concurrency", 128, _number(1, whole=True), "code", ""),
    _Setting("max_response_size", 256 * 1024 * 1024, _number(1, whole=True), "both", ""),
    _Setting("recover", False, _parse_flag, "both", ""),
    _Setting("output", None, _parse_text, "tool", ""),
    _Setting("theme", None, _parse_text, "tool", ""),
)
# fmt: on
_CLIENT_SETTINGS: "Any" = {each.name: each for each in SETTINGS if each.given_in != "tool"}
_ATTRIBUTES = frozenset(setting.name for setting in SETTINGS if "attribute" in setting.traits)
_TOGETHER = [setting.name for setting in SETTINGS if "together" in setting.traits]


# 7.2 Configuration: environment and ini files.
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


class Config:
    """A configuration, and where it came from; load_config() returns it."""

    def __init__(self):
        self.settings = {}  # for CloudStack(**settings)
        self.region = None
        self.origins = {}  # {setting: path, variable, or "option"}
        self.values = {}  # {key: (text, path)} of the region's section in the ini files
        self.unknown = []  # (key, path) of keys that no setting has
        self.warnings = []  # texts
        self.regions = set()  # the sections of all files
        self.tried = []
        self.read = []

    def add_file(self, path, parser, region):
        """Take in a region's section of a parsed file. Raises ValueError."""
        self.read.append(path)
        self.regions.update(parser.sections())
        if not parser.has_section(region):
            return
        raw = dict(parser.items(region))
        expand = functools.partial(_expand, raw=raw)
        for key in raw:
            value = _convert(f"{path!a}: [{region}] {key!a}", expand, key)
            is_header = key.startswith(_HEADER) and key != _HEADER
            if key in _CLIENT_SETTINGS and "\n" in value:
                # It may hold a secret that was meant for the next line.
                reason = "the value continues in the next, indented line; each setting stands on a"
                raise ValueError(f"{path!a}: {key}: {reason} line of its own")
            if key not in _CONFIG_KEYS and not is_header:
                used = any(f"%({key})s" in other.lower() for other in raw.values())
                if not used and key not in parser.defaults():
                    self.unknown.append((key, path))
            elif value:
                self.values[key] = (value, path)


def _check_together(values, paths):
    """Raise ValueError if values that belong together come from two of these files.

    values is {key: (text, origin)}."""
    by_file: dict = {}
    for key, (_, origin) in sorted(values.items()):
        if origin in paths and _group_of(key) in _TOGETHER:
            by_file.setdefault(os.path.realpath(origin), f"{origin!a} ({key})")
    if len(by_file) > 1:
        rule = "endpoint, credentials, certificates and headers must all come from one of them"
        raise ValueError(f"the files {' and '.join(by_file.values())} cannot be combined: {rule}")


def _group_of(key):
    """Return the name by which SETTINGS and CLOUDSTACK_OVERRIDES know a key."""
    return "headers" if key.startswith(_HEADER) else key


def _list_ini_paths(config=None):
    """Return the files to read, later ones win, and the one among them that was named, or ""."""
    paths = [os.path.expanduser("~/.cloudstack.ini")]
    try:
        paths.append(os.path.abspath("cloudstack.ini"))
    except OSError:  # the working directory is gone
        pass
    named = os.path.expanduser(config or os.environ.get(_PREFIX + "CONFIG", ""))
    return paths + [named] * bool(named), named


def _read_text(path):
    """Return the text of a file.

    Raises ValueError that says what is wrong with it, FileNotFoundError without one."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except (OSError, ValueError) as error:
        why = "it is not UTF-8 text" if isinstance(error, UnicodeError) else error_text(error)
        raise ValueError(f"cannot read {path!a}: {why}") from None


def parse_ini(path, text):
    """Return a parser of the file as it stands, `%` and all.

    configparser's errors quote lines of the file, which may be secrets: the ValueError says line
    numbers only."""
    import configparser

    parser = configparser.RawConfigParser()
    try:
        parser.read_string(text, source=path)
        return parser
    except (configparser.DuplicateOptionError, configparser.DuplicateSectionError) as error:
        reason = f"line {error.lineno} repeats {getattr(error, 'option', None) or error.section!a}"
    except configparser.ParsingError as error:
        line = getattr(error, "lineno", None) or error.errors[0][0]
        reason = f"line {line} is not 'name = value' in a [section]"
    raise ValueError(f"{path!a} is not an ini file: {reason}")


def _expand(key, raw, depth=10):
    """Return the value of a key of a section.

    `%%` and `%(name)s` mean what they always mean in ini files, any other `%` stands for itself:
    `50%` is `50%`. Raises ValueError for a `%(name)s` that is not there, that leads back here, or
    that leads on for more than ten names, as configparser does: each may double the text."""
    if key not in raw:  # which may be part of a secret with a % in it, and is not quoted
        raise ValueError("it refers to a name that is not there, or to itself")
    others = {name: text for name, text in raw.items() if name != key and depth}

    def replace(found):
        return _expand(found.group(1).lower(), others, depth - 1) if found.group(1) else "%"

    return re.sub(r"%%|%\(([^)]+)\)s", replace, raw[key])


def _read_ini_values(region, config=None):
    """Return the Config of a region, out of the files of _list_ini_paths.

    Raises SystemExit if a file that was named is not there."""
    found = Config()
    found.tried, named = _list_ini_paths(config)
    for path in found.tried:
        try:
            found.add_file(path, parse_ini(path, _read_text(path)), region)
        except FileNotFoundError:
            if path == named:
                raise SystemExit("Config file not found. Tried " + named) from None
    return found


def _read_environment():
    """Return {key: (text, variable)} of the CLOUDSTACK_* variables.

    Empty ones do not count, but for CLOUDSTACK_KEY: an empty one asks for unsigned requests."""
    names = {key: _PREFIX + key.upper() for key in _CONFIG_KEYS}
    for name in os.environ:
        found = re.match(_PREFIX + "HEADER_(.+)", name, re.IGNORECASE)
        if found:
            names[_HEADER + found.group(1).lower().replace("_", "-")] = name
    given = {key: (os.environ[name], name) for key, name in names.items() if os.environ.get(name)}
    if os.environ.get(names["key"]) == "":
        given["key"] = ("", names["key"])
        given.pop("secret", None)
    return given


def unknown_variables():
    """Return the names of CLOUDSTACK_* variables that nothing reads."""
    known = {_PREFIX + name.upper() for name in [*_CONFIG_KEYS, "config", "region", "overrides"]}
    unknown = [name for name in os.environ if name not in known]
    return sorted(filter(re.compile(_PREFIX + "(?!(?i:HEADER_.))").match, unknown))


def _to_settings(values):
    """Return {key: (text, origin)} as the constructor takes it.

    Headers are gathered, and the two booleans of read_config are parsed if they can be."""
    settings: dict = {}
    for key, (text, _) in values.items():
        if key.startswith(_HEADER):
            settings.setdefault("headers", {})[key[len(_HEADER) :]] = text
        elif key in ("trace", "dangerous_no_tls_verify"):
            settings[key] = _BOOLEANS.get(text.lower(), text)
        else:
            settings[key] = text
    return settings


def _merge_layers(*layers):
    """Merge layers of {key: (text, origin)}, lowest first.

    There is a key or there is a user name; and an empty key means that there is no key."""
    merged: dict = {}
    for layer in layers:
        overruled = ["key", "secret"] if "username" in layer else []
        if "key" in layer:
            overruled += ["username", "password", "domain"] if layer["key"][0] else ["secret"]
        for key in overruled:
            merged.pop(key, None)
        merged.update(layer)
    return {key: pair for key, pair in merged.items() if pair[0]}


def load_config(region=None, overrides=None, path=None):
    """Return the Config of a region: its `settings` are what read_config() returns.

    overrides {setting: text} beat all else, as options of the command line do; path stands in for
    CLOUDSTACK_CONFIG. Raises what read_config() raises."""
    # The default's own name asks for nothing: Ansible's modules up to 2.9 always pass it.
    is_explicit = bool(region) and region != _DEFAULT_REGION
    region = region or os.environ.get(_PREFIX + "REGION") or _DEFAULT_REGION
    named = set(os.environ.get(_PREFIX + "OVERRIDES", "").lower().replace(",", " ").split())
    env = _read_environment()
    env_first = "endpoint" in env and not is_explicit and not named
    above = {key: env[key] for key in env if env_first or {key, _group_of(key)} & named}
    above.update({key: (text, "option") for key, text in (overrides or {}).items()})

    found = Config()
    has_key = "key" in env and ("secret" in env or env["key"][0] == "")
    is_complete = has_key or ("username" in env and "password" in env)
    if path or not (env_first and is_complete):
        found = _read_ini_values(region, path)
        if not found.read and "endpoint" not in {**env, **above}:
            raise SystemExit(f"Config file not found. Tried {', '.join(found.tried)}")
        if is_explicit and region not in found.regions:
            import configparser

            raise configparser.NoSectionError(region)
    values = _merge_layers({} if env_first else env, found.values, above)
    _check_together(values, found.read)
    if "endpoint" not in values:
        where = ""
        if region not in found.regions:
            where = f" (there is no section [{region}] in {', '.join(found.read)})"
        error = ValueError(f"the configuration is missing the following keys: endpoint{where}")
        error.config = found  # type: ignore[attr-defined]
        raise error

    settings = {each.name: each.default for each in SETTINGS if "always" in each.traits}
    # trace is None as 5.2.0 has it; the constructor takes it for False.
    settings.update(trace=None, name=region if region in found.regions else None)
    settings.update(_to_settings(values))
    found.settings, found.region = settings, region
    found.origins = {key: origin for key, (_, origin) in values.items()}
    found.warnings = _warnings_of(found)
    return found


def _warnings_of(found):
    """Return what is wrong with the files that were read, although they can be used."""
    secrets = {found.origins.get(key) for key in ("secret", "password")}
    return [
        f"{path} holds a secret and can be read by others; chmod 600 {path}"
        for path in sorted(secrets.intersection(found.read))
        if os.name == "posix" and os.stat(path).st_mode & 0o044
    ]


def parse_section(path, text, region):
    """Return the settings of a region in the text of one ini file. Raises ValueError."""
    found = Config()
    found.add_file(path, parse_ini(path, text), region)
    return _to_settings(found.values)


def list_regions(path=None):
    """Return the sections of all ini files that can be read; path as in load_config."""
    found = set()
    for file in _list_ini_paths(path)[0]:
        try:
            found.update(parse_ini(file, _read_text(file)).sections())
        except (OSError, ValueError):
            pass
    return sorted(found)


def read_config(ini_group=None):
    """Return the settings for `CloudStack(**read_config())`, from environment and ini files.

    ini_group is the region, a section of the ini files; README lists the layers.
    Raises SystemExit if there is no configuration at all, ValueError if it cannot be used,
    configparser.NoSectionError if ini_group is in no file."""
    return load_config(ini_group).settings


def read_config_from_ini(ini_group=None):
    """Return what a region's section holds in the ini files, plus `name` and `headers`.

    Without such a section that is {"name": None}."""
    region = ini_group or os.environ.get(_PREFIX + "REGION") or _DEFAULT_REGION
    found = _read_ini_values(region)
    _check_together(found.values, found.read)
    return dict(_to_settings(found.values), name=region if region in found.regions else None)


# --- 8 command line -------------------------------------------------------------------------------
# A line of words becomes a checked call (_check_call), the call is made (_carry_out), its answer
# is printed (_print_answers). _Invocation holds what they share, and may serve one line after
# another with the same client.

__all__ += ["main"]


# 8.1 Options and exit codes: the words of a line, taken apart, and what a line ends with.


class _Usage(Exception):
    """The command line cannot be carried out as it was typed."""


# code: what the help calls it, and what was raised; the highest that fits is the exit code.
_EXITS: dict = {
    0: ("done", ()),
    1: ("error", (CloudStackException,)),
    2: ("usage", (_Usage, ValueError, OSError, RecursionError)),  # the last: rows nested too deeply
    3: ("no answer", (CloudStackConnectionError, CloudStackTimeoutError)),
    4: ("job still runs", (CloudStackJobTimeout,)),
    130: ("interrupted", (KeyboardInterrupt,)),
}
_REPORTED = tuple(kind for code, (word, kinds) in _EXITS.items() for kind in kinds)

# What --help prints is the table of options, too: "-LETTER, --NAME VALUE  about". VALUE is a choice
# such as a|b, or what stands for the value.
_USAGE = """\
cs [options] COMMAND [name=value ...]  call the CloudStack API, print its answer

  cs listVirtualMachines state=Running    name=@file reads the value from a file
  cs startVirtualMachine id=name:web-01   look up the id by name
  cs --list [WORD ...], cs COMMAND --help   commands, and their parameters
  cs --configure, cs --shell              write the ini file; interactive shell

 -o, --output json|jsonl|table|csv|text  -c, --columns id,name,nic.0.ipaddress
     --where CONDITION  name~^web            --sort [-]COLUMN
     --all  fetch all pages of a list        --sync  refresh the known commands
     --each  run once per stdin row; {name} is that row's field
     --parallel COUNT  rows at a time        --stop-on-error
 -r, --region NAME  ini file's section   -p, --profile NAME  alias of --region
     --config FILE  another ini file         --endpoint URL
     --timeout SECONDS  per request          --retry COUNT
     --async  do not wait for jobs           --wait JOBID  wait for a job
     --job-timeout SECONDS                   --poll-interval SECONDS
     --dry-run  print, do not send           --force  skip validation
 -q, --quiet  fewer messages             -t, --trace  show each exchange
     --color auto|always|never               --theme STYLE  for Pygments
     --post  send by POST                    --completion bash|zsh|fish
     --version                           -h, --help
More: README.rst; the API: https://cloudstack.apache.org/api.html
exit: """ + "  ".join(f"{code} {word}" for code, (word, _) in _EXITS.items()) + "\n"

_Option = collections.namedtuple("_Option", "name value")


def _read_options(text):
    """Return {flag: _Option} of a help text, for --name and -n.

    value: None for a flag, a tuple of all the values there are, or what stands for the value."""
    flags = {}
    for part in text.replace("\n", "  ").split("  "):
        *letter, option = part.strip().split(", ")
        flag, _, value = option.partition(" ")
        if flag.startswith("--"):
            choice = tuple(value.split("|")) if "|" in value else value or None
            flags.update(dict.fromkeys([flag, *letter], _Option(flag[2:], choice)))
    return flags


_FLAGS = _read_options(_USAGE + "--list  --shell  --configure")  # which are in the help's head
FORMATS = _FLAGS["--output"].value
# An empty value of any other is an unset variable of a script: it must not mean the usual region.
_MAY_BE_EMPTY = frozenset(["columns", "sort", "where", "theme"])
# What an option does not go with.
_CLASHES = {
    "--each": "--columns, --sort, --wait, --list, --sync, --shell, a line of the shell, json=false",
    "--where": "json=false",  # a text, in which there are no rows
    "--shell": "--wait, --list, --sync, a command, a line of the shell",
    "--configure": "a command",
}


def _parse_arguments(args):
    """Return {option: value} and the words that are not options; they may stand in any order.

    Names of options are never completed: a new option would change what an abbreviation means."""
    options: dict = dict.fromkeys(option.name for option in _FLAGS.values())
    words = []
    waiting = collections.deque(args)
    while waiting:
        arg = waiting.popleft()
        if not arg.startswith("-"):
            words.append(arg)
        elif arg != "--":
            name, value = _parse_option(arg, waiting)
            options[name] = [*(options[name] or ()), value] if name == "where" else value
    options["region"] = options["region"] or options["profile"]
    return options, words


def _parse_option(arg, waiting):
    """Return an option's name and value, which may be the next of the waiting arguments."""
    ((flag, equals, value),) = re.findall(r"\A(--[^=]*|-.?)(=?)(.*)\Z", arg, re.DOTALL)
    option = _FLAGS.get(flag)
    if option is None:
        names = [other[2:] for other in _FLAGS if other.startswith("--")]  # -v may mean --version
        begun = [name for name in names if "-" + name[0] == flag.lower()][:3]
        near = ["--" + name for name in begun or _near(flag, names, most=1)]
        hint = _did_you_mean(near) or "; parameters are name=value"
        raise _Usage(f"there is no option {flag!a}{hint}")
    if option.value is None:
        if equals:
            raise _Usage(f"option {flag} takes no value: {value!a}; see cs --help")
        waiting.extendleft(["-" + value] if value else [])  # -qt
        return option.name, True
    if not (equals or value):
        is_given = waiting and (option.name == "sort" or not re.match("-[^0-9]", waiting[0]))
        value = waiting.popleft() if is_given else None
    return option.name, _check_value(option, value)


def _check_options(options, *others):
    """Raise _Usage for options that do not go with each other, or with other items of _CLASHES."""
    given = {"--" + name for name, value in options.items() if value}.union(others)
    for name in given.intersection(_CLASHES):
        for other in given.intersection(_CLASHES[name].split(", ")):
            raise _Usage(f"{name} does not go with {other}")
    if given & {"--parallel", "--stop-on-error"} and "--each" not in given:
        raise _Usage("--parallel or --stop-on-error needs --each")


def _merge_options(base, options):
    """Return the options of a line over those that hold for every line of a shell."""
    return {**base, **{name: value for name, value in options.items() if value is not None}}


def _check_value(option, value):
    """Return the value of an option. Raises _Usage for one that it cannot have."""
    if value is None or (value == "" and option.name not in _MAY_BE_EMPTY):
        raise _Usage(f"option --{option.name} needs a value; see cs --help")
    if option.name == "parallel" and not re.match(r"0*[1-9][0-9]{0,5}\Z", value, re.ASCII):
        raise _Usage(f"--parallel {value!a}: it should be a number from 1 up")
    if not isinstance(option.value, tuple):
        return value
    if value.lower() not in option.value:
        near = _did_you_mean(_near(value, option.value, most=1))
        raise _Usage(f"--{option.name}: {value!a} is not one of {', '.join(option.value)}{near}")
    return value.lower()


# A value as it was typed. literal: None; "quoted" or "file" for one that is nothing but a text,
# so that name:... in it is not looked up; "name" for one that is.
_Value = collections.namedtuple("_Value", "text literal")


def _parse_parameters(words):
    """Return {name: [_Value, ...]} of name=value words, in the order given."""
    params: dict = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip()
        if not equals or not name:
            example = "parameters are name=value, such as id=name:web-01"
            raise _Usage(f"{word!a} has no {'name' if equals else repr('=')}; {example}")
        params.setdefault(name, []).append(_parse_value(name, text.strip()))
    return params


def _parse_value(name, text):
    """Return the _Value of a name=value word: quotes taken off, @file and @- read, @@ made one @.

    Within quotes neither @ nor name: has a meaning. "a","b" is not one quoted text."""
    quoted = re.match(r"""(["'])((?!.*\1\s*,\s*\1).*)\1\Z""", text, re.DOTALL)
    if quoted:
        return _Value(quoted.group(2), "quoted")
    if text.startswith("@") and not text.startswith("@@"):
        return _Value(_read_value(name, text[1:]), "file")
    return _Value(text[1:] if text.startswith("@@") else text, None)


def _read_value(name, path):
    """Return the text of a file, or of standard input for "-"; userdata that is not base64 yet is
    made so."""
    source = "standard input" if path == "-" else f"file {path!a} (@@ stands for a plain @)"
    try:
        if path != "-":
            with open(os.path.expanduser(path), "rb") as file:
                content = file.read()
        elif sys.stdin is None:
            raise FileNotFoundError("there is no standard input")
        else:
            content = sys.stdin.buffer.read()
        if name.lower() == "userdata":
            text = b"".join(content.split())
            is_base64 = len(text) % 4 == 0 and re.match(rb"[A-Za-z0-9+/]*={0,2}\Z", text)
            content = text if is_base64 else b2a_base64(content, newline=False)
        return re.sub(r"\r?\n\Z", "", content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _Usage(f"{name}: {source} is not UTF-8 text") from None
    except OSError as error:
        raise _Usage(f"{name}: cannot read {source}: {error_text(error)}") from None


def _joined(values):
    """Return the text that the values of one parameter are sent as."""
    return ",".join(value.text for value in values)


# 8.2 Run, progress and reports.


def main(args=None):
    """Run the command line with these arguments, or those of the process.

    Returns the exit code; `cs --help` says what each means."""
    if sys.stdout is None:  # closed by the process that started this one
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    invocation = _Invocation()
    outcome: Any = True
    try:
        outcome = _attempt(invocation, _dispatch, sys.argv[1:] if args is None else args)
        if invocation.client is not None:
            invocation.client.close()
    except KeyboardInterrupt as error:
        outcome = outcome if _exit_code(outcome) else error
    if args is None and isinstance(outcome, KeyboardInterrupt):
        import signal

        for number in (signal.SIGINT, signal.SIGTERM):  # another would change the exit code
            signal.signal(number, signal.SIG_IGN)
    return _exit_code(outcome)


class _Interrupts:
    """Makes the first SIGINT, SIGTERM or SIGHUP a KeyboardInterrupt, and ignores all others.

    Wrappers and impatient people send several, and none may cut the account of what was begun.
    After the `with` block, or release(), signals have their usual effect again.
    is_over: the first has been seen, or what it would end is done, so that signals are ignored from
    now on."""

    is_over = False
    _quiet_until = 0.0

    def on_first(self):
        """Do what the first is for; another may be put in its place."""
        raise KeyboardInterrupt

    def __enter__(self):
        import signal

        self._usual = {}
        usual = (signal.SIG_DFL, signal.default_int_handler)  # not what nohup has ignored
        is_main = threading.current_thread() is threading.main_thread()
        for number in (1, 2, 15) if is_main else ():  # SIGHUP, SIGINT, SIGTERM
            if signal.getsignal(number) in usual:
                self._usual[number] = signal.signal(number, self._handle)

    def release(self, *exc_info):
        """Give signals their usual effect again."""
        import signal

        while self._usual:
            signal.signal(*self._usual.popitem())

    __exit__ = release

    def _handle(self, number, frame):
        if not self.is_over and time.monotonic() >= self._quiet_until:
            # Python may drop what is raised in the middle of a finalizer; then the next is raised.
            self._quiet_until = time.monotonic() + 1.0
            self.on_first()
            self.is_over = True


def _attempt(invocation, dispatch, line):
    """Do what a line asks for, and report what it raises.

    Returns what was raised, or whether it succeeded."""
    outcome: Any = True
    try:
        with invocation.interrupts:
            try:
                outcome = dispatch(invocation, line)
                invocation.show()
                _write("", flush=True)
            except _REPORTED as error:
                invocation.interrupts.is_over = True
                outcome = error
                _report(invocation, error)
                _write("", flush=True)
    except _OutputFailed as failed:
        if sys.stdout is sys.__stdout__:  # what is buffered goes nowhere, also at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if _exit_code(failed):
            write_stderr(f"cs: cannot write the answer: {error_text(failed.args[0])}")
        outcome = outcome if _exit_code(outcome) else failed  # a failure before this says more
    return outcome


def _exit_code(outcome):
    """Return the exit code for what was raised, or for whether everything succeeded."""
    if isinstance(outcome, _OutputFailed):  # a reader that has seen enough (head) is none
        return 0 if isinstance(outcome.args[0], BrokenPipeError) else 1
    codes = (code for code, (_, kinds) in _EXITS.items() if isinstance(outcome, kinds))
    return max(codes, default=0 if outcome else 1)


def _dispatch(invocation, args):
    """Do what the arguments ask for. Returns whether it succeeded.

    For a shell it returns what became of the first line that failed."""
    # A C locale has left undecoded what is not ASCII (Python 3.6, from cron).
    raw = [arg.encode("utf-8", "surrogateescape") for arg in args]
    args = [arg.decode("utf-8", "surrogateescape") for arg in raw]
    if args and args[0].startswith("--complete="):  # what the scripts of completion ask
        _print_completions(args[0].partition("=")[2], invocation.options)
        return True
    options, words = _parse_arguments(args)
    options = invocation.options = _merge_options(invocation.options, options)
    if words[:1] == ["help"] and not options["list"]:
        options["help"], words = True, words[1:]
    is_inside = invocation.clients is not None  # a shell
    _check_options(options, *["a command"] * bool(words), *["a line of the shell"] * is_inside)
    is_idle = not (words or options["wait"] or options["list"] or options["sync"])
    if options["version"]:
        _write(f"cs {__version__}\n")
    elif options["completion"]:
        _write(_SCRIPTS[options["completion"]])
    elif options["configure"]:
        return _configure(invocation)
    elif options["help"] and not words:
        _write(_USAGE)
    elif options["shell"] or (is_idle and not is_inside and _is_at_terminal()):
        if not options["shell"]:
            invocation.connect()  # without a configuration it could do nothing
        invocation.interrupts.release()  # each line has its own
        return _Shell(options).run()
    elif is_idle:
        raise _Usage("no command given; see cs --help")
    else:
        return _use_server(invocation, words)
    return True


def _use_server(invocation, words):
    """Do what needs a client. Returns whether it succeeded."""
    options = invocation.options
    invocation.conditions = [_Condition(text, invocation.say) for text in options["where"] or ()]
    invocation.connect()
    if options["sync"] and not options["dry-run"]:
        _fetch_catalog(invocation)
    if options["list"]:
        return _list_commands(invocation, words)
    if options["wait"]:
        return _wait_for_jobs(invocation, [options["wait"], *words])
    if not words:
        call = _CheckedCall("listApis", {}, [], pages=True)
        return not options["dry-run"] or _show_plan(invocation, call)
    if not re.match(r"[\w.-]+\Z", words[0], re.ASCII):
        raise _Usage(f"{words[0]!a} is not the name of a command; see cs --help")
    words = _join_command(invocation, words)
    if options["help"]:
        return _describe_command(invocation, words[0])
    if options["each"]:
        return _carry_out_each(invocation, words)
    return _carry_out(invocation, _check_call(invocation, _parse_parameters(words[1:]), words))


class _Invocation:
    """Holds what one use of the command line has: options, settings, client, progress.

    Messages go through say(), so that -q has one place. clients holds those of a shell: {what leads
    to a client: (settings, the client)}; they outlive the invocation."""

    def __init__(self, options=None, clients=None, place=""):
        self.options = _parse_arguments([])[0] if options is None else options
        self.settings = {}
        self.conditions: list = []  # of --where
        self.catalog: Any = None  # the list of commands, once it was read
        self.warned = False  # of what an old list of commands does not know
        self.ids: dict = {}  # what _id_of_name found
        self.client: Any = None
        self.clients = clients
        self.place = place  # "line 3: " of a script
        self.interrupts = _Interrupts()
        self.format = "json"
        self.shown = ""  # of progress
        self.under_way = _CheckedCall("", {}, [])
        self.request: Any = None  # the one that was sent last
        self.fetched: Any = None  # how many rows of how many there are, of all pages

    def say(self, text):
        """Write a line on standard error, unless -q."""
        if not self.options["quiet"]:
            self.show()
            write_stderr(text)

    def show(self, text=""):
        """Show a line of progress on standard error, in place of the last; without one, no line."""
        if text != self.shown and (not text or self._is_watched()):
            self.shown = text
            try:
                sys.stderr.write("\r\x1b[K" + text)
                sys.stderr.flush()
            except (OSError, ValueError):
                pass

    def _is_watched(self):
        """Return whether progress is seen, and by nobody else: a pipe's reader may write to the
        same terminal."""
        is_silent = self.options["quiet"] or self.client.trace
        is_alone = sys.stdout.isatty() or sys.stdout.seekable()
        return _is_terminal(sys.stderr) and is_alone and not is_silent

    def connect(self):
        """Make the client that configuration and options describe. Raises _Usage, ValueError.

        In a shell, a client that an earlier line made for them is used again."""
        clients = {} if self.clients is None else self.clients
        options = {name: self.options[name.replace("_", "-")] for name in _OVERRIDES}
        overrides = {name: str(value) for name, value in options.items() if value is not None}
        overrides.update({"method": "post"} if self.options["post"] else {})
        place = (self.options["region"], self.options["config"], *sorted(overrides.items()))
        if place not in clients:
            clients[place] = self._make_client(place[0], place[1], overrides)
        self.settings, self.client = clients[place]
        self.client.on_event = self.observe
        name = self.options["output"] or self.settings.get("output") or "json"
        self.format = _check_value(_FLAGS["--output"], str(name))

    def _make_client(self, region, path, overrides):
        """Return settings and the client; warn of what is odd.

        It works all the same, so warnings are for terminals: not for cron, nor for programs that
        read standard error as well. But without a key few servers answer."""
        config = Config()
        try:
            config = load_config(region, overrides, path)
            settings = {"recover": True, **config.settings}
            client = CloudStack(**settings)
            client.check()
        except (Exception, SystemExit) as error:
            text = str(error)
            if type(error).__name__ == "NoSectionError":  # to import configparser takes its time
                there = ", ".join(list_regions(path)) or "none"
                text = f"Error: region {region!a} not in config; there are {there}"
            elif isinstance(error, SystemExit):
                names = "CLOUDSTACK_ENDPOINT, CLOUDSTACK_KEY, CLOUDSTACK_SECRET"
                text += f"; `cs --configure` makes one, or set {names}"
            elif not isinstance(error, ValueError):
                raise
            unknown = _describe_unknown(getattr(error, "config", config))
            raise _Usage("; ".join(filter(None, [text, unknown]))) from None
        if _is_terminal(sys.stderr) or _is_unsigned(client):
            for text in filter(None, [*config.warnings, _describe_unknown(config)]):
                self.say("Warning: " + text)
        return settings, client

    def observe(self, event):
        """Take notice of what happens to a request; the client's on_event."""
        self.request = getattr(event, "request", self.request)
        if isinstance(event, Rows):
            self.fetched = event
            self.show(f"{event.seen}{f' of {event.total}' if event.total else ''} rows")
        elif isinstance(event, Waiting):
            jobid = _cut(_one_line(event.jobid), 60)  # it is the server's word
            self.show(f"waiting for job {jobid}, {int(event.seconds)} s")

    def masked(self, text):
        """Return the beginning of the server's words without what they repeat of our secrets."""
        secrets = self.request.all_secrets() if self.request else []
        # Masked first: a secret may be long, and be cut in two.
        return mask_text(mask_secrets(text, secrets)[:10000], secrets)[:2000]

    def is_colored(self):
        """Return whether colours are wanted."""
        usual = _is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
        return {"always": True, "never": False}.get(self.options["color"], usual)


# Settings that are options, too.
_OVERRIDES = ("endpoint", "timeout", "retry", "job_timeout", "poll_interval", "trace")


def _describe_unknown(config):
    """Return a text about keys of the section and variables that no setting has; empty if none."""
    found = []
    for key, path in [*config.unknown, *((name, "") for name in unknown_variables())]:
        bare = re.sub("[^a-z]", "", key.lower().replace("cloudstack_", ""))
        meant = "".join(f" ({name}?)" for name in _near(bare, _CONFIG_KEYS, most=1))
        found.append(f"{key!a}{' in ' if path else ''}{path}{meant}")
    return "not known as settings: " + ", ".join(found) if found else ""


def _is_unsigned(client):
    """Return whether requests go out without a signature and without a session."""
    return client.key is None and not client.get_setting("username")


def _is_terminal(stream):
    """Return whether a stream is a terminal that can do more than print."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


class _CheckedCall:
    """A call that may be made; options are those of client.call().

    words: the command and its parameters as they were typed, for messages."""

    def __init__(self, command, params, words, pages=False, wait=None, **options):
        self.command, self.params, self.words = command, params, words
        self.pages, self.wait, self.options = pages, wait, options

    def make(self, client):
        """Return what client.call() does; a coroutine for AIOCloudStack."""
        if self.words[:1] == ["--wait"]:
            return client.wait_job(self.params["jobid"])
        pages, wait, options = self.pages, self.wait, self.options
        return client.call(self.command, self.params, pages=pages, wait=wait, **options)


_CONTROL_WORDS = ("json", "fetch_list", "fetch_result", "opcode_name")  # no parameters


def _check_call(invocation, values, words):
    """Return the call of a command (the first of words) with parameters {name: [_Value, ...]}.

    Raises _Usage for what is wrong with it, by itself or by the list of commands."""
    line = invocation.options
    command, recover = _check_against_catalog(invocation, words[0], values)
    _fill_in_ids(invocation, command, values)
    params = {name: _joined(given) for name, given in values.items()}
    own: dict = {name: params.pop(name) for name in _CONTROL_WORDS if name in params}
    for name in own.keys() - {"opcode_name"}:
        try:
            own[name] = strtobool(own[name])
        except ValueError:
            raise _Usage(f"{name}={own[name]!a} is neither true nor false") from None
    if own.get("json") is False:
        _check_options(line, "json=false")
    # In a command that changes something there are no pages.
    pages = (own.pop("fetch_list", False) or line["all"]) and only_reads(command)
    wait = own.pop("fetch_result", not (line["async"] or "async" in command.lower()))
    return _CheckedCall(command, params, [command] + words[1:], pages, wait, recover=recover, **own)


def _carry_out(invocation, call):
    """Make a call and print the answer. Returns whether it succeeded."""
    invocation.under_way = call
    if invocation.options["dry-run"]:
        return _show_plan(invocation, call)
    if call.options.get("json") is not False:
        return _print_answers(invocation, call, _answers(invocation, call))
    text = call.make(invocation.client).rstrip("\n")
    if re.match(r"(?i)\s*<(?:!doctype )?html\b", text):
        raise CloudStackException("Unexpected response from CloudStack", "a page of HTML: " + text)
    invocation.show()
    if text:
        _write_line(text)
    return True


def _answers(invocation, call):
    """Yield the answer of a call; of a list whose rows are written as they arrive, its pages."""
    if call.pages and invocation.format == "jsonl" and not invocation.options["sort"]:
        for page in invocation.client.pages(call.command, call.params, **call.options):
            yield page[0] if isinstance(page, tuple) else page
            _write("", flush=True)
    else:
        yield call.make(invocation.client)


def _tells_success(answer):
    """Return whether an answer of status 200 is a success: some report a failure all the same."""
    said = answer if isinstance(answer, dict) else {}
    return "errortext" not in said and str(said.get("success")).lower() != "false"


def _wait_for_jobs(invocation, words):
    """Wait for the jobs of these ids, `-` for those on standard input, and print their results.

    Returns the first failure, or whether all is well."""
    jobids = " ".join(_read_value("--wait", "-") if word == "-" else word for word in words).split()
    if not jobids or not all(re.match(r"[\w.-]+\Z", jobid, re.ASCII) for jobid in jobids):
        raise _Usage(f"--wait takes ids of jobs, not {', '.join(map(ascii, jobids)) or 'nothing'}")
    first: Any = True
    for number, jobid in enumerate(jobids):
        call = _CheckedCall("queryAsyncJobResult", {"jobid": jobid}, ["--wait", *jobids[number:]])
        try:
            outcome = _carry_out(invocation, call)
        except CloudStackException as error:
            _report(invocation, error)
            outcome = error
        first = first if _exit_code(first) else outcome
    return first


def _warn_of_missing_rows(invocation, call, rows, seen):
    """Warn if the server cut a list short, or if rows were lost between its pages."""
    total, why = None, "--all for the rest"
    if call.pages and invocation.fetched:
        _, seen, total = invocation.fetched
        why = "the list changed while it was read"
    elif seen and not {name.lower() for name in call.params} & {"page", "pagesize"}:
        total = rows.answer.get("count") if isinstance(rows.answer, dict) and rows.is_list else None
    if isinstance(total, int) and total > seen:
        invocation.say(f"{seen} of {total} rows came; {why}")


def _show_plan(invocation, call):
    """Print what would be sent (--dry-run); nothing is. Returns True."""
    request = invocation.client.prepare(call.command, call.params, **call.options)
    lines = [request.method + " " + request.masked_url().partition("?")[0]]
    lines += [f"{name}={text}" for name, text in sorted(request.masked_params().items())]
    _write("".join(escape_unprintable(line) + "\n" for line in lines))
    return True


# What can be done about an error: the first whose facts (of _hint) all hold. A number is the
# errorcode, or the status of an answer that is not CloudStack's. In braces stand other facts.
_HINTS = (
    ("532", "A limit of the account or project is reached: {cs} listResourceLimits."),
    ("533", "There is no room for it now: another zone, host or a smaller offering may do."),
    ("536", "Something else still uses it."),
    ("job-failed", ""),  # all others are about a request, not about its job
    ("--wait 431", "The server knows no such job."),
    ("job stated", "The command was accepted; only asking for its job failed."),
    ("login stated", "Check user name, password and domain."),
    ("unsigned 401", "There was no key, so the request was not signed."),
    ("projectid 432", "You may not be in this project."),
    ("--sync 432", "Your role may not ask for the list of commands; calls work without it."),
    ("too-large", "It is over 1 MiB, the most that servers usually take."),
    ("outcome-unknown", "Check whether it was done before you send it again."),
    ("unsent", "Check the endpoint, its name, the network, proxies and --timeout."),
    ("no-api", "Check the endpoint: it usually ends in /client/api."),
    ("401", "Check endpoint, key, secret and clock; or there is no such command: {cs} --list."),
    ("429", "Send fewer requests, or have them sent again: --retry 3."),
    ("430", "Run {cs} {command} --help to list its parameters."),
    ("431 field", "{value} is filled in from the rows of standard input with --each."),
    ("431 id lister", "Nothing has this id, or it is not yours: {cs} {lister} --all -c id,name"),
    ("431 id", "Nothing has this id, or it is not yours."),
    ("431 param", "{param}=name:{value}, if that is a name."),
    ("431", "Run {cs} {command} --help to list its parameters."),
    ("432", "No such command, or your role may not use it: {cs} --sync, then {cs} --list."),
    ("503", "The server is in maintenance; nothing was done. Try again later, or with --retry 3."),
    ("530", "The management server's log says more."),
    ("531", "Your role or account may not do this."),
)  # fmt: skip


def _report(invocation, error):
    """Report on standard error what was raised, and what can be done."""
    invocation.show()
    if isinstance(error, CloudStackException):
        _report_failure(invocation, error)
    elif isinstance(error, KeyboardInterrupt):
        told = _how_to_go_on(invocation, error)
        if told or invocation.clients is not None:  # a shell's prompt begins below the ^C
            write_stderr(f"Interrupted. {told}".rstrip())
    else:
        text = error_text(error)
        front = "" if text.startswith("Error: ") else "cs: "
        write_stderr(f"{front}{invocation.place}{text}")


def _report_failure(invocation, error):
    """Say what failed: the message, the call, codes, a hint; then the server's own words."""
    document = _server_error(error)
    names = [name for name in ("errorcode", "cserrorcode") if name in document]
    is_wait = invocation.options["wait"]
    left = _left_behind(invocation.under_way, error)
    told = {
        "CloudStack error": invocation.place + invocation.masked(_sentence(error)),
        "  Call": _typed_call(invocation), "  Server": mask_address(invocation.client.endpoint),
        "  Codes": invocation.masked(", ".join(f"{name} {document[name]}" for name in names)),
        "  It was about" if is_wait else "  Left behind": invocation.masked(left),
        "  Hint": _hint(invocation, error, document),
    }  # fmt: skip
    invocation.say("\n".join(f"{name}: {text}" for name, text in told.items() if text))
    is_unknown = is_wait and document.get("errorcode") == 431
    if error.jobid and not (error.job_failed or is_unknown):
        write_stderr(_how_to_go_on(invocation, error))  # also with -q: nothing else shows the id
    is_read = sys.stdout.isatty() and not invocation.options["quiet"]
    if document and invocation.format == "json" and not is_read:
        _write(_json_text(error.response.json()) + "\n")
    elif not (document or error.response is None or isinstance(error, CloudStackJobTimeout)):
        invocation.say(invocation.masked(error.response.text))


def _server_error(error):
    """Return the document in which CloudStack itself states an error, or an empty one."""
    document = getattr(error, "error", None)
    is_one = isinstance(document, dict) and {"errortext", "errorcode", "jobstatus"} & set(document)
    return document if is_one else {}


def _sentence(error):
    """Return an exception in a line: its message, and the text of the server's error."""
    parts = [*error.args, _server_error(error).get("errortext")]
    return ": ".join(str(part) for part in parts if part)


def _left_behind(call, error):
    """Return what a failed job was about, such as the machine of a deployment, or an empty text.

    What the call itself names was there before."""
    if str(error.jobinstanceid) in ",".join(map(str, call.params.values())).split(","):
        return ""
    return " ".join(str(part) for part in (error.jobinstancetype, error.jobinstanceid) if part)


def _hint(invocation, error, document):
    """Return what can be tried after an error, or an empty text."""
    call = invocation.under_way
    code = document.get("errorcode", _status_of(error))
    sent = invocation.request.params if invocation.request else {}
    pattern = r"Invalid parameter (\w{1,50}) value=(.{1,255}?)(?: due to |$)"
    found = re.search(pattern, invocation.masked(str(document.get("errortext"))))
    param, value = found.groups() if found else ("", "")
    catalog = _cached_catalog(invocation) if param else None
    lister = _lister(catalog, call.command, param, {}) if catalog else None
    facts = {
        str(code): True, "stated": document, "no-api": code in (200, 404, 405),
        "job": error.jobid, "job-failed": error.job_failed, "--wait": invocation.options["wait"],
        "login": sent.get("command") == "login", "unsigned": _is_unsigned(invocation.client),
        "projectid": "projectid" in map(str.lower, call.params), "--sync": not call.command,
        "too-large": "request.content.size" in _sentence(error),
        "outcome-unknown": error.outcome_unknown, "unsent": error.unsent,
        "param": param, "value": value, "field": re.match(r"\{.*\}\Z", value),
        "id": re.match(r"[0-9]+\Z|[0-9a-fA-F-]{36}\Z", value), "lister": lister and lister.name,
        "cs": _shell_line(invocation, []), "command": call.command,
    }  # fmt: skip
    hint = next((hint for needed, hint in _HINTS if all(map(facts.get, needed.split()))), "")
    return hint.format_map(facts)


def _typed_call(invocation):
    """Return the call that failed as it can be typed again, secrets replaced."""
    shown = mask_params(invocation.under_way.params)
    pairs = [(word, word.partition("=")[0]) for word in invocation.under_way.words]
    words = [f"{name}={MASK}" if shown.get(name.strip()) == MASK else word for word, name in pairs]
    return _shell_line(invocation, words) if words else ""


def _shell_line(invocation, words):
    """Return a command line that carries out these words with the same configuration."""
    line = ["cs"]
    for name in ("region", "config", "endpoint"):
        value = invocation.options[name]
        if value:
            line += ["--" + name, mask_address(value) if name == "endpoint" else value]
    return " ".join(_shell_word(_cut(word, 500)) for word in line + words)


def _shell_word(word):
    """Quote a word for a shell, what cannot be printed escaped."""
    import shlex

    return shlex.quote(escape_unprintable(word).replace("\n", r"\n").replace("\t", r"\t"))


def _how_to_go_on(invocation, error):
    """Return what a call that was cut short may have done, and how to wait for its job."""
    call, jobid = invocation.under_way, getattr(error, "jobid", None)
    if not jobid:
        changes = call.command and not only_reads(call.command)
        return f"{call.command} may have run; check before you send it again." if changes else ""
    line = _shell_line(invocation, call.words if invocation.options["wait"] else ["--wait", jobid])
    if getattr(error, "outcome_unknown", False):
        # The answer was lost. Without the list of commands, any command is given an id.
        return f"{call.command} may have run; if it started a job, this waits for it: {line}"
    return f"Job {jobid} may still be running; to go on waiting for it: {line}"


# 8.3 Formats.

# Columns that come first in a table, in this order.
_PREFERRED = (
    "id jobid name state status allocationstate jobstatus type zonename account username"
    " nic ipaddress cidr hostname cpunumber memory size templatename serviceofferingname"
    " virtualmachinename vmname key value resourcetypename resourcetype max cmd level success"
    " displayname displaytext description created".split()
)
_MOST_COLUMNS = 8


class _OutputFailed(Exception):
    """Standard output could not be written."""


def _write(text, flush=False):
    """Write text on standard output, whatever it can show. Raises _OutputFailed."""
    out = sys.stdout
    try:
        try:
            out.write(text)
        except UnicodeEncodeError:  # Python 3.6 under a C locale escapes; others take UTF-8
            encoding = "utf-8" if out.errors == "surrogateescape" else out.encoding
            raw = text.encode(encoding, "backslashreplace")
            out.write(raw.decode(out.encoding, out.errors))
        if flush:
            out.flush()
    except OSError as error:
        raise _OutputFailed(error) from None


def _write_line(text):
    """Write a line whose characters are data: as they are, but escaped on a terminal."""
    _write((escape_unprintable(text) if sys.stdout.isatty() else text) + "\n")


def _json_text(document, indent=2):
    """Return JSON as it is printed.

    Characters that a terminal must not see are \\uXXXX; if standard output cannot show all others,
    so are all that are not ASCII."""
    is_ascii = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = jsonlib.dumps(document, indent=indent, sort_keys=True, ensure_ascii=is_ascii)
    return re.sub(_UNPRINTABLE, lambda found: jsonlib.dumps(found.group())[1:-1], text)


def _highlighted(text, theme):
    """Return JSON coloured by Pygments, where it is installed and has the theme."""
    try:
        from pygments import formatters, highlight, lexers

        formatter = formatters.Terminal256Formatter(style=theme or "default")
    except (ImportError, ValueError):  # or there is no such style
        return text
    return highlight(text, lexers.JsonLexer(), formatter).rstrip("\n")


class _Rows:
    """The rows of an answer: a list's items, else the one object in it (as of a job), else itself.

    Assign to rows to put others in their place; document() is the answer with them."""

    def __init__(self, answer):
        document = {} if answer in (None, "") else answer
        found = answer if isinstance(answer, list) else find_rows(document)
        self.answer, self.is_list = answer, found is not None
        only = list(answer.values()) if isinstance(answer, dict) and len(answer) == 1 else []
        self.rows = found if self.is_list else dicts(only) or [answer]
        self._place = self.rows if self.is_list else self.rows[0]  # what they stand for

    def document(self, is_counted):
        """Return the answer with these rows in the place of its own, and their count if wanted."""
        if self.answer in (None, ""):
            return self.answer
        if not (self.is_list or self.rows):
            return {}
        new = self.rows if self.is_list else self.rows[0]
        if self._place is self.answer or not isinstance(self.answer, dict):
            return new
        count = {"count": len(self.rows)} if is_counted and "count" in self.answer else {}
        fields = {**self.answer, **count}
        return {key: new if value is self._place else value for key, value in fields.items()}


def _pick(value, path, unknown=None):
    """Return what a dotted path leads to, or None. A list without an index gives all of its items.

    unknown: what to return where null or an empty list or object hides whether it leads somewhere.
    """
    head, _, rest = path.partition(".")
    if isinstance(value, list):
        if not re.match(r"[0-9]{1,9}\Z", head):
            found = [_pick(item, path, unknown) for item in value]
            return [item for item in found if item is not None] or (None if value else unknown)
        inner = value[int(head)] if int(head) < len(value) else None
    elif isinstance(value, dict) and (path in value or head in value):
        if path in value:  # a name with a dot of its own
            head, rest = path, ""
        inner = value[head]
    else:
        return None
    if inner is None or (rest and inner == {}):
        return unknown
    return _pick(inner, rest, unknown) if rest else inner


def _print_answers(invocation, call, answers):
    """Print what a call gave: one answer, or the pages of a list. Returns whether it succeeded.

    Raises _Usage, with nothing printed, if no row has a column of --where."""
    chosen = list(filter(None, map(str.strip, (invocation.options["columns"] or "").split(","))))
    needed = [condition.column for condition in invocation.conditions]
    sorted_by = (invocation.options["sort"] or "").lstrip("-")
    unseen = list(filter(None, dict.fromkeys([*needed, *chosen, sorted_by])))
    needed = needed if only_reads(call.command) else []  # what was done cannot be refused
    rows, held, seen, shown = _Rows([]), [], 0, 0
    known: list = []  # fields, in case that one is unseen
    for answer in answers:
        rows = _Rows(answer)
        held.append(rows)
        seen += len(rows.rows)
        unseen = [name for name in unseen if _is_missing(name, rows.rows)]
        known += _field_names(rows.rows) if unseen else []
        while held and not (seen and set(needed).intersection(unseen)):
            shown += _print_rows(invocation, held.pop(0), chosen)

    for name in unseen if seen else ():
        if name in needed:
            raise _Usage(f"--where: {_no_such_column(name, known)}")
        invocation.say(f"Warning: {_no_such_column(name, known)}")
    if not shown and only_reads(call.command) and _is_terminal(sys.stderr):
        invocation.say("no rows")
    _warn_of_missing_rows(invocation, call, rows, seen)
    return _tells_success(rows.answer)


def _print_rows(invocation, rows, columns):
    """Print the rows that meet --where, sorted, with these columns; return how many they are."""
    rows.rows = _filtered(invocation.conditions, rows.rows)
    column = invocation.options["sort"] or ""
    path = column.lstrip("-")
    if path:
        rows.rows.sort(key=lambda row: _order_key(_cell(_pick(row, path))), reverse=column != path)
        rows.rows.sort(key=lambda row: _pick(row, path) is None)  # those without it come last
    if columns:
        rows.rows = [{name: _pick(_fields(row), name) for name in columns} for row in rows.rows]
    invocation.show()
    _PRINTERS[invocation.format](invocation, rows, columns)
    return len(rows.rows)


def _cell(value):
    """Return a value as text.

    Lists are joined by commas, objects are compact JSON, booleans are as the API spells them."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and not any(isinstance(item, dict) for item in value):
        return ",".join(map(_cell, value))
    return jsonlib.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _fields(row):
    """Return the fields of a row; what is no object has one, its value."""
    return row if isinstance(row, dict) else {"value": row}


def _default_columns(invocation, rows):
    """Return sensible columns, id, name, state and the like first; for csv all that there are.

    They are those of the list of commands, if it is there, so that a list has the same header
    whatever rows come."""
    objects = dicts(rows.rows)
    catalog = _cached_catalog(invocation) if objects and rows.is_list else None
    spec = catalog.find(invocation.under_way.command) if catalog else None
    fields = spec.fields if spec else []
    present = dict.fromkeys(name for name in fields if "." not in name)
    hidden = {name.partition(".")[0] for name in fields if "." in name}
    if invocation.format == "csv" or not fields:
        present.update(dict.fromkeys(key for row in objects for key in row))
        hidden.update(key for row in objects for key in row if isinstance(row[key], (dict, list)))
    columns = sorted(present, key=lambda name: (*_PREFERRED, name).index(name))
    if invocation.format != "csv":
        if "nic" in present:  # nic.ipaddress is the same as ipaddress, and all
            hidden.add("ipaddress")
            columns[columns.index("nic")] = "nic.ipaddress"
        if "jobstatus" in present and "cmd" not in present:  # of the job that made it, no job
            hidden.update(["jobid", "jobstatus"])
        columns = [name for name in columns if name not in hidden][:_MOST_COLUMNS]
    return columns or ["value"]


def _grid(invocation, rows, columns):
    """Return a header and the texts of each row, in these columns or sensible ones.

    Without rows there is a header only if columns were chosen."""
    columns = columns or (_default_columns(invocation, rows) if rows.rows else [])
    texts = [[_cell(_pick(_fields(row), name)) for name in columns] for row in rows.rows]
    return [columns, *texts] if columns else []


def _near(name, names, most=3):
    """Return the names that a misspelt one may be meant for, the likeliest first."""
    import difflib

    lower = {other.lower(): other for other in names}
    return [lower[match] for match in difflib.get_close_matches(name.lower(), lower, most)]


def _did_you_mean(names):
    """Return the end of a message that suggests names; an empty text without any."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _no_such_column(name, known):
    """Return the text for a column that no row has, with those that may be meant."""
    return f"no row has {name!a}{_did_you_mean(_near(name, known))}"


def _is_missing(name, rows):
    """Return whether no row has a column. Where all it could be in is empty, it is not missing."""
    head = name.partition(".")[0]
    found = [_pick(row, name, ()) for row in dicts(rows) if head in row or name in row]
    return all(value in (None, ()) for value in found) and (None in found or () not in found)


def _field_names(rows):
    """Return every dotted path that leads somewhere in rows, one level into lists and objects."""
    names: dict = {}
    for key, value in [item for row in dicts(rows) for item in row.items()]:
        names[key] = True
        for inner in dicts(value[:1] if isinstance(value, list) else [value]):
            names.update((f"{key}.{field}", True) for field in inner)
    return list(names)


def _print_json(invocation, rows, columns):
    """Print the answer as JSON; nothing for one that was empty, unless JSON was asked for."""
    if rows.answer in ({}, [], None, "") and not invocation.options["output"]:
        return
    # The count stays as it is without --where: a script looks for the rest by it.
    text = _json_text(rows.document(is_counted=bool(invocation.conditions)))
    if invocation.is_colored():
        text = _highlighted(text, invocation.options["theme"] or invocation.settings.get("theme"))
    _write(text + "\n")


def _print_jsonl(invocation, rows, columns):
    """Print each row as a line of JSON."""
    _write("".join(_json_text(row, None) + "\n" for row in rows.rows))


def _print_csv(invocation, rows, columns):
    """Print RFC 4180: a header, CRLF, quotes if they are needed.

    By hand, since the csv module of 3.10 refuses NUL characters."""
    # Where lines end with CRLF the stream itself makes it of LF; a terminal needs none.
    end = "" if os.linesep == "\r\n" or sys.stdout.isatty() else "\r"
    for cells in _grid(invocation, rows, columns):
        _write_line((",".join(map(_csv_field, cells)) or '""') + end)


def _csv_field(text):
    """Return a text as a field of CSV."""
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def _print_text(invocation, rows, columns):
    """Print the values of each row, separated by tabs; the only one of an object as it is.

    (As it is, a value may have several lines: those of a list could be taken for rows.)"""
    escapes = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    for cells in _grid(invocation, rows, columns)[1:]:
        is_value = len(cells) == 1 and not rows.is_list
        line = "\t".join(cell.translate(escapes) for cell in cells)
        _write_line(re.sub(r"\n\Z", "", cells[0]) if is_value else line)


def _width(text):
    """Return how many columns of a terminal a text takes: two for each wide character, none for
    one that combines with another."""
    if len(text.encode("utf-8", "replace")) == len(text):  # ASCII
        return len(text)
    from unicodedata import category, east_asian_width

    seen = [char for char in text if category(char) not in ("Mn", "Me", "Cf")]
    return len(seen) + sum(east_asian_width(char) in "WF" for char in seen)


def _terminal_width():
    """Return the width of the terminal on standard output; as good as endless if it is not one."""
    if not sys.stdout.isatty():
        return sys.maxsize
    import shutil

    return shutil.get_terminal_size().columns


def _cut(text, width):
    """Return text cut to a width, with an ellipsis if anything is left out."""
    text = text[: 2 * width + 100]  # combining characters aside, more cannot be seen
    if _width(text) <= width:
        return text
    return text[: sum(end < width for end in itertools.accumulate(map(_width, text)))] + "…"


def _one_line(text):
    """Return text that is safe to show, on one line."""
    return escape_unprintable(text.replace("\n", " ").replace("\t", " "))


def _print_table(invocation, rows, columns):
    """Print aligned columns under a header.

    On a terminal, default columns that do not fit are left out, which is said: an id that leaves
    no 20 characters to others, then those at the end. A line that is still too long is cut."""
    table = [list(map(_one_line, cells)) for cells in _grid(invocation, rows, columns)]
    widths = [max(map(_width, cells)) for cells in zip(*table)]
    left_out, room = [], _terminal_width()
    if not columns and len(widths) > 1 and table[0][0] == "id" and widths[0] + 22 > room:
        left_out, table, widths = ["id"], [line[1:] for line in table], widths[1:]
    starts = itertools.accumulate([0, *(width + 2 for width in widths)])
    fitting = sum(start + min(width, 20) <= room for start, width in zip(starts, widths))
    most = len(widths) if columns else max(fitting, 1)
    for number, line in enumerate(table):
        padded = [text + " " * (width - _width(text)) for text, width in zip(line[:most], widths)]
        text = _cut("  ".join(padded).rstrip(), room)
        is_bold = number == 0 and invocation.is_colored()
        _write(f"\x1b[1m{text}\x1b[0m\n" if is_bold else text + "\n")
    left_out += table[0][most:] if table else []
    if left_out and _is_terminal(sys.stderr):
        invocation.say(f"no room for {', '.join(left_out)}; -c chooses columns")


_PRINTERS = {
    "json": _print_json, "jsonl": _print_jsonl,
    "table": _print_table, "csv": _print_csv, "text": _print_text,
}  # fmt: skip


# 8.4 The list of commands.
# What the server offers: the rows of listApis as they came, kept in a file.

_CATALOG_LIFE = 30 * 86400  # seconds; an older one only warns
_SYNC_TIMEOUT = 60.0  # seconds; a server that has just started took 19.5 for its first answer
_ALWAYS_KNOWN = frozenset([*_CONTROL_WORDS, *(
    "response customjobid page pagesize expires signature signatureversion apikey sessionkey uuid"
    " ctxuserid ctxaccountid ctxstarteventid ctxdetails".split()
)])  # fmt: skip
_REFUSALS = (431, 432, 531)  # statuses of what an account may not ask for

_Param = collections.namedtuple("_Param", "name type required description related")


class _CommandSpec:
    """What is known of one command: a row of listApis, whatever shape it has."""

    def __init__(self, api):
        def texts(row, names):
            return [str(row.get(name) or "") for name in names]

        self.name, self.description = texts(api, ("name", "description"))
        self.is_async = api.get("isasync") is True
        made = [_Param(*texts(param, _Param._fields)) for param in dicts(api.get("params"))]
        self.params = sorted(made, key=lambda param: (not param.required, param.name))
        self.required = [param.name for param in self.params if param.required]
        self.fields = []  # of the answer; those of an object in it are dotted
        for field in dicts(api.get("response")):
            name = field.get("name")
            inner = [f"{name}.{row.get('name')}" for row in dicts(field.get("response"))]
            self.fields += [name, *inner] if isinstance(name, str) else []

    def find_param(self, name):
        """Return the _Param of a name in any case, or None."""
        return next((param for param in self.params if param.name.lower() == name.lower()), None)


class _Catalog(dict):
    """{command: its row of listApis as JSON}, for one account: all are not parsed to find one.

    It is empty if the account may not ask for them."""

    def __init__(self, lines, fetched_at):
        super().__init__(line.split(" ", 1) for line in lines)
        self.age = time.time() - fetched_at  # in seconds

    def summaries(self):
        """Return (name, description) of each command."""
        return [(name, str(jsonlib.loads(self[name]).get("description") or "")) for name in self]

    def find(self, name):
        """Return the _CommandSpec of a name in any case, or None."""
        found = [name] if name in self else [x for x in self if x.lower() == name.lower()]
        return _CommandSpec(jsonlib.loads(self[found[0]])) if len(found) == 1 else None

    def meant(self, text):
        """Return the command that a text means in any case, singular or plural, or None."""
        return {_bare(name): name for name in self}.get(_bare(text))


def _bare(name):
    """Return what is left of a name without case and plural, vm written out."""
    return _written_out(name).rstrip("iesy")


def _written_out(text):
    """Return a text in lower case, with the usual abbreviation written out."""
    return text.lower().replace("vm", "virtualmachine")


def _make_catalog(rows):
    """Return the _Catalog of rows of listApis; those without a proper name are left out."""
    rows = [row for row in rows if isinstance(row.get("name"), str)]
    rows = [row for row in rows if re.match(r"[\w.-]{1,100}\Z", row["name"], re.ASCII)]
    return _Catalog(sorted(f"{row['name']} {jsonlib.dumps(row)}\n" for row in rows), time.time())


def _cache_path(client):
    """Return the path of the list of commands of this endpoint and account.

    Its name is a hash, so that it says nothing about them."""
    import hashlib

    account = [client.endpoint, client.key, *map(client.get_setting, ("username", "domain"))]
    digest = hashlib.sha256(repr(account).encode("utf-8")).hexdigest()
    return _own_path("XDG_CACHE_HOME", ".cache", digest[:32])


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


def _fetch_catalog(invocation, is_needed=True):
    """Ask the server for the list of commands, keep it, say how many there are, and return it.

    An account that may not have it gets one that is false, if none is needed; kept, so that this
    is told once. Raises CloudStackException, and ValueError if --sync cannot keep it."""
    client = invocation.client
    timeout = None if invocation.options["timeout"] else max(_SYNC_TIMEOUT, client.timeout)
    try:
        catalog = _make_catalog(dicts(client.call("listApis", pages=True, timeout=timeout)))
        if not catalog:
            raise _unexpected("listApis gave no commands")
        told = f"{len(catalog)} commands of {mask_address(client.endpoint)} are now known"
    except CloudStackApiException as error:
        if is_needed or _status_of(error) not in _REFUSALS:
            raise
        catalog = _make_catalog(())
        told = "Your role may not ask for the list of commands; names work without it"
    path = _cache_path(client)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        _write_private(path, "".join(f"{name} {row}" for name, row in catalog.items()))
    except OSError as error:
        problem = f"cannot write the cache {path!a}: {error_text(error)}"
        if invocation.options["sync"]:
            raise ValueError(problem) from None
        invocation.say("Warning: " + problem)
    invocation.say(told)
    invocation.catalog = catalog
    return catalog


def _cached_catalog(invocation):
    """Return the _Catalog that is kept, which is read once; None if there is none."""
    if invocation.catalog is None:
        try:
            with open(_cache_path(invocation.client), encoding="utf-8") as file:
                invocation.catalog = _Catalog(file, os.fstat(file.fileno()).st_mtime)
        except (OSError, ValueError):
            pass
    return invocation.catalog


def _check_against_catalog(invocation, command, params):
    """Return the command in its own spelling, and whether its lost answer may be recovered.

    Without a job there is nothing by which it could be found again. Raises _Usage for what the list
    of commands knows to be wrong, unless --force; an old list only warns, once."""
    catalog = _cached_catalog(invocation)
    spec = catalog.find(command) if catalog else None
    problems = list(_wrong_params(spec, params)) if spec else []
    if catalog and not spec and command not in ("login", "logout"):  # which no server lists
        problems = [_unknown_command(catalog, command)]
    if problems and not invocation.options["force"]:
        text = "\n    ".join(problems)
        sync = f"`{_shell_line(invocation, ['--sync'])}` fetches the list of commands again"
        if 0 <= catalog.age < _CATALOG_LIFE:
            if not (spec and text.startswith(spec.name + " needs")):  # which neither would help
                text += f"\n    Nothing was sent. {sync}; --force sends the call as it is."
            raise _Usage(text)
        if not invocation.warned:  # of the first of many rows
            days = f"the list of commands is {catalog.age / 86400:.0f} days old"
            invocation.say(f"Warning: {text}\n    ({days}; {sync})")
            invocation.warned = True
    may_have_job = spec is None or spec.is_async
    return spec.name if spec else command, may_have_job and invocation.settings["recover"]


def _wrong_params(spec, params):
    """Yield a sentence for each parameter that the server would ignore, and one for those missing.

    To the server an empty text is a value; an empty id or number is not."""
    types = {param.name.lower(): param.type for param in spec.params}
    given = set()
    for name, values in params.items():
        base, text = name.partition("[")[0].lower(), _joined(values)  # tags, of tags[0].key
        if text or types.get(base) not in ("uuid", "integer", "long"):
            given.add(base)
        if base not in types and base not in _ALWAYS_KNOWN:
            near = ["id=name:" + text] if base == "name" and "id" in types else _near(base, types)
            yield f"{spec.name} has no parameter {name!a}{_did_you_mean(near)}"
    missing = [name for name in spec.required if name.lower() not in given]
    if missing:
        yield f"{spec.name} needs {', '.join(missing)}; see cs {spec.name} --help"


def _unknown_command(catalog, name):
    """Return the sentence about a command that the list of commands does not have.

    Habits from elsewhere may have spelled it: a noun or a verb alone, in singular or plural."""
    meant = [catalog.meant(form) for form in (name, "list" + name, name + "vm")]
    near = list(filter(None, meant))[:1] or _near(name, catalog)
    return f"no command {name!a} is available to you{_did_you_mean(near)}"


def _join_command(invocation, words):
    """Return the words with `stop virtualmachine` made one, where that means some command."""
    apart = list(itertools.takewhile(lambda word: "=" not in word, words))
    joined = "".join(apart)
    catalog = _cached_catalog(invocation)
    if catalog and not catalog.find(words[0]) and catalog.meant(joined):
        return [joined, *words[len(apart) :]]
    return words


def _list_commands(invocation, words):
    """Print the commands in whose name or description all the words stand (--list).

    Returns whether there are any."""
    catalog = _cached_catalog(invocation) or _fetch_catalog(invocation)
    found = catalog.summaries()
    for word in map(_written_out, words):
        found = [pair for pair in found if word in _written_out(" ".join(pair))]
    if not found:
        quoted = " and ".join(map(ascii, words))
        invocation.say(f"No command has {quoted} in its name or description")
    longest = max((len(name) for name, _ in found), default=0)
    width = _terminal_width()
    for name, description in found:
        _write(_cut(_one_line(f"{name:{longest}}  {description.strip()}").rstrip(), width) + "\n")
    return bool(found)


def _describe_command(invocation, name):
    """Print what a command takes and returns (COMMAND --help)."""
    import textwrap

    catalog = _cached_catalog(invocation) or _fetch_catalog(invocation)
    spec = catalog.find(name)
    if spec is None:
        raise _Usage(_unknown_command(catalog, name) + "\n    `cs --list WORD` looks for one.")
    lines = [spec.name, "  " + spec.description]
    lines += ["  It starts a job, which is waited for unless --async."] if spec.is_async else []
    for required, group in itertools.groupby(spec.params, lambda param: param.required):
        lines += ["", "Required:" if required else "Optional:"]
        lines += [f"  {param.name} ({param.type})  {param.description}" for param in group]
    top = ", ".join(field for field in spec.fields if "." not in field)
    lines += ["", "Returns: " + top] if top else []
    wrapper = textwrap.TextWrapper(min(_terminal_width(), 100), subsequent_indent="    ")
    lines = [part for line in lines for part in wrapper.wrap(line[:5000]) or [""]]
    others = [x for x in spec.params if _takes_ids(x.name) and x.name not in _PLACES]
    # Without a template, deployVirtualMachine makes nothing.
    shown = [x for x in spec.params if x.required or x.name == "templateid"] or others[:1]
    lines += ["", " ".join(["Example: cs", spec.name, *map(_example, shown)])]
    _write(escape_unprintable("\n".join(lines)) + "\n")
    return True


def _example(param):
    """Return how a parameter can be given."""
    if param.type == "map":
        return f"'{param.name}[0].key=...' '{param.name}[0].value=...'"  # quoted for zsh
    return f"{param.name}={'name:...' if _takes_ids(param.name) else '...'}"


def _takes_ids(name):
    """Return whether a parameter takes an id, or several."""
    return name.lower().endswith(("id", "ids"))


# 8.5 Completion.
# The shells' scripts hand over the line up to the cursor and get lines of `word TAB description`.
# Words come partly from the server, and names from tenants: only words that no shell would evaluate
# are given, and the scripts never evaluate any.

_SCRIPTS = {
    "bash": r"""
_cs_complete() {
    local found line="${COMP_LINE:0:COMP_POINT}" ends="${COMP_WORDBREAKS//[^=:]/}" cut=""
    local quotes="${line//[^\']/}" word="${line##*[[:space:]]}"
    COMPREPLY=()
    while IFS= read -r found; do
        [[ "$found" == $'\t'* ]] && { COMPREPLY=("${found#?}" " "); return; }  # a message
        COMPREPLY+=("${found%%$'\t'*}")
    done < <(if [[ "$word" == *=@* ]]; then compgen -P "${word%%@*}@" -f -- "${word#*@}"
        else command "${COMP_WORDS[0]}" --complete="$line" 2>/dev/null; fi)
    if (( ${#quotes} % 2 )); then  # bash replaces what follows an open quote, and closes it
        COMPREPLY=("${COMPREPLY[@]#*\'}"); COMPREPLY=("${COMPREPLY[@]%\'}")
    elif [[ -n "$ends" ]]; then  # else what follows the last = or :
        cut="${word%"${word##*[$ends]}"}"; COMPREPLY=("${COMPREPLY[@]#"$cut"}")
    fi
    [[ "${COMPREPLY[*]}" == *[=,] ]] && compopt -o nospace 2>/dev/null
}
complete -o nosort -F _cs_complete cs 2>/dev/null || complete -F _cs_complete cs
""",
    "zsh": r"""#compdef cs
_cs() {
    compset -P '*=@' && { _files; return }
    local line="${(j: :)words[1,CURRENT-1]} $PREFIX"
    local -a found=(${(f)"$(command ${words[1]} --complete="$line" 2>/dev/null)"}) end
    local -a plain=(${found%%$'\t'*}) shown=(${found/$'\t'/  -- })
    (( $#plain )) || { compadd -x "${${shown[1]#  -- }//\%/%%}"; return }
    [[ $#plain = 1 && $plain[1] != *[=,] ]] || end=(-S '')
    compadd -U -Q -V cs "${end[@]}" -l -d shown -- $plain
    # a name that is typed stays there, although the words begin with name:
    [[ $#plain -gt 1 && $plain[1] != "$PREFIX"* ]] && compstate[insert]= compstate[list]=list
}
if [[ "$funcstack[1]" = _cs ]]; then _cs "$@"; else compdef _cs cs; fi
""",
    "fish": r"""
function __cs_complete
    set -l word (string match -r '(.*=@)(.*)' -- (commandline -ct))
    and __fish_complete_path $word[3] | string replace -r '^' $word[2]
    and return
    set -l found (env (commandline -opc)[1] --complete=(commandline -cp) 2>/dev/null)
    string match -q \t'*' -- "$found"  # a message
    and printf '\n%s\n' (string trim -- "$found") >&2
    and commandline -f repaint
    or string replace -r "'([^'\t]*)'" '$1' -- $found  # fish quotes by itself
end
complete -c cs -k -f -a '(__cs_complete)'
""",
}
# What no shell evaluates; within quotes, spaces and parentheses are safe, too.
_SAFE_WORD = r"(?:[A-Za-z0-9_.,:/@%+=\[\]-]|'(?! )[A-Za-z0-9_.:/@%+() -]+(?<! )')+\Z"
_KEY_TIMEOUT = 1.0  # seconds that a list command may take at a key


class _Line:
    """A line as far as it is typed. Raises _Usage for options that are wrong.

    option: the one whose value is being typed, if any; words: those before it that are not options;
    front: what stays of the last word, such as `--output=`, `id=` or `ids=1,`; name: what stands
    before = in it; typed: the rest of the last word, with its quotes. base: a shell's options."""

    def __init__(self, text, base):
        pattern = r"""(?:\\.?|'[^']*'?|"[^"]*"?|[^\s'"\\])+"""
        cursor = "|"  # so that there is a last word, although nothing of it may be typed yet
        *words, last = re.findall(pattern, text + cursor, re.DOTALL)[1:] or [cursor]
        words = [*map(_unquoted, words), *re.findall("^--[^=]*=", last)]
        option = _FLAGS.get(words[-1].rstrip("=")) if words else None
        self.option = option if option and option.value else _Option("", None)
        if self.option.value:
            del words[-1]
        options, self.words = _parse_arguments(words)
        self.options = _merge_options(base, {**options, "quiet": True})
        parameter = "(?:[^=]*=(?:(?<=s=).*,)?)?"  # several ids have commas between them
        front = "(?:--[^=]*=)?(?:-|.*,)?" if self.option.value else parameter
        found: Any = re.match(front, last[:-1], re.DOTALL | re.IGNORECASE)
        self.front = found.group()
        self.name = self.front.partition("=")[0]
        self.typed = last[len(self.front) : -1]


def _unquoted(word):
    """Return a word as a shell would pass it on."""
    return re.sub(r"""\\(.)|['"]""", r"\1", word)


def _print_completions(text, base):
    """Print the words that may stand where the cursor is, at the end of the text."""
    try:
        for word, description in _completions(text, base):
            _write(f"{word}\t{description}".rstrip("\t") + "\n")
    except (_Usage, ValueError) as error:  # no word, so that no shell puts it on the line
        _write(f"\t{_one_line(str(error))}\n")


def _completions(text, base):
    """Return (word, description) of what may stand at the end of a line, and is safe to type.

    Raises _Usage for what must be done first, ValueError for settings that cannot be used."""
    line = _Line(text, base)
    words = {}
    for word, about in _candidates(line).items():
        # What may stand for an id was chosen by names.
        if _takes_ids(line.name) or word.lower().startswith(line.typed.lower()):
            words[line.front + word] = _cut(_one_line(about), 60)
    return [pair for pair in words.items() if re.match(_SAFE_WORD, pair[0])]


def _candidates(line):
    """Return {word: description} of what may stand after a line's front."""
    option = line.option
    if option.name in ("region", "profile"):
        return dict.fromkeys(list_regions(line.options["config"]), "")
    if option.name not in ("", "columns", "sort", "where"):
        return dict.fromkeys(option.value if isinstance(option.value, tuple) else (), "")
    if not (option.value or line.front) and line.typed.startswith("-"):
        return {flag: "" for flag in sorted(_FLAGS) if flag[1] == "-"}

    invocation = _Invocation(line.options)
    invocation.connect()
    catalog = _cached_catalog(invocation)
    if catalog is None:
        raise _Usage(f"to have commands completed, type: {_shell_line(invocation, ['--sync'])}")
    spec = catalog.find(_join_command(invocation, line.words)[0]) if line.words else None
    given = {word.partition("=")[0].lower(): word.partition("=")[2] for word in line.words}
    if spec is None:
        return {} if line.words or option.value else dict(catalog.summaries())
    if option.value:
        end = "=" if option.name == "where" else ""
        return {field + end: "" for field in spec.fields}
    if not line.front:
        return {x.name + "=": x.description for x in spec.params if x.name.lower() not in given}
    if _takes_ids(line.name):
        return _id_words(line, _rows_at_a_key(invocation, spec, line.name, given))
    is_boolean = getattr(spec.find_param(line.name), "type", "") == "boolean"
    return {"true": "", "false": ""} if is_boolean else {}


def _id_words(line, rows):
    """Return {word: description} of what an ...id parameter may be: names, or else ids.

    What is typed may begin a name, name: and a name, or an id. A name is offered where it is safe
    to type and nothing else has it. rows: {id: row}."""
    typed = _unquoted(line.typed)
    begun = re.sub("^name:", "", typed).lower()
    owners = collections.Counter(name for row in rows.values() for name in row_names(row))
    offered: list = []  # ("name:" or "", the name or id, description)
    for ident, row in rows.items():
        begins = [name for name in row_names(row) if name.lower().startswith(begun)]
        safe = [x for x in begins if owners[x] == 1 and re.match(_SAFE_WORD, f"'{x}'")]
        offered += [("name:", name, ident) for name in safe]
        if not safe and (begins or ident.lower().startswith(typed.lower())):
            offered.append(("", ident, " / ".join(row_names(row))))
    # All in quotes if one is: a shell replaces what was typed by what all words have in common.
    form = "{}'{}'" if any(re.search("[ ()]", text) for _, text, _ in offered) else "{}{}"
    form = "'{}{}'" if line.typed[:1] in ("'", '"') else form
    return {form.format(kind, text): about for kind, text, about in offered}


def _rows_at_a_key(invocation, spec, name, given):
    """Return {id: row} of the list command whose ids a parameter takes.

    A log-in that is refused deletes the list of commands, without which no key causes another one:
    five of them lock an account."""
    lister = _lister(invocation.catalog, spec.name, name, given)
    if lister is None or _lacking(lister, given):
        return {}
    client = invocation.client
    client.timeout, client.retry = _KEY_TIMEOUT, 0  # of a log-in, too
    try:
        with client:
            answer = client.call(lister.name, next(_questions(lister, given)))
    except CloudStackException as error:
        if error.response is not None and "loginresponse" in error.response.text:
            os.unlink(_cache_path(client))
        return {}
    rows = {str(row.get("id") or ""): row for row in _in_place(dicts(find_rows(answer)), given)}
    return {x: rows[x] for x in rows if re.match(r"[\w-]+\Z", x, re.ASCII)}  # no @file


# 8.6 Configure.

# What is asked, and what an answer looks like. An answer is never repeated: pasted a line too
# early, it is the secret.
_QUESTIONS = {
    "endpoint": ("Endpoint (a full URL, such as https://host/client/api): ", r"https?://[^\s@]+\Z"),
    "key": ("API key: ", "."),
    "secret": ("Secret key (not shown): ", "."),
    "save": ("Save them all the same? [y/N] ", ""),
    "output": (f"Output format ({'|'.join(FORMATS)}) [json]: ", rf"(?i)(?:{'|'.join(FORMATS)}|)\Z"),
}


def _configure(invocation):
    """Ask for a section, try it, add it to ~/.cloudstack.ini (--configure).

    Returns whether it was written; of one that does not work, a person decides."""
    options = invocation.options
    region = options["region"] or os.environ.get(_PREFIX + "REGION") or _DEFAULT_REGION
    if not re.match(r"[^\[\]\s][^\[\]\r\n]*\Z", region) or region == "DEFAULT":
        raise _Usage(f"{region!a} cannot be the name of a section")
    path = os.path.realpath(os.path.expanduser(options["config"] or "~/.cloudstack.ini"))

    text = _text_without_section(path, region)  # refused before anything is asked
    section = f"[{region}]\n"
    for name in ("endpoint", "key", "secret"):
        section += f"{name} = {_ask(name).replace('%', '%%')}\n"
    settings = {**parse_section(path, text + section, region), "trace": options["trace"]}
    client = invocation.client = CloudStack(**settings)
    client.on_event = invocation.observe
    try:
        if not _fetch_catalog(invocation, is_needed=False):  # it says what came of it
            client.listCapabilities()  # a call that every role may make
        invocation.say("They work.")
    except CloudStackException as error:
        _report(invocation, error)
        if _ask("save").lower() not in ("y", "yes"):
            invocation.say("Nothing was written.")
            return False
    section += f"output = {_ask('output') or 'json'}\n"

    text = _text_without_section(path, region)  # as it is now: others may have written to it
    try:
        _write_private(path, text + section)
    except OSError as error:
        raise ValueError(f"cannot write {path!a}: {error_text(error)}") from None
    invocation.say(f"Section [{region}] is in {path} now.")
    if _PREFIX + "ENDPOINT" in os.environ and region == _DEFAULT_REGION:
        invocation.say("The environment's CLOUDSTACK_ENDPOINT, key and secret go before it.")
    return True


def _text_without_section(path, region):
    """Return the text that a section can be added to.

    Raises _Usage if the file has the section, which a person may have edited; ValueError for a
    broken file."""
    try:
        text = _read_text(path).rstrip("\n")
    except FileNotFoundError:
        return ""
    if parse_ini(path, text).has_section(region):
        raise _Usage(f"[{region}] stands in {path}; edit it there, or give another --region")
    return text + "\n\n" if text else ""


def _ask(name):
    """Ask a person until the answer makes sense. Raises _Usage if there is none."""
    from contextlib import redirect_stdout
    from getpass import getpass

    question, pattern = _QUESTIONS[name]
    while True:
        try:
            with redirect_stdout(sys.stderr):
                is_hidden = name == "secret" and sys.stdin.isatty()
                answer = getpass(question) if is_hidden else input(question)
        except (AttributeError, EOFError, RuntimeError):  # no standard input, or Ctrl-D
            if name == "output":
                return ""
            raise _Usage(f"no answer to '{question.strip()}'; nothing was written") from None
        if re.match(pattern, answer.strip()):
            return answer.strip()
        write_stderr("  That cannot be used; please type it again, or press Ctrl-C to end")


# 8.7 Names for ids.
# name:web-01 where an id belongs is looked up before the call, by the list command that completion
# asks, too.

# The kind of thing that a parameter's ids belong to, where its name, or for a plain id the
# command's, does not show it. There is no list command for "none".
_IDS_OF = dict(pair.split("=") for pair in """
    registeruserkeys.id=user getuserkeys.id=user discovergpudevices.id=host
    generateclusterdrsplan.id=cluster executeclusterdrsplan.id=cluster removeipfromnic.id=none
    findstoragepoolsformigration.id=volume migratesystemvm.virtualmachineid=systemvm
    revokesecuritygroupingress.id=none revokesecuritygroupegress.id=none type.uservm=virtualmachine
    type.loadbalancer=loadbalancerrule acl=networkacllist downpolicy=autoscalepolicy
    group=instancegroup guestos=ostype ip=publicipaddress ipaddress=publicipaddress
    ipv4subnetforzone=ipv4subnetsforzone kubernetesversion=kubernetessupportedversion
    lbrule=loadbalancerrule node=virtualmachine objectstorage=objectstoragepool os=ostype
    releasepodipaddress.id=none publiciprange=vlaniprange s2scustomergateway=vpncustomergateway
    storage=storagepool target=systemvm uppolicy=autoscalepolicy vmgroup=autoscalevmgroup
    vmprofile=autoscalevmprofile
    """.split())  # fmt: skip
# What listApis would say, for an account that may not ask it.
_USUAL_PARAMS = [{"name": "keyword"}, {"name": "listall"}, {"name": "projectid"}]
_USUAL_LISTS = [
    {"name": "list" + things, "params": [*_USUAL_PARAMS, *more]}
    for names, more in (
        ("Accounts AffinityGroups DiskOfferings Domains NetworkOfferings Networks Projects"
         " SecurityGroups ServiceOfferings Snapshots Users VPCs VirtualMachines Volumes Zones", []),
        ("Templates", [{"name": "templatefilter"}]),
        ("Isos", [{"name": "isofilter"}]),
    )
    for things in names.split()
]  # fmt: skip
# Parameters of a call that tell things of one name apart, and the fields with the places' names.
# They are looked up before others.
_PLACES = {"zoneid": "zonename", "domainid": "domain", "account": "account", "projectid": "project"}


def _fill_in_ids(invocation, command, params):
    """Replace names by ids in {name: [_Value, ...]}.

    Raises _Usage for a name that no thing has, or that several have."""
    for param in sorted(params, key=lambda param: param.lower() not in _PLACES):
        parts = [part for value in params[param] for part in _split_names(param, value)]
        for index, part in enumerate(parts):
            if part.literal == "name":
                parts[index] = _id_of_name(invocation, command, param, part.text, params)
        params[param] = parts
    invocation.show()


def _split_names(param, value):
    """Return the parts of a value, each marked as a "name" to look up or as another literal.

    In a list a comma ends a name only before another name or an id: others are the name's own."""
    if value.literal or not _takes_ids(param):
        return [value._replace(literal=value.literal or "quoted")]
    end = r",(?=name:|[0-9a-fA-F-]{36}(?:,|\Z))"
    texts = re.split(end, value.text) if param.lower().endswith("s") else [value.text]
    return [_Value(text, "name" if text.startswith("name:") else "quoted") for text in texts]


def _id_of_name(invocation, command, param, text, params):
    """Return the id, a _Value, of what has the name in a text such as name:x. Raises _Usage.

    A listing shows a project's things only if it names the project, which is put into params."""
    given = {name.lower(): _joined(values) for name, values in params.items()}
    typed, name = f"{param}={text}", text.partition(":")[2]
    if not name.strip():
        raise _Usage(f"{typed}: a name is missing after name:")
    if _cached_catalog(invocation) is None:
        _fetch_catalog(invocation, is_needed=False)
    catalog = invocation.catalog or _make_catalog(_USUAL_LISTS)
    spec, lister = catalog.find(command), _lister(catalog, command, param, given)
    if lister is None:
        raise _Usage(f"{typed}: there is no list command to look a name up by; give an id")
    lacking = _lacking(lister, given)
    if lacking:
        raise _Usage(f"{typed}: {lister.name} looks it up, and needs {lacking}; or give an id")

    may_choose = "projectid" not in given and (spec is None or spec.find_param("projectid"))
    if may_choose and not only_reads(command) and param.lower() not in ("id", "ids"):
        given["projectid"] = ""  # it makes something for the account, out of the account's things
    key = (lister.name, name, *(given.get(other) for other in [*_PLACES, *lister.required]))
    if key not in invocation.ids:  # once for all rows of --each that ask for the same
        invocation.ids[key] = _look_up(invocation, lister, typed, name, given)
    row = invocation.ids[key]
    if may_choose and only_reads(command) and row.get("projectid"):
        params["projectid"] = [_Value(str(row["projectid"]), "file")]
    return _Value(str(row["id"]), "file")


def _lister(catalog, command, name, given):
    """Return the list command whose ids a parameter takes, or None.

    It is listZones for zoneid, and for a plain id that of the command's own object. If the server
    relates the parameter to list commands, it is one of them."""
    spec = catalog.find(command)
    param = spec.find_param(name) if spec else None
    related = re.findall(r"\blist\w+", param.related) if param else []
    things = _things(command, name.lower(), given)
    names = [catalog.meant("list" + _IDS_OF.get(thing, thing)) for thing in things]
    for other in [other for other in names if other in (related or names)] + related:
        lister = catalog.find(other or "")
        if lister and "id" not in lister.required:
            return lister
    return None


def _things(command, name, given):
    """Yield the kinds of thing that ids may belong to, the likeliest first: zone for zoneid."""
    name = name[:-1] if name.endswith("s") else name
    known = _IDS_OF.get(f"{command.lower()}.{name}")
    if name in ("resourceid", "entityid"):
        kind = given.get(name[:-2] + "type", "").lower()
        known = _IDS_OF.get("type." + kind, kind)
    if known is not None:
        yield known
    elif name == "id":
        # stopVirtualMachine, resetPasswordForVirtualMachine, prepareHostForMaintenance
        words = re.findall("[A-Z]+(?![a-z])|[A-Z]?[^A-Z]+", command[:100])[1:]
        starts = [at for at, word in enumerate(words, 1) if word in ("For", "To", "From")]
        parts = [words[at:] for at in [0, *starts]] + [words[:-end] for end in range(1, len(words))]
        yield from ("".join(part).lower() for part in parts)
    else:
        thing = re.sub(r"(uu)?id\Z", "", name[-50:])
        yield from (thing[start:] for start in range(max(1, len(thing) - 1)))  # zone of destzoneid


def _lacking(lister, given):
    """Return the parameters that a list command needs and the call does not have, as a text."""
    return " and ".join(x for x in lister.required if x not in given and x != "templatefilter")


def _look_up(invocation, lister, typed, name, given):
    """Return the one row of a list command that has a name. Raises _Usage."""
    keyword = name.rpartition("/")[2]  # of a domain's path
    # To the server it may be a pattern, and what is not ASCII is compared in the server's own ways.
    can_search = lister.find_param("keyword") and re.match(r"[\w .()/-]+\Z", keyword, re.ASCII)
    for word in [keyword, ""] if can_search else [""]:
        questions = list(_questions(lister, given, word))
        rows = [row for x in questions for row in _ask_list(invocation, lister, typed, x)]
        if rows_named(rows, name):
            break

    found = rows_named(_in_place(rows, given), name)
    if len(found) > 1 and not any("project" in row for row in found):
        questions[0].pop("listall", None)
        own = [row["id"] for row in _ask_list(invocation, lister, typed, questions[0])]
        own = [row for row in found if row["id"] in own]
        if len(own) == 1:
            found = own
            invocation.say(f"{typed}: several have it; your account's own is {own[0]['id']}")
    try:
        return pick_row(lister.name, name, rows, found)
    except LookupError as error:
        problem = f"{typed}: {error}"
    if "*" in name:
        where = f"--where 'name~^{name.partition('*')[0]}'"
        problem += f"\n    For all names of a kind: cs {lister.name} --all {where} | cs ... --each"
    elif "Give its id" not in problem:
        problem += f"; cs {lister.name} -o table -c id,name shows what there is"
    raise _Usage(problem + "\n    The call was not sent.")


def _questions(lister, given, keyword=""):
    """Yield the parameters of the requests that together return all rows of a list command.

    What belongs to a project is listed for projects only. Templates and ISOs that cannot be run are
    listed as one's own, and to administrators among all."""
    has = lister.find_param
    values = {**given, "keyword": keyword, "listall": "true" if has("listall") else ""}
    fixed = {x: values[x] for x in [*lister.required, "keyword", "listall"] if values.get(x)}
    filters = [name for name in ("templatefilter", "isofilter") if has(name)]
    project = re.sub("^name:.*", "-1", given.get("projectid", ""))  # at a key; rows tell its name
    projects = [{"projectid": project or "-1"}, {}] if has("projectid") else [{}]
    for kind in ("executable", "self", "all") if filters else ("",):
        for more in projects if project else projects[::-1]:
            yield {**fixed, **dict.fromkeys(filters, kind), **more}


def _ask_list(invocation, lister, typed, question):
    """Return the rows of a list command. Raises _Usage if this account may not ask it at all."""
    words = [lister.name, *(f"{param}={value}" for param, value in question.items())]
    call = invocation.under_way = _CheckedCall(lister.name, question, words, pages=True)
    try:
        return [row for row in dicts(call.make(invocation.client)) if "id" in row]
    except CloudStackApiException as error:
        if _status_of(error) not in _REFUSALS:
            raise
        if not {"-1", "self", "all"} & set(question.values()):  # which not everybody may ask for
            raise _Usage(f"{typed}: {_sentence(error)}; give an id") from None
        return []


def _in_place(rows, given):
    """Return the rows that fit a call's zone, domain, account and project.

    What is in another zone never fits; the others decide only if some row fits them."""
    for place, name in _PLACES.items():
        if place in given:
            fits = [x for x in rows if given[place] in (x.get(place) or "", f"name:{x.get(name)}")]
            nowhere = [row for row in rows if not row.get(place)]
            rows = fits + nowhere if place == "zoneid" else fits or rows
    return rows


# 8.8 Rows that meet conditions: --where.

# Compiled when it is used.
_CONDITION = r"([^=!<>~]+)(!=|<=|>=|=?~|==?(?![<>])|[<>])(.*)\Z"
_ORDERS = {"<": (-1,), "<=": (-1, 0), ">": (1,), ">=": (0, 1)}  # what comparing may give
_NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?)(?: ?(%|[kmgtp]?i?b|[kmg]?hz|m?s))?\Z"
_DATE = r"(?m)^[0-9]{4}-[0-9]{2}(?![0-9])"
_VERSION = r"v?([0-9]{1,9}(?:\.[0-9]{1,9})*)(?:[-+/].*)?\Z"  # an address, too


class _Condition:
    """One --where: a column, a sign and a value. Raises _Usage for what cannot be one."""

    def __init__(self, text, say):
        found = re.match(_CONDITION, text, re.DOTALL)
        self.column, self.sign, self.wanted = map(str.strip, found.groups() if found else ("",) * 3)
        if not self.column or (self.sign in _ORDERS and not self.wanted):
            raise _Usage(f"--where {text!a}: it should be 'COLUMN=VALUE', or != ~ < <= > >= for =")
        self.say: Any = say  # of the first text that has no order beside the value
        try:
            self.pattern = re.compile(self.wanted, re.IGNORECASE) if "~" in self.sign else None
        except (re.error, OverflowError, RecursionError) as error:
            raise _Usage(f"--where {self.wanted!a}: not a regular expression: {error}") from None

    def is_met(self, row):
        """Return whether a row meets it.

        Of a list any item may, but for != none may be equal; what a row does not have counts as the
        empty text."""
        holds = any(map(self._holds, _texts(_pick(row, self.column))))
        return holds != (self.sign == "!=")

    def _holds(self, text):
        """Return whether one text meets the condition; for != whether it is equal."""
        if self.pattern:
            return self.pattern.search(text) is not None
        if self.sign not in _ORDERS:
            return _order_key(text) == _order_key(self.wanted)
        order = _order(text, self.wanted) if text else None
        if text and order is None and self.say:
            self.say(f"--where {self.column}: {text[:60]!a} and {self.wanted!a} do not compare")
            self.say = None
        return order in _ORDERS[self.sign]


def _texts(value):
    """Return the texts that a condition compares: that of a value, or those of a list's items."""
    if isinstance(value, list) and value:
        return [text for item in value for text in _texts(item)]
    return [_cell(value)]


def _order_key(text, as_version=False):
    """Return what puts texts in their order: (kind, unit, value, text).

    Kind 0 are numbers such as 7, 1e3, 87.3% or 48.00 GB, whatever their text; 1 versions such as
    4.20.0.0 or v1.28.4-rc1, by ten numbers; 2 all else. as_version: 4.20 and v4 are versions."""
    found = re.match(_VERSION, text, re.ASCII | re.DOTALL)
    if found and (as_version or text.count(".") > 1):
        return (1, "", [*map(int, found.group(1).split(".")), *[0] * 10][:10], text)
    found = re.match(_NUMBER, text, re.ASCII | re.IGNORECASE)
    if found:
        number, unit = found.groups("")
        is_whole = re.match(r"-?[0-9]{1,999}\Z", number)  # int() may refuse more digits
        return (0, unit.lower(), int(number) if is_whole else float(number), "")
    return (2, "", text.lower(), text)


def _order(text, other):
    """Return -1, 0 or 1 as a text comes before, with or after another, None if neither."""
    one, two = _order_key(text), _order_key(other)
    if 1 in (one[0], two[0]):
        one, two = _order_key(text, True), _order_key(other, True)
    (kind, unit, first, _), (other_kind, other_unit, second, _) = one, two
    if kind != other_kind:  # a year and a date are compared as texts
        if 0 in (kind, other_kind) and not re.search(_DATE, f"{text}\n{other}"):
            return None  # 7 and "many"
        first, second = text.lower(), other.lower()
    elif unit and other_unit and unit != other_unit:
        return None  # GB and MHz
    return (first > second) - (first < second)


def _filtered(conditions, rows):
    """Return the rows that meet every condition."""
    return [row for row in rows if all(condition.is_met(row) for condition in conditions)]


# 8.9 Many at once: --each.

_FIELD = r"\{\{|\}\}|\{([^{}]*)\}|[{}]"
# A server's error, as it came or as --each has written it, and what is not CloudStack's.
_ERROR = r'\s*(?:\{.*"error(?:code|text)"\s*:|<(?:!doctype|html)\b|CloudStack error: )'
_TABLE_HEADER = r"(?:[a-z][\w.]*(?:,|  +))*(?:id|name)(?:(?:,|  +)[a-z][\w.]*)*\Z"


def _carry_out_each(invocation, words):
    """Make the call once for each row of standard input. Returns whether all succeeded."""
    if any(word.partition("=")[2].strip() == "@-" for word in words):
        raise _Usage("@- does not go with --each, whose rows are standard input")
    template = {}
    for param, given in _parse_parameters(words[1:]).items():
        template[param] = [part for value in given for part in _split_names(param, value)]
    if _is_terminal(sys.stdin):
        invocation.say("Type the rows, then Ctrl-D")
    rows = _read_rows()
    for name in [condition.column for condition in invocation.conditions if rows]:
        if _is_missing(name, rows):  # != would hold for all of them
            raise _Usage(f"--where: {_no_such_column(name, _field_names(rows))}")
    rows = _filtered(invocation.conditions, rows)
    calls = []
    for number, row in enumerate(rows, 1):  # all of them before the first is sent
        try:
            values = {param: [_filled(part, row) for part in template[param]] for param in template}
            call = _check_call(invocation, values, words[:1])
            invocation.client.prepare(call.command, call.params, **call.options)
        except (_Usage, ValueError) as error:
            raise _Usage(f"row {number}{_label(row)}: {error}") from None
        calls.append(call)
    if not rows:
        invocation.say("No rows: nothing to do")
    if invocation.options["dry-run"]:
        for row, call in zip(rows, calls):
            pairs = [f"{name}={text}" for name, text in mask_params(call.params).items()]
            _write_line(" ".join(map(_shell_word, [call.command, *pairs])) + _label(row))
        return True
    return not rows or _Batch(invocation, rows, calls).run()


def _label(row):
    """Return a row's name or id in brackets, to tell it from others; the rest may be secret."""
    name = isinstance(row, dict) and (row.get("name") or row.get("id"))
    return f" ({_cut(_one_line(str(name)), 60)})" if name else ""


def _filled(part, row):
    """Return a part of a value with the row's fields for each {field}; a file stays as it is.

    What is filled in is plain text, or one whole name to look up. Raises _Usage for a field that
    the row lacks."""

    def fill(found):
        field = found.group(1)
        if found.group() in ("{", "}"):
            raise _Usage(f"a single {found.group()}; a brace that is text is written twice")
        if field is None:
            return found.group()[0]
        value = _pick(row, field) if field else row
        if value is None:
            near = [name for name in _near(field, _field_names([row])) if name != field]
            raise _Usage(f"there is no {field!a}{_did_you_mean(near)}")
        return _cell(value)

    return part if part.literal == "file" else part._replace(text=re.sub(_FIELD, fill, part.text))


def _read_rows():
    """Return the rows of standard input: JSON, one document or many, else its lines.

    Raises _Usage for what is no rows, such as the answer of a call that failed."""
    text = _read_value("--each", "-")
    rows: list = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if re.match(r'\s*[\[{"]', text):
        rows = _json_rows(text.strip())
    elif rows and re.match(_TABLE_HEADER, rows[0]):
        raise _Usage(f"standard input begins like a table, {_cut(rows[0], 60)!a}; use -o jsonl")
    if any(re.match(_ERROR, _cell(row), re.IGNORECASE) for row in rows):
        raise _Usage("standard input holds the answer of a call that failed; nothing was sent")
    return rows


def _json_rows(text):
    """Return the rows of JSON documents: a list's, those of an answer that is a list, or itself.

    Rows that an earlier --each did not send are unwrapped. Raises _Usage for other text."""
    rows: list = []
    index = 0
    while index < len(text):
        try:
            document, index = _JSON.raw_decode(text, index)
        except (ValueError, RecursionError) as error:
            raise _Usage(f"standard input is not JSON: {error}") from None
        is_answer = isinstance(document, dict) and len(document) == 2 and "count" in document
        for row in _Rows(document).rows if is_answer or isinstance(document, list) else [document]:
            is_unsent = isinstance(row, dict) and row.get("unsent") is True and "row" in row
            rows.append(row["row"] if is_unsent else row)
        while text[index : index + 1].isspace():
            index += 1
    return rows


class _Batch:
    """The calls of --each: some are made at once, and a line is written for each row.

    Rows and jobs are accounted for before connections are closed, whatever happens."""

    def __init__(self, invocation, rows, calls):
        self.invocation, self.rows, self.calls = invocation, rows, calls
        self.todo = collections.deque(range(len(rows)))
        self.counts: Any = collections.Counter()  # of the rows by what became of them
        self.sent = 0  # requests of rows
        self.jobids: list = []  # of jobs that may still run
        self.is_over = False  # nothing more is to be begun

    def run(self):
        """Make the calls and write the account. Returns whether all succeeded, or an interrupt.

        A bug in a task is told by asyncio."""
        import asyncio

        invocation, interrupts = self.invocation, self.invocation.interrupts
        most = min(int(invocation.options["parallel"] or 10), 128, len(self.rows))
        client = AIOCloudStack(**invocation.settings)
        client.on_event = self.observe
        loop = asyncio.new_event_loop()  # asyncio.run does not exist in 3.6
        tasks: list = []
        interrupts.on_first = lambda: [loop.call_soon_threadsafe(task.cancel) for task in tasks]
        invocation.client.close()  # it has looked up names
        invocation.client = client  # to be closed after the account
        invocation.show(self.counted())
        tasks += [asyncio.ensure_future(self.work(client), loop=loop) for _ in range(most)]
        loop.run_until_complete(asyncio.wait(tasks))
        was_interrupted, interrupts.is_over = interrupts.is_over, True
        loop.close()
        while self.todo:  # what was never begun
            self.note(self.todo.popleft(), "unsent", {"unsent": True})
        is_done = self.counts["done"] == len(self.rows)
        if was_interrupted or not is_done:
            say = write_stderr if was_interrupted or self.is_over else invocation.say
            say(("Interrupted: " if was_interrupted else "") + self.counted())
        if self.jobids:
            write_stderr("To go on waiting: " + _shell_line(invocation, ["--wait", *self.jobids]))
        return KeyboardInterrupt() if was_interrupted else is_done

    def observe(self, event):
        """Count the rows' own requests, but no log-in and no poll; the client's on_event."""
        if isinstance(event, Sent) and self.calls[0].command in event.request.params.values():
            self.sent += 1

    async def work(self, client):
        """Make one call after another, until nothing more is to be begun."""
        while self.todo and not (self.is_over or self.invocation.interrupts.is_over):
            number = self.todo.popleft()
            call, before = self.calls[number], self.sent
            try:
                answer = await call.make(client)
                end, line = "done", {"result": answer}
                if not _tells_success(answer):
                    end, line = "failed", {"error": answer, "outcome_unknown": False}
            except BaseException as error:  # CancelledError, too
                was_sent = self.sent > before  # or another was meanwhile
                end, line = self.failed(call, error, was_sent)
            self.note(number, end, line)

    def failed(self, call, error, was_sent):
        """Return what became of a call that raised, and what its row's line says."""
        said = dict(_server_error(error) or {"message": _sentence(error) or "interrupted"})
        jobid = getattr(error, "jobid", None)
        if not was_sent or (getattr(error, "unsent", False) and not jobid):
            return "unsent", {"error": said, "unsent": True}
        job_failed = getattr(error, "job_failed", False)
        facts = {"jobid": jobid, "left_behind": job_failed and _left_behind(call, error)}
        said.update((name, text) for name, text in facts.items() if text)
        may_run = jobid or getattr(error, "outcome_unknown", not only_reads(call.command))
        if job_failed or not may_run:
            return "failed", {"error": said, "outcome_unknown": False}
        self.jobids += [jobid] if jobid else []
        return "unknown", {"error": said, "outcome_unknown": True}

    def note(self, number, end, line):
        """Write a row's line; on standard error no more than its number once output is broken."""
        row = self.rows[number]
        self.counts[end] += 1
        self.is_over |= end != "done" and bool(self.invocation.options["stop-on-error"])
        self.invocation.show()
        try:
            _write(_json_text({**line, "row": row}, None) + "\n", flush=True)
        except _OutputFailed:
            self.is_over = True
            if end != "unsent":
                write_stderr(f"row {number + 1}{_label(row)}: {end}")
        self.invocation.show(self.counted())

    def counted(self):
        """Return a text such as: 5 done, 1 failed, of 16 rows."""
        texts = [f"{count} {end}" for end, count in sorted(self.counts.items())]
        return f"{', '.join(texts) or '0 done'}, of {len(self.rows)} rows"


# 8.10 The shell.
# Lines are carried out as arguments are, but with the same clients: {what leads to one: (its
# settings, the client)}.

# Its own words, and what they stand for.
_OWN_WORDS = {"help": "--help ", "list": "--list ", "use": "--region ", "set": "--", "exit": "exit"}


# What a line does cannot be set for all lines. (_CLASHES refuses the rest.)
_NOT_SET = "wait list sync configure completion version help".split()


def _is_at_terminal():
    """Return whether a person sits at both ends."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


class _Shell:
    """Carries out one line after another (--shell)."""

    def __init__(self, options):
        self.options = {**options, "shell": None}  # they hold for every line
        self.clients = {}
        self.readline: Any = None
        self.history = ""  # its path

    def run(self):
        """Carry out the lines. Returns the first failure, or True.

        At a terminal each failure has been seen, so it always returns True, and Ctrl-C ends only
        the line; elsewhere Ctrl-C ends them all."""
        is_typed = _is_at_terminal()
        ends = _OutputFailed if is_typed else (_OutputFailed, KeyboardInterrupt)
        first = True
        try:
            for place, line in self._typed_lines() if is_typed else _piped_lines():
                line = re.sub(r"\A\s*(?:cs\s+|#.*)?", "", line).rstrip()
                if line in ("exit", "quit"):
                    break
                invocation = _Invocation(self.options, self.clients, place)
                outcome = _attempt(invocation, self._dispatch, line) if line else True
                first = first if _exit_code(first) else outcome
                if isinstance(outcome, ends):
                    break
        finally:
            for _, client in self.clients.values():
                client.close()
        return is_typed or first

    def _dispatch(self, invocation, line):
        """Do what a line asks for; have an option hold for every line, if it can be used.

        Returns as _dispatch does."""
        first, *others = words = _split_line(line)
        for sign in {"|", ">", ">>", "<"}.intersection(words):
            piped = " ".join(words[words.index(sign) :])
            raise _Usage(f"pipes and redirections are a real shell's: cs ... {piped}")
        if first not in ("set", "use"):
            return _dispatch(invocation, [_OWN_WORDS.get(first, first).rstrip(), *others])
        if first == "use":
            others = ["region", " ".join(others) or "off"]
        name, *values = others or [""]
        options, words = _parse_arguments(["--" + name, *values] if values != ["off"] else [])
        if words or "--" + name not in _FLAGS or name in _NOT_SET:
            raise _Usage("set takes an option that holds for every line, such as: set output table")
        _check_options(options, "a line of the shell")
        invocation.options = _merge_options({**self.options, name: None}, options)
        invocation.connect()
        self.options = invocation.options
        return True

    def _typed_lines(self):
        """Yield what a person types. Ctrl-C clears a line, Ctrl-D is the end."""
        self._prepare()
        words = "help [COMMAND], list [WORD ...], use [REGION], set OPTION VALUE|off, exit"
        _Invocation(self.options).say(f"In the shell: {words}. Tab completes.")
        while True:
            try:
                line = input(f"cs {_one_line(self.options['region'] or _DEFAULT_REGION)}> ")
                self._remember(line)
            except (EOFError, KeyboardInterrupt, UnicodeError) as error:
                write_stderr("")
                line = "exit" if isinstance(error, EOFError) else ""
            yield "", line

    def _prepare(self):
        """Have lines completed and remembered, as far as this Python's readline can."""
        try:
            import readline

            readline.set_auto_history(False)  # not every line is to be remembered
            readline.set_completer(self._complete)
            readline.set_completer_delims(" \t\n")  # `=` and `:` are part of a word
            is_editline = "libedit" in (readline.__doc__ or "")
            readline.parse_and_bind("bind ^I rl_complete" if is_editline else "tab: complete")
            self.readline = readline
            path = os.path.realpath(_own_path("XDG_STATE_HOME", ".local/state", "history"))
            os.umask(0o077)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if os.path.exists(path):
                readline.read_history_file(path)
            readline.set_history_length(1000)
            self.history = path
        except Exception as error:  # PyPy's readline raises errors of its own for some TERMs
            _Invocation(self.options).say(f"Warning: no history is kept: {error}")

    def _remember(self, line):
        """Keep a line for this shell and later ones, unless it holds a secret."""
        secrets = [client.secret for _, client in self.clients.values()]
        if self.history and line.strip() and not _holds_secret(line, secrets):
            self.readline.add_history(line)
            try:
                self.readline.write_history_file(self.history)
            except OSError:
                pass

    def _complete(self, word, number):
        """Return one of the words that may stand in place of the one at the cursor."""
        if number == 0:
            typed = self.readline.get_line_buffer()[: self.readline.get_endidx()]
            self.found = [*self._candidates(typed.lstrip()), None]
        return self.found[number]

    def _candidates(self, typed):
        """Return what may stand at the end of a line."""
        first, space, rest = typed.partition(" ")
        found = [] if space else [word + " " for word in _OWN_WORDS if word.startswith(first)]
        typed = _OWN_WORDS[first] + rest if space and first in _OWN_WORDS else typed
        try:
            words = [word for word, _ in _completions("cs " + typed, self.options)]
        except (_Usage, ValueError) as error:
            return found or [_one_line(str(error)), " "]
        if first == "set":
            words = [re.sub("^--", "", word) for word in words]
        return found + [word if word.endswith(("=", ",")) else word + " " for word in words]


def _split_line(line):
    """Return the words of a line, as a shell takes it apart. Raises _Usage.

    shlex takes seconds for userdata of some 100 kB."""

    def plain(found):
        escaped, single, double = found.groups("")
        return escaped + single + re.sub(r"\\([\"\\])", r"\1", double)

    quoted = r"""\\(.)|'([^']*)'|"((?:[^"\\]|\\.)*)\""""
    word = rf"""(?:[^ \t\r\n'"\\]+|{quoted})+"""
    if re.sub(word, "", line).strip(" \t\r\n"):
        raise _Usage("the line cannot be taken apart: a quote in it is not closed")
    return [re.sub(quoted, plain, found.group()) for found in re.finditer(word, line)]


def _holds_secret(line, secrets):
    """Return whether a line must not be remembered: a word of it is the name of a secret value, or
    it holds one of these secrets."""
    words = re.findall(r"[\w.-]+", line.replace("\\", ""))
    has_name = MASK in mask_params(dict.fromkeys(words, "")).values()
    return has_name or mask_text(line, secrets) != line


def _piped_lines():
    """Yield (what says where it stands, the line) of standard input, line by line.

    The rest of it may be for a line's name=@-."""
    for number, line in enumerate(sys.stdin.buffer if sys.stdin else (), 1):
        yield f"line {number}: ", line.decode("utf-8-sig", "surrogateescape")


if __name__ == "__main__":
    sys.exit(main())
