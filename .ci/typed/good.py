"""Programs as they are written for cs: `mypy --strict` and pyright accept every line. Nothing here is ever run."""

import asyncio
import copy
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, AsyncIterator, Dict, Iterator, List

import cs
from cs import (
    AIOCloudStack,
    CloudStack,
    CloudStackApiException,
    CloudStackConnectionError,
    CloudStackException,
    CloudStackJobTimeout,
    CloudStackTimeoutError,
    cs_encode,
    read_config,
    read_config_from_ini,
    strtobool,
)


def make() -> List[CloudStack]:
    settings: Dict[str, Any] = read_config()
    section: Dict[str, Any] = read_config_from_ini("lab")
    return [
        CloudStack(**settings),
        CloudStack(**read_config(ini_group="lab")),
        CloudStack(**dict(section, timeout=5)),
        CloudStack("https://cloud.example/client/api", "key", "secret", 10, "post", None, None, None, "lab", 3),
        CloudStack(endpoint="https://cloud.example", key=os.environ.get("KEY"), secret=os.environ.get("SECRET")),
        # What an ini file gives is text.
        CloudStack(endpoint="https://cloud.example", timeout="5", retry="2", trace="yes", expiration="-1"),
        CloudStack(
            endpoint="https://cloud.example", username="admin", password="x", domain="/a", verify="/ca.pem",
            cert=("/cert.pem", Path("/key.pem")), expiration=timedelta(minutes=5), poll_interval=0.5, job_timeout=None,
            headers={"x-tenant": "a"}, concurrency=4, recover=True, fetch_result=True, max_response_size=1 << 20,
        ),
        AIOCloudStack(**dict(read_config(), poll_interval=5)),
        AIOCloudStack(endpoint="https://cloud.example", fetch_result=False, domain="/a"),
    ]  # fmt: skip


def call(client: CloudStack) -> None:
    zones = client.listZones(name="Zurich-1", fetch_list=True)
    print(zones[0]["id"], len(zones))
    client.createSecurityGroup(name="web", **{"tags[0].key": "a"})
    words: Dict[str, str] = {"zoneid": "1", "name": "web"}
    client.deployVirtualMachine(fetch_result=True, headers={"x-tenant": "a"}, **words)
    client.listZones(**words)
    rows: Iterator[Any] = client.iter_list("listVirtualMachines", state="Running")
    for row in rows:
        print(row["name"])
    names: List[str] = [vm["name"] for vm in client.iter_list("listVirtualMachines", **words)]
    print(names, client.wait_job("1")["virtualmachine"])
    with client as same:
        same.listZones()
    copy.deepcopy(client).close()


def call_by_name(client: CloudStack, seen: List[Any]) -> None:
    """The settings of one call, pages, a request that is not sent, a name for an id, and what happens on the way."""
    client.on_event = seen.append
    client.check()
    job = client.call("startVirtualMachine", {"id": "1"}, wait=True, job_timeout=60, poll_interval=0.5, recover=False)
    print(job["virtualmachine"], client.find_id("listZones", "Zurich-1", available=True).upper())
    for rows in client.pages("listVirtualMachines", {"state": "Running"}):
        print(len(rows), rows[0]["id"])
    request = client.prepare("listZones", {"name": "Zurich-1"})
    print(request.method, request.masked_url())


def set_up(client: CloudStack) -> None:
    client.timeout = client.timeout * 2
    client.retry += 1
    client.poll_interval = 1
    client.headers["x-tenant"] = "a"
    client.verify = "/ca.pem"
    client.verify = Path("/ca.pem")
    client.cert = ("/cert.pem", "/key.pem")
    client.expiration += timedelta(seconds=5)
    client.set_setting("domain", "/a")
    print(client.get_setting("domain").upper(), client.endpoint.upper(), (client.name or "").upper())
    if isinstance(client.verify, str):
        print(client.verify.upper())


def fail(client: CloudStack) -> int:
    try:
        client.startVirtualMachine(id=1, fetch_result=True)
    except CloudStackApiException as error:
        print(error.error["errortext"], error.response.status_code, error.response.json(), error.args[0])
    except CloudStackJobTimeout as error:
        print((error.jobid or "").upper())
    except (CloudStackTimeoutError, CloudStackConnectionError) as error:
        os_error: OSError = error
        print(os_error.errno, error.outcome_unknown or error.unsent or error.stale)
    except CloudStackException as error:
        print(*error.args, error.jobid, error.response.reason, error.response.headers["server"], error.response.text)
    raise CloudStackApiException("made by hand", error={"errorcode": 431}, response=None)


async def call_on_loop_by_name(client: AIOCloudStack) -> None:
    zone = await client.find_id("listZones", "Zurich-1")
    print((await client.call("startVirtualMachine", {"zoneid": zone}, timeout=5))["jobid"])
    async for rows in client.pages("listVirtualMachines"):
        print(len(rows))


async def call_on_loop(client: AIOCloudStack) -> None:
    zones = await client.listZones(name="Zurich-1", fetch_list=True)
    print(zones[0]["id"])
    machines = await asyncio.gather(*[client.startVirtualMachine(id=number) for number in range(3)])
    print(machines[0]["virtualmachine"])
    task = asyncio.create_task(client.listZones())
    await asyncio.wait_for(client.listZones(), 5)
    await task
    rows: AsyncIterator[Any] = client.iter_list("listVirtualMachines", state="Running")
    async for row in rows:
        print(row["name"])
    print([zone["id"] async for zone in client.iter_list("listZones")], (await client.wait_job("1"))["virtualmachine"])
    async with client as same:
        await same.listZones()
    await client.aclose()
    client.close()


class Auditing(CloudStack):
    """As Ansible's modules and others step in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: List[str] = []
        self.domain = {"id": "1"}

    def _request(self, command: str, **params: Any) -> Any:
        self.seen.append(command)
        return super()._request(command, **params)


class AuditingAsSince5(CloudStack):
    def _request(
        self, command: str, json: bool = True, opcode_name: str = "command", fetch_list: bool = False,
        headers: Any = None, **params: Any
    ) -> Any:  # fmt: skip
        return super()._request(command, json=json, opcode_name=opcode_name, headers=headers, **params)


class AuditingAsync(AIOCloudStack):
    async def _request(self, command: str, **params: Any) -> Any:
        return await super()._request(command, **params)


def use_the_rest() -> int:
    params: Dict[str, Any] = {"tags": [{"key": "a"}]}
    print(cs_encode("a b").upper(), strtobool("yes"))
    print(cs.sign(cs.flatten(params), "secret"), cs.backoff(1, 0.5), cs.__version__.split("."))
    print([setting.name for setting in cs.SETTINGS])
    with Auditing("https://cloud.example") as client:
        print(client.seen, client.domain["id"])
    return cs.main(["listZones", "-q"]) + cs.main()
