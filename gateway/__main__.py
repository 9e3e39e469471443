"""`python -m gateway --model FOLDER --port 8000`: one gateway as a process of its own.

`--models a=FOLDER,b=FOLDER` adds models, `--aliases fast=a` names, `--residency eu` zones that requests may use,
`--tenants FILE` who may ask, with which key.
SIGTERM and SIGINT let it leave: not ready, nothing new, what runs ends (`drain_s` at most). A second one ends it at
once.
"""

from gateway.service import serve
from shared.process import run
from shared.settings import GatewaySettings

if __name__ == "__main__":
    run("gateway", GatewaySettings, serve)
