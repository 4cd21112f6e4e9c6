"""What must not pass: `mypy --strict` and pyright refuse each marked line, and no other. Nothing here is ever run."""

import cs
from cs import AIOCloudStack, CloudStack, CloudStackApiException, CloudStackException

CloudStack(endpoint=5)  # refused
CloudStack()  # refused
CloudStack("https://cloud.example", retry=[3])  # refused
CloudStack("https://cloud.example", timeout={})  # refused
CloudStack("https://cloud.example", expires=600)  # refused
CloudStack("https://cloud.example", headers="x-tenant")  # refused
CloudStack("https://cloud.example", cert=("/cert.pem",))  # refused
AIOCloudStack(endpoint=5)  # refused
AIOCloudStack("https://cloud.example", user="admin")  # refused


def call(client: CloudStack) -> int:
    client.listZones("Zurich-1")  # refused
    client.iter_list(name="Zurich-1")  # refused
    client.iter_list("listZones", "Zurich-1")  # refused
    print(client.iter_list("listZones")[0])  # refused
    client.wait_job(5)  # refused
    client.call({"id": "1"})  # refused
    client.find_id("listZones")  # refused
    print(client.prepare("listZones").nothing)  # refused
    client.timeout = None  # refused
    client.timeot = 5  # refused
    client.expiration = "600"  # refused
    client.verify = 5  # refused
    print(client.listZones.text)  # refused
    text: str = client.retry  # refused
    return client.key or text  # refused


def fail(client: CloudStack) -> None:
    try:
        client.listZones()
    except CloudStackApiException as e:
        print(e.statuscode)  # refused
        print(e.jobid + 1)  # refused
    except CloudStackException as e:
        print(e.outcome_unkown)  # refused
        print(e.errno)  # refused


async def call_on_loop(client: AIOCloudStack, sync: CloudStack) -> None:
    client.listZones()  # refused
    print(client.listZones()["zone"])  # refused
    await client.listZones("Zurich-1")  # refused
    for row in client.iter_list("listZones"):  # refused
        print(row)
    async for row in sync.iter_list("listZones"):  # refused
        print(row)
    await client.iter_list("listZones")  # refused
    await sync.close()  # refused
    async with sync as same:  # refused
        print(same)
    client.wait_job("1")  # refused
    print(await sync.listZones())  # passes: what a command returns may be anything


class Auditing(CloudStack):
    def _request(self) -> None:  # refused
        pass


cs.read_config(5)  # refused
cs.read_conf()  # refused
cs.main(["listZones"]).upper()  # refused
