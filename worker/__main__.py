"""`python -m worker --engine mock --nats nats://127.0.0.1:4222`: one worker as a process of its own.

SIGTERM and SIGINT drain it: no new streams, what runs ends (`drain_s` at most), the rest goes elsewhere. A second one
ends it at once.
"""

from functools import partial

from shared.process import run
from shared.settings import WorkerSettings
from shared.timeline import Timeline
from worker.service import serve

if __name__ == "__main__":
    timeline = Timeline.of_process()
    run("worker", WorkerSettings, partial(serve, timeline=timeline), timeline=timeline)
