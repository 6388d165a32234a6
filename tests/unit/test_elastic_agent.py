"""torchrun with restarts: what was asked to stop is not started again."""

import signal

import pytest
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent

from fcmae import torchrun


class Stopped(Exception):
    pass


def test_what_was_asked_to_stop_is_not_started_again(monkeypatch):
    started = []
    monkeypatch.setattr(SimpleElasticAgent, "_restart_workers", lambda agent, group: started.append(group))
    monkeypatch.setattr(torchrun, "_signals", [])
    torchrun._stay_stopped(Stopped)
    SimpleElasticAgent._restart_workers(None, "a lost node")
    torchrun._signals.append(signal.SIGTERM)
    with pytest.raises(Stopped):
        SimpleElasticAgent._restart_workers(None, "a stop")
    assert started == ["a lost node"]
