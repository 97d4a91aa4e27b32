"""Ranks that meet by `env://` at a port that nobody can take from them while they start."""

import errno
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from verl.utils.meeting_place import MeetingPlace


def add_up(rank: int, environment: dict[str, str]) -> None:
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    total = torch.tensor([10.0 + rank])
    dist.all_reduce(total)
    dist.destroy_process_group()
    assert total.item() == 21


def test_two_ranks_meet_where_no_other_program_can_listen():
    meeting, other = MeetingPlace(), MeetingPlace()
    port = int(meeting.environment["MASTER_PORT"])
    assert port != int(other.environment["MASTER_PORT"])
    with pytest.raises(OSError) as refused:
        socket.create_server(("127.0.0.1", port))
    assert refused.value.errno == errno.EADDRINUSE
    mp.spawn(add_up, args=(meeting.environment,), nprocs=2)
