"""The live table of `tokenmill up`: each process, its state, tokens/s, KV blocks, draft acceptance.

Fed by the status messages everyone publishes; draws only what changed, and only on a terminal.
"""

from collections.abc import Sequence

from rich.table import Table

from deploy.supervisor import Child
from shared.bus import Delivery
from shared.messages import DrafterStatus, GatewayStatus, RouterStatus, Status, WorkerStatus, decode


class Board:
    """The last status of everyone."""

    def __init__(self) -> None:
        self.statuses: dict[str, Status] = {}

    def take(self, delivery: Delivery) -> None:
        """Fold one status message in (a bus handler)."""
        status: Status = decode(delivery.data, Status)  # type: ignore[arg-type]
        self.statuses[status.id] = status

    def table(self, children: Sequence[Child]) -> Table:
        """The table as it stands."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("process", "state", "pid", "load", "tokens/s", "KV blocks", "drafts accepted"):
            table.add_column(title, justify="left" if title in ("process", "state", "load") else "right")
        for child in children:
            status = self.statuses.get(child.name)
            table.add_row(child.name, _state(child, status), str(child.pid or "-"), *_figures(status))
        return table


def _state(child: Child, status: Status | None) -> str:
    state = child.state
    if state == "running" and status is not None:
        state = status.state
    elif state == "running" and not child.name.startswith("nats"):
        state = "starting"
    colour = {"ready": "green", "running": "green", "starting": "yellow", "draining": "yellow"}.get(state, "red")
    again = f" (restarted {child.restarts}x)" if child.restarts else ""
    return f"[{colour}]{state}[/]{again}"


def _figures(status: Status | None) -> tuple[str, str, str, str]:
    match status:
        case WorkerStatus():
            drafted, accepted = status.draft_tokens_total, status.accepted_draft_tokens_total
            return (
                f"{status.running} running, {status.waiting} waiting",
                f"{status.decode_tok_s:.0f}",
                f"{status.blocks_used}/{status.blocks_total}",
                f"{accepted / drafted:.0%}" if drafted else "-",
            )
        case RouterStatus():
            load = f"{status.placed_total} placed, {status.refused_total} refused"
            return (load, "", f"{status.indexed_blocks} known", "")
        case DrafterStatus():
            return (f"{status.following} followed", "", "", "")
        case GatewayStatus():
            return (f"{status.active} active", "", "", "")
    return ("", "", "", "")
