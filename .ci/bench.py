#!/usr/bin/env python3
"""Measure cs.py against PyPI's cs 5.2.0, side by side in one run.

    python3 .ci/bench.py                  the whole table, some ten minutes
    python3 .ci/bench.py --quick          tiny counts: shows that it runs, not how fast
    python3 .ci/bench.py --only http,jobs --runs 15
    python3 .ci/bench.py --json           everything measured, for machines
    python3 .ci/bench.py --ours DIR       measure the cs.py (or package cs) in DIR instead
    python3 .ci/bench.py --peer 28f687a   beside the cs.py of that commit (or DIR), not 5.2.0: what a change has cost

It makes two virtual environments for the peer (kept in the temporary directory for the next time), one with
aiohttp and one without, and starts a stand-in server in a process of its own. Both clients run under the peer's
interpreter: for "ours" a directory that holds nothing but a copy of cs.py goes in front of its path. The two
alternate, each measurement in a process of its own; where the least that plain CPython must pay can be measured
(the floor), a third process takes turns with them. Needs Python 3.10 or later, for the peer.

Sections: work (what the measured processes run), server (the stand-in), measuring, rows, report.
"""
import json
import os
import shutil
import sys
import time

PEER = "5.2.0"
KEY, SECRET = "bench-key", "bench-secret"
HERE = os.path.dirname(os.path.abspath(__file__))
CONCURRENCY = 128
PAGE = 500


# ---- work: what a measured process runs, one function for each kind ---------------------------------------------
# Each takes the options of its row and returns {"wall": seconds by the clock, "cpu": seconds of CPU}, and what more it
# measures. Imports are not counted, as they have rows of their own: a client that puts them off gets one call to make
# them, through another instance. Both clients get the same arguments wherever they understand the same.

def clocked(run, check):
    """Time run(), then let check(result) make sure that the work was really done."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    if not check(result):
        raise SystemExit("wrong result: %.200r" % (result,))
    return taken


def settings(options):
    given = {"endpoint": options["url"], "key": KEY, "secret": SECRET, "timeout": 60}
    if options.get("cafile"):
        given["verify"] = options["cafile"]
    return given


def warmed_up(options):
    from cs import CloudStack
    CloudStack(**settings(options)).listZones()
    return CloudStack


def is_zones(answer):
    return len(answer["zone"]) == 2


def work_calls(options):
    client_class = warmed_up(options)

    def run():
        client = client_class(**settings(options))
        return [client.listZones() for _ in range(options["calls"])]

    return clocked(run, lambda answers: all(map(is_zones, answers)))


def floor_calls(options):
    import http.client
    import ssl
    from urllib.parse import urlsplit

    def run():
        url = urlsplit(options["url"])
        if options.get("cafile"):
            context = ssl.create_default_context(cafile=options["cafile"])
            connection = http.client.HTTPSConnection(url.hostname, url.port, context=context)
        else:
            connection = http.client.HTTPConnection(url.hostname, url.port)
        answers = []
        for _ in range(options["calls"]):
            connection.request("GET", plain_path("listZones"))
            answers.append(json.loads(connection.getresponse().read()))
        return answers

    return clocked(run, lambda answers: all(is_zones(answer["listzonesresponse"]) for answer in answers))


def work_threads(options):
    import threading

    client, answers = warmed_up(options)(**settings(options)), []
    todo = iter(range(options["calls"]))

    def body():
        for _ in todo:
            answers.append(client.listZones())

    def run():
        threads = [threading.Thread(target=body) for _ in range(options["threads"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    return clocked(run, lambda answers: len(answers) == options["calls"] and all(map(is_zones, answers)))


def work_list(options):
    client_class = warmed_up(options)

    def run():
        return client_class(**settings(options)).listVirtualMachines(fetch_list=True)

    return clocked(run, lambda rows: [row["id"] for row in rows] == [machine_id(n) for n in range(options["rows"])])


def work_iter(options):
    """Row by row where the client can; the peer has only the whole list."""
    from cs import CloudStack

    if not hasattr(CloudStack, "iter_list"):
        return work_list(options)

    def run():
        client = CloudStack(**settings(options))
        return sum(row["id"] == machine_id(n) for n, row in enumerate(client.iter_list("listVirtualMachines")))

    return clocked(run, lambda count: count == options["rows"])


def fetch_pages(options, pages):
    import http.client
    from urllib.parse import urlsplit
    connection = http.client.HTTPConnection(urlsplit(options["url"]).netloc)
    for page in range(1, pages + 1):
        connection.request("GET", plain_path("listVirtualMachines&page=%d&pagesize=%d" % (page, PAGE)))
        yield connection.getresponse().read()


def floor_list(options):
    bodies = list(fetch_pages(options, -(-options["rows"] // PAGE)))
    taken = clocked(lambda: [json.loads(body) for body in bodies], lambda pages: len(pages) == len(bodies))
    return dict(taken, wall=taken["wall"] + options.get("latency", 0))


def floor_iter(options):
    return clocked(lambda: [json.loads(body) for body in fetch_pages(options, 1)], len)


def work_concurrent(options):
    import asyncio

    async def main(calls):
        async with async_client(options) as client:
            return await asyncio.gather(*[client.listZones() for _ in range(calls)])

    asyncio.run(main(1))
    return clocked(lambda: asyncio.run(main(options["calls"])), lambda answers: all(map(is_zones, answers)))


def work_jobs(options):
    import asyncio

    async def main():
        async with async_client(options, poll_interval=options["poll_interval"]) as client:
            return await asyncio.gather(*[client.deployVirtualMachine(name="vm-%d" % n, fetch_result=True)
                                          for n in range(options["jobs"])])

    def check(results):
        return len({result["virtualmachine"]["id"] for result in results}) == options["jobs"]

    return clocked(lambda: asyncio.run(main()), check)


def job_length(number, jobs):
    """Seconds that job `number` of so many takes: from 0.1 to 7, as many short as long ones on a scale of logarithms,
    in an order that is neither."""
    return 0.1 * 70 ** (number * 7 % jobs / (jobs - 1))


def work_late(options):
    """Jobs one after another; `late` is the mean time from a job's end to its result."""
    client = warmed_up(options)(**dict(settings(options), fetch_result=True))
    late = []

    def run():
        for number in range(options["jobs"]):
            begun = time.perf_counter()
            client.deployVirtualMachine(name="vm-%d" % number)
            late.append(time.perf_counter() - begun - job_length(number, options["jobs"]))
        return late

    return dict(clocked(run, lambda late: min(late) > 0), late=sum(late) / len(late))


def work_late_crowd(options):
    """The same, all at once."""
    import asyncio

    late = []

    async def one(client, number):
        begun = time.perf_counter()
        job = await client.deployVirtualMachine(name="vm-%d" % number, fetch_result=True)
        number = int(job["virtualmachine"]["id"].rpartition("-")[2], 16)  # the server counts them as they come
        late.append(time.perf_counter() - begun - job_length(number, options["jobs"]))

    async def main():
        async with async_client(options) as client:
            await asyncio.gather(*[one(client, number) for number in range(options["jobs"])])

    taken = clocked(lambda: asyncio.run(main()), lambda _: len(late) == options["jobs"] and min(late) > 0)
    return dict(taken, late=sum(late) / len(late))


def async_client(options, **more):
    """The peer keeps connections only inside `async with`, where its pool has aiohttp's default of 100."""
    from cs import AIOCloudStack, CloudStack
    if hasattr(CloudStack, "iter_list"):
        more["concurrency"] = CONCURRENCY
    return AIOCloudStack(**dict(settings(options), **more))


def work_shell(options):
    """Command lines in one shell; in processes where the client has none."""
    import subprocess

    import cs

    if not hasattr(cs.CloudStack, "iter_list"):
        return work_lines(options)
    command, lines = [sys.executable, "-m", "cs", "--shell"], b"listZones\n" * options["calls"]
    return clocked(lambda: subprocess.check_output(command, input=lines),
                   lambda out: out.count(b"zone-1") == options["calls"])


def work_lines(options):
    """Command lines in a process each."""
    import cs  # noqa: F401  # for check_module

    return processes([sys.executable, "-m", "cs", "listZones"], options["calls"])


def floor_lines(options):
    """The same by CloudMonkey, for who has it."""
    command = ["cmk", "-o", "json", "-u", options["url"], "-k", KEY, "-s", SECRET, "list", "zones"]
    return processes(command, options["calls"])


def processes(command, calls):
    import subprocess
    return clocked(lambda: [subprocess.check_output(command, stdin=subprocess.DEVNULL) for _ in range(calls)],
                   lambda outs: all(b"zone-1" in out for out in outs))


def plain_path(command):
    return "/client/api?command=%s&response=json&apiKey=k&signature=s" % command


def machine_id(n):
    return "00000000-0000-4000-8000-%012x" % n


def peak_memory():
    """The most this process had in memory, in bytes.

    Not ru_maxrss where it can be helped: Linux hands a parent's peak down to the children it starts.
    """
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def child(name, options):
    taken = globals()[name](options)
    module = sys.modules.get("cs")
    print(json.dumps(dict(taken, memory=peak_memory(), module=module and module.__file__)))


# ---- server: answers made beforehand, next to no work for a request ---------------------------------------------

ZONES = {"listzonesresponse": {"count": 2, "zone": [
    {"id": machine_id(n), "name": "zone-%d" % n, "networktype": "Advanced", "securitygroupsenabled": False,
     "allocationstate": "Enabled", "dhcpprovider": "VirtualRouter", "localstorageenabled": True, "tags": []}
    for n in range(2)]}}


def machine(n):
    """A row of listVirtualMachines: fields as a server sends them, filled up to 2 kB of JSON."""
    ids = {name: machine_id(n % few) for name, few in (
        ("hostid", 40), ("templateid", 9), ("serviceofferingid", 7), ("zoneid", 2), ("guestosid", 30), ("ostypeid", 30),
        ("domainid", 12), ("userid", 97))}
    nics = [{"id": machine_id(n * 2 + i), "networkid": machine_id(i), "networkname": "net-%d" % i, "isdefault": not i,
             "netmask": "255.255.0.0", "gateway": "10.%d.0.1" % i, "ipaddress": "10.%d.%d.%d" % (
                 i, n // 250 % 250, n % 250), "traffictype": "Guest", "type": "Isolated",
             "macaddress": "02:00:%02x:00:%02x:%02x" % (i, n >> 8 & 255, n & 255)} for i in range(1)]
    row = dict(
        ids, id=machine_id(n), name="vm-%05d" % n, displayname="vm-%05d" % n, account="tenant-%d" % (n % 97),
        domain="customers", created="2026-08-21T08:36:28+0000", state="Running", haenable=False, zonename="zone-1",
        hostname="host-%d" % (n % 40), templatename="debian-13", templatedisplaytext="Debian 13", passwordenabled=True,
        serviceofferingname="medium", cpunumber=4, cpuspeed=2400, memory=8192, cpuused="3.1%", networkkbsread=n * 3,
        networkkbswrite=n * 2, diskkbsread=n, diskkbswrite=n * 5, diskioread=n // 2, diskiowrite=n // 3, rootdeviceid=0,
        rootdevicetype="ROOT", hypervisor="KVM", instancename="i-2-%d-VM" % n, displayvm=True,
        isdynamicallyscalable=True, osdisplayname="Debian GNU/Linux 13", nic=nics,
        details={"rootdisksize": "20", "keyboard": "us"},
        tags=[{"key": "role", "value": "web-%d" % n, "resourcetype": "UserVm"}], affinitygroup=[], securitygroup=[])
    row["userdatadetails"] = "x" * max(0, 2000 - len(encoded(row)) - len(',"userdatadetails":""'))
    return row


def encoded(value):
    return json.dumps(value, separators=(",", ":")).encode()


class Cloud:
    """The state behind the answers; a control request (/control?latency=0.1&rows=500) starts it anew."""

    made = {}  # bodies, made once and compressed once: the clients are measured, not this server

    def __init__(self, rows=0, latency=0.0, job_seconds=0.0, jobs=0):
        self.rows, self.latency, self.job_seconds, self.jobs = int(rows), float(latency), float(job_seconds), int(jobs)
        self.requests, self.job_ends, self.job_rows = {}, [], []
        for first in range(0, self.rows, PAGE):
            for wants_gzip in (False, True):
                self.machines(first, min(first + PAGE, self.rows), wants_gzip)

    def answer(self, query, wants_gzip):
        """The body for one command, as (bytes, whether it is compressed, HTTP status)."""
        command = query.get("command", "")
        self.requests[command] = self.requests.get(command, 0) + 1
        if "signature" not in query:
            return error(401, "unable to verify user credentials and/or request signature")
        if command == "listZones":
            return self.kept("zones", lambda: ZONES, wants_gzip)
        if command == "listVirtualMachines":
            return self.machines(*window(query, self.rows), wants_gzip)
        if command == "deployVirtualMachine":
            return self.deploy()
        if command == "queryAsyncJobResult":
            return self.job(query.get("jobid", ""))
        if command == "listAsyncJobs":
            return self.pending(query)
        return error(432, "The given command does not exist")

    def machines(self, first, last, wants_gzip):
        return self.kept((self.rows, first, last), lambda: {"listvirtualmachinesresponse": listing(
            self.rows, "virtualmachine", [machine(n) for n in range(first, last)])}, wants_gzip)

    def kept(self, key, make, wants_gzip):
        import gzip
        if (key, wants_gzip) not in self.made:
            body = encoded(make())
            self.made[key, wants_gzip] = gzip.compress(body, 6) if wants_gzip else body
        return self.made[key, wants_gzip], wants_gzip, 200

    def deploy(self):
        number = len(self.job_ends)
        seconds = job_length(number, self.jobs) if self.jobs else self.job_seconds
        self.job_ends.append(time.monotonic() + seconds)
        self.job_rows.append(encoded({"jobid": machine_id(number), "jobstatus": 0, "jobprocstatus": 0,
                                      "cmd": "org.apache.cloudstack.api.command.user.vm.DeployVMCmd",
                                      "jobresultcode": 0, "created": "2026-08-21T08:36:28+0000"}))
        ids = {"id": machine_id(number), "jobid": machine_id(number)}
        return encoded({"deployvirtualmachineresponse": ids}), False, 200

    def job(self, jobid):
        number = int(jobid.rpartition("-")[2] or "-1", 16)
        if not 0 <= number < len(self.job_ends):
            return error(431, "Unable to find a job by id " + jobid)
        job = json.loads(self.job_rows[number].decode())
        if self.job_ends[number] <= time.monotonic():
            job.update(jobstatus=1, jobresulttype="object", jobresult={"virtualmachine": machine(number)})
        return encoded({"queryasyncjobresultresponse": job}), False, 200

    def pending(self, query):
        now = time.monotonic()
        rows = [row for row, end in zip(self.job_rows, self.job_ends) if end > now]
        first, last = window(query, len(rows))
        if first == last:
            return encoded({"listasyncjobsresponse": {}}), False, 200
        return b'{"listasyncjobsresponse":{"count":%d,"asyncjobs":[%s]}}' % (
            len(rows), b",".join(rows[first:last])), False, 200


def window(query, total):
    size = int(query.get("pagesize", PAGE))
    first = min(total, (int(query.get("page", 1)) - 1) * size)
    return first, min(total, first + size)


def listing(count, name, rows):
    return {"count": count, name: rows} if rows else {"count": count}


def error(code, text):
    return encoded({"errorresponse": {"uuidList": [], "errorcode": code, "errortext": text}}), False, code


def serve(directory, pem):
    """Serve http (and https, where there is a certificate) until the process that started this closes our input."""
    import asyncio
    import ssl
    from urllib.parse import parse_qsl

    cloud = [Cloud()]

    class Connection(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport, self.buffer = transport, b""

        def data_received(self, data):
            self.buffer += data
            while b"\r\n\r\n" in self.buffer:
                head, _, rest = self.buffer.partition(b"\r\n\r\n")
                fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
                length = int(fields.get(b"content-length", 0))
                if len(rest) < length:
                    return
                self.buffer = rest[length:]
                target = head.split(b" ", 2)[1].decode()
                self.handle(target, rest[:length].decode(), b"gzip" in fields.get(b"accept-encoding", b""))

        def handle(self, target, form, wants_gzip):
            path, _, query = target.partition("?")
            query = dict(parse_qsl(query + "&" + form, keep_blank_values=True))
            if path == "/control":
                self.send(*control(query))
                return
            answer = cloud[0].answer(query, wants_gzip)
            if cloud[0].latency:
                asyncio.get_running_loop().call_later(cloud[0].latency, self.send, *answer)
            else:
                self.send(*answer)

        def send(self, body, compressed, status):
            self.transport.write(b"HTTP/1.1 %d %d\r\nContent-Type: application/json; charset=UTF-8\r\n%s"
                                 b"Content-Length: %d\r\n\r\n%s" % (
                                     status, status, b"Content-Encoding: gzip\r\n" if compressed else b"",
                                     len(body), body))

    def control(query):
        counted = cloud[0].requests
        if query:
            query.pop("reset", None)
            cloud[0] = Cloud(**query)
        return encoded(counted), False, 200

    async def main():
        loop = asyncio.get_running_loop()
        http = await loop.create_server(Connection, "127.0.0.1", 0, backlog=1024)
        ports = {"http": http.sockets[0].getsockname()[1]}
        if pem:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pem)
            https = await loop.create_server(Connection, "127.0.0.1", 0, backlog=1024, ssl=context)
            ports["https"] = https.sockets[0].getsockname()[1]
        print(json.dumps(ports), flush=True)
        await loop.run_in_executor(None, sys.stdin.read)

    os.chdir(directory)
    asyncio.run(main())


# ---- measuring --------------------------------------------------------------------------------------------------

# Starts its arguments and prints clock, CPU, peak memory and exit status. It is tiny for the peak's sake: a process
# begins with the peak of the one that started it.
SPAWN = """
import os, sys, time
null = os.open(os.devnull, os.O_WRONLY)
begun = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, 1)])
_, status, used = os.wait4(pid, 0)
print(time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss, status)
"""


class Failure(Exception):
    """A measured process that did not do its work."""


class Bench:
    def __init__(self, temp, ours, peer, quiet):
        self.temp, self.quiet = temp, quiet
        self.folders = {"ours": copy_of(ours, os.path.join(temp, "ours"))}  # in front of the interpreter's path
        if peer:
            self.folders["peer"] = copy_of(peer, os.path.join(temp, "peer"))
        self.environments, self.warmed = {}, set()
        self.pem = make_certificate(temp)
        self.server = self.start_server()

    def say(self, text):
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def python(self, extras):
        """The interpreter of the environment that holds the peer with these extras, made at first use."""
        if extras not in self.environments:
            self.environments[extras] = make_environment(extras, self.say)
        return self.environments[extras]

    def start_server(self):
        import subprocess
        command = [sys.executable, os.path.abspath(__file__), "--serve", self.temp, self.pem or ""]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ports = json.loads(server.stdout.readline().decode())
        return server

    def close(self):
        self.server.stdin.close()
        self.server.wait(10)
        self.server.stdout.close()

    def url(self, scheme="http"):
        return "%s://127.0.0.1:%d/client/api" % (scheme, self.ports[scheme])

    def control(self, **state):
        """Start the server's state anew; returns what was asked of it until now."""
        from urllib.request import ProxyHandler, build_opener
        query = "&".join("%s=%s" % item for item in dict(state, reset=1).items())
        url = "http://127.0.0.1:%d/control?%s" % (self.ports["http"], query)
        with build_opener(ProxyHandler({})).open(url) as answer:
            return json.loads(answer.read().decode())

    def environment(self, side):
        """A clean environment: no settings of the user's, no proxies; bytecode may be cached."""
        clean = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        clean.update(HOME=self.temp, CLOUDSTACK_ENDPOINT=self.url(), CLOUDSTACK_KEY=KEY, CLOUDSTACK_SECRET=SECRET)
        if side in self.folders:
            clean["PYTHONPATH"] = self.folders[side]
        return clean

    def run(self, side, arguments):
        import subprocess
        empty = os.path.join(self.temp, "empty")
        os.makedirs(empty, exist_ok=True)
        try:
            done = subprocess.run(arguments, env=self.environment(side), cwd=empty, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise Failure("%s: no end after 300 s" % side) from None
        if done.returncode:
            raise Failure("%s: exit %d: %s" % (side, done.returncode, (done.stderr or done.stdout).strip()[-400:]))
        return done.stdout

    def measure_work(self, row, side):
        """One run of a function of the section "work" in a process of its own."""
        options = dict(row.options, url=self.url(row.scheme))
        if row.scheme == "https":
            options["cafile"] = self.pem
        name = ("floor_" if side == "floor" else "work_") + row.work
        self.control(**row.state)
        python = self.python(row.extras)
        sample = json.loads(self.run(side, [python, os.path.abspath(__file__), "--child", name, json.dumps(options)]))
        sample["requests"] = sum(self.control(**row.state).values())
        self.check_module(side, sample.pop("module"), python)
        return sample

    def measure_process(self, row, side):
        """A whole process, from its start to its end."""
        self.control(**row.state)
        arguments = row.floor_command if side == "floor" else row.command
        url = "http://127.0.0.1:%d%s" % (self.ports["http"], plain_path("listZones"))
        python = self.python(row.extras)
        out = self.run(side, [python, "-I", "-S", "-c", SPAWN, python] + [url if a == "URL" else a for a in arguments])
        wall, cpu, memory, status = out.split()
        if status != "0":
            raise Failure("%s: %s ended with status %s" % (side, " ".join(arguments)[:60], status))
        if "listZones" in row.command and self.control().get("listZones") != 1:
            raise Failure("%s: the server was not asked once" % side)
        unit = 1 if sys.platform == "darwin" else 1024
        return {"wall": float(wall), "cpu": float(cpu), "memory": int(memory) * unit}

    def check_module(self, side, module, python):
        """Make sure that each side ran the client it stands for."""
        wanted = self.folders.get(side) or (side == "peer" and os.path.dirname(os.path.dirname(python)))
        if wanted and not os.path.realpath(module or "").startswith(os.path.realpath(wanted) + os.sep):
            raise Failure("%s: the client measured was %s, not in %s" % (side, module, wanted))

    def warm(self, extras):
        """Fill both bytecode caches, and see that each side imports its own client."""
        if extras in self.warmed:
            return
        self.warmed.add(extras)
        for side in ("ours", "peer"):
            python = self.python(extras)
            module = self.run(side, [python, "-c", "import cs; print(cs.__file__)"]).strip()
            self.check_module(side, module, python)


def copy_of(source, target):
    """Put the client of a directory, or of a commit, into a directory of its own; the directory."""
    import subprocess
    os.makedirs(target)
    for name, copy in (("cs.py", shutil.copy), ("cs", shutil.copytree)):
        if os.path.exists(os.path.join(source, name)):
            copy(os.path.join(source, name), os.path.join(target, name))
            return target
    shown = subprocess.run(["git", "-C", HERE, "show", source + ":cs.py"], stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL)
    if shown.returncode:
        raise SystemExit("bench.py: no cs.py in %s, and no such commit" % source)
    with open(os.path.join(target, "cs.py"), "wb") as file:
        file.write(shown.stdout)
    return target


def make_certificate(directory):
    """A certificate for 127.0.0.1, good for a day; None without openssl."""
    import subprocess
    pem, key = os.path.join(directory, "server.pem"), os.path.join(directory, "server.key")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1",
               "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", pem]
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    with open(key) as source, open(pem, "a") as target:
        target.write(source.read())
    return pem


def make_environment(extras, say):
    """A virtual environment with cs[extras] in the user's own corner of the temporary directory, kept for next time."""
    import subprocess
    import tempfile
    import venv
    corner = os.path.join(tempfile.gettempdir(), "cs-bench-%d" % os.getuid())
    os.makedirs(corner, mode=0o700, exist_ok=True)
    found = os.lstat(corner)
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise SystemExit("bench.py: %s is not ours alone" % corner)
    version = "%d.%d.%d" % sys.version_info[:3]
    directory = os.path.join(corner, "-".join([version, PEER] + extras.split(",")))
    python, stamp = os.path.join(directory, "bin", "python"), os.path.join(directory, "complete")
    if not os.path.exists(stamp):
        say("installing cs[%s]==%s for Python %s ..." % (extras, PEER, version))
        venv.create(directory, clear=True, with_pip=True)
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "cs[%s]==%s" % (extras, PEER)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        if done.returncode:
            raise SystemExit("bench.py: pip could not install the peer:\n" + done.stdout)
        open(stamp, "w").close()
    return python


# ---- rows: the table --------------------------------------------------------------------------------------------

WITH, WITHOUT = "async,highlight", "highlight"  # the peer's extras: aiohttp comes with the first
IMPORT_FLOOR = ["-c", "import json, urllib.parse, hmac"]
COMMAND_FLOOR = ["-c", "import argparse, json, sys, urllib.request\n"
                 "parser = argparse.ArgumentParser(); parser.add_argument('url')\n"
                 "with urllib.request.urlopen(parser.parse_args().url) as answer:\n"
                 "    print(json.dumps(json.load(answer), indent=2, sort_keys=True))", "URL"]


class Row:
    """One piece of work. `goals` is {figure: the ratio ours/peer that is asked for} beside the peer; `since` the same
    beside commit 28f687a, where equal work is measured up to 3 % apart. A row without goals of its own has to be no
    worse than the peer in the figures of `since`."""
    since = {}
    work = command = floor_command = floor_value = None
    options = state = {}
    scheme, extras, floor_name = "http", WITH, "-"

    def __init__(self, key, title, goals, runs, **more):
        self.key, self.title, self.runs = key, title, runs
        self.__dict__.update(more)
        self.goals = goals or dict.fromkeys(self.since, 1.00)

    def sides(self):
        measured = self.floor_command or "floor_%s" % self.work in globals()
        if self.work == "lines":
            measured = shutil.which("cmk")
        return ("ours", "peer", "floor") if measured else ("ours", "peer")


def table(quick):
    calls, rows = (100, 1000) if quick else (2000, 20000)
    concurrent, jobs, interval = (64, 20, 0.2) if quick else (400, 1000, 2.0)
    shared, threads, rounds = (48, 16, 10) if quick else (200, 16, 10)
    alone, crowd = (2, 4) if quick else (16, 60)
    starts, usual = (2, 1) if quick else (21, 7)
    few, many = (1, 1) if quick else (3, 15)
    listed, slow = {"rows": rows}, {"rows": rows, "latency": 0.1}
    lines = 3 if quick else 100
    return [
        Row("import", "import cs, aiohttp there", {"wall": 0.11}, starts, command=["-c", "import cs"],
            floor_name="import json, urllib.parse, hmac", floor_command=IMPORT_FLOOR),
        Row("import-bare", "import cs, no aiohttp", {"wall": 0.30}, starts, command=["-c", "import cs"],
            extras=WITHOUT, floor_name="import json, urllib.parse, hmac", floor_command=IMPORT_FLOOR),
        Row("command", "python -m cs listZones, aiohttp there", {"wall": 0.22}, starts,
            command=["-m", "cs", "listZones"], floor_name="urllib.request + argparse + json",
            floor_command=COMMAND_FLOOR),
        Row("command-bare", "python -m cs listZones, no aiohttp", {"wall": 0.65}, starts,
            command=["-m", "cs", "listZones"], extras=WITHOUT, floor_name="urllib.request + argparse + json",
            floor_command=COMMAND_FLOOR),
        Row("http", "%d calls, http" % calls, None, usual, work="calls",
            options={"calls": calls}, floor_name="kept http.client", since={"wall": 1.15, "cpu": 1.15}),
        Row("https", "%d calls, https" % calls, None, usual, work="calls",
            options={"calls": calls}, scheme="https", floor_name="kept http.client",
            since={"wall": 1.15, "cpu": 1.15}),
        Row("list", "fetch_list of %d machines" % rows, None, usual, work="list", options=listed,
            state=listed, floor_name="json.loads of the same bytes", since={"wall": 1.03, "memory": 1.03}),
        Row("list-slow", "the same, 100 ms a page", {"wall": 0.36}, usual, work="list", options=slow, state=slow,
            floor_name="one page's latency + json.loads"),
        Row("iter", "%d machines by iter_list" % rows, None, usual, work="iter",
            options=listed, state=listed, floor_name="one page", since={"wall": 1.03, "memory": 1.03}),
        Row("concurrent", "%d concurrent calls, 100 ms each (async)" % concurrent, {"wall": 0.95}, usual,
            work="concurrent", options={"calls": concurrent}, state={"latency": 0.1},
            floor_value={"wall": -(-concurrent // CONCURRENCY) * 0.1}, floor_name="calls / %d x 100 ms" % CONCURRENCY),
        Row("jobs", "%d jobs of %d poll rounds (async), requests" % (jobs, rounds), {"requests": 0.35}, few,
            work="jobs", options={"jobs": jobs, "poll_interval": interval},
            state={"job_seconds": (rounds - 0.5) * interval},
            floor_value={"requests": 2 * jobs + 2 * rounds}, floor_name="2 a job + 2 a round"),
        Row("late", "%d jobs of 0.1 to 7 s in turn, how late" % alone, {"late": 0.30}, few, work="late",
            options={"jobs": alone}, state={"jobs": alone}),
        Row("late-crowd", "%d at once (async), how late" % crowd, {"late": 0.35, "requests": 1.0}, few,
            work="late_crowd", options={"jobs": crowd}, state={"jobs": crowd},
            floor_value={"requests": 2 * crowd}, floor_name="2 a job"),
        Row("threads", "%d calls from %d threads, one client" % (shared, threads), {"wall": 1.00}, many,
            work="threads", options={"calls": shared, "threads": threads}),
        Row("shell", "%d lines listZones, one shell, else processes" % lines, {"wall": 0.02}, 1, work="shell",
            options={"calls": lines}),
        Row("lines", "the same, a process each", {"wall": 0.28}, 1, work="lines",
            options={"calls": lines}, floor_name="cmk, if it is on PATH"),
    ]


def measure(bench, row, runs):
    """All samples of a row: {side: [sample, ..]}, the sides taking turns."""
    if row.scheme not in bench.ports:
        raise Failure("not measured: it takes the openssl program")
    bench.warm(row.extras)
    samples = {side: [] for side in row.sides()}
    for _ in range(runs):
        for side in samples:
            one = bench.measure_process if row.command else bench.measure_work
            samples[side].append(one(row, side))
    return samples


def summary(row, samples):
    """Medians of every figure for every side, and the ratios ours/peer."""
    from statistics import median
    medians = {side: {figure: median(sample[figure] for sample in taken) for figure in taken[0]}
               for side, taken in samples.items()}
    if row.floor_value:
        medians["floor"] = row.floor_value
    ratios = {figure: medians["ours"][figure] / medians["peer"][figure] for figure in medians["ours"]
              if medians["peer"][figure]}
    return {"row": row.key, "work": row.title, "runs": len(samples["ours"]), "goals": row.goals, "ratios": ratios,
            "medians": medians, "floor": row.floor_name, "samples": samples}


# ---- report -----------------------------------------------------------------------------------------------------

LINE = "%-46s %-6s %9s %9s %6s %5s %-5s %9s  %-16s %s"


def shown(figure, value):
    if value is None:
        return "-"
    if figure == "requests":
        return "%d" % value
    if figure == "memory":
        return "%.1f MB" % (value / 1e6)
    return "%.0f ms" % (value * 1e3) if value < 1 else "%.2f s" % value


def lines(result, quick):
    """One line for each figure that has a goal; the clock and the memory are shown beside it."""
    ours, peer = result["medians"]["ours"], result["medians"]["peer"]
    floor = result["medians"].get("floor", {})
    for figure, goal in result["goals"].items():
        ratio = result["ratios"].get(figure, float("nan"))
        memory = "%.1f / %.1f MB" % (ours["memory"] / 1e6, peer["memory"] / 1e6)
        verdict = "" if quick or not goal else "met" if ratio <= goal else "MISS"
        yield LINE % (result["work"], figure, shown(figure, ours[figure]), shown(figure, peer[figure]),
                      "%.2f" % ratio, "%.2f" % goal if goal else "-", verdict, shown(figure, floor.get(figure)), memory,
                      result["floor"])


def facts(bench, peer):
    import platform
    client = bench.run("ours", [sys.executable, "-c", "import cs; print(getattr(cs, '__version__', '?'))"]).strip()
    return {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count(),
            "ours": client, "peer": peer or PEER}


def main():
    import argparse
    import tempfile
    parser = argparse.ArgumentParser(description="Measure cs.py against PyPI's cs %s." % PEER)
    parser.add_argument("--quick", action="store_true", help="tiny counts: shows that it runs, not how fast")
    parser.add_argument("--only", metavar="ROW[,ROW..]", help="some rows: %s" % ", ".join(r.key for r in table(False)))
    parser.add_argument("--runs", type=int, metavar="N", help="measurements for each side (default: by the row)")
    parser.add_argument("--json", action="store_true", help="everything measured, as JSON")
    parser.add_argument("--peer", metavar="COMMIT", help="beside the cs.py of a commit, or in a directory, instead")
    parser.add_argument("--ours", metavar="DIR", default=os.path.dirname(HERE), help="where the cs.py to measure lives")
    arguments = parser.parse_args()
    rows = table(arguments.quick)
    if arguments.peer:
        for row in rows:
            row.goals = row.since or dict.fromkeys(row.goals)
    if arguments.only:
        wanted = arguments.only.split(",")
        unknown = set(wanted) - {row.key for row in rows}
        if unknown:
            parser.error("no such row: " + ", ".join(sorted(unknown)))
        rows = [row for row in rows if row.key in wanted]
    if sys.version_info < (3, 10):
        raise SystemExit("bench.py: the peer, cs %s, needs Python 3.10 or later" % PEER)
    with tempfile.TemporaryDirectory(prefix="cs-bench-") as temp:
        bench = Bench(os.path.realpath(temp), arguments.ours, arguments.peer, arguments.json)
        try:
            return report(bench, rows, arguments)
        finally:
            bench.close()


def report(bench, rows, arguments):
    for extras in sorted({row.extras for row in rows}):
        bench.python(extras)
    told, results, failures = facts(bench, arguments.peer), [], {}
    if not arguments.json:
        print("cs %(ours)s against cs %(peer)s, Python %(python)s, %(system)s, %(cpus)s CPUs" % told)
        print(LINE % ("work", "figure", "ours", "peer", "ratio", "goal", "", "floor", "memory", "what the floor is"))
    for row in rows:
        try:
            result = summary(row, measure(bench, row, arguments.runs or row.runs))
        except (Failure, OSError) as failure:
            failures[row.key] = str(failure)
            if not arguments.json:
                print("%-46s FAILED %s" % (row.title, failure), flush=True)
            continue
        results.append(result)
        if not arguments.json:
            print("\n".join(lines(result, arguments.quick)), flush=True)
    if arguments.json:
        print(json.dumps(dict(told, results=results, failures=failures), indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]))
    elif sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3])
    else:
        sys.exit(main())
